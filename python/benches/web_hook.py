"""How much of bare uvicorn's speed is left when the same app is served by the web hook inside the real runtime?

    python python/benches/web_hook.py [rounds]

Run by the client's interpreter with python/tests/requirements.txt; needs `wrk` and two cores: the servers share one and
the load generator has the other. Rounds alternate between both servers and the ratio is the median of the paired ones,
so that what else the machine does hits both. Prints one JSON line.
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PYTHON = Path(__file__).parent.parent
sys.path.insert(0, str(PYTHON / "tests"))

from fake_platform import Container, FakePlatform, function_definition  # noqa: E402
from modal_proto import api_pb2  # noqa: E402

SERVER_CORE, LOAD_CORE = 0, 1
CONNECTIONS = 32
SECONDS = 4

APP = """
import modal
from fastapi import FastAPI
app = modal.App("hello")
web = FastAPI()
@web.get("/hello")
async def hello():
    return {"hello": "Ionian"}
@app.function()
@modal.asgi_app()
def fastapi_app():
    return web
"""
# What the platform sends along with every request.
HEADERS = [
    "x-ionian-client: 203.0.113.7:51234",
    "x-ionian-scheme: https",
    "x-ionian-request-id: re-0123456789abcdef",
    "x-forwarded-for: 203.0.113.7",
    "x-forwarded-proto: https",
    "x-forwarded-host: web.example.com",
    "user-agent: bench",
    "accept: */*",
]


def requests_per_second(port: int, connections: int, seconds: int) -> tuple[float, float]:
    """Load one server; returns requests/s and the median latency in ms."""
    command = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    for header in HEADERS:
        command += ["-H", header]
    output = subprocess.check_output([*command, f"http://127.0.0.1:{port}/hello"], text=True)
    assert "Non-2xx" not in output, output
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1])
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", output).groups()
    return rate, float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "bare uvicorn did not start"
        time.sleep(0.02)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    assert shutil.which("wrk"), "install wrk"
    directory = Path(tempfile.mkdtemp())
    (directory / "hello.py").write_text(APP)
    pinned = ["taskset", "-c", str(SERVER_CORE)]
    bare_port = free_port()
    flags = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    bare = subprocess.Popen(
        [*pinned, sys.executable, "-m", "uvicorn", "hello:web", *flags, "--port", str(bare_port)], cwd=directory
    )
    function = function_definition("hello", "fastapi_app", api_pb2.WEBHOOK_TYPE_ASGI_APP)
    with FakePlatform().running() as platform:
        container = Container(
            platform,
            sys.executable,
            directory,
            function,
            {"IONIAN_WEB_HOOK": "1", "PYTHONPATH": str(directory)},
            preexec=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        )
        try:
            port = container.wait_until_ready().ports()[None]
            wait_until_open(bare_port)
            result: dict[str, object] = {"server_core": SERVER_CORE, "load_core": LOAD_CORE, "rounds": rounds}
            for connections in (1, CONNECTIONS):
                requests_per_second(port, connections, 1)
                requests_per_second(bare_port, connections, 1)
                hook, plain = [], []
                for _ in range(rounds):
                    hook.append(requests_per_second(port, connections, SECONDS))
                    plain.append(requests_per_second(bare_port, connections, SECONDS))
                result[f"connections_{connections}"] = {
                    "hook_rps": round(statistics.median(rate for rate, _ in hook)),
                    "bare_rps": round(statistics.median(rate for rate, _ in plain)),
                    "ratio": round(statistics.median(h[0] / b[0] for h, b in zip(hook, plain, strict=True)), 3),
                    "hook_p50_ms": round(statistics.median(p50 for _, p50 in hook), 3),
                    "bare_p50_ms": round(statistics.median(p50 for _, p50 in plain), 3),
                }
            print(json.dumps(result))
            container.stop()
        finally:
            container.destroy()
            bare.terminate()
            bare.wait()
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
