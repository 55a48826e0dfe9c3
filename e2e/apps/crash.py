"""Functions that tell in which container, and in which process of it, they ran."""

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
app = modal.App("crash", image=modal.Image.debian_slim())

# As old as the process: a container that went on has the same, one that was started anew has another.
BORN = time.time_ns()
served = 0


def whoami() -> dict:
    global served
    served += 1
    return {"container": os.environ["MODAL_TASK_ID"], "born": BORN, "served": served}


@app.function(max_containers=1, scaledown_window=300)
def identify(pause: float = 0.0) -> dict:
    print("identifying")
    time.sleep(pause)
    return whoami()


@app.function(max_containers=4)
def record(x: int) -> int:
    time.sleep(0.02)
    return x * x


@app.function(max_containers=4)
def weigh(seconds: float, size: int) -> bytes:
    print("weighing")
    time.sleep(seconds)
    return bytes(size)


@app.function(max_containers=1)
def count(start: int, pause: float):
    for number in range(start):
        yield number
        time.sleep(pause)


@app.function(image=web_image, max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=20)
@modal.asgi_app()
def site():
    from fastapi import FastAPI

    web = FastAPI()

    @web.get("/whoami")
    def answer() -> dict:
        return whoami()

    return web


@app.function(max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=5)
@modal.web_server(8000)
def plain_server():
    import subprocess

    subprocess.Popen(["python", "-m", "http.server", "8000"])
