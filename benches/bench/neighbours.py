"""What one function's greed costs another: p99 of a quiet endpoint with and without a culprit beside it.

The load is far below saturation and comes on schedule: a request that starts late counts from when it was due. The
culprit is limited to one core, as a careful user would limit it. Rounds alternate, and the median of their ratios
counts.
"""

import http.client
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench import machine
from bench.machine import BenchFailed
from bench.report import Report, fine_milliseconds, heading, ratio, say, spread
from bench.server import REPOSITORY, Server

APP = REPOSITORY / "e2e" / "apps" / "neighbours.py"
CULPRITS = ("spin", "fork_bomb", "memory_hog", "shared_memory", "many_files", "chatter")
ROUNDS = 5
SECONDS = 4.0
REQUESTS_PER_SECOND = 100
# The culprit's container starts and reaches its stride meanwhile.
LEAD_SECONDS = 2.5
MAX_RATIO = 1.2


def main() -> int:
    report = Report()
    try:
        with ExitStack() as cleanup:
            conditions = machine.prepare()
            heading("Conditions")
            for line in conditions:
                say(line)
            server = Server()
            cleanup.callback(server.destroy)
            server.start()
            shutil.copy(APP, server.work)
            measure(server, report)
    except BenchFailed as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    report.print_table()
    return 0


def measure(server: Server, report: Report) -> None:
    heading(f"p99 of a quiet endpoint at {REQUESTS_PER_SECOND} requests/s, with a culprit / without ({ROUNDS} rounds)")
    host = server.deploy_app("neighbours.py", "quiet")
    Sampler(server.port, host).run(1.0)
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(Sampler(server.port, host).run(SECONDS))
        with idle_process():
            beside.append(Sampler(server.port, host).run(SECONDS))
    say(
        f"what the machine itself costs, one busy process of the host in the idle class:"
        f" {spread([b / a for a, b in zip(alone, beside, strict=True)], ratio)} of p99 alone"
        f" ({spread(alone, fine_milliseconds)})"
    )
    for culprit in CULPRITS:
        ratios = []
        quiet, disturbed = [], []
        for number in range(ROUNDS):
            order = ("quiet", "disturbed") if number % 2 == 0 else ("disturbed", "quiet")
            taken = {}
            for side in order:
                if side == "disturbed":
                    run_for = LEAD_SECONDS + SECONDS + 1
                    started = server.start_python(
                        "import modal\n"
                        f"f = modal.Function.from_name('neighbours', '{culprit}')\n"
                        "try:\n"
                        f"    f.remote({run_for})\n"
                        "except Exception as error:\n"
                        "    print(type(error).__name__)\n"
                    )
                    time.sleep(LEAD_SECONDS)
                    taken[side] = Sampler(server.port, host).run(SECONDS)
                    started.wait(120)
                    server.wait_for_containers(1)
                else:
                    taken[side] = Sampler(server.port, host).run(SECONDS)
            quiet.append(taken["quiet"])
            disturbed.append(taken["disturbed"])
            ratios.append(taken["disturbed"] / taken["quiet"])
        say(f"{culprit:14} quiet {spread(quiet, fine_milliseconds)}, disturbed {spread(disturbed, fine_milliseconds)}")
        report.promise(
            f"p99 beside {culprit} <= {MAX_RATIO} of p99 alone",
            spread(ratios, ratio),
            statistics.median(ratios) <= MAX_RATIO,
        )


@contextmanager
def idle_process() -> Iterator[None]:
    """A process that the kernel runs only when nobody else wants to: what it costs, no scheduling can prevent."""
    process = subprocess.Popen(["chrt", "--idle", "0", sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Sampler:
    """One connection, requests on schedule."""

    def __init__(self, port: int, host: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.host = host

    def run(self, seconds: float) -> float:
        """The 99th percentile of the time from when a request was due to the end of its answer, in seconds."""
        period = 1 / REQUESTS_PER_SECOND
        count = int(seconds * REQUESTS_PER_SECOND)
        begin = time.perf_counter() + period
        taken = []
        for number in range(count):
            due = begin + number * period
            while (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            self.connection.request("GET", "/", headers={"Host": self.host})
            response = self.connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise BenchFailed(f"the quiet endpoint answered with {response.status}: {body!r}")
            taken.append(time.perf_counter() - due)
        self.connection.close()
        return statistics.quantiles(taken, n=100)[98]
