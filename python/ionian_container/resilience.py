"""Lets the runtime outlive a restart of the platform, and end when the platform has given its container up.

Two places of the official client are wrapped, both looked up by name each time the client uses them:

- `modal._utils.grpc_utils.process_exception_before_retry`, which the client asks before each retry of an RPC and which
  raises after the last one: three retries in 0.7 s for most RPCs. Where the connection itself failed, which is what a
  platform that restarts looks like, it is told for about a minute that more retries follow. Errors that the platform
  answered with are none of that, and keep the client's own limits.
- the heartbeat of the container's runtime. The client goes on after a failed one, whatever the reason, and so would run
  for ever in a container that was given up while it could not be reached: its results are refused, and its input runs
  again elsewhere. It is interrupted, as by the platform's polite stop, and ended a little later.

If the installed client does not look as expected, one line says so, and it stays as it is.
"""

import asyncio
import functools
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from ionian_container.report import report

# The client's delays between retries rise to a second: about a minute. A restart takes a second; an upgrade, or a
# machine that has to look for its disks, takes longer.
BRIDGED_RETRIES = 60

# From the interrupt of a container that was given up to its end: for exit hooks. Nothing that it says is heard.
REFUSED_GRACE_SECONDS = 5.0

RETRY_ARGUMENTS = ["exc", "final_attempt", "fn_name", "n_retries"]


class UnknownClientError(Exception):
    """The installed client is not built as expected; says where."""


def install() -> None:
    """Wrap the client. Never raises: what cannot be wrapped is reported and left as it is."""
    for wrap, consequence in (
        (_bridge_restarts, "a restart of the platform may end this container"),
        (_end_when_refused, "this container may go on for a while after the platform has given it up"),
    ):
        try:
            wrap()
        except UnknownClientError as error:
            report(f"this version of the client {error}; {consequence}")
        except Exception:
            # The client cannot even be imported: the runtime is about to fail in the same way, in its own words.
            return


def _bridge_restarts() -> None:
    grpc_utils: Any = importlib.import_module("modal._utils.grpc_utils")
    original = getattr(grpc_utils, "process_exception_before_retry", None)
    retrying = getattr(grpc_utils, "_retry_transient_errors", None)
    names = getattr(getattr(retrying, "__code__", None), "co_names", ())
    if (
        not callable(original)
        or list(inspect.signature(original).parameters)[: len(RETRY_ARGUMENTS)] != RETRY_ARGUMENTS
        or "process_exception_before_retry" not in names
    ):
        raise UnknownClientError("retries RPCs in an unknown way (process_exception_before_retry)")
    grpc_utils.process_exception_before_retry = _patient(original, _connection_errors(grpc_utils))


def _connection_errors(grpc_utils: Any) -> tuple[type[BaseException], ...]:
    # What the client itself retries, as far as it knows it by these names.
    found = [getattr(grpc_utils, name, None) for name in ("StreamTerminatedError", "H2ProtocolError")]
    return (OSError, *(kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseException)))


def _patient(original: Callable[..., None], connection_errors: tuple[type[BaseException], ...]) -> Callable[..., None]:
    def is_lost_connection(error: Exception) -> bool:
        # An attempt that took too long is an OSError in newer versions of Python, and says nothing of the connection.
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            return False
        # grpclib before 0.4.8 stumbles over a connection that is gone.
        stumbled = isinstance(error, AttributeError) and "_write_appdata" in str(error)
        return stumbled or isinstance(error, connection_errors)

    @functools.wraps(original)
    def process_exception_before_retry(
        exc: Exception, final_attempt: bool, fn_name: str, n_retries: int, *args: Any, **kwargs: Any
    ) -> None:
        if (
            final_attempt
            and n_retries < BRIDGED_RETRIES
            and not kwargs.get("total_deadline_reached", False)
            and is_lost_connection(exc)
        ):
            final_attempt = False
        original(exc, final_attempt, fn_name, n_retries, *args, **kwargs)

    return process_exception_before_retry


def _end_when_refused() -> None:
    manager: Any = importlib.import_module("modal._runtime.container_io_manager")
    exceptions: Any = importlib.import_module("modal.exception")
    runtime = getattr(manager, "_ContainerIOManager", None)
    heartbeat = getattr(runtime, "_heartbeat_handle_cancellations", None)
    refused = getattr(exceptions, "AuthError", None)
    if not inspect.iscoroutinefunction(heartbeat) or not isinstance(refused, type):
        raise UnknownClientError("sends heartbeats in an unknown way (_heartbeat_handle_cancellations)")

    @functools.wraps(heartbeat)
    async def checked_heartbeat(self: Any) -> Any:
        try:
            return await heartbeat(self)
        except refused as error:
            _end(str(error))
            raise

    runtime._heartbeat_handle_cancellations = checked_heartbeat


@functools.cache
def _end(reason: str) -> None:
    # Cached: a second refusal must not interrupt the exit hooks that the first one has started.
    report(f"the platform has given this container up ({reason}); it ends")
    # User code may hold on to the main thread, or refuse to be interrupted.
    end = threading.Timer(REFUSED_GRACE_SECONDS, os._exit, [1])
    end.daemon = True
    end.start()
    os.kill(os.getpid(), signal.SIGINT)
