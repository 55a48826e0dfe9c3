"""Answers the runtime's question for the container's own address where its kernel does not.

For a `web_server` the client asks for the address of `eth0` by an ioctl of a socket (SIOCGIFADDR), which older
releases of gVisor do not have for sockets of the host. The address is then found as any program can find it: by asking
which one a packet to the platform would come from. Nothing is sent.

`modal._runtime.asgi.get_ip_address` is wrapped, by its name, and only where the kernel does not answer. The module is
costly to import, so this happens when the client is about to use it.
"""

import fcntl
import functools
import importlib
import os
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

from ionian_container.report import report

SIOCGIFADDR = 0x8915
INTERFACE = b"eth0"
# Where the platform's address is not known. For documents, and routed like everything outside.
SOMEWHERE_OUTSIDE = "192.0.2.1"
# Of no meaning, since nothing is sent.
PORT = 9


def install() -> None:
    """Never raises. Where the kernel answers, or the client is built otherwise, everything stays as it is."""
    if _kernel_answers():
        return
    try:
        imports: Any = importlib.import_module("modal._runtime.user_code_imports")
    except Exception:
        # The client cannot even be imported: the runtime is about to fail in the same way, in its own words.
        return
    original = getattr(imports, "construct_webhook_callable", None)
    if not callable(original):
        report("this version of the client makes web endpoints in an unknown way; a web_server may not start in gVisor")
        return

    @functools.wraps(original)
    def construct(*args: Any, **kwargs: Any) -> Any:
        _wrap(importlib.import_module("modal._runtime.asgi"))
        return original(*args, **kwargs)

    imports.construct_webhook_callable = construct


def _kernel_answers() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking.fileno(), SIOCGIFADDR, struct.pack("256s", INTERFACE))
        except OSError:
            return False
    return True


def _wrap(asgi: Any) -> None:
    original = getattr(asgi, "get_ip_address", None)
    if not callable(original) or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_ip_address(ifname: bytes) -> str:
        try:
            return original(ifname)
        except OSError:
            if ifname != INTERFACE:
                raise
            return own_address()

    asgi.get_ip_address = get_ip_address


def own_address() -> str:
    """The address that packets to the platform come from."""
    platform = urlsplit(os.environ.get("MODAL_SERVER_URL", "")).hostname
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((platform or SOMEWHERE_OUTSIDE, PORT))
        return asking.getsockname()[0]
