"""Requests straight to a web function's container, and the ways in which the hook steps aside."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_platform import (
    CREDENTIALS,
    LAUNCHER,
    Container,
    FakePlatform,
    Response,
    class_definition,
    function_definition,
)
from modal_proto import api_pb2
from websockets.sync.client import connect as connect_websocket

ASGI = api_pb2.WEBHOOK_TYPE_ASGI_APP
ENDPOINT = api_pb2.WEBHOOK_TYPE_FUNCTION
WSGI = api_pb2.WEBHOOK_TYPE_WSGI_APP

FASTAPI_APP = function_definition("web", "fastapi_app", ASGI)
SHOP = class_definition("web", "Shop", {"site": ASGI, "price": ENDPOINT, "restock": 0, "legacy": WSGI})
HOOK = {"IONIAN_WEB_HOOK": "1"}


def fetch(port: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> Response:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        response = connection.getresponse()
        return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def sysconfig_purelib(python: str) -> str:
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.check_output([python, "-c", script], text=True).strip()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_request_reaches_the_app_without_an_input(start, platform):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    port = container.ports()[None]
    response = fetch(port, "/hello?name=Ionian")
    assert (response.status, response.json()) == (200, {"hello": "Ionian"})
    assert "server" not in response.headers
    assert "date" in response.headers
    assert fetch(port, "/echo", body=b"x" * 3_000_000).json() == {"length": 3_000_000}
    assert "FunctionPutOutputs" not in platform.events
    assert container.stop() == 0
    assert container.stderr == ""


def test_the_port_is_announced_with_credentials_after_the_lifespan_and_before_ready(start, platform):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    assert platform.events.index("announce") < platform.events.index("FunctionGetInputs")
    assert "lifespan started" in container.stdout
    headers = platform.announcement_headers[0]
    assert {name: headers.get(name) for name in CREDENTIALS} == CREDENTIALS


def test_the_app_sees_the_client_and_scheme_that_the_platform_names(start):
    port = start(FASTAPI_APP, **HOOK).wait_until_ready().ports()[None]
    headers = {
        "host": "web.example.com",
        "x-ionian-client": "203.0.113.7:51234",
        "x-ionian-scheme": "https",
        "x-ionian-request-id": "re-1",
        "x-forwarded-for": "198.51.100.9",
        "x-forwarded-proto": "ftp",
    }
    seen = fetch(port, "/scope", headers).json()
    assert seen["client"] == ["203.0.113.7", 51234]
    assert seen["url"] == "https://web.example.com/scope"
    assert not [name for name in seen["headers"] if name.startswith("x-ionian")]
    assert seen["headers"]["x-forwarded-for"] == "198.51.100.9"
    assert fetch(port, "/scope", {"x-ionian-client": "[2001:db8::1]:443"}).json()["client"] == ["2001:db8::1", 443]
    assert fetch(port, "/scope", {"x-ionian-client": "nonsense"}).json()["client"][0] == "127.0.0.1"


def test_lifespan_state_is_copied_into_each_request(start):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    port = container.ports()[None]
    assert fetch(port, "/scope").json()["model"] == "loaded"
    assert [fetch(port, "/taint").json()["before"] for _ in range(2)] == [False, False]
    assert container.stop() == 0
    assert container.stdout.splitlines() == ["lifespan started", "lifespan ended"]


def test_user_code_runs_on_uvloop_unless_told_otherwise(start):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    assert fetch(container.ports()[None], "/scope").json()["loop"] == "uvloop"


def test_uvloop_can_be_switched_off(start):
    container = start(FASTAPI_APP, IONIAN_WEB_UVLOOP="0", **HOOK).wait_until_ready()
    assert fetch(container.ports()[None], "/scope").json()["loop"].startswith("asyncio")


def test_a_streamed_response_arrives_as_it_is_produced(start):
    port = start(FASTAPI_APP, **HOOK).wait_until_ready().ports()[None]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/stream")
    response = connection.getresponse()
    arrivals = []
    while line := response.readline():
        arrivals.append((line, time.monotonic()))
    connection.close()
    assert [line for line, _ in arrivals] == [b"part 0\n", b"part 1\n", b"part 2\n"]
    assert arrivals[2][1] - arrivals[0][1] > 0.3


def test_websocket(start):
    port = start(FASTAPI_APP, **HOOK).wait_until_ready().ports()[None]
    headers = {"x-ionian-client": "203.0.113.7:1", "x-ionian-scheme": "https"}
    with connect_websocket(f"ws://127.0.0.1:{port}/ws", additional_headers=headers) as websocket:
        assert json.loads(websocket.recv()) == {"client": ["203.0.113.7", 1], "scheme": "wss", "model": "loaded"}
        websocket.send("hello")
        assert websocket.recv() == "HELLO"


def test_an_image_without_a_web_server_uses_ours(start, client_python, tmp_path):
    """The user's environment has no uvicorn and no websockets; both come from IONIAN_DEPS."""
    deps = tmp_path / "deps"
    deps.mkdir()
    site = Path(sysconfig_purelib(client_python))
    hide = tmp_path / "hide"
    hide.mkdir()
    ours = ["uvicorn", "websockets", "httptools", "uvloop", "h11", "click"]
    for name in ours:
        (deps / name).symlink_to(site / name)
    # Hides the installed ones from every finder but that of `deps`.
    (hide / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class OnlyOurs:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name not in {ours!r}: return None\n"
        f"        spec = PathFinder.find_spec(name, [{str(deps)!r}])\n"
        f"        if {str(deps)!r} not in sys.path: raise ModuleNotFoundError(name)\n"
        "        return spec\n"
        "sys.meta_path.insert(0, OnlyOurs())\n"
    )
    python_path = f"{hide}:{LAUNCHER.parent.parent / 'tests' / 'apps'}"
    container = start(FASTAPI_APP, IONIAN_DEPS=str(deps), PYTHONPATH=python_path, **HOOK).wait_until_ready()
    port = container.ports()[None]
    assert fetch(port, "/scope").json()["loop"] == "uvloop"
    with connect_websocket(f"ws://127.0.0.1:{port}/ws") as websocket:
        assert json.loads(websocket.recv())["scheme"] == "ws"


def test_without_any_web_server_the_data_channel_serves(start, platform, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('No module named uvicorn')\n")
    container = start(FASTAPI_APP, IONIAN_DEPS=str(tmp_path / "nothing"), **HOOK).wait_until_ready()
    serves_by_data_channel_only(container, platform, "No module named uvicorn")


@pytest.mark.parametrize(
    ("function", "message"),
    [("fastapi_app", "RuntimeError: a route that raises"), ("raw_app", "ValueError: raw app raises")],
)
def test_an_exception_is_a_500_and_one_traceback_on_stderr(start, function, message):
    container = start(function_definition("web", function, ASGI), **HOOK).wait_until_ready()
    response = fetch(container.ports()[None], "/raise")
    assert (response.status, response.body) == (500, b"Internal Server Error")
    container.wait_for("the traceback", lambda: message in container.stderr)
    assert container.stop() == 0
    assert container.stderr.count(message) == 1
    assert container.stderr.count("Traceback (most recent call last)") == 1
    assert "apps/web.py" in container.stderr
    assert "ionian_container" not in container.stderr


def test_fastapi_endpoint(start):
    container = start(function_definition("web", "endpoint", ENDPOINT), **HOOK).wait_until_ready()
    response = fetch(container.ports()[None], "/?name=Ionian", {"origin": "https://example.com"})
    assert response.json() == {"endpoint": "Ionian"}
    assert "access-control-allow-origin" in response.headers


def test_wsgi(start):
    container = start(function_definition("web", "flask_app", WSGI), **HOOK).wait_until_ready()
    headers = {"x-ionian-client": "203.0.113.7:9", "x-ionian-scheme": "https"}
    response = fetch(container.ports()[None], "/hello?name=Ionian", headers)
    assert response.json() == {"hello": "Ionian", "remote": "203.0.113.7", "scheme": "https"}


def test_each_web_method_of_a_class_has_its_own_port_and_plain_methods_still_work(start, platform):
    container = start(SHOP, **HOOK).wait_until_ready()
    ports = container.ports()
    assert set(ports) == {"site", "price", "legacy"}
    assert fetch(ports["site"], "/stock").json() == {"stock": 3}
    assert fetch(ports["price"], "/?item=tea").json() == {"item": "tea", "price": 30}
    assert fetch(ports["legacy"], "/").body == f"pid {container.process.pid}".encode()
    assert platform.call(4, method="restock") == 7
    assert fetch(ports["site"], "/stock").json() == {"stock": 7}
    assert platform.data_channel_get("/stock", method="site").json() == {"stock": 7}
    assert container.stop() == 0
    assert container.stdout == "shop closed\n"


def test_sync_routes_run_side_by_side(start):
    port = start(FASTAPI_APP, **HOOK).wait_until_ready().ports()[None]
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: fetch(port, "/sync").status, range(8)))
    assert statuses == [200] * 8
    assert time.monotonic() - began < 8 * 0.5


def test_a_blocking_handler_does_not_stop_heartbeats(start, platform):
    container = start(FASTAPI_APP, MODAL_HEARTBEAT_INTERVAL="1", **HOOK).wait_until_ready()
    began = time.monotonic()
    assert fetch(container.ports()[None], "/block?seconds=3.5").status == 200
    assert len([beat for beat in platform.heartbeats if began < beat < began + 3.5]) >= 2


def test_the_data_channel_works_beside_the_hook(start, platform):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    assert platform.data_channel_get("/hello").json() == {"hello": "you"}
    assert fetch(container.ports()[None], "/hello").json() == {"hello": "you"}
    assert container.stop() == 0


def serves_by_data_channel_only(container: Container, platform: FakePlatform, complaint: str) -> None:
    response = platform.data_channel_get("/hello")
    assert (response.status, response.json()) == (200, {"hello": "you"})
    assert container.stop() == 0
    lines = container.stderr.splitlines()
    assert len(lines) == 1, container.stderr
    assert lines[0].startswith("ionian: web hook not ")
    assert complaint in lines[0]
    assert "data channel" in lines[0]
    assert "lifespan ended" in container.stdout


def test_refused_announcement_falls_back(start, platform):
    platform.announcement_status = 500
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    assert not is_open(container.ports()[None])
    serves_by_data_channel_only(container, platform, "no web endpoint here")


def test_unreachable_platform_falls_back(start, platform):
    # To this address there is no connection, on any machine. One that is refused would be tried for a minute: the
    # platform may be restarting.
    url = "http://255.255.255.255:9/"
    container = start(FASTAPI_APP, IONIAN_ANNOUNCE_URL=url, **HOOK).wait_until_ready()
    serves_by_data_channel_only(container, platform, url)


def test_no_concurrency_falls_back(start, platform):
    function = function_definition("web", "fastapi_app", ASGI, concurrency=0)
    container = start(function, **HOOK).wait_until_ready()
    assert platform.announcements == []
    serves_by_data_channel_only(container, platform, "max_concurrent_inputs")


def test_an_address_that_cannot_be_bound_falls_back(start, platform):
    container = start(FASTAPI_APP, **{**HOOK, "IONIAN_WEB_BIND": "203.0.113.1"}).wait_until_ready()
    serves_by_data_channel_only(container, platform, "OSError")


def test_a_broken_uvicorn_falls_back(start, platform, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise RuntimeError('a uvicorn that cannot be imported')\n")
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    serves_by_data_channel_only(container, platform, "a uvicorn that cannot be imported")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("imports.lifecycle_asgi = lambda loop: None", "lifecycle_asgi"),
        ("del imports.lifecycle_asgi", "lifecycle_asgi"),
        ("imports.UserCodeEventLoop = object", "event loop"),
        ("imports.Service.function_execution_context = lambda *a: None", "function_execution_context"),
    ],
)
def test_an_unknown_client_is_left_alone(start, tmp_path, change, complaint):
    """The checks alone: a client changed like this could not run a container, with or without us."""
    script = tmp_path / "check.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import modal._runtime.user_code_imports as imports\n"
        f"{change}\n"
        "before = dict(vars(imports))\n"
        "from ionian_container import web_hook\n"
        "web_hook.install()\n"
        "assert dict(vars(imports)) == before\n"
    )
    container = start(FASTAPI_APP, command=[str(script), str(LAUNCHER.parent.parent)])
    assert container.wait() == 0, container.stderr
    assert container.stderr.startswith("ionian: web hook not installed: this version of the client")
    assert complaint in container.stderr
    assert len(container.stderr.splitlines()) == 1


def test_without_the_switch_nothing_is_served(start, platform):
    container = start(FASTAPI_APP).wait_until_ready()
    response = platform.data_channel_get("/scope")
    assert response.json()["loop"].startswith("asyncio")
    assert platform.announcements == []
    assert container.stop() == 0
    assert container.stderr == ""


def test_kill_switch_finishes_what_is_in_flight_before_the_lifespan_ends(start, platform):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    port = container.ports()[None]
    # A connection that idles, as the platform's pool keeps them, must not hold up the exit.
    idle = http.client.HTTPConnection("127.0.0.1", port)
    idle.request("GET", "/hello")
    idle.getresponse().read()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(fetch, port, "/slow?seconds=1.5")
        container.wait_for("the request", lambda: "slow begins" in container.stdout)
        platform.kill_switch()
        container.wait_for("the port to close", lambda: not is_open(port))
        response = slow.result()
    assert (response.status, response.json()) == (200, {"slow": 1.5})
    assert container.wait() == 0
    assert container.stdout.splitlines() == ["lifespan started", "slow begins", "slow ends", "lifespan ended"]
    assert container.stderr == ""
    idle.close()


def test_sigint_stops_gracefully_and_cancels_what_takes_too_long(start):
    container = start(FASTAPI_APP, **HOOK).wait_until_ready()
    request = threading.Thread(target=_ignore_lost_response, args=(container.ports()[None], "/slow?seconds=50"))
    request.start()
    container.wait_for("the request", lambda: "slow begins" in container.stdout)
    began = time.monotonic()
    container.process.send_signal(signal.SIGINT)
    assert container.wait() == 0
    assert time.monotonic() - began < 20
    assert container.stdout.splitlines() == ["lifespan started", "slow begins", "slow ends", "lifespan ended"]
    assert "Traceback" not in container.stderr
    request.join()


def _ignore_lost_response(port: int, path: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        fetch(port, path)


def test_sigint_works_when_the_parent_ignored_it(start):
    container = start(
        FASTAPI_APP, preexec=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), **HOOK
    ).wait_until_ready()
    container.process.send_signal(signal.SIGINT)
    assert container.wait() == 0
    assert "lifespan ended" in container.stdout


def test_sigint_stops_a_container_that_is_between_two_runs_of_its_event_loop(start):
    container = start(class_definition("web", "SlowStart", {"site": ASGI}), **HOOK)
    container.wait_for("the sync enter hook", lambda: "loading" in container.stdout)
    began = time.monotonic()
    container.process.send_signal(signal.SIGINT)
    assert container.wait() == 0
    assert time.monotonic() - began < 20


def test_a_failing_lifespan_is_a_task_result_and_announces_nothing(start, platform):
    container = start(function_definition("web", "lifespan_fails", ASGI), **HOOK)
    assert container.wait() == 0
    # The client sends a second one, since it then runs the shutdown of what never started: the first one counts.
    assert "startup failed" in platform.task_results[0].exception
    assert platform.announcements == []
    assert "the model is missing" in container.stderr


def test_a_module_that_cannot_be_imported_is_a_task_result(start, platform):
    container = start(function_definition("broken", "fastapi_app", ASGI), **HOOK)
    assert container.wait() == 0
    assert "this module is broken" in platform.task_results[0].exception
    assert "Traceback" in platform.task_results[0].traceback
    assert platform.announcements == []
    assert "FunctionGetInputs" not in platform.events
