"""What goes wrong is said clearly, and harms nothing else."""

import hashlib
import os
import socket
import time
from base64 import b64encode
from urllib.parse import urlsplit

import pytest
from grpclib import GRPCError, Status
from grpclib.exceptions import StreamTerminatedError
from modal_proto import api_pb2
from support import rpc, web
from support.waiting import stays_true

MEGABYTE = 1 << 20


def serves(client) -> bool:
    """What every test here ends with."""
    return client.modal("app", "list").code == 0


def test_an_unknown_image_command_is_named(client):
    failed = client.modal("deploy", client.app("unknown_command.py"), ok=False)
    assert "FROBNICATE" in failed.words
    assert serves(client)


def test_a_failing_pip_install_shows_pips_words_and_the_step(client):
    failed = client.modal("deploy", client.app("failing_pip.py"), ok=False, timeout=300)
    assert "No matching distribution found for ionian-has-no-such-package==1.2.3" in failed.words
    assert "pip install ionian-has-no-such-package==1.2.3" in failed.words.replace("'", "")
    assert serves(client)


def test_an_impossible_python_says_what_to_do(client):
    client.work.joinpath("ancient.py").write_text(
        "import modal\n"
        "app = modal.App('ancient', image=modal.Image.from_registry('python:2.7-slim'))\n"
        "@app.function()\n"
        "def f(): ...\n"
    )
    failed = client.modal("deploy", "ancient.py", ok=False, timeout=300)
    assert "python:2.7-slim" in failed.words
    assert serves(client)


def test_an_unknown_app_is_named(client):
    unknown = client.python("import modal; modal.Function.from_name('no-such-app', 'f').remote()", ok=False)
    assert "NotFoundError" in unknown.output
    assert "no-such-app" in unknown.output
    assert "no-such-app" in client.modal("app", "logs", "no-such-app", ok=False).words
    assert "no-such-app" in client.modal("app", "stop", "--yes", "no-such-app", ok=False).words


def test_an_unknown_host_is_named(platform):
    answer = web.request(f"http://ionian--nothing-here.localhost:{platform.port}/")
    assert answer.status == 404
    assert "ionian--nothing-here.localhost" in answer.text
    assert answer.headers["x-request-id"] in answer.text


def test_a_file_that_raises_on_import_fails_its_requests_at_once(client):
    platform = client.platform
    url = client.deploy("broken_import.py").url()
    start = time.monotonic()
    answer = web.request(url)
    took = time.monotonic() - start
    print(f"answered {answer.status} after {took:.1f} s")
    assert 500 <= answer.status < 600
    assert took < 20
    request_id = answer.headers["x-request-id"]
    assert request_id in answer.text
    assert request_id in platform.log()
    logs = client.wait_for_log("broken-import", "RuntimeError: this file is broken")
    assert "Traceback" in logs

    # No endless loop: nobody asks, so nothing starts, and one who asks again is answered again.
    started = client.app_logs("broken-import").count("a container starts")
    assert 1 <= started <= 3
    stays_true(
        lambda: client.app_logs("broken-import").count("a container starts") == started, "no container starts", 8
    )
    assert web.request(url).status >= 500
    assert client.app_logs("broken-import").count("a container starts") <= started + 3
    assert serves(client)


def test_a_call_into_a_file_that_raises_on_import_fails(client):
    client.deploy("broken_import.py")
    failed = client.python("import modal; modal.Function.from_name('broken-import', 'call').remote()", ok=False)
    assert "this file is broken" in failed.output


def test_an_oversized_message_is_refused(client):
    platform = client.platform
    huge = api_pb2.MountPutFileRequest(sha256_hex="0" * 64, data=bytes(129 * MEGABYTE))
    with pytest.raises((GRPCError, StreamTerminatedError, ConnectionError)) as caught:
        rpc.call(platform.url, "MountPutFile", huge, client.token)
    if isinstance(caught.value, GRPCError):
        assert caught.value.status in (Status.RESOURCE_EXHAUSTED, Status.OUT_OF_RANGE, Status.INVALID_ARGUMENT)
    assert serves(client)


def test_a_message_of_a_hundred_megabytes_is_taken(client):
    """The client sends up to 100 MiB in one message."""
    data = bytes(100 * MEGABYTE)
    request = api_pb2.MountPutFileRequest(sha256_hex=hashlib.sha256(data).hexdigest(), data=data)
    rpc.call(client.platform.url, "MountPutFile", request, client.token)


def test_a_file_with_another_digest_is_refused(client):
    request = api_pb2.MountPutFileRequest(sha256_hex=hashlib.sha256(b"this").hexdigest(), data=b"that")
    with pytest.raises(GRPCError) as caught:
        rpc.call(client.platform.url, "MountPutFile", request, client.token)
    assert caught.value.status is Status.INVALID_ARGUMENT


GARBAGE = {
    "random bytes": os.urandom(4096),
    "zero bytes": bytes(4096),
    "a TLS hello": bytes.fromhex("1603010200010001fc0303") + os.urandom(400),
    "half an HTTP request": b"GET / HTTP/1.1\r\nHost: ",
    "an endless header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 500_000,
    "an HTTP/2 preface and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(2000),
    "bad chunks": b"POST /no HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two lengths": b"POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
}


def test_garbage_on_the_port_harms_nobody(client):
    for name, sent in GARBAGE.items():
        with socket.create_connection(("127.0.0.1", client.platform.port), timeout=10) as connection:
            connection.settimeout(0.5)
            try:
                connection.sendall(sent)
                received = connection.recv(65536)
            except (TimeoutError, ConnectionError):
                # The server waits for more, or has hung up; both are fine.
                received = b""
            assert not received.startswith(b"HTTP/1.1 2"), f"{name} was answered: {received[:200]!r}"
    assert client.platform.is_running()
    assert serves(client)


def test_a_request_without_a_host_is_refused(platform):
    """As HTTP demands of every server: which app was meant could only be guessed."""
    with socket.create_connection(("127.0.0.1", platform.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def create_blob(client, data: bytes, sha256: bytes | None = None):
    request = api_pb2.BlobCreateRequest(
        content_md5=b64encode(hashlib.md5(data).digest()).decode(),
        content_sha256_base64=b64encode(sha256 or hashlib.sha256(data).digest()).decode(),
        content_length=len(data),
    )
    return rpc.call(client.platform.url, "BlobCreate", request, client.token)


def blob_is_readable(client, blob_id: str) -> bool:
    try:
        found = rpc.call(client.platform.url, "BlobGet", api_pb2.BlobGetRequest(blob_id=blob_id), client.token)
    except GRPCError as error:
        if error.status in (Status.NOT_FOUND, Status.FAILED_PRECONDITION):
            return False
        raise
    return web.request(found.download_url).status == 200


def test_a_blob_is_kept_when_all_is_well(client):
    """What the two tests below would look like if nothing were wrong."""
    data = os.urandom(100_000)
    created = create_blob(client, data)
    assert web.request(created.upload_url, "PUT", data).headers["etag"].strip('"') == hashlib.md5(data).hexdigest()
    assert blob_is_readable(client, created.blob_id)


def test_a_blob_with_a_wrong_checksum_is_refused(client):
    data = os.urandom(100_000)
    created = create_blob(client, data)
    answer = web.request(created.upload_url, "PUT", os.urandom(100_000))
    assert 400 <= answer.status < 500
    assert not blob_is_readable(client, created.blob_id)


def test_a_truncated_upload_is_no_blob(client):
    data = os.urandom(100_000)
    created = create_blob(client, data)
    split = urlsplit(created.upload_url)
    head = f"PUT {split.path}?{split.query} HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((split.hostname, split.port), timeout=10) as connection:
        connection.sendall(head.encode() + data[:50_000])
    assert not blob_is_readable(client, created.blob_id)
    # And it can be uploaded again, in full.
    assert web.request(created.upload_url, "PUT", data).status == 200
    assert blob_is_readable(client, created.blob_id)


def test_a_forged_blob_url_is_refused(client):
    data = os.urandom(1000)
    created = create_blob(client, data)
    split = urlsplit(created.upload_url)
    forged = f"http://{split.netloc}{split.path}?{split.query[:-4]}0000"
    assert web.request(forged, "PUT", data).status in (400, 401, 403)
    assert not blob_is_readable(client, created.blob_id)


def test_mistakes_in_the_configuration_are_reported_together(platform):
    settings = platform.state / "bad.toml"
    settings.write_text('[server]\nlisten = "nowhere"\nlistenn = "x"\n[nonsense]\nkey = 1\n')
    refused = platform.command("serve", "--config", settings, ok=False)
    assert refused.returncode != 0
    for mistake in ("nowhere", "listenn", "nonsense"):
        assert mistake in refused.stderr
