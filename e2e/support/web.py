"""HTTP from outside. Connects to the loopback address and names the host, so that no resolver is needed."""

import http.client
import json
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as websocket_connect

# A cold container starts in about a second; a loaded machine of two cores takes longer.
REQUEST_SECONDS = 60


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> object:
        return json.loads(self.body)


def request(
    url: str,
    method: str = "GET",
    body: bytes | Iterable[bytes] | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = REQUEST_SECONDS,
) -> Response:
    with _exchange(url, method, body, headers, timeout) as response:
        return Response(response.status, _headers(response), response.read())


def get_json(url: str) -> object:
    response = request(url)
    assert response.status == 200, f"{url}: {response.status} {response.text}"
    return response.json()


def stream(url: str) -> Iterator[tuple[float, bytes]]:
    """Pieces of a body, each with the time at which it arrived."""
    with _exchange(url, "GET", None, None, REQUEST_SECONDS) as response:
        assert response.status == 200, response.read()
        while piece := response.read1(65536):
            yield time.monotonic(), piece


@contextmanager
def websocket(url: str) -> Iterator[ClientConnection]:
    split = urlsplit(url)
    plain = socket.create_connection(("127.0.0.1", split.port or 80), timeout=REQUEST_SECONDS)
    with websocket_connect(
        url.replace("http://", "ws://", 1),
        sock=plain,
        proxy=None,
        open_timeout=REQUEST_SECONDS,
        max_size=16 << 20,
    ) as connection:
        yield connection


@contextmanager
def _exchange(
    url: str, method: str, body: bytes | Iterable[bytes] | None, headers: dict[str, str] | None, timeout: float
) -> Iterator[http.client.HTTPResponse]:
    split = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", split.port or 80, timeout=timeout)
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    try:
        chunked = body is not None and not isinstance(body, bytes)
        connection.request(method, target, body, {"Host": split.netloc} | (headers or {}), encode_chunked=chunked)
        yield connection.getresponse()
    finally:
        connection.close()


def _headers(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}
