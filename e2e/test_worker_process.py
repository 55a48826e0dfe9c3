"""The worker as a process of its own: started, killed, frozen and started again apart from the server."""

import re

import pytest
from support import web
from support.waiting import wait_until
from support.worker import Worker

# The server gives a worker up after 30 s of silence.
SILENCE_SECONDS = 30
# From there to a container elsewhere, or here again.
AGAIN_SECONDS = 60


@pytest.fixture
def platform_settings():
    return {"IONIAN_WORKER_EMBEDDED": "false"}


@pytest.fixture
def worker(platform):
    worker = Worker(platform).start()
    yield worker
    worker.destroy()


def whoami(client) -> str:
    code = "import modal; print(modal.Function.from_name('own-worker', 'whoami').remote())"
    return client.python(code).stdout.strip()


def spawn_slow(client, seconds: float) -> str:
    code = f"import modal; print(modal.Function.from_name('own-worker', 'slow').spawn({seconds}).object_id)"
    return client.python(code).stdout.strip()


def result_of(client, call_id: str) -> str:
    code = f"import modal; print(modal.FunctionCall.from_id('{call_id}').get(timeout=90))"
    return client.python(code).stdout.strip()


def containers(client) -> set[str]:
    return set(re.findall(r"ta-[0-9A-Za-z]{22}", client.modal("container", "list", "--json").stdout))


def test_an_app_is_built_and_served_by_a_worker_of_its_own(client, worker):
    url = client.deploy("own_worker.py").url("hello")
    assert whoami(client).startswith("ta-")
    assert web.get_json(url)["container"].startswith("ta-")
    # What containers print takes the same way.
    wait_until(lambda: "a request came" in client.modal("app", "logs", "own-worker").output, "the log line")
    # The server itself has no containers, networks or layers.
    assert not (client.platform.data_dir / "containers").exists()


def test_a_killed_worker_finds_its_containers_again(client, worker):
    url = client.deploy("own_worker.py").url("hello")
    container, served_by = whoami(client), web.get_json(url)["container"]
    call_id = spawn_slow(client, 8.0)
    client.wait_for_log("own-worker", "sleeping")
    worker.kill()
    # Nobody needs the worker for a request to a container that runs.
    assert web.get_json(url)["container"] == served_by
    worker.start()
    assert whoami(client) == container
    assert web.get_json(url)["container"] == served_by
    assert result_of(client, call_id).startswith("ta-")
    wait_until(lambda: worker.log().count("a container was adopted") >= 3, "the adoption of all three")


def test_a_stopped_worker_leaves_its_containers_to_the_next(client, worker):
    client.deploy("own_worker.py")
    container = whoami(client)
    worker.stop()
    worker.start()
    assert whoami(client) == container


def test_a_killed_server_finds_its_worker_again(client, worker):
    platform = client.platform
    url = client.deploy("own_worker.py").url("hello")
    container, served_by = whoami(client), web.get_json(url)["container"]
    call_id = spawn_slow(client, 5.0)
    platform.kill()
    platform.start()
    assert whoami(client) == container
    assert web.get_json(url)["container"] == served_by
    assert result_of(client, call_id).startswith("ta-")


def test_both_are_killed_and_the_containers_go_on(client, worker):
    platform = client.platform
    client.deploy("own_worker.py")
    container = whoami(client)
    platform.kill()
    worker.kill()
    worker.start()
    platform.start()
    assert whoami(client) == container


@pytest.mark.slow
def test_a_worker_that_was_silent_for_too_long_is_fenced_off(client, worker):
    client.deploy("own_worker.py")
    container = whoami(client)
    before = spawn_slow(client, SILENCE_SECONDS + 15.0)
    wait_until(lambda: len(containers(client)) >= 3, "the slow call's container")
    old = containers(client)
    worker.freeze()
    wait_until(lambda: not old & containers(client), "the worker to be given up", 60)
    # Long enough for the slow call to end in its old container: that result is refused.
    worker.thaw()
    again = wait_until(lambda: (name := whoami(client)) != container and name, "another container", AGAIN_SECONDS)
    assert again.startswith("ta-")
    assert result_of(client, before) not in old
    # What the worker still had of before is gone.
    run_dirs = worker.data_dir / "worker" / "containers" / "run"
    wait_until(lambda: not old & {path.name for path in run_dirs.iterdir()}, "the old containers to end", AGAIN_SECONDS)


def test_a_stranger_does_not_become_a_worker(client, worker):
    stranger = Worker(client.platform, "stranger")
    stranger.write_token("wj-00.00")
    refused = stranger.run()
    assert refused.returncode != 0
    assert "ionian token new --worker" in refused.stderr
    client.platform.command("reap", "--data-dir", stranger.data_dir)
