"""Functions without a web endpoint, which must not notice the launcher."""

import asyncio
import contextlib
import multiprocessing
import os
import sys
import time

import modal

app = modal.App("plain")


@app.function()
def surroundings() -> dict:
    main = sys.modules["__main__"]
    return {
        "main": main.__spec__.name,
        "argv": sys.argv,
        "path": sys.path,
        "ours": sorted(name for name in sys.modules if name.startswith(("ionian", "uvicorn", "uvloop"))),
        "cwd": os.getcwd(),
    }


@app.function()
async def loop_type() -> str:
    return type(asyncio.get_running_loop()).__module__


@app.function()
def spawned() -> list:
    # The children import the parent's main module by its name.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(abs, [-1, -2])


@app.function()
def slowly(seconds: float) -> str:
    print("running")
    time.sleep(seconds)
    return "done"


@app.function()
def stubborn() -> None:
    """Cannot be interrupted."""
    print("running")
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)
