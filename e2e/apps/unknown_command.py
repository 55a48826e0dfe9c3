"""An image with a command that no builder knows."""

import modal

image = modal.Image.debian_slim().dockerfile_commands("FROBNICATE everything")
app = modal.App("unknown-command", image=image)


@app.function()
def never() -> None: ...
