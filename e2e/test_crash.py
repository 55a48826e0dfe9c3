"""The server is killed while there is work, and nobody who works or waits has to know."""

import json
import os
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import web
from support.server import Platform
from support.waiting import wait_until

# How long the server is away: less than the client's patience (0.7 s), more, and much more.
AWAY_SECONDS = [0.3, 2.0, 10.0]

# As the client's own protocol counts it.
SUCCESS = 1

# What a careful user writes: what was not acknowledged is tried again.
PATIENCE = """
import sys, time, modal

def patiently(action, tries=100):
    for _ in range(tries):
        try:
            return action()
        except Exception as error:
            print("tried again after", repr(error), file=sys.stderr)
            time.sleep(0.2)
    return action()
"""

SPAWNS_AND_A_MAP = (
    PATIENCE
    + """
record = patiently(lambda: modal.Function.from_name("crash", "record").hydrate())
calls = []
for x in range(50):
    calls.append((x, patiently(lambda: record.spawn(x)).object_id))
    print("spawned", flush=True)
for x, call_id in calls:
    result = patiently(lambda: modal.FunctionCall.from_id(call_id).get(timeout=60))
    assert result == x * x, (x, result)
print("all spawns finished", flush=True)
total = 0
for number in record.map(range(200), order_outputs=False):
    total += number
    print("mapped", flush=True)
assert total == sum(x * x for x in range(200)), total
print("the map is complete", flush=True)
"""
)


GENERATOR = """
import modal
for number in modal.Function.from_name("crash", "count").remote_gen(30, 0.2):
    print("got", number, flush=True)
print("no more", flush=True)
"""


def identify(client, pause: float) -> str:
    """Starts a call, and returns its id once it runs."""
    code = f"import modal; print(modal.Function.from_name('crash', 'identify').spawn({pause}).object_id)"
    before = client.app_logs("crash").count("identifying")
    call_id = client.python(code).stdout.strip()
    wait_until(lambda: client.app_logs("crash").count("identifying") > before, "the call to run")
    return call_id


def containers(client) -> set[str]:
    # The client's versions name the column differently.
    return set(re.findall(r"ta-[0-9A-Za-z]{22}", client.modal("container", "list", "--json").stdout))


def result_of(client, call_id: str) -> dict:
    code = f"import json, modal; print(json.dumps(modal.FunctionCall.from_id('{call_id}').get(timeout=90)))"
    return json.loads(client.python(code).stdout)


def attempts(platform, call_id: str) -> list[int]:
    """The numbers of the attempts whose results were recorded."""
    rows = query(platform, "SELECT attempt FROM outputs WHERE call_id = ?", call_id)
    return [attempt for (attempt,) in rows]


def query(platform, statement: str, *values: str) -> list[tuple]:
    database = sqlite3.connect(f"file:{platform.data_dir / 'ionian.db'}?mode=ro", uri=True)
    try:
        return database.execute(statement, values).fetchall()
    finally:
        database.close()


def processes_of(container: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"MODAL_TASK_ID={container}\0".encode() in environment:
                yield int(entry.name)


def crash(platform, away: float = 0.0) -> None:
    platform.kill()
    time.sleep(away)
    platform.start()
    print(f"ready after {platform.start_seconds * 1e3:.0f} ms")


@pytest.mark.parametrize("away", AWAY_SECONDS)
def test_a_call_goes_on_in_its_container(each_client, away):
    client, platform = each_client, each_client.platform
    client.deploy("crash.py")
    # It ends before the server is there again, or after; its result arrives in both cases.
    call_id = identify(client, 4.0)
    (container,) = containers(client)
    crash(platform, away)
    result = result_of(client, call_id)
    assert result["container"] == container
    assert result["served"] == 1
    assert attempts(platform, call_id) == [0]
    # What it had in memory is there for the next call, too.
    again = result_of(client, identify(client, 0.0))
    assert (again["container"], again["born"], again["served"]) == (result["container"], result["born"], 2)


def test_a_container_outlives_several_crashes_in_a_row(client):
    client.deploy("crash.py")
    first = result_of(client, identify(client, 0.0))
    for _ in range(3):
        crash(client.platform)
    again = result_of(client, identify(client, 0.0))
    assert (again["container"], again["born"], again["served"]) == (first["container"], first["born"], 2)


def test_what_was_acknowledged_is_done_once(client):
    platform = client.platform
    client.deploy("crash.py")
    script = client.work / "spawns.py"
    script.write_text(SPAWNS_AND_A_MAP)
    running = client.start_python(script)
    try:
        wait_until(lambda: running.output.count("spawned") >= 20, "the first spawns", 60)
        crash(platform)
        running.wait_for("all spawns finished")
        wait_until(lambda: running.output.count("mapped") >= 20, "the first results of the map", 60)
        crash(platform)
        running.wait_for("the map is complete")
        assert running.wait() == 0
    finally:
        running.end()
    # Also what was recorded and not acknowledged, before the client tried again.
    unfinished = "SELECT count(*) FROM inputs WHERE NOT finished"
    wait_until(lambda: query(platform, unfinished) == [(0,)], "everything that was recorded to finish", 60)
    assert query(platform, "SELECT input_id FROM outputs GROUP BY input_id HAVING count(*) > 1") == []
    counts = "SELECT (SELECT count(*) FROM inputs), (SELECT count(*) FROM outputs)"
    ((inputs, outputs),) = query(platform, counts)
    assert inputs == outputs >= 250
    assert query(platform, "SELECT DISTINCT status FROM outputs") == [(SUCCESS,)]


def test_web_endpoints_answer_from_the_same_containers(client):
    platform = client.platform
    deployment = client.deploy("crash.py")
    site, server = deployment.url("site"), deployment.url("plain_server")
    first = web.get_json(f"{site}/whoami")
    assert web.request(server).status == 200
    before = containers(client)
    crash(platform)
    again = web.get_json(f"{site}/whoami")
    assert (again["container"], again["born"], again["served"]) == (first["container"], first["born"], 2)
    assert web.request(server).status == 200
    assert containers(client) == before


def test_a_container_that_died_meanwhile_is_replaced(client):
    platform = client.platform
    client.deploy("crash.py")
    call_id = identify(client, 15.0)
    (container,) = containers(client)
    platform.kill()
    killed = list(processes_of(container))
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    platform.start()
    result = result_of(client, call_id)
    assert result["container"] != container
    assert attempts(platform, call_id) == [1]


def test_a_generator_begins_anew_and_its_caller_misses_nothing(client):
    # The client reads values on when its connection breaks, but not when it is refused.
    with listening(client.platform) as platform:
        client.token["MODAL_SERVER_URL"] = platform.url
        client.deploy("crash.py")
        script = client.work / "generator.py"
        script.write_text(GENERATOR)
        running = client.start_python(script)
        try:
            running.wait_for("got 5")
            crash(platform)
            running.wait_for("no more")
        finally:
            running.end()
    assert re.findall(r"got (\d+)", running.output) == [str(number) for number in range(30)]


def test_a_container_that_cannot_reach_the_server_any_more_is_replaced(client):
    """Something else listens where the containers know the server."""
    platform = client.platform
    client.deploy("crash.py")
    first = result_of(client, identify(client, 0.0))
    platform.kill()
    (known,) = query(platform, "SELECT value FROM meta WHERE key = 'containers-url'")
    host, port = known[0].decode().removeprefix("http://").split(":")
    with socket.create_server((host, int(port))):
        platform.start()
    assert "choosing another port" in platform.log()
    again = result_of(client, identify(client, 0.0))
    assert again["container"] != first["container"]


def test_no_connection_is_refused_while_a_socket_waits_for_the_server(client):
    with listening(client.platform) as platform:
        platform.kill()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(web.request, f"{platform.url}/_blobs/v1/get/none/0")
            time.sleep(0.5)
            assert not waiting.done()
            platform.start()
            assert waiting.result().status in (403, 404)


@contextmanager
def listening(platform) -> Iterator[Platform]:
    """Passes the server a socket that outlives it, as systemd does."""
    platform.stop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        platform.socket = listener
        platform.start()
        assert platform.port == listener.getsockname()[1]
        yield platform
        platform.stop()
    platform.socket = None
