"""Gives the user's ASGI app the request as the outside world sent it, not as the platform's proxy did.

The only peer of a container's web socket is the platform (the network sees to that), which says who the real client is
in headers of its own. They are taken from the request here and never reach the app:

- `x-ionian-client: 203.0.113.7:51234` (IPv6 in brackets) becomes `scope["client"]`;
- `x-ionian-scheme: https` becomes `scope["scheme"]`, `wss` for a websocket;
- `x-ionian-request-id` and any other `x-ionian-…` are dropped.

This runs once per request, on the path whose speed is the point of the web hook: one pass over the headers, no
allocation beyond the new list. It is also where a request's input id and call id would be set.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
PrintException = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]

WEBSOCKET_SCHEMES = {"http": "ws", "https": "wss"}


def adapt(app: AsgiApp, state: dict[str, Any], print_exception: PrintException) -> AsgiApp:
    """Wrap `app` for requests that come from the platform; `state` is its lifespan state, copied per request."""

    async def platform_app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = state.copy()
        headers = []
        for header in scope["headers"]:
            name = header[0]
            if not name.startswith(b"x-ionian-"):
                headers.append(header)
            elif name == b"x-ionian-client":
                scope["client"] = _client_address(header[1]) or scope.get("client")
            elif name == b"x-ionian-scheme":
                scheme = header[1].decode("latin-1")
                scope["scheme"] = scheme if scope["type"] == "http" else WEBSOCKET_SCHEMES.get(scheme, scheme)
        scope["headers"] = headers
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # As the runtime does for an input that raised. The server's own report of it is silenced in exchange.
            _print_from_app(error, print_exception)
            raise

    return platform_app


def _client_address(value: bytes) -> tuple[str, int] | None:
    host, _, port = value.decode("latin-1").rpartition(":")
    try:
        return host.strip("[]"), int(port)
    except ValueError:
        return None


def _print_from_app(error: BaseException, print_exception: PrintException) -> None:
    traceback = error.__traceback__
    # The first frame is ours; the user's app starts below it.
    if traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    print_exception(type(error), error, traceback)
    sys.stderr.flush()
