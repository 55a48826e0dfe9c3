"""The disk fills up and is emptied again. Callers are told, nothing that was acknowledged is lost, and nobody has to
restart anything."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import web
from support.client import Client
from support.server import Platform
from support.waiting import wait_until

# For the database, blobs and logs of a test, and for what a container writes.
DISK_MIB = 64

SPAWN = """
import sys, modal
function = modal.Function.from_name("calls", "square")
try:
    print(function.spawn(int(sys.argv[1])).object_id)
except Exception as error:
    print(type(error).__name__, error)
"""

GET = """
import sys, modal
print(*[modal.FunctionCall.from_id(call_id).get(timeout=90) for call_id in sys.argv[1:]])
"""

# What is recorded as it is and not as a blob, and more than the database has room for without growing.
SIZE = 1_900_000
WEIGHING_SECONDS = 8.0
WEIGH = f"""
import modal
weigh = modal.Function.from_name("crash", "weigh")
print(*[weigh.spawn({WEIGHING_SECONDS}, {SIZE}).object_id for _ in range(4)])
"""
GET_SIZES = """
import sys, modal
print(*[len(modal.FunctionCall.from_id(call_id).get(timeout=90)) for call_id in sys.argv[1:]])
"""

UPLOAD = """
import modal
try:
    print(len(modal.Function.from_name("calls", "echo").remote(bytes(8_000_000))))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is small enough to fill."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.fixture
def small_platform(disk, start_platform, shared_images) -> Platform:
    return start_platform(data_dir=disk / "data")


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert shutil.disk_usage(disk).free == 0
    try:
        yield
    finally:
        filler.unlink()


def test_callers_are_told_and_work_goes_on_by_itself(small_platform, disk, tmp_path_factory):
    platform = small_platform
    platform.expect_error("a turn could not be recorded")
    platform.expect_error("log entries are lost")
    client = Client(platform, tmp_path_factory.mktemp("home"))
    client.deploy("calls.py")
    acknowledged = [client.python(SPAWN, str(x)).stdout.strip() for x in (2, 3)]
    assert client.python(GET, *acknowledged).stdout.split() == ["4", "9"]

    with filled(disk):
        for _ in range(2):
            refused = client.python(SPAWN, "4").stdout
            assert "disk is full" in refused, refused
            assert str(platform.data_dir) in refused, refused
        refused = client.modal("secret", "create", "late", "A=1", ok=False).words
        assert "disk is full" in refused, refused
        assert str(platform.data_dir) in refused, refused
        refused = client.python(UPLOAD).stdout
        assert "disk is full" in refused, refused
        # Reading goes on.
        assert client.python(GET, *acknowledged).stdout.split() == ["4", "9"]
        assert "calls" in client.modal("app", "list", "--json").stdout

    wait_until(lambda: "the database takes writes again" in platform.log(), "the server to go on")
    call_id = client.python(SPAWN, "5").stdout.strip()
    assert call_id.startswith("fc-"), call_id
    assert client.python(GET, *acknowledged, call_id).stdout.split() == ["4", "9", "25"]
    assert client.python(UPLOAD).stdout.strip() == "8000000"
    client.modal("secret", "create", "late", "A=1")


def test_results_wait_for_room(small_platform, disk, tmp_path_factory):
    """A container that finishes while nothing can be recorded keeps its result until it can."""
    platform = small_platform
    platform.expect_error("a turn could not be recorded")
    platform.expect_error("log entries are lost")
    client = Client(platform, tmp_path_factory.mktemp("home"))
    client.deploy("crash.py")
    spawned = client.python(WEIGH).stdout.split()
    client.wait_for_log("crash", "weighing")
    with filled(disk):
        # Of a result's blob the runtime says in its log that it was told to come back, and that cannot be kept either;
        # or the record is the first that finds no room.
        signs = ("log entries are lost", "a turn could not be recorded")
        wait_until(lambda: any(sign in platform.log() for sign in signs), "something to be refused", 60)
        # Long enough for the results, should it have been something else.
        time.sleep(WEIGHING_SECONDS + 2)
    assert client.python(GET_SIZES, *spawned).stdout.split() == [str(SIZE)] * len(spawned)
    # Recorded, and not only told: they are there after a crash.
    platform.kill()
    platform.start()
    assert client.python(GET_SIZES, *spawned).stdout.split() == [str(SIZE)] * len(spawned)


def test_web_endpoints_need_no_disk(small_platform, disk, tmp_path_factory):
    platform = small_platform
    platform.expect_error("a turn could not be recorded")
    platform.expect_error("log entries are lost")
    client = Client(platform, tmp_path_factory.mktemp("home"))
    url = client.deploy("fastapi_modal_app.py").url()
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}
    with filled(disk):
        for _ in range(20):
            assert web.get_json(f"{url}/healthz") == {"status": "ok"}
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}
