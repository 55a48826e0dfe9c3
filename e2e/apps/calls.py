"""Functions of every kind that a user calls."""

import os
import pathlib
import time

import modal

app = modal.App("calls", image=modal.Image.debian_slim())


class OutOfStock(Exception):
    def __init__(self, item: str, left: int):
        super().__init__(item, left)
        self.item = item
        self.left = left


@app.function(max_containers=4)
def square(x: int) -> int:
    return x * x


@app.function(max_containers=2)
@modal.concurrent(max_inputs=50)
async def cube(x: int) -> int:
    return x**3


@app.function()
def order(item: str, amount: int) -> str:
    check_stock(item, amount)
    return f"{amount} x {item}"


def check_stock(item: str, amount: int) -> None:
    if amount > 3:
        raise OutOfStock(item, 3)


@app.function()
def divide(x: int, y: int) -> float:
    return x / y


@app.function()
def countdown(start: int, pause: float = 0.0):
    for number in range(start, 0, -1):
        yield number
        time.sleep(pause)


@app.function()
def announce(text: str) -> None:
    print(f"announcing {text}")


@app.function()
def echo(data: bytes) -> bytes:
    return data


@app.function()
def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@app.function(timeout=2)
def too_slow() -> None:
    time.sleep(60)


@app.function(max_containers=1, retries=modal.Retries(max_retries=3, initial_delay=0.0, backoff_coefficient=1.0))
def third_time_lucky(name: str) -> str:
    """Counts its tries in a file: with max_containers=1, all of them run in one container."""
    path = pathlib.Path("/tmp", name)
    tries = int(path.read_text()) if path.exists() else 0
    path.write_text(str(tries + 1))
    if tries < 2:
        raise RuntimeError(f"try {tries + 1} failed")
    return f"try {tries + 1} worked"


@app.function()
@modal.batched(max_batch_size=4, wait_ms=2000)
def batch(numbers: list[int]) -> list[tuple[int, int]]:
    return [(number, len(numbers)) for number in numbers]


@app.function()
def die() -> None:
    os._exit(3)


@app.cls()
class Account:
    owner: str = modal.parameter()
    balance: int = modal.parameter(default=100)

    @modal.enter()
    def open(self):
        self.entered = f"account of {self.owner}"

    @modal.method()
    def describe(self) -> str:
        return f"{self.entered}: {self.balance}"

    @modal.method()
    def withdraw(self, amount: int) -> int:
        return self.balance - amount

    @modal.exit()
    def close(self):
        print(f"closing {self.entered}")


@app.local_entrypoint()
def shop():
    """The own exception type arrives, with the remote traceback."""
    import traceback

    print(order.remote("tea", 2))
    try:
        order.remote("coffee", 5)
    except OutOfStock as error:
        print(f"caught {type(error).__module__}.{type(error).__name__}: {error.item}, {error.left} left")
        traceback.print_exc()
