"""An image with one step that no test has built before: MARKER is replaced."""

import modal

image = modal.Image.debian_slim().run_commands("echo this step says MARKER && echo MARKER > /marker && sleep 1")
app = modal.App("small-image", image=image)


@app.function()
def marker() -> str:
    return open("/marker").read().strip()
