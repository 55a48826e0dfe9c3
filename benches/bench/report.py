"""Numbers as text, and the table at the end."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Promise:
    """A line of SPECIFICATION.md, what was measured, and whether that keeps it."""

    what: str
    measured: str
    is_met: bool


@dataclass
class Report:
    promises: list[Promise] = field(default_factory=list)

    def promise(self, what: str, measured: str, is_met: bool) -> None:
        self.promises.append(Promise(what, measured, is_met))

    def print_table(self) -> None:
        if not self.promises:
            return
        heading("Promises of SPECIFICATION.md")
        rows = [
            ("promise", "measured: median [min to max]", ""),
            *((p.what, p.measured, verdict(p)) for p in self.promises),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        for row in rows:
            say(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip())


def verdict(promise: Promise) -> str:
    return "met" if promise.is_met else "NOT met"


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(statistics.median(values))} [{show(min(values))} to {show(max(values))}]"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def fine_milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def rate(value: float) -> str:
    return f"{value:.0f}/s"
