"""Calls by the client: how long one takes, and how many there are in a second. For information; nothing is promised."""

import json

from bench import machine
from bench.report import heading, say
from bench.server import Server

# Run by the client's own interpreter. Calls are made one after the other, as a script does.
_REMOTE = """
import json, statistics, time, modal
echo = modal.Function.from_name("bench", "echo")
for number in range(20):
    echo.remote(number)
cpu = time.process_time()
latencies = []
for number in range(300):
    began = time.perf_counter()
    assert echo.remote(number) == number
    latencies.append(time.perf_counter() - began)
latencies.sort()
print(json.dumps({
    "calls": 320,
    "p50": statistics.median(latencies),
    "p99": latencies[int(len(latencies) * 0.99)],
    "rate": len(latencies) / sum(latencies),
    "client": (time.process_time() - cpu) / len(latencies),
}))
"""

_MAP = """
import json, time, modal
echo = modal.Function.from_name("bench", "echo")
echo.remote(0)
cpu = time.process_time()
began = time.perf_counter()
assert list(echo.map(range(1000))) == list(range(1000))
took = time.perf_counter() - began
print(json.dumps({"calls": 1000, "took": took, "client": (time.process_time() - cpu) / 1000}))
"""


def measure(server: Server) -> None:
    heading("Calls by the client (information only; nothing pinned)")
    server.wait_for_no_container()
    # A container that is warm, and whose start is not counted.
    server.python("import modal; modal.Function.from_name('bench', 'echo').remote(0)")
    result, cpu = _measured(server, _REMOTE)
    p50, p99 = result["p50"] * 1e3, result["p99"] * 1e3
    say(f".remote() of a warm function: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {result['rate']:.0f}/s one after the other")
    say(f"  {cpu}")
    result, cpu = _measured(server, _MAP)
    took, containers = result["took"], len(server.containers())
    say(f".map() of 1,000 inputs: {took:.2f} s, {1000 / took:.0f} inputs/s, {containers} containers in the end")
    say(f"  {cpu}")


def _measured(server: Server, script: str) -> tuple[dict[str, float], str]:
    """What a script printed, and the CPU time that a call took; starts of further containers are part of it."""
    server_cpu, container_cpu = machine.cpu_seconds(server.pid), _containers_cpu(server)
    result: dict[str, float] = json.loads(server.python(script).splitlines()[-1])
    in_server = (machine.cpu_seconds(server.pid) - server_cpu) / result["calls"]
    in_containers = (_containers_cpu(server) - container_cpu) / result["calls"]
    parts = {"client": result["client"], "server": in_server, "containers": in_containers}
    return result, "CPU time per call: " + ", ".join(f"{name} {spent * 1e3:.1f} ms" for name, spent in parts.items())


def _containers_cpu(server: Server) -> float:
    return sum(machine.cpu_seconds(pid) for pid in server.containers())
