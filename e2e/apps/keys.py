"""Functions that ask for secrets, and one that does not."""

import os

import modal

app = modal.App("keys", image=modal.Image.debian_slim())


@app.function(secrets=[modal.Secret.from_name("my-keys")])
def stored() -> list:
    return [os.environ.get("API_KEY"), os.environ.get("REGION")]


@app.function(secrets=[modal.Secret.from_dict({"INLINE_KEY": os.environ.get("FROM_THE_SHELL", "")})])
def inline() -> str | None:
    return os.environ.get("INLINE_KEY")


@app.function()
def none() -> list[str]:
    return [name for name in os.environ if name in ("API_KEY", "REGION", "INLINE_KEY")]
