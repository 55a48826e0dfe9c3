"""How this package speaks to people: one line on stderr, which lands in the container's log."""

import sys


def report(message: str) -> None:
    """Write one line to stderr, whatever line breaks the message (often another library's error) has."""
    sys.stderr.write(f"ionian: {' '.join(message.split())}\n")
    sys.stderr.flush()


def describe(error: BaseException) -> str:
    """An error as a person reads it: with its type, since many messages mean nothing without."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
