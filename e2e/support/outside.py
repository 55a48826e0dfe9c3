"""Something that answers outside: a network namespace of its own, which stands for the rest of the world. No packet
leaves the machine."""

import subprocess
import sys
import textwrap
import uuid

from support.waiting import wait_until

# A range for examples in documents, which nobody routes; a host of its own for each of them.
HOST_SIDE = "203.0.113.1"
SERVERS = ["203.0.113.7", "203.0.113.8"]
TCP_PORT = 7007
# As name servers have it.
UDP_PORT = 53
COMMAND_SECONDS = 20

# Says hello to everybody who connects, and gives every datagram back.
SERVE = textwrap.dedent(
    f"""
    import selectors, socket
    ready = selectors.DefaultSelector()
    for address in {SERVERS!r}:
        listener = socket.create_server((address, {TCP_PORT}))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind((address, {UDP_PORT}))
        ready.register(listener, selectors.EVENT_READ, "tcp")
        ready.register(datagrams, selectors.EVENT_READ, "udp")
    print("ready", flush=True)
    while True:
        for key, _ in ready.select():
            if key.data == "tcp":
                connection, _ = key.fileobj.accept()
                connection.close()
            else:
                data, sender = key.fileobj.recvfrom(2048)
                key.fileobj.sendto(data, sender)
    """
)


class Outside:
    def __init__(self) -> None:
        suffix = uuid.uuid4().hex[:6]
        self.namespace = f"e2e-{suffix}"
        self._link, self._inner = f"e2e{suffix}", f"e2i{suffix}"
        self._server: subprocess.Popen[str] | None = None

    def start(self) -> "Outside":
        name, link, inner = self.namespace, self._link, self._inner
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", inner, "netns", name)
        _ip("addr", "add", f"{HOST_SIDE}/24", "dev", link)
        _ip("link", "set", link, "up")
        for address in SERVERS:
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "route", "add", "default", "via", HOST_SIDE)
        self._server = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        first = self._server.stdout.readline
        wait_until(lambda: first().strip() == "ready", "the servers outside")
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        for arguments in (("link", "del", self._link), ("netns", "del", self.namespace)):
            # The link goes with the namespace, maybe before it is asked to.
            subprocess.run(["ip", *arguments], capture_output=True, timeout=COMMAND_SECONDS, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=COMMAND_SECONDS)
