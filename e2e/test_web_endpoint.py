"""A user's web endpoints over HTTP, through the web hook and through the official data channel: the same behaviour."""

import hashlib
import os
import time

import pytest
from support import web

MEGABYTE = 1 << 20


@pytest.fixture(params=["hook", "data channel"])
def platform_settings(request):
    return {"IONIAN_WEB_HOOK": "true" if request.param == "hook" else "false"}


@pytest.fixture
def deployment(client):
    return client.deploy("web.py")


def test_an_asgi_app_answers(deployment):
    url = deployment.url("api")
    assert web.get_json(f"{url}/hello?name=Ada%20L") == {"message": "Hello, Ada L!"}
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
        answer = web.request(f"{url}/status/299", method)
        assert (answer.status, answer.text, answer.headers["x-app"]) == (299, method, "web")
    # The app's own 404, not the platform's.
    assert web.request(f"{url}/nothing-here").json() == {"detail": "Not Found"}


def test_the_app_sees_the_request_as_it_was_sent(deployment):
    url = deployment.url("api")
    headers = {"X-Twice": "one", "User-Agent": "tester/1", "Cookie": "a=1; b=2"}
    seen = web.request(f"{url}/seen?q=%C3%A4&q=2", headers=headers).json()
    assert seen["url"] == f"{url}/seen?q=%C3%A4&q=2"
    received = {name: value for name, value in seen["headers"]}
    assert received["host"] == url.removeprefix("http://")
    assert (received["x-twice"], received["user-agent"], received["cookie"]) == ("one", "tester/1", "a=1; b=2")


def test_eight_megabytes_up_and_down(deployment):
    url = deployment.url("api")
    body = os.urandom(8 * MEGABYTE)
    wanted = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert web.request(f"{url}/upload", "POST", body).json() == wanted
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    assert web.request(f"{url}/upload", "POST", pieces).json() == wanted
    assert web.request(f"{url}/download?size={8 * MEGABYTE}").body == b"x" * (8 * MEGABYTE)


def test_a_streamed_response_arrives_while_it_is_made(deployment):
    url = deployment.url("api")
    pieces = web.stream(f"{url}/stream")
    assert next(pieces)[1] == b"first"
    # The rest is only made once this second request has come.
    assert web.request(f"{url}/go-on", "POST").status == 200
    assert b"".join(piece for _, piece in pieces) == b"second"


def test_a_websocket_echoes(deployment):
    with web.websocket(f"{deployment.url('api')}/ws") as connection:
        for number in range(20):
            connection.send(f"message {number}")
            assert connection.recv(timeout=30) == f"echo message {number}"
        connection.send(b"abc" * 100_000)
        assert connection.recv(timeout=30) == b"cba" * 100_000


def test_an_exception_is_a_500(client, deployment):
    url = deployment.url("api")
    answer = web.request(f"{url}/boom")
    assert answer.status == 500
    assert "went boom" not in answer.text
    assert "RuntimeError: the app went boom" in client.wait_for_log("web", "the app went boom")
    assert web.get_json(f"{url}/hello") == {"message": "Hello, world!"}


def test_a_flask_app_answers(deployment):
    url = deployment.url("flask_app")
    assert web.get_json(f"{url}/hello?name=Flask") == {"message": "Hello, Flask!"}
    assert web.request(f"{url}/upload", "POST", b"x" * MEGABYTE).json() == {"size": MEGABYTE}


def test_a_fastapi_endpoint_checks_its_input(deployment):
    url = deployment.url("total")
    as_json = {"Content-Type": "application/json"}
    assert web.request(url, "POST", b"[1, 2, 39]", as_json).json() == {"total": 42}
    assert web.request(url, "POST", b'["no number"]', as_json).status == 422
    assert web.request(url, "GET").status == 405
    assert web.request(f"{url}/docs").status == 200


def test_a_web_server_of_the_user_is_reached(deployment):
    answer = web.request(deployment.url("files"))
    assert answer.status == 200
    assert "Directory listing" in answer.text


def test_a_method_of_a_class_keeps_its_state(deployment):
    url = deployment.url("counter-hits")
    assert [web.get_json(url) for _ in range(3)] == [{"hits": 41}, {"hits": 42}, {"hits": 43}]


def test_the_lane_is_the_one_that_was_asked_for(request, deployment):
    """Otherwise the suite could pass twice on the same lane."""
    is_hook = "data channel" not in request.node.name
    start = time.monotonic()
    assert web.get_json(f"{deployment.url('api')}/served-by-uvicorn") == is_hook
    took = time.monotonic() - start
    print(f"answered by a cold container after {took:.2f} s")
    # Ten times what it takes: a lost wake-up, which costs a whole long poll, is found, and a slow machine is not.
    assert took < 15
