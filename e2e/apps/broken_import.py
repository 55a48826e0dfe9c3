"""Can be deployed, but raises in every container that imports it."""

import modal

app = modal.App("broken-import", image=modal.Image.debian_slim())

if not modal.is_local():
    print("a container starts", flush=True)
    raise RuntimeError("this file is broken")


@app.function()
@modal.asgi_app()
def page():
    raise NotImplementedError


@app.function()
def call() -> None:
    raise NotImplementedError
