"""Functions that ask for secrets, and one that does not."""

import hashlib
import os

import modal

# Set where the app is deployed, and empty in containers, where this file is imported again.
shell = os.environ.get("FROM_THE_SHELL", "")
app = modal.App("keys", image=modal.Image.debian_slim())


@app.function(secrets=[modal.Secret.from_name("my-keys")])
def stored() -> list:
    return [os.environ.get("API_KEY"), os.environ.get("REGION")]


@app.function(secrets=[modal.Secret.from_dict({"INLINE_KEY": shell})])
def inline() -> str | None:
    return os.environ.get("INLINE_KEY")


@app.function(secrets=[modal.Secret.from_name("my-keys"), modal.Secret.from_dict({"INLINE_KEY": shell})])
def fingerprints() -> list[str]:
    """Results are recorded, so a test that looks for traces must not return the values themselves."""
    return [hashlib.sha256(os.environ[name].encode()).hexdigest() for name in ("API_KEY", "INLINE_KEY")]


@app.function()
def none() -> list[str]:
    return [name for name in os.environ if name in ("API_KEY", "REGION", "INLINE_KEY")]
