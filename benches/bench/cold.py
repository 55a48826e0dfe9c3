"""A request to a function that is scaled to zero, step by step, against `runc run … python -c "import fastapi"`."""

import json
import re
import statistics
import time
from datetime import datetime

from bench import machine
from bench.bare import Image
from bench.machine import BenchFailed
from bench.report import Report, heading, milliseconds, ratio, say, spread
from bench.server import Server

ROUNDS = 9
MAX_RATIO = 2.5

_STARTED = re.compile(r'^(\S+)\s+DEBUG .*container started .*steps="([^"]*)"', re.MULTILINE)
_STEP = re.compile(r"(\S+)=([\d.]+)ms")


def measure(server: Server, image: Image, report: Report) -> None:
    heading(f"A request to a cold web function / runc run ... python -c 'import fastapi' ({ROUNDS} paired rounds)")
    cores = " and ".join(map(str, machine.BOTH_CORES))
    say(f"pinned: nothing; both sides may use cores {cores}. The root of the bare side is mounted beforehand")
    machine.pin([server.pid, *server.containers()], machine.BOTH_CORES)
    bare_command = ("python", "-c", "import fastapi")
    image.run(*bare_command)
    request(server)
    cold, bare, steps = [], [], []
    for number in range(ROUNDS):
        if number % 2:
            bare.append(image.run(*bare_command))
        took, found = request(server)
        cold.append(took)
        steps.append(found)
        if not number % 2:
            bare.append(image.run(*bare_command))
    ratios = [request_took / bare_took for request_took, bare_took in zip(cold, bare, strict=True)]
    say(f"request   {spread(cold, milliseconds)}")
    say(f"runc run  {spread(bare, milliseconds)}")
    say(f"ratio     {spread(ratios, ratio)}")
    say("the request, step by step:")
    for name in steps[0]:
        say(f"  {name:60} {spread([found[name] for found in steps if name in found], milliseconds)}")
    report.promise(
        f"request to a cold web function <= {MAX_RATIO} of runc run ... import fastapi",
        f"{spread(ratios, ratio)} ({milliseconds(statistics.median(cold))} / {milliseconds(statistics.median(bare))})",
        statistics.median(ratios) <= MAX_RATIO,
    )


def request(server: Server) -> tuple[float, dict[str, float]]:
    """One cold request; returns how long it took, and its steps in order."""
    server.wait_for_no_container()
    log = server.log_size()
    # Containers share the monotonic clock with their host; only the server's log has the time of day.
    monotonic_zero = time.time() - time.monotonic()
    body, sent, received = server.get("cold", "/moments")
    moments: dict[str, float] = json.loads(body)
    found = machine.wait_until(lambda: _STARTED.search(server.log_since(log)), "the log's line about the container")
    started = datetime.fromisoformat(found[1].replace("Z", "+00:00")).timestamp() - monotonic_zero
    measured = {name: float(took) / 1e3 for name, took in _STEP.findall(found[2])}
    if not sent < started < received:
        raise BenchFailed(f"the container of a cold request was started at {started}, the request sent at {sent}")
    steps = {"server: request to container started": started - sent}
    steps |= {f"    worker: {name}": took for name, took in measured.items()}
    steps["    decided, recorded and told"] = started - sent - sum(measured.values())
    previous = started
    for name, moment in (
        ("container: Python, launcher, official runtime", "import began"),
        ("container: the app's file, the runtime's imports for the web", "factory began"),
        ("container: the app's factory (import fastapi and so on)", "factory ended"),
        ("container: lifespan, uvicorn, socket", "announcement began"),
        ("container: announcement, answered by the server", "announcement ended"),
        ("first poll, slot, request on its way to the handler", "handler"),
    ):
        if moment in moments:
            steps[name] = moments[moment] - previous
            previous = moments[moment]
    steps["handler to the first byte"] = received - previous
    steps["CPU time of the container until the handler"] = moments["CPU time"]
    return received - sent, steps
