"""Functions that ask for gVisor, and the same without; each tells what kernel answers it."""

import asyncio
import ctypes
import os
import time

import modal

# The images of the other tests, and so the same layers.
web_image = modal.Image.debian_slim().pip_install(
    "fastapi[standard]",
    "uvicorn[standard]",
    # Add your app deps here:
    "pydantic",
    "requests",
)
app = modal.App("gvisor", image=modal.Image.debian_slim())

GVISOR = {"ionian.runtime": "gvisor"}
# As old as the process: a container that went on has the same, one that was started anew has another.
BORN = time.time_ns()
served = 0


def kernel() -> str:
    """`gvisor` or `host`: gVisor's own kernel log says what it is, and the host's may not be read."""
    read_all, size = 3, 1 << 16
    buffer = ctypes.create_string_buffer(size)
    length = ctypes.CDLL(None).klogctl(read_all, buffer, size)
    return "gvisor" if length > 0 and b"gVisor" in buffer.raw[:length] else "host"


def whoami() -> dict:
    global served
    served += 1
    return {"container": os.environ["MODAL_TASK_ID"], "born": BORN, "served": served, "kernel": kernel()}


@app.function()
def plain_kernel() -> str:
    return kernel()


@app.function(experimental_options=GVISOR)
def sandboxed_kernel() -> str:
    print("looking around")
    return kernel()


@app.function(experimental_options=GVISOR, max_containers=1)
def squares(count: int):
    for number in range(count):
        yield number * number, kernel()


@app.cls(experimental_options=GVISOR, max_containers=1)
class Counter:
    start: int = modal.parameter(default=40)

    @modal.enter()
    def enter(self):
        self.count = self.start

    @modal.method()
    def add(self, number: int) -> list:
        self.count += number
        return [self.count, kernel()]


@app.function(image=web_image, experimental_options=GVISOR, max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=20)
@modal.asgi_app()
def site():
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    web = FastAPI()
    go_on = asyncio.Event()

    @web.get("/whoami")
    def answer() -> dict:
        return whoami()

    @web.get("/stream")
    async def stream():
        async def pieces():
            yield b"first"
            await asyncio.wait_for(go_on.wait(), 30)
            yield b"second"

        return StreamingResponse(pieces(), media_type="text/plain")

    @web.post("/go-on")
    async def let_go_on():
        go_on.set()

    return web


@app.function(experimental_options=GVISOR, max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=5)
@modal.web_server(8000)
def plain_server():
    import subprocess

    subprocess.Popen(["python", "-m", "http.server", "8000", "--directory", "/usr/share/doc"])


@app.function(experimental_options=GVISOR, max_containers=1)
def fail(how: str) -> None:
    if how == "raise":
        raise ValueError("a mistake of the user")
    if how == "exit":
        os._exit(7)
    if how == "signal":
        os.kill(os.getpid(), 11)


@app.function(max_containers=1, scaledown_window=300)
def identify_plain(pause: float = 0.0) -> dict:
    print("identifying")
    time.sleep(pause)
    return whoami()


@app.function(experimental_options=GVISOR, max_containers=1, scaledown_window=300)
def identify_sandboxed(pause: float = 0.0) -> dict:
    print("identifying")
    time.sleep(pause)
    return whoami()
