"""Serves ASGI apps over HTTP on the runtime's own user event loop, with uvicorn.

One `WebServers` per container, one port per app: a function has one app, a class one per web method. The sockets are
bound before anything else happens, so that a port that was announced can always be connected to; the loop, its signal
handlers and the apps' lifespans stay the runtime's.

uvicorn and what it uses may be the user's own version: options that an older one does not know are left out, and
whatever else does not fit raises, which the caller turns into a fallback.
"""

import asyncio
import contextlib
import gc
import importlib.util
import inspect
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ionian_container.announcement import Endpoint
from ionian_container.paths import deps_path
from ionian_container.platform_scope import AsgiApp
from ionian_container.report import describe, report

# A loop that only has to register a listening socket needs milliseconds; the bound is there for a broken one.
START_TIMEOUT_SECONDS = 10.0

# Far above the idle time after which the platform's connection pool drops a connection: the side that sends requests
# must be the one that closes, or a request is lost on a connection that was closed under it.
KEEP_ALIVE_SECONDS = 75

# The platform limits what is in flight per container; this only has to absorb a burst of new connections.
LISTEN_BACKLOG = 2048

# As large a header block as the runtime's own proxy accepts. For h11; httptools has no limit, the platform has.
MAX_HEADER_BYTES = 64 * 1024

# Pings keep idle websockets alive in routers on the way to the client, but an unanswered one closes nothing: behind a
# handler that blocks the loop for a minute, the pong may well be waiting unread.
WEBSOCKET_PING_SECONDS = 20.0

# How long tasks that were cancelled at the end of a drain have for their `finally` blocks.
CANCEL_GRACE_SECONDS = 1.0

# uvicorn refreshes the Date header and looks for its exit flag in this rhythm (its own is ten times as often, which
# hundreds of idle containers would feel).
TICK_SECONDS = 1.0


class UserEventLoop(Protocol):
    """What is used of the runtime's `UserCodeEventLoop`."""

    loop: asyncio.AbstractEventLoop

    def create_task(self, coro: Any) -> "asyncio.Task[Any]": ...

    def run(self, coro: Any) -> Any: ...


@dataclass(frozen=True)
class WebApp:
    """One app to serve: the web method of a class, or None for a function."""

    method: str | None
    app: AsgiApp


@dataclass(frozen=True)
class _Running:
    server: Any
    task: "asyncio.Task[None]"


class WebServers:
    """The HTTP servers of one container, from `start` to `stop`."""

    def __init__(self, event_loop: UserEventLoop, endpoints: list[Endpoint], running: list[_Running]) -> None:
        self._event_loop = event_loop
        self._running = running
        self.endpoints = endpoints

    @classmethod
    def start(cls, event_loop: UserEventLoop, apps: list[WebApp], host: str) -> "WebServers":
        """Bind a port per app and serve it; on any error nothing is left open."""
        endpoints: list[Endpoint] = []
        running: list[_Running] = []
        listeners: list[socket.socket] = []
        try:
            for web_app in apps:
                server = _build_server(web_app.app)
                listener = _bind(host)
                listeners.append(listener)
                running.append(_Running(server, event_loop.create_task(_serve(server, listener))))
                endpoints.append({"method": web_app.method, "port": listener.getsockname()[1]})
            event_loop.run(_wait_until_started(running))
        except BaseException:
            event_loop.run(_stop_all(running, drain_seconds=CANCEL_GRACE_SECONDS))
            for listener in listeners:
                listener.close()
            raise
        return cls(event_loop, endpoints, running)

    def stop(self, drain_seconds: float) -> None:
        """Accept no more, finish what is in flight within the limit, cancel the rest. Runs the event loop."""
        self._event_loop.run(_stop_all(self._running, drain_seconds))


def _bind(host: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _build_server(app: AsgiApp) -> Any:
    # Imported here, after the user's code: their version of it wins, and nobody else pays for the import.
    with _collector_paused():
        import uvicorn

    class RuntimeServer(uvicorn.Server):
        """A server inside somebody else's event loop: no signal handlers, and stopped by an event."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.stop_requested = asyncio.Event()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        def install_signal_handlers(self) -> None:
            """What uvicorn before 0.29 calls in place of `capture_signals`."""

        async def main_loop(self) -> None:
            # A tick number that is a multiple of ten is the one that refreshes the Date header.
            while not await self.on_tick(0):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.stop_requested.wait(), TICK_SECONDS)

        def request_stop(self) -> None:
            self.should_exit = True
            self.stop_requested.set()

    options: dict[str, Any] = {
        "interface": "asgi3",
        "http": "httptools" if _importable("httptools") else "h11",
        # Ours fit each other, so their import (12 ms) can wait for the first upgrade, which most containers never see.
        # The user's may not, and must be found out now.
        "ws": _websocket_protocol if _is_ours("uvicorn") and _is_ours("websockets") else "auto",
        "lifespan": "off",
        "workers": 1,
        "log_config": None,
        "log_level": "warning",
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "date_header": True,
        "limit_concurrency": None,
        "backlog": LISTEN_BACKLOG,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "ws_ping_interval": WEBSOCKET_PING_SECONDS,
        "ws_ping_timeout": None,
    }
    known = inspect.signature(uvicorn.Config.__init__).parameters
    config = uvicorn.Config(app, **{name: value for name, value in options.items() if name in known})
    # Now, and not in the server's task: a missing or unfitting package must surface before the port is announced.
    with _collector_paused():
        config.load()
    _silence_app_exceptions()
    return RuntimeServer(config)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    # Beside a framework and a model, one pass of the garbage collector takes longer than the import that triggers it.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _is_ours(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    folder = deps_path().rstrip("/") + "/"
    return spec is not None and (spec.origin or "").startswith(folder)


def _websocket_protocol(**arguments: Any) -> Any:
    from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol

    assert AutoWebSocketsProtocol is not None, "websockets was importable when the server was built"
    return AutoWebSocketsProtocol(**arguments)


def _silence_app_exceptions() -> None:
    logger = logging.getLogger("uvicorn.error")
    # A `dictConfig` in user code switches off the loggers that exist; real errors of the server must stay visible.
    logger.disabled = False
    if _is_not_app_exception not in logger.filters:
        logger.addFilter(_is_not_app_exception)


def _is_not_app_exception(record: logging.LogRecord) -> bool:
    # `platform_scope` has printed it by then, as the runtime would have; twice would be one too many.
    return not str(record.msg).startswith("Exception in ASGI application")


async def _serve(server: Any, listener: socket.socket) -> None:
    try:
        await server.serve(sockets=[listener])
    except SystemExit as error:
        # uvicorn's way to say that it could not start. In a task it would end the user's process.
        raise RuntimeError(f"uvicorn could not start (exit status {error.code})") from error


async def _wait_until_started(running: list[_Running]) -> None:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_SECONDS
    for item in running:
        while not item.server.started:
            if item.task.done():
                item.task.result()
                raise RuntimeError("the web server ended at its start")
            if asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"the web server did not start in {START_TIMEOUT_SECONDS:g} s")
            # A few turns of the loop; there is nothing to wait on that every uvicorn version has.
            await asyncio.sleep(0)


async def _stop_all(running: list[_Running], drain_seconds: float) -> None:
    if not running:
        return
    for item in running:
        item.server.config.timeout_graceful_shutdown = drain_seconds
        item.server.request_stop()
    await asyncio.wait([item.task for item in running], timeout=drain_seconds + CANCEL_GRACE_SECONDS)
    for item in running:
        if item.task.done() and not item.task.cancelled() and (error := item.task.exception()):
            report(f"the web server ended with an error: {describe(error)}")
        # Handlers that were still at work when the drain ended.
        handlers = [task for task in item.server.server_state.tasks if not task.done()]
        for task in handlers:
            task.cancel()
        if handlers:
            await asyncio.wait(handlers, timeout=CANCEL_GRACE_SECONDS)
