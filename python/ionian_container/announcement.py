"""Tells the platform, before the runtime asks for its first input, on which ports a container serves its web apps.

    POST {IONIAN_ANNOUNCE_URL, default MODAL_SERVER_URL + /_ionian/v1/web-ready}
    {"endpoints": [{"method": null, "port": 41234}]}

`method` is the web method of a class, null for a function. The headers are the container's credentials, from
MODAL_OVERRIDE_HEADERS. Any 2xx means that the platform will send requests there; anything else, or silence, means that
it will not, and the caller must close the ports.
"""

import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Mapping
from typing import TypedDict

ANNOUNCE_PATH = "/_ionian/v1/web-ready"

# The platform answers from memory. A container whose announcement takes longer is better off with the data channel
# than with a cold start of unknown length.
ANNOUNCE_TIMEOUT_SECONDS = 5.0

# A platform that restarts refuses connections for a moment, in which the runtime itself waits, too. About as long as
# the runtime's own requests are repeated.
RESTART_SECONDS = 60.0
RESTART_PAUSE_SECONDS = 0.2

# Enough of a refusal's body to say what is wrong, and no more: it ends in one log line.
MAX_REFUSAL_BYTES = 300


class Endpoint(TypedDict):
    method: str | None
    port: int


class AnnouncementError(Exception):
    """The platform did not take the announcement."""


def announce(endpoints: list[Endpoint], environ: Mapping[str, str] = os.environ) -> None:
    """Post the endpoints and wait for the answer; raises `AnnouncementError` unless it is a 2xx."""
    url = announcement_url(environ)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AnnouncementError(f"cannot announce to {url!r}: only http and https URLs are supported")
    headers = {**container_headers(environ.get("MODAL_OVERRIDE_HEADERS", "")), "content-type": "application/json"}
    body = json.dumps({"endpoints": endpoints})
    give_up = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            response, refusal = _post(parts, body, headers)
            break
        except (OSError, http.client.HTTPException) as error:
            # Repeating it is harmless: the newest announcement counts.
            if isinstance(error, ConnectionError) and time.monotonic() < give_up:
                time.sleep(RESTART_PAUSE_SECONDS)
                continue
            raise AnnouncementError(f"announcing the web endpoint to {url} failed: {error!r}") from error
    if not 200 <= response.status < 300:
        text = refusal.decode("utf-8", "replace")
        raise AnnouncementError(f"{url} answered {response.status} {response.reason}: {text}")


def _post(
    parts: urllib.parse.SplitResult, body: str, headers: dict[str, str]
) -> tuple[http.client.HTTPResponse, bytes]:
    connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connection_type(parts.hostname or "", parts.port, timeout=ANNOUNCE_TIMEOUT_SECONDS)
    try:
        connection.request("POST", parts.path or "/", body, headers)
        response = connection.getresponse()
        return response, response.read(MAX_REFUSAL_BYTES)
    finally:
        connection.close()


def announcement_url(environ: Mapping[str, str]) -> str:
    explicit = environ.get("IONIAN_ANNOUNCE_URL")
    if explicit:
        return explicit
    server_url = environ.get("MODAL_SERVER_URL", "")
    if not server_url:
        raise AnnouncementError("neither IONIAN_ANNOUNCE_URL nor MODAL_SERVER_URL is set")
    return server_url.rstrip("/") + ANNOUNCE_PATH


def container_headers(setting: str) -> dict[str, str]:
    """Parse `name:value,name:value` as the client itself does, so that both send the same credentials."""
    headers: dict[str, str] = {}
    for pair in setting.split(",") if setting else []:
        name, separator, value = pair.partition(":")
        if not separator or not name.strip() or not value.strip():
            raise AnnouncementError("MODAL_OVERRIDE_HEADERS is not a comma-separated list of name:value pairs")
        headers[name.strip()] = value.strip()
    return headers
