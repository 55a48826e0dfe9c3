"""Stands on an image of a registry: REGISTRY is replaced."""

import modal

app = modal.App("registry-image", image=modal.Image.from_registry("REGISTRY/team/python:1"))


@app.function()
def origin() -> str:
    return open("/etc/made-for").read().strip()
