"""Puts an HTTP server beside the runtime's data channel, for the web functions of this container.

Two places of the official runtime are wrapped, both looked up by name each time the runtime uses them:

- `modal._runtime.user_code_imports.lifecycle_asgi`, the context in which a container serves its web apps. It is entered
  once all of them are built, begins with their lifespan startup and ends with their lifespan shutdown. Inside of it,
  that is after the startup, before the first `FunctionGetInputs` and until just before the shutdown, our server runs.
  What it serves is taken from the runtime's own table of web methods, so that a port and a method cannot be mixed up.
- `UserCodeEventLoop`, to run the user's code on uvloop where it is installed.

The runtime's data channel stays in place and in working order. If the installed client does not look as expected, or
anything fails before the platform has confirmed the ports, one line says why and every request takes the data channel.
`web_server` functions are left alone: the platform reaches their port without us.
"""

import contextlib
import importlib
import inspect
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ionian_container import announcement
from ionian_container.platform_scope import adapt
from ionian_container.report import describe, report
from ionian_container.web_server import UserEventLoop, WebApp, WebServers

FALLBACK = "requests will take the client's own data channel, which is slower"

# Bind address of the server when IONIAN_WEB_BIND does not name one: in a network namespace, all there is.
DEFAULT_BIND_HOST = "0.0.0.0"

# The platform drains a container before it tells it to stop, so this is for what slipped through; it has to leave
# time for the lifespan shutdown and exit hooks, before the platform's SIGKILL at about 30 s.
DRAIN_SECONDS = 20.0

# A SIGINT asks for more haste; the runtime itself cancels running inputs at once on it.
INTERRUPTED_DRAIN_SECONDS = 2.0


class HookError(Exception):
    """The hook cannot be attached; says why."""


def install() -> None:
    """Wrap the runtime. Never raises: what cannot be wrapped is reported and left as it is."""
    try:
        imports: Any = importlib.import_module("modal._runtime.user_code_imports")
    except Exception:
        # The runtime's first statement is this import: it is about to fail the same way, in its own words.
        return
    try:
        _check_runtime(imports)
    except HookError as error:
        report(f"web hook not installed: {error}; {FALLBACK}")
        return
    imports.lifecycle_asgi = _with_web_servers(imports.lifecycle_asgi)
    if os.environ.get("IONIAN_WEB_UVLOOP") != "0":
        _use_uvloop(imports.UserCodeEventLoop)


def _check_runtime(imports: Any) -> None:
    lifecycle = getattr(imports, "lifecycle_asgi", None)
    expected = ["event_loop", "task_lifecycle_manager", "finalized_functions"]
    if not callable(lifecycle) or list(inspect.signature(lifecycle).parameters) != expected:
        raise HookError("this version of the client starts web apps in an unknown way (lifecycle_asgi)")
    context = inspect.unwrap(getattr(getattr(imports, "Service", None), "function_execution_context", None) or install)
    if "lifecycle_asgi" not in context.__code__.co_names:
        raise HookError("this version of the client does not use lifecycle_asgi in function_execution_context")
    loop_type = getattr(imports, "UserCodeEventLoop", None)
    if not all(callable(getattr(loop_type, name, None)) for name in ("__enter__", "create_task", "run")):
        raise HookError("this version of the client has an unknown user event loop")


def _use_uvloop(loop_type: Any) -> None:
    try:
        import uvloop
    except ModuleNotFoundError:
        return
    except Exception as error:
        report(f"web hook: uvloop cannot be used: {describe(error)}; the user's code runs on asyncio's own event loop")
        return
    enter, run = loop_type.__enter__, loop_type.run

    def enter_with_uvloop(self: Any) -> Any:
        result = enter(self)
        replaced = getattr(self, "loop", None)
        if replaced is None:
            report("web hook: this version of the client has an unknown user event loop; not using uvloop")
            return result
        self.loop = uvloop.new_event_loop()
        replaced.close()
        return result

    def run_and_release_signals(self: Any, coro: Any) -> Any:
        try:
            return run(self, coro)
        finally:
            # The runtime takes its handlers off after each run, which uvloop ignores once it has stopped. Left on, they
            # would swallow a SIGINT that arrives between two runs, say during a sync enter hook.
            for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGUSR1, signal.SIG_DFL)):
                if getattr(signal.getsignal(number), "__self__", None) is self.loop:
                    signal.signal(number, handler)

    loop_type.__enter__ = enter_with_uvloop
    loop_type.run = run_and_release_signals


def _with_web_servers(lifecycle_asgi: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def lifecycle_asgi_with_web_servers(
        event_loop: UserEventLoop, task_lifecycle_manager: Any, finalized_functions: Mapping[str, Any]
    ) -> Iterator[None]:
        with lifecycle_asgi(event_loop, task_lifecycle_manager, finalized_functions):
            servers = _attach(event_loop, finalized_functions)
            drain_seconds = DRAIN_SECONDS
            try:
                yield
            except KeyboardInterrupt:
                drain_seconds = INTERRUPTED_DRAIN_SECONDS
                raise
            finally:
                if servers is not None:
                    _stop(servers, drain_seconds)

    return lifecycle_asgi_with_web_servers


def _attach(event_loop: UserEventLoop, finalized_functions: Mapping[str, Any]) -> WebServers | None:
    """Serve, then announce: in this order, so that the platform is never told of a port that does not answer."""
    try:
        apps = _web_apps(finalized_functions)
        if not apps:
            return None
        servers = WebServers.start(event_loop, apps, os.environ.get("IONIAN_WEB_BIND") or DEFAULT_BIND_HOST)
    except Exception as error:
        report(f"web hook not attached: {_reason(error)}; {FALLBACK}")
        return None
    try:
        announcement.announce(servers.endpoints)
    except BaseException as error:
        _stop(servers, INTERRUPTED_DRAIN_SECONDS)
        if not isinstance(error, Exception):
            raise
        report(f"web hook not attached: {_reason(error)}; {FALLBACK}")
        return None
    return servers


def _reason(error: Exception) -> str:
    ours = isinstance(error, HookError | announcement.AnnouncementError)
    return str(error) if ours else describe(error)


def _stop(servers: WebServers, drain_seconds: float) -> None:
    try:
        servers.stop(drain_seconds)
    except Exception as error:
        # The container is on its way out; its lifespan shutdown and exit hooks must still run.
        report(f"stopping the web server failed: {describe(error)}")


def _web_apps(finalized_functions: Mapping[str, Any]) -> list[WebApp]:
    from modal._runtime.container_io_manager import _ContainerIOManager
    from modal._traceback import print_exception
    from modal_proto import api_pb2

    served_types = (
        api_pb2.WEBHOOK_TYPE_ASGI_APP,
        api_pb2.WEBHOOK_TYPE_FUNCTION,
        api_pb2.WEBHOOK_TYPE_WSGI_APP,
    )
    io_manager = _ContainerIOManager._singleton
    if io_manager is None:
        raise HookError("the runtime has no input manager")
    function = io_manager.function_def
    apps = []
    for name, finalized in finalized_functions.items():
        lifespan = finalized.lifespan_manager
        if lifespan is None:
            continue
        config = _webhook_config(function, name)
        if config.type == api_pb2.WEBHOOK_TYPE_WEB_SERVER:
            continue
        if config.type not in served_types:
            raise HookError(f"web method {name!r} is of an unknown type ({config.type})")
        if not callable(lifespan.asgi_app) or not isinstance(lifespan.state, dict):
            raise HookError("this version of the client keeps web apps in an unknown way")
        apps.append(WebApp(name or None, adapt(lifespan.asgi_app, lifespan.state, print_exception)))
    if apps and not io_manager.input_concurrency_enabled:
        # Then the runtime runs the loop only while it has an input, and our server would hang in between.
        raise HookError("the container was not started with max_concurrent_inputs of at least 2")
    return apps


def _webhook_config(function: Any, name: str) -> Any:
    if not name:
        return function.webhook_config
    # Indexing a protobuf map adds what is missing, so ask first.
    if name not in function.method_definitions:
        raise HookError(f"the function definition has no web method {name!r}")
    return function.method_definitions[name].webhook_config
