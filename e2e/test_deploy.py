"""A user deploys apps, lists them, stops them and deploys them again."""

import json
import urllib.request
import uuid

from support import paths, web
from support.waiting import wait_until


def value(row, *names):
    """Column names of `modal app list --json` differ between client versions."""
    return next(row[name] for name in names if name in row)


def apps(client):
    rows = json.loads(client.modal("app", "list", "--json").stdout)
    normalised = [{key.lower().replace(" ", "_"): cell for key, cell in row.items()} for row in rows]
    return {value(row, "description", "name"): row["state"] for row in normalised}


def test_the_fastapi_article_works_as_written(each_client):
    """Seed 000, up to its DNS step."""
    deployment = each_client.deploy("fastapi_modal_app.py")
    assert "App deployed" in deployment.output
    url = deployment.url("fastapi-app")
    assert url.split("//")[1].startswith("ionian--fastapi-on-modal-fastapi-app.localhost:")
    assert web.get_json(f"{url}/healthz") == {"status": "ok"}
    assert web.get_json(f"{url}/hello?name=Modal") == {"message": "Hello, Modal!"}
    assert web.get_json(f"{url}/hello") == {"message": "Hello, world!"}
    assert each_client.platform.port == int(url.rsplit(":", 1)[1])


def test_a_module_is_deployed_like_a_file(each_client):
    each_client.app("fastapi_modal_app.py")
    deployment = each_client.deploy("fastapi_modal_app", "-m")
    assert web.get_json(f"{deployment.url()}/hello?name=module") == {"message": "Hello, module!"}


def test_apps_are_listed_with_their_state(each_client):
    each_client.deploy("calls.py")
    assert apps(each_client) == {"calls": "deployed"}


def test_a_stopped_app_is_gone(client):
    url = client.deploy("fastapi_modal_app.py").url()
    assert web.request(f"{url}/healthz").status == 200
    client.modal("app", "stop", "--yes", "fastapi-on-modal")
    assert apps(client)["fastapi-on-modal"] == "stopped"
    gone = web.request(f"{url}/healthz")
    assert gone.status == 404
    assert url.removeprefix("http://").split(":")[0] in gone.text
    look_up = "import modal; modal.Function.from_name('fastapi-on-modal', 'fastapi_app').hydrate()"
    assert "NotFoundError" in client.python(look_up, ok=False).output
    # Its containers end, too.
    wait_until(lambda: not json.loads(client.modal("container", "list", "--json").stdout), "no container to be listed")


def test_a_stopped_app_can_be_deployed_again(client):
    client.deploy("calls.py")
    client.modal("app", "stop", "--yes", "calls")
    client.deploy("calls.py")
    call = "import modal; print(modal.Function.from_name('calls', 'square').remote(7))"
    assert client.python(call).stdout.strip() == "49"


def test_deploying_the_same_image_again_builds_nothing(client):
    marker = uuid.uuid4().hex
    client.app("small_image.py", MARKER=marker)
    said = f"this step says {marker}"
    first = client.deploy("small_image.py")
    assert said in first.output
    layers_before = layers()
    again = client.deploy("small_image.py")
    assert said not in again.output
    assert "Step" not in again.output
    assert layers() == layers_before


def layers():
    """Every folder a layer could be in, by name and time: a rebuilt layer would be seen as well as a new one."""
    return {
        (str(path), path.stat().st_mtime_ns)
        for pattern in ("*", "*/*", "*/*/*")
        for path in paths.IMAGES.glob(pattern)
        if path.is_dir() and "fs" not in path.parts[len(paths.IMAGES.parts) :]
    }


def test_an_edited_app_answers_with_the_new_code(client):
    url = client.deploy("fastapi_modal_app.py").url()
    assert web.get_json(f"{url}/hello") == {"message": "Hello, world!"}
    source = client.work / "fastapi_modal_app.py"
    source.write_text(source.read_text().replace("Hello, ", "Goodbye, "))
    assert client.deploy("fastapi_modal_app.py").url() == url

    def answers_new():
        # Never an error in between: old containers drain, new ones start.
        answer = web.get_json(f"{url}/hello")
        return answer == {"message": "Goodbye, world!"}

    wait_until(answers_new, "the new code to answer")


def test_the_name_resolves_and_answers(client):
    """Through the resolver, as curl and browsers do it; the other tests connect to the address."""
    url = client.deploy("fastapi_modal_app.py").url()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/hello?name=resolver", timeout=web.REQUEST_SECONDS) as response:
        assert json.load(response) == {"message": "Hello, resolver!"}
