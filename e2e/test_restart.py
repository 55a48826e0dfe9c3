"""The server is stopped, started, and killed, and users go on."""

import json
from pathlib import Path

import pytest
from support import web
from support.waiting import wait_until


@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_everything_is_still_there(client, way):
    platform = client.platform
    url = client.deploy("fastapi_modal_app.py").url()
    client.deploy("calls.py")
    client.modal("secret", "create", "kept", "A=1")
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}

    if way == "stopped":
        platform.stop()
    else:
        platform.kill()
    platform.start()

    # The same token, the same URL, nothing deployed again.
    assert web.get_json(f"{url}/hello?name=again") == {"message": "Hello, again!"}
    call = "import modal; print(modal.Function.from_name('calls', 'square').remote(5))"
    assert client.python(call).stdout.strip() == "25"
    listed = client.modal("app", "list", "--json").stdout
    assert "fastapi-on-modal" in listed
    assert "calls" in listed
    assert "kept" in client.modal("secret", "list", "--json").stdout
    # Images, too: deploying again builds nothing.
    assert "Step" not in client.deploy("fastapi_modal_app.py").output


def test_a_spawned_call_outlives_a_killed_server(client):
    platform = client.platform
    client.deploy("calls.py")
    spawn = "import modal; print(modal.Function.from_name('calls', 'slow').spawn(2.0).object_id)"
    call_id = client.python(spawn).stdout.strip()
    platform.kill()
    platform.start()
    get = f"import modal; print(modal.FunctionCall.from_id('{call_id}').get(timeout=90))"
    assert client.python(get).stdout.strip() == "done"


def test_a_killed_server_leaves_no_containers_behind(client):
    platform = client.platform
    client.deploy("calls.py")
    client.python("import modal; modal.Function.from_name('calls', 'slow').spawn(600.0)")
    wait_until(lambda: containers(client), "the container to run")
    platform.kill()
    reaped = platform.command("reap", "--data-dir", platform.data_dir)
    assert "nothing" in reaped.stdout
    state = platform.data_dir.resolve()
    assert str(state) not in Path("/proc/mounts").read_text()
    platform.start()


def test_reaping_a_running_server_is_refused(platform):
    refused = platform.command("reap", "--data-dir", platform.data_dir, ok=False)
    assert refused.returncode != 0
    assert refused.stderr.strip()
    assert platform.is_running()


def containers(client):
    return json.loads(client.modal("container", "list", "--json").stdout)
