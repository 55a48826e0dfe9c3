"""Prints more than anyone reads."""

import sys
import time

import modal

app = modal.App("chatty", image=modal.Image.debian_slim())

LINE = "x" * 99 + "\n"


@app.function()
def say(text: str, to_stderr: bool = False) -> None:
    print(text, file=sys.stderr if to_stderr else sys.stdout)


@app.function()
def flood(megabytes: int) -> float:
    start = time.monotonic()
    for _ in range(megabytes):
        sys.stdout.write(LINE * 10_000)
    print("end of the flood")
    return time.monotonic() - start
