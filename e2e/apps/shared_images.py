"""Uses the images that most tests share, so that they are built once; see conftest.py."""

import modal

# What examples/fastapi_modal_app.py asks for, in the same order, and so the same layers.
image = modal.Image.debian_slim().pip_install(
    "fastapi[standard]",
    "uvicorn[standard]",
    # Add your app deps here:
    "pydantic",
    "requests",
)

app = modal.App("shared-images")


@app.function(image=modal.Image.debian_slim())
def plain() -> str:
    return "plain"


@app.function(image=image)
def with_fastapi() -> str:
    import fastapi

    return fastapi.__version__


@app.local_entrypoint()
def main():
    print(plain.remote(), with_fastapi.remote())
