"""What the server takes while it has nothing to do."""

import time

from bench import machine
from bench.report import Report, heading, say
from bench.server import Server

SECONDS = 20
# Connections that were just closed and containers that just ended are still being cleared away.
SETTLE_SECONDS = 3

MAX_RESIDENT_MB = 80
MAX_CPU = 0.005


def measure(server: Server, report: Report) -> None:
    heading(f"The idle server over {SECONDS} s, with one deployed app scaled to zero, after all of the above")
    server.wait_for_no_container()
    time.sleep(SETTLE_SECONDS)
    began, cpu = time.monotonic(), machine.cpu_seconds(server.pid)
    time.sleep(SECONDS)
    share = (machine.cpu_seconds(server.pid) - cpu) / (time.monotonic() - began)
    resident = machine.resident_mb(server.pid)
    say(f"{resident:.0f} MB resident, {share:.3%} of one core")
    report.promise(f"idle: resident memory <= {MAX_RESIDENT_MB} MB", f"{resident:.0f} MB", resident <= MAX_RESIDENT_MB)
    report.promise(f"idle: CPU < {MAX_CPU:.1%}", f"{share:.3%}", share < MAX_CPU)
