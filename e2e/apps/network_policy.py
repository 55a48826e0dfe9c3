"""Functions that may reach the outside, nothing of it, or a part."""

import os
import socket

import modal

web_image = modal.Image.debian_slim().pip_install(
    "fastapi[standard]",
    "uvicorn[standard]",
    # Add your app deps here:
    "pydantic",
    "requests",
)
app = modal.App("network-policy", image=modal.Image.debian_slim())
RUNTIME = {"ionian.runtime": "CHOSEN"}


def reach(hosts: list) -> dict:
    """Which of them answer: on a port of TCP, and as a name server would."""
    print(f"trying {len(hosts)} hosts")
    return {host: [connects(host, 7007), echoes(host, 53)] for host in hosts}


def connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def echoes(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(3)
        try:
            datagrams.sendto(b"hello", (host, port))
            return datagrams.recv(2048) == b"hello"
        except OSError:
            return False


@app.function(experimental_options=RUNTIME)
def everything(hosts: list) -> dict:
    return reach(hosts)


@app.function(experimental_options=RUNTIME, block_network=True, max_containers=1, scaledown_window=300)
def nothing(hosts: list) -> dict:
    return reach(hosts)


@app.function(experimental_options=RUNTIME, block_network=True)
def large(size: int) -> bytes:
    return os.urandom(size)


@app.function(experimental_options=RUNTIME | {"ionian.outbound_cidr_allowlist": "198.51.100.0/24, 203.0.113.7/32"})
def listed(hosts: list) -> dict:
    return reach(hosts)


@app.cls(experimental_options=RUNTIME, block_network=True)
class Closed:
    @modal.method()
    def reach(self, hosts: list) -> dict:
        return reach(hosts)


@app.function(image=web_image, experimental_options=RUNTIME, block_network=True)
@modal.asgi_app()
def site():
    from fastapi import FastAPI

    web = FastAPI()

    @web.get("/reach/{host}")
    def answer(host: str) -> dict:
        return reach([host])

    return web
