"""An app that tells which container answers, and how often that one was started."""

import os
import time

import modal

# The same layers as in other apps.
image = modal.Image.debian_slim().pip_install(
    "fastapi[standard]",
    "uvicorn[standard]",
    # Add your app deps here:
    "pydantic",
    "requests",
)
app = modal.App("own-worker", image=image)


@app.function(min_containers=1, max_containers=1)
def whoami() -> str:
    return os.environ["MODAL_TASK_ID"]


@app.function(max_containers=1)
def slow(seconds: float) -> str:
    print("sleeping", flush=True)
    time.sleep(seconds)
    return os.environ["MODAL_TASK_ID"]


@app.function(max_containers=1, min_containers=1)
@modal.fastapi_endpoint()
def hello() -> dict[str, str]:
    print("a request came", flush=True)
    return {"container": os.environ["MODAL_TASK_ID"]}
