"""Short inputs whose results tell whether something was lost or mixed up."""

import os
import time

import modal

app = modal.App("chaos", image=modal.Image.debian_slim().uv_pip_install("fastapi[standard]"))


@app.function(max_containers=2, scaledown_window=60, timeout=300)
@modal.concurrent(max_inputs=16)
def double(number: int) -> int:
    time.sleep(0.02)
    return 2 * number


@app.function(max_containers=1, scaledown_window=300)
@modal.concurrent(max_inputs=16)
@modal.fastapi_endpoint()
def alive() -> dict:
    return {"container": os.environ["MODAL_TASK_ID"]}
