"""Looks around from inside a container."""

import os
import socket
import struct
import threading

import modal

app = modal.App("isolation", image=modal.Image.debian_slim())


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: only the route is looked up.
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


@app.function()
def listen():
    """Serves a port as long as the caller does not take the second item."""
    listener = socket.create_server(("0.0.0.0", 7000))

    def accept():
        while True:
            listener.accept()[0].sendall(b"hello")

    threading.Thread(target=accept, daemon=True).start()
    with socket.create_connection(("127.0.0.1", 7000), timeout=5) as own:
        own.recv(1)
    for _ in range(2):
        yield own_address()


@app.function()
def can_connect(targets: list) -> list[bool]:
    return [connects(host, port) for host, port in targets]


def connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


@app.function()
def gateway() -> str:
    with open("/proc/net/route") as routes:
        for line in list(routes)[1:]:
            fields = line.split()
            if fields[1] == "00000000":
                return socket.inet_ntoa(struct.pack("<I", int(fields[2], 16)))
    raise RuntimeError("there is no default route")


@app.function()
def surroundings() -> dict:
    with open("/proc/self/status") as lines:
        status = dict(line.split(":", 1) for line in lines if ":" in line)
    with open("/proc/self/uid_map") as lines:
        ids = lines.read().split()
    return {
        "ids": ids,
        "pids": len([name for name in os.listdir("/proc") if name.isdigit()]),
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "no_new_privs": status["NoNewPrivs"].strip(),
        "seccomp": status["Seccomp"].strip(),
        "can_mount": can_mount(),
        "environment": sorted(os.environ),
    }


def can_mount() -> bool:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs("/tmp/mountpoint", exist_ok=True)
    return libc.mount(b"none", b"/tmp/mountpoint", b"tmpfs", 0, None) == 0
