"""The order of things: one server, one image, one comparison after the other, one table."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

from bench import calls, cold, deploy, idle, machine, web
from bench.bare import Image, environment_of, layers_of
from bench.machine import BenchFailed
from bench.report import Report, heading, say
from bench.server import BINARY, Server

ALL = ("cold", "web", "deploy", "calls", "idle")
LOG_TAIL = 30


def main(arguments: list[str]) -> int:
    unknown = set(arguments) - set(ALL)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    # As Ctrl-C does: what was started is stopped again.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    report = Report()
    try:
        with ExitStack() as cleanup:
            measure(arguments or list(ALL), report, cleanup)
    except (BenchFailed, OSError, subprocess.SubprocessError) as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    report.print_table()
    say(f"load average at the end: {os.getloadavg()[0]:.1f}")
    return 0


def measure(chosen: list[str], report: Report, cleanup: ExitStack) -> None:
    conditions = machine.prepare()
    for program in ("wrk", "runc", "taskset"):
        if shutil.which(program) is None:
            raise BenchFailed(f"{program} is missing; `make setup` installs it")
    if not BINARY.exists():
        raise BenchFailed(f"{BINARY} is missing; `make build` makes it")
    heading("Conditions")
    for line in conditions:
        say(line)
    server = Server()
    cleanup.callback(server.destroy)
    cleanup.push(print_log_of(server))
    server.start()
    say("deploying (the first time, this builds a Python image: some minutes)")
    server.deploy()
    server.get("cold", "/hello")
    container = server.containers()[0]
    cleanup.callback(machine.favour_container(container))
    image = Image(layers_of(container), environment_of(container))
    cleanup.callback(image.close)
    if "cold" in chosen:
        cold.measure(server, image, report)
    if "web" in chosen:
        web.measure(server, image, report)
    if "deploy" in chosen:
        deploy.measure(server, report)
    if "calls" in chosen:
        calls.measure(server)
    if "idle" in chosen:
        idle.measure(server, report)


def print_log_of(server: Server) -> Callable[..., None]:
    """Shows why something failed, before the log goes with the rest."""

    def on_exit(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and server.log_file.exists():
            tail = server.log_since(0).splitlines()[-LOG_TAIL:]
            print("--- end of the server's log", *tail, sep="\n", file=sys.stderr)

    return on_exit
