"""The app under test. The image is that of examples/fastapi_modal_app.py, so that it is built once for both."""

import time

IMPORT_BEGAN = time.monotonic()

import modal  # noqa: E402

# The one line that the benchmark of deploys edits.
VERSION = 1

image = (
    modal.Image.debian_slim()
    .pip_install("fastapi[standard]", "uvicorn[standard]", "pydantic", "requests")
    .add_local_python_source("hello_web")
)
app = modal.App("bench", image=image)


@app.function(scaledown_window=30)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def warm():
    from hello_web import web

    return web


@app.function(scaledown_window=2)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def cold():
    """Tells when it was where on its way to its first answer, by a clock that containers share with their host."""
    moments = {"import began": IMPORT_BEGAN, "factory began": time.monotonic(), "version": VERSION}
    observe_announcement(moments)

    from hello_web import web

    moments["factory ended"] = time.monotonic()

    @web.get("/moments")
    async def tell():
        return moments | {"handler": time.monotonic(), "CPU time": time.process_time()}

    return web


@app.function(scaledown_window=30)
def echo(value):
    return value


def observe_announcement(moments):
    """Looks over the shoulder of the web hook, which tells the platform where the app listens."""
    import sys

    announcement = sys.modules.get("ionian_container.announcement")
    if announcement is None:
        return
    announce = announcement.announce

    def observed(*arguments, **options):
        moments["announcement began"] = time.monotonic()
        announce(*arguments, **options)
        moments["announcement ended"] = time.monotonic()

    announcement.announce = observed
