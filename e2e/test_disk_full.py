"""The disk fills up and is emptied again. Callers are told, nothing that was acknowledged is lost, and nobody has to
restart anything."""

import contextlib
import shutil
import subprocess
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


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert shutil.disk_usage(disk).free == 0
    return filler


def test_callers_are_told_and_work_goes_on_by_itself(small_platform, disk, tmp_path_factory):
    platform = small_platform
    platform.expect_error("a turn could not be recorded")
    platform.expect_error("log entries are lost")
    client = Client(platform, tmp_path_factory.mktemp("home"))
    client.deploy("calls.py")
    acknowledged = [client.python(SPAWN, str(x)).stdout.strip() for x in (2, 3)]
    assert client.python(GET, *acknowledged).stdout.split() == ["4", "9"]

    filler = fill(disk)
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

    filler.unlink()
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
    client.deploy("calls.py")
    spawn = "import modal; print(modal.Function.from_name('calls', 'slow').spawn(3.0).object_id)"
    call_id = client.python(spawn).stdout.strip()
    wait_until(lambda: "ta-" in client.modal("container", "list", "--json").stdout, "the call to run")
    filler = fill(disk)
    wait_until(lambda: "a turn could not be recorded" in platform.log(), "the result to arrive")
    filler.unlink()
    assert client.python(GET, call_id).stdout.strip() == "done"
    # Recorded, and not only told: it is there after a crash.
    platform.kill()
    platform.start()
    assert client.python(GET, call_id).stdout.strip() == "done"


def test_web_endpoints_need_no_disk(small_platform, disk, tmp_path_factory):
    platform = small_platform
    platform.expect_error("log entries are lost")
    client = Client(platform, tmp_path_factory.mktemp("home"))
    url = client.deploy("fastapi_modal_app.py").url()
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}
    filler = fill(disk)
    for _ in range(20):
        assert web.get_json(f"{url}/healthz") == {"status": "ok"}
    filler.unlink()
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}
