"""Cores, processes and clocks of the machine that everything runs on."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

# The app has a core for itself; whatever stands in front of it shares the other one with the load generator. A
# single-threaded app is then the bottleneck on both sides of the comparison, as it is on any machine with more cores.
LOAD_CORE, APP_CORE = 0, 1
BOTH_CORES = (LOAD_CORE, APP_CORE)

# So that other work on a shared machine weighs less: priority counts between processes of one session, sessions have
# priorities among each other, and a container has a share of its own, whatever the priorities inside of it.
NICENESS = -20
CPU_SHARES = 262144
CPU_WEIGHT = 10000

# For what takes a second or two; a machine that is busy elsewhere takes longer.
WAIT_SECONDS = 60


T = TypeVar("T")


class BenchFailed(Exception):
    """Something did not work, so there is nothing to measure."""


def prepare() -> list[str]:
    """Claims what the measurements need; returns lines that say under which conditions they were taken."""
    if os.geteuid() != 0:
        raise BenchFailed("benches need root: for containers, and to pin what runs in them")
    if not set(BOTH_CORES) <= os.sched_getaffinity(0):
        raise BenchFailed(f"benches need the cores {BOTH_CORES}, and may only use {os.sched_getaffinity(0)}")
    # Inherited by all that is started from here.
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    _write_if_there(Path("/proc/self/autogroup"), str(NICENESS))
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "?")
    return [
        f"{os.cpu_count()} cores ({model}), Linux {os.uname().release}",
        f"all that is measured runs at nice {NICENESS}, and containers have the largest share of the CPU that there is",
        f"load average at the beginning: {os.getloadavg()[0]:.1f}",
    ]


def pin(pids: Iterable[int], cores: Iterable[int]) -> None:
    """All threads of the processes; those that they start later inherit it."""
    wanted = set(cores)
    for pid in pids:
        # A thread that is started meanwhile by one not yet pinned is found by the next look.
        while True:
            loose = [thread for thread in _threads(pid) if _affinity(thread) not in (None, wanted)]
            if not loose:
                break
            for thread in loose:
                try:
                    os.sched_setaffinity(thread, wanted)
                except ProcessLookupError:
                    continue


def favour_container(pid: int) -> Callable[[], None]:
    """Gives a container, and with it all others of its platform, the largest share; returns what takes it back."""
    before: dict[Path, str] = {}
    for line in _lines(f"/proc/{pid}/cgroup"):
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            top, name, share = Path("/sys/fs/cgroup/cpu"), "cpu.shares", CPU_SHARES
        elif not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            top, name, share = Path("/sys/fs/cgroup"), "cpu.weight", CPU_WEIGHT
        else:
            continue
        folder = top / path.lstrip("/")
        while folder != top:
            file = folder / name
            if file.exists():
                before[file] = file.read_text()
                file.write_text(str(share))
            folder = folder.parent

    def take_back() -> None:
        for file, share in before.items():
            # Most have gone with their containers.
            _write_if_there(file, share)

    return take_back


def descendants(pid: int) -> Iterator[int]:
    for thread in _threads(pid):
        for line in _lines(f"/proc/{pid}/task/{thread}/children"):
            for child in map(int, line.split()):
                yield child
                yield from descendants(child)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_seconds(pid: int) -> float:
    """By the process's own clock, which counts nanoseconds where /proc counts hundredths of a second."""
    process_clock_scheduled = 2
    return time.clock_gettime(~pid << 3 | process_clock_scheduled)


def resident_mb(pid: int) -> float:
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchFailed(f"process {pid} is gone")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], T], what: str, seconds: float = WAIT_SECONDS) -> T:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise BenchFailed(f"waited for {seconds:g} s in vain for {what}")
        time.sleep(0.01)
    return result


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return []


def _affinity(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None


def _write_if_there(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except FileNotFoundError:
        return


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
