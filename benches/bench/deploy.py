"""`modal deploy` after a one-line edit, as the wire between client and server sees it."""

import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable

from bench.machine import BenchFailed
from bench.report import Report, heading, milliseconds, say, spread
from bench.server import Server

ROUNDS = 7
MAX_SECONDS = 1.0

_CLIENTS_OWN = re.compile(r"App deployed in ([\d.]+)s")
_VERSION = re.compile(r"^VERSION = \d+$", re.MULTILINE)


def measure(server: Server, report: Report) -> None:
    heading(f"modal deploy after a one-line edit ({ROUNDS} rounds; nothing pinned)")
    spans, walls, own, replies = [], [], [], []
    for version in range(2, ROUNDS + 2):
        edit(server, version)
        with Relay(server.port) as relay:
            began = time.monotonic()
            printed = server.deploy(MODAL_SERVER_URL=f"http://127.0.0.1:{relay.port}")
            walls.append(time.monotonic() - began)
            spans.append(relay.span())
        if found := _CLIENTS_OWN.search(printed):
            own.append(float(found[1]))
        body, sent, received = server.get("cold", "/moments")
        replies.append(received - sent)
        if json.loads(body)["version"] != version:
            raise BenchFailed(f"after the deploy of version {version}, another one answered: {body!r}")
    say("first byte of the client to last byte of the server, through a relay on this machine; includes what")
    say(f"the client does in between, so the server's share is less:  {spread(spans, milliseconds)}")
    if own:
        say(f"as the client says (`App deployed in`):                     {spread(own, milliseconds)}")
    say(f"the command, with start and imports of the client:          {spread(walls, milliseconds)}")
    say(f"the next request, which a container of the new version answers:  {spread(replies, milliseconds)}")
    report.promise(
        f"modal deploy after a one-line edit: server time <= {MAX_SECONDS} s",
        f"less than {spread(spans, milliseconds)}",
        statistics.median(spans) <= MAX_SECONDS,
    )


def edit(server: Server, version: int) -> None:
    file = server.work / "hello.py"
    text, edits = _VERSION.subn(f"VERSION = {version}", file.read_text())
    if edits != 1:
        raise BenchFailed("the app has no line to edit")
    file.write_text(text)


class Relay:
    """Passes bytes on between a client and the server, and notes when the first and the last of them came."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._first_asked: float | None = None
        self._last_answered: float | None = None
        self._open: list[socket.socket] = []

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake a thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                connection.close()

    def span(self) -> float:
        with self._lock:
            if self._first_asked is None or self._last_answered is None:
                raise BenchFailed("the client did not go through the relay")
            return self._last_answered - self._first_asked

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server_port))
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, self._asked), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, self._answered), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, note: Callable[[], None]) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                note()
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One of them left; the other is closed at the end.
            return

    def _asked(self) -> None:
        with self._lock:
            if self._first_asked is None:
                self._first_asked = time.monotonic()

    def _answered(self) -> None:
        with self._lock:
            self._last_answered = time.monotonic()
