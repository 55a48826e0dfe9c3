"""Containers come and go with the work."""

import json

from support import web
from support.waiting import wait_until

APP = """
import modal, os, time
app = modal.App("scaling", image=modal.Image.debian_slim())

@app.function(scaledown_window=2, max_containers=3)
def who(seconds: float = 0.0) -> str:
    time.sleep(seconds)
    return os.environ["MODAL_TASK_ID"]

@app.function(min_containers=1)
def warm() -> str:
    return os.environ["MODAL_TASK_ID"]
"""


def containers(client):
    return json.loads(client.modal("container", "list", "--json").stdout)


def test_containers_are_started_for_work_and_stopped_without(client):
    client.work.joinpath("scaling.py").write_text(APP.replace("min_containers=1", "max_containers=1"))
    client.deploy("scaling.py")
    assert containers(client) == []
    code = (
        "import modal; f = modal.Function.from_name('scaling', 'who');"
        "print(len(set(f.map([1.0] * 12, order_outputs=False))))"
    )
    used = int(client.python(code).stdout)
    assert 2 <= used <= 3
    wait_until(lambda: containers(client) == [], "all containers to stop", 30)


def test_a_warm_container_waits_for_the_first_call(client):
    client.work.joinpath("scaling.py").write_text(APP)
    client.deploy("scaling.py")
    wait_until(lambda: containers(client), "the warm container to start")
    call = "import modal; print(modal.Function.from_name('scaling', 'warm').remote())"
    assert client.python(call).stdout.strip() in json.dumps(containers(client))


def test_a_web_endpoint_scales_to_nothing_and_back(client):
    app = client.app("fastapi_modal_app.py")
    app.write_text(app.read_text().replace("@app.function()", "@app.function(scaledown_window=2)"))
    url = client.deploy("fastapi_modal_app.py").url()
    assert containers(client) == []
    assert web.request(f"{url}/healthz").status == 200
    wait_until(lambda: containers(client) == [], "the container to stop", 30)
    assert web.request(f"{url}/healthz").status == 200
