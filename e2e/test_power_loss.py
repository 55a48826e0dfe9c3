"""The power fails at any moment, and nothing is lost that was acknowledged.

A layer under the C library records what the server asks of its disk while a load generator writes a bit of everything
and notes each acknowledgement. Then the disk is built anew as a power cut would leave it, at many moments, and opened:
see powerloss/src/main.rs.
"""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import paths
from support.server import Platform

LOAD_SECONDS = 3
LONG_LOAD_SECONDS = 12
CALLERS = 4
BUILD_SECONDS = 1_800
REPLAY_SECONDS = 240
LONG_REPLAY_SECONDS = 3_600

# Moments looked at in the normal run. The long one cuts the power before every sync.
DROPS = 120
TEARS = 40
LONG_TEARS = 1_500
# A disk that lies is found out sooner or later; how often does not matter.
BROKEN_DROPS = 60

# Where disks are built: thousands of files are written and read again.
MEMORY = Path("/dev/shm")


@dataclass
class Recording:
    trace: Path
    root: Path
    acknowledged: list[Path]
    scratch: Path

    def replay(self, *options: str, limit: float = REPLAY_SECONDS) -> dict:
        command = [tool("ionian-powerloss"), "--trace", self.trace, "--root", self.root, "--scratch", self.scratch]
        for file in self.acknowledged:
            command += ["--acknowledged", file]
        done = run([*command, *options], limit)
        report = json.loads(done.stdout)
        print({name: value for name, value in report.items() if name != "lost"})
        return report


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    """What a server did on an empty data directory, from its first start on."""
    seconds = LONG_LOAD_SECONDS if is_long() else LOAD_SECONDS
    build_tools()
    folder = tmp_path_factory.mktemp("power-loss")
    layer = folder / "preload.so"
    source = paths.E2E / "powerloss" / "preload.c"
    run(["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", layer, source, "-ldl"], BUILD_SECONDS)
    found = Recording(
        trace=folder / "trace",
        root=folder / "state" / "data",
        acknowledged=[folder / "load", folder / "tokens"],
        scratch=(MEMORY if MEMORY.is_dir() else folder) / f"ionian-power-loss-{os.getpid()}",
    )
    found.root.mkdir(parents=True)
    settings = {
        "LD_PRELOAD": str(layer),
        "IONIAN_TRACE_FILE": str(found.trace),
        "IONIAN_TRACE_ROOT": str(found.root),
    }
    platform = Platform(folder / "state", settings)
    platform.start()
    try:
        token = new_token(platform, found.acknowledged[1])
        options = ["--callers", str(CALLERS), "--seconds", str(seconds)]
        command = [tool("ionian-loadgen"), "record", "--acknowledged", found.acknowledged[0], *options]
        load = subprocess.Popen(command, env=os.environ | token)
        while load.poll() is None:
            new_token(platform, found.acknowledged[1])
        assert load.returncode == 0, f"the load generator ended with {load.returncode}\n{platform.tail()}"
        # No orderly end: that would fold the log into the database, and every later cut would find it there.
        platform.kill()
    finally:
        if platform.is_running():
            platform.kill()
        platform.settings = {}
        platform.command("reap", "--data-dir", platform.data_dir)
    yield found
    subprocess.run(["rm", "-rf", found.scratch], check=False)


@pytest.mark.timeout(BUILD_SECONDS + LONG_REPLAY_SECONDS)
def test_what_was_acknowledged_outlives_a_power_cut(recording):
    if is_long():
        report = recording.replay("--tears", str(LONG_TEARS), limit=LONG_REPLAY_SECONDS)
    else:
        report = recording.replay("--drops", str(DROPS), "--tears", str(TEARS))
    assert report["acknowledged"] > 50, "the load did too little for the replay to mean anything"
    assert report["lost"] == []


@pytest.mark.timeout(BUILD_SECONDS + REPLAY_SECONDS)
@pytest.mark.parametrize("ignored", ["log", "blobs", "directories"])
def test_a_disk_that_forgets_its_syncs_is_noticed(recording, ignored):
    options = ["--drops", str(BROKEN_DROPS), "--tears", "0", "--failures", "1", "--ignore-syncs", ignored]
    assert recording.replay(*options)["lost"], f"without syncs of {ignored} something must be lost"


def new_token(platform: Platform, acknowledged: Path) -> dict[str, str]:
    token = platform.new_token()
    line = {"monotonic_ns": time.monotonic_ns(), "kind": "token", "token_id": token["MODAL_TOKEN_ID"]}
    with acknowledged.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return token


def is_long() -> bool:
    return os.environ.get("IONIAN_LONG_TESTS") == "1"


def build_tools() -> None:
    # All of the workspace, because its parts choose features of libraries together: else those would be built again.
    run(["cargo", "build", "--locked", "--workspace", "--bins"], BUILD_SECONDS)


def tool(name: str) -> Path:
    return paths.REPOSITORY / "target" / "debug" / name


def run(command: list[str | Path], limit: float) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=paths.REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done
