"""Waiting for a condition with a limit. Nothing else in the tests sleeps."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Short, so that waiting adds little to a test; long enough not to load a machine of two cores.
POLL_SECONDS = 0.05


def wait_until(condition: Callable[[], T], what: str, timeout: float = 30) -> T:
    """The first true value of `condition`. `what` completes "waited 30 s for ..."."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what}")
        time.sleep(POLL_SECONDS)


def stays_true(condition: Callable[[], object], what: str, seconds: float) -> None:
    """That something does not happen can only be watched for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), f"within {seconds} s, no longer: {what}"
        time.sleep(POLL_SECONDS)
