"""The kill matrix: server, worker and containers die by SIGKILL at random moments while users map and spawn.

    python -m chaos.matrix [--rounds 50] [--map 5000] [--spawns 1000] [--seed N] [--separate-worker]

Then: nothing that was acknowledged is lost, nothing is recorded twice, every result is right. Prints a table with
figures and exits with 0, or says what broke and keeps the state directory.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support import paths, web
from support.client import BUILD_SECONDS, Client
from support.server import Platform
from support.waiting import wait_until
from support.worker import Worker

LOAD = Path(__file__).with_name("load.py")
# Between two kills: short enough to hit recoveries, long enough that work gets done.
PAUSE_SECONDS = (0.1, 2.5)
# After the last kill, everything that was accepted must come to its end.
REST_SECONDS = 600
SERVING_SECONDS = 30


@dataclass
class Figures:
    kills: dict[str, int] = field(default_factory=dict)
    # Of a server whose container of the endpoint lived, and where that had been killed, too: a cold start.
    recoveries: list[float] = field(default_factory=list)
    recoveries_with_start: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--map", type=int, default=5000)
    parser.add_argument("--spawns", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--separate-worker", action="store_true", help="the worker is a process of its own")
    options = parser.parse_args()
    print(f"seed {options.seed}; again with: python -m chaos.matrix --seed {options.seed}", flush=True)
    state = paths.STATE / f"chaos-{uuid.uuid4().hex[:6]}"
    settings = {"IONIAN_WORKER_EMBEDDED": "false"} if options.separate_worker else {}
    platform = Platform(state, settings)
    figures = Figures()
    try:
        platform.start()
        worker = Worker(platform).start() if options.separate_worker else None
        try:
            run(platform, worker, options, figures)
        finally:
            if worker:
                worker.destroy()
    finally:
        platform.destroy()
    report(options, figures)
    if figures.problems:
        print(f"state kept in {state}")
        return 1
    shutil.rmtree(state)
    return 0


def run(platform: Platform, worker: Worker | None, options: argparse.Namespace, figures: Figures) -> None:
    client = Client(platform, platform.state / "home")
    url = client.deploy("chaos.py", timeout=BUILD_SECONDS).url()
    container = serving(url)
    chance = random.Random(options.seed)
    data_dirs = [platform.data_dir] + ([worker.data_dir] if worker else [])
    victims = ["server", "container"] + (["worker"] if worker else [])
    mapping, spawning = Users(client, "map", options.map), Users(client, "spawn", options.spawns)
    started = time.monotonic()
    for _ in range(options.rounds):
        time.sleep(chance.uniform(*PAUSE_SECONDS))
        victim = chance.choice(victims)
        if victim == "server":
            platform.kill()
            began = time.monotonic()
            platform.start()
            before, container = container, serving(url)
            times = figures.recoveries if container == before else figures.recoveries_with_start
            times.append(time.monotonic() - began)
        elif victim == "worker":
            assert worker is not None
            worker.kill()
            worker.start()
        elif not kill_container(data_dirs, chance):
            continue
        figures.kills[victim] = figures.kills.get(victim, 0) + 1
    print(f"{options.rounds} rounds in {time.monotonic() - started:.0f} s; waiting for the users", flush=True)
    for users in (mapping, spawning):
        users.wait(figures)
    verify(platform, client, spawning, options, figures)


def serving(url: str) -> str:
    """Waits until an HTTP request is answered by the app, and tells by which container."""
    deadline = time.monotonic() + SERVING_SECONDS
    while True:
        with contextlib.suppress(Exception):
            return web.get_json(url)["container"]
        if time.monotonic() > deadline:
            raise AssertionError(f"{url} did not answer within {SERVING_SECONDS} s of a kill")
        time.sleep(0.01)


def kill_container(data_dirs: list[Path], chance: random.Random) -> bool:
    """Kills the first process of a random container of this platform; false if there is none."""
    found = sorted(container_processes(data_dirs))
    if not found:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(found), signal.SIGKILL)
    return True


def container_processes(data_dirs: list[Path]) -> Iterator[int]:
    """First processes of containers: number 1 in their own namespace, with mounts from these directories."""
    wanted = [str(path.resolve()).encode() for path in data_dirs]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
            numbers = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            mounts = (entry / "mountinfo").read_bytes()
        except (OSError, StopIteration):
            continue
        if len(numbers) > 1 and numbers[-1] == "1" and any(path in mounts for path in wanted):
            yield int(entry.name)


class Users:
    """A process of the client under load."""

    def __init__(self, client: Client, kind: str, count: int) -> None:
        self.kind = kind
        self.count = count
        self.output = client.home / f"{kind}.out"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [paths.client_python(client.version), LOAD, kind, str(count)],
                cwd=client.work,
                env=client.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, figures: Figures) -> None:
        try:
            code = self.process.wait(REST_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = None
        if code != 0:
            tail = self.output.read_text(errors="replace")[-3000:]
            figures.problems.append(f"{self.kind}: the client ended with {code}\n{tail}")

    def spawned(self) -> dict[int, str]:
        words = [line.split() for line in self.output.read_text(errors="replace").splitlines()]
        return {int(word[1]): word[2] for word in words if len(word) == 3 and word[0] == "spawned"}


def verify(platform: Platform, client: Client, spawning: Users, options: argparse.Namespace, figures: Figures) -> None:
    spawned = spawning.spawned()
    if len(spawned) != options.spawns:
        figures.problems.append(f"only {len(spawned)} of {options.spawns} spawns were acknowledged")
    # All results, by the way that a user takes.
    gather = (
        "import sys, modal\n"
        "wrong = 0\n"
        "for line in sys.stdin:\n"
        "    number, call = line.split()\n"
        "    wrong += modal.FunctionCall.from_id(call).get(timeout=60) != 2 * int(number)\n"
        "print(wrong)\n"
    )
    done = subprocess.run(
        [paths.client_python(client.version), "-c", gather],
        cwd=client.work,
        env=client.environment(),
        input="".join(f"{number} {call}\n" for number, call in spawned.items()),
        capture_output=True,
        text=True,
        timeout=REST_SECONDS,
        check=False,
    )
    if done.stdout.strip() != "0":
        figures.problems.append(f"spawned results: {done.stdout}{done.stderr[-3000:]}")
    wait_until(lambda: unfinished(platform) == 0, "all accepted inputs to finish", REST_SECONDS)
    with database(platform) as connection:
        # An input has one row at most, by the table's key; a result that was recorded twice shows as a second
        # sequence number, and one that is lost as an input without a row.
        lost = connection.execute(
            "SELECT count(*) FROM inputs LEFT JOIN outputs ON outputs.input_id = inputs.id "
            "WHERE inputs.finished AND outputs.input_id IS NULL"
        ).fetchone()[0]
        gaps = connection.execute(
            "SELECT count(*) FROM calls WHERE last_sequence != "
            "(SELECT count(*) FROM outputs WHERE outputs.call_id = calls.id) OR finished_count != input_count"
        ).fetchone()[0]
        doubled = connection.execute(
            "SELECT count(*) FROM (SELECT 1 FROM inputs GROUP BY call_id, input_index HAVING count(*) > 1)"
        ).fetchone()[0]
        failed = connection.execute("SELECT count(*) FROM outputs WHERE status != 1").fetchone()[0]
        known = {row[0] for row in connection.execute("SELECT id FROM calls")}
        again = connection.execute("SELECT count(*) FROM outputs WHERE attempt > 0").fetchone()[0]
    missing = [call for call in spawned.values() if call not in known]
    for count, what in [
        (lost, "finished inputs without an outcome"),
        (gaps, "calls whose outcomes and inputs differ"),
        (doubled, "inputs recorded twice"),
        (failed, "inputs that did not succeed"),
        (len(missing), "acknowledged spawns that the record does not know"),
    ]:
        print(f"{count} {what}", flush=True)
        if count:
            figures.problems.append(f"{count} {what}")
    print(f"{again} results came from a later attempt than the first", flush=True)


@contextlib.contextmanager
def database(platform: Platform) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"file:{platform.data_dir}/ionian.db?mode=ro", uri=True, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def unfinished(platform: Platform) -> int:
    with database(platform) as connection:
        return connection.execute("SELECT count(*) FROM inputs WHERE NOT finished").fetchone()[0]


def report(options: argparse.Namespace, figures: Figures) -> None:
    kills = ", ".join(f"{count} x {victim}" for victim, count in sorted(figures.kills.items()))
    print(f"killed: {kills}")
    for times, what in [
        (figures.recoveries, "server killed to app answering again"),
        (figures.recoveries_with_start, "the same, where its container had been killed, too"),
    ]:
        if times:
            median, worst = statistics.median(times), max(times)
            print(f"{what}: median {median:.2f} s, worst {worst:.2f} s of {len(times)}")
    for problem in figures.problems:
        print(f"FAILED {problem}")
    verdict = "0 lost, 0 recorded twice" if not figures.problems else f"{len(figures.problems)} problems"
    print(f"chaos: map of {options.map}, {options.spawns} spawns, {options.rounds} rounds: {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
