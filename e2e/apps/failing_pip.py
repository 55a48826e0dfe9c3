"""An image whose packages do not exist."""

import modal

image = modal.Image.debian_slim().pip_install("ionian-has-no-such-package==1.2.3")
app = modal.App("failing-pip", image=image)


@app.function()
def never() -> None: ...
