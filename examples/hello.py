"""A function that runs in a container, and a local entrypoint that calls it.

modal run hello.py --name Ada --times 3
"""

import platform

import modal

app = modal.App("hello", image=modal.Image.debian_slim())


@app.function()
def greet(name: str) -> str:
    print(f"greeting {name}")
    return f"Hello, {name}, from Python {platform.python_version()} on {platform.node()}!"


@app.local_entrypoint()
def main(name: str = "world", times: int = 1):
    for _ in range(times):
        print(greet.remote(name))
