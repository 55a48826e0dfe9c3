"""FastAPI hello through the ingress, against the same app on bare uvicorn in the same image."""

import re
import statistics
import subprocess
from dataclasses import dataclass

from bench import machine
from bench.bare import Image
from bench.machine import APP_CORE, LOAD_CORE, BenchFailed
from bench.report import Report, fine_milliseconds, heading, microseconds, rate, ratio, say, spread
from bench.server import Server

ROUNDS = 7
SECONDS = 3
WARM_UP_SECONDS = 1
CONNECTIONS = 32

MIN_THROUGHPUT = 0.8
MAX_ADDED_SECONDS = 0.0005

UVICORN = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")


@dataclass(frozen=True)
class Side:
    """One of the two ways to the app."""

    url: str
    host: str
    # By what they do.
    processes: dict[str, int]


class Load:
    """What wrk found out: requests per second and the median latency; and the CPU time that a request took."""

    def __init__(self, side: Side, connections: int, seconds: int) -> None:
        url = side.url
        before = {name: machine.cpu_seconds(pid) for name, pid in side.processes.items()}
        command = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
        output = subprocess.run(
            [*command, "-H", f"Host: {side.host}", url],
            capture_output=True,
            text=True,
            timeout=seconds + machine.WAIT_SECONDS,
            check=True,
        ).stdout
        used = {name: machine.cpu_seconds(pid) - before[name] for name, pid in side.processes.items()}
        if "Non-2xx" in output or "Socket errors" in output:
            raise BenchFailed(f"requests to {url} failed:\n{output}")
        requests = int(_found(r"(\d+) requests in", output)[1])
        self.cpu = {name: seconds / requests for name, seconds in used.items()}
        self.rate = float(_found(r"Requests/sec:\s+([\d.]+)", output)[1])
        value, unit = _found(r"50%\s+([\d.]+)(us|ms|s)", output).groups()
        self.p50 = float(value) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit]


def measure(server: Server, image: Image, report: Report) -> None:
    heading(
        f"FastAPI hello through the ingress / bare uvicorn in the same image ({ROUNDS} paired rounds of {SECONDS} s)"
    )
    server.wait_for_no_container()
    server.get("warm", "/hello")
    app = server.containers()
    if len(app) != 1:
        raise BenchFailed(f"{len(app)} containers run, where one was expected")
    port = machine.free_port()
    command = ("python", "-m", "uvicorn", "hello_web:web", *UVICORN, "--host", "127.0.0.1", "--port", str(port))
    with image.serving(port, *command) as bare:
        machine.pin([bare, *app], [APP_CORE])
        sides = {
            "ionian": Side(
                f"http://127.0.0.1:{server.port}/hello", server.host("warm"), {"app": app[0], "server": server.pid}
            ),
            "bare": Side(f"http://127.0.0.1:{port}/hello", f"127.0.0.1:{port}", {"app": bare}),
        }
        try:
            say(f"pinned: wrk and the server on core {LOAD_CORE}; the app on core {APP_CORE} on both sides")
            machine.pin([server.pid], [LOAD_CORE])
            throughput, _ = compare(sides, CONNECTIONS)
            _, added = compare(sides, 1)
        finally:
            machine.pin([server.pid, *app], machine.BOTH_CORES)
        if server.containers() != app:
            raise BenchFailed("the app's container did not stay alone, and others are not pinned")
    report.promise(
        f"requests/s at {CONNECTIONS} connections >= {MIN_THROUGHPUT} of bare uvicorn",
        spread(throughput, ratio),
        statistics.median(throughput) >= MIN_THROUGHPUT,
    )
    report.promise(
        f"p50 at 1 connection <= {fine_milliseconds(MAX_ADDED_SECONDS)} above bare uvicorn",
        "+" + spread(added, fine_milliseconds),
        statistics.median(added) <= MAX_ADDED_SECONDS,
    )


def compare(sides: dict[str, Side], connections: int) -> tuple[list[float], list[float]]:
    """Ratios of throughput and differences of latency, one per round."""
    for side in sides.values():
        Load(side, connections, WARM_UP_SECONDS)
    loads: dict[str, list[Load]] = {name: [] for name in sides}
    for number in range(ROUNDS):
        # The order alternates, too: whatever drifts within a round would favour the same side in all of them.
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in names:
            loads[name].append(Load(sides[name], connections, SECONDS))
    pairs = list(zip(loads["ionian"], loads["bare"], strict=True))
    ratios = [ionian.rate / bare.rate for ionian, bare in pairs]
    added = [ionian.p50 - bare.p50 for ionian, bare in pairs]
    say(f"{connections} connection{'s' if connections > 1 else ''}:")
    for name, taken in loads.items():
        rates, p50s = [load.rate for load in taken], [load.p50 for load in taken]
        say(f"  {name:7} {spread(rates, rate)}, p50 {spread(p50s, fine_milliseconds)}")
        for process in taken[0].cpu:
            spent = spread([load.cpu[process] for load in taken], microseconds)
            say(f"          CPU time of the {process} per request: {spent}")
    say(f"  ratio   {spread(ratios, ratio)}, p50 +{spread(added, fine_milliseconds)}")
    return ratios, added


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise BenchFailed(f"wrk printed something else than expected:\n{text}")
    return found
