"""Functions that take whatever they can get, and one that only wants to answer."""

import os
import time

import modal

app = modal.App("neighbours", image=modal.Image.debian_slim().uv_pip_install("fastapi[standard]"))

# One core, half a gigabyte: what the culprits below are limited to.
LIMITED = {
    "cpu": (0.125, 1.0),
    "memory": (128, 512),
    "timeout": 120,
    "max_containers": 1,
    "retries": 0,
    "scaledown_window": 2,
}


@app.function(max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def quiet():
    from fastapi import FastAPI

    web = FastAPI()

    @web.get("/")
    async def answer() -> dict:
        return {"quiet": True}

    return web


def until(seconds: float) -> float:
    return time.monotonic() + seconds


@app.function(**LIMITED)
def spin(seconds: float) -> None:
    """Four threads' worth of work, as processes."""
    first = os.getpid()
    for _ in range(2):
        os.fork()
    end = until(seconds)
    while time.monotonic() < end:
        pass
    if os.getpid() != first:
        os._exit(0)


@app.function(**LIMITED)
def fork_bomb(seconds: float) -> int:
    """Forks until it may not, then lets the caller know why."""
    end = until(seconds)
    while True:
        try:
            if os.fork() == 0:
                # No Python clean-up: the child holds copies of the runtime's connections.
                time.sleep(max(0.0, end - time.monotonic()))
                os._exit(0)
        except OSError:
            while time.monotonic() < end:
                time.sleep(0.05)
            raise


@app.function(**LIMITED)
def memory_hog(seconds: float) -> int:
    held = []
    end = until(seconds)
    while time.monotonic() < end:
        held.append(os.urandom(16 << 20))
    return len(held)


@app.function(**LIMITED)
def shared_memory(seconds: float) -> int:
    end = until(seconds)
    block = b"x" * (1 << 20)
    with open("/dev/shm/filler", "wb") as filler:
        while time.monotonic() < end:
            filler.write(block)
    return filler.tell()


@app.function(**LIMITED)
def many_files(seconds: float, count: int = 1_000_000) -> int:
    end = until(seconds)
    made = 0
    os.makedirs("/tmp/many")
    while made < count and time.monotonic() < end:
        if made % 10_000 == 0:
            os.makedirs(f"/tmp/many/{made}")
        with open(f"/tmp/many/{made - made % 10_000}/{made}", "w"):
            made += 1
    return made


@app.function(**LIMITED)
def chatter(seconds: float) -> int:
    """As fast as it can, a hundred megabytes a second and more."""
    line = b"x" * 1023 + b"\n"
    end = until(seconds)
    written = 0
    while time.monotonic() < end:
        written += os.write(1, line * 64)
    return written
