"""A user's image definitions, and what becomes of them."""

import json
import re
import uuid

import pytest
from support.client import Client

BUILDERS = ["2025.06", "2024.10"]


def write_user_files(client):
    (client.work / "notes.txt").write_text("remember the milk\n")
    (client.work / "pictures").mkdir()
    for name in ("one.png", "two.png"):
        (client.work / "pictures" / name).write_bytes(b"png")
    (client.work / "user_package").mkdir()
    (client.work / "user_package" / "__init__.py").write_text("ANSWER = 42\n")


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_kind_of_step_is_in_the_image(start_platform, shared_images, builder):
    platform = start_platform({"IONIAN_IMAGES_BUILDER_VERSION": builder})
    client = Client(platform, platform.state / "home")
    write_user_files(client)
    marker = uuid.uuid4().hex
    client.app("built_image.py", MARKER=marker)
    deployed = client.deploy("built_image.py")
    # The build's own output, live.
    assert f"this step says {marker}" in deployed.output
    code = "import modal, json; print(json.dumps(modal.Function.from_name('built-image', 'look').remote()))"
    printed = client.python(code).stdout
    assert json.loads(printed) == {
        "hello": "Hello, world!",
        "humanize": "1,234,567",
        "env": "set",
        "workdir": "/made",
        "by_run": marker,
        "notes": "remember the milk\n",
        "late": "remember the milk\n",
        "pictures": ["one.png", "two.png"],
        "package": 42,
    }


def test_an_image_is_built_once_when_two_ask_at_the_same_time(platform, tmp_path):
    marker = uuid.uuid4().hex
    said = f"this step says {marker}"
    runs = []
    for number in range(2):
        client = Client(platform, tmp_path / f"user{number}")
        client.app("small_image.py", MARKER=marker)
        runs.append(client.start("deploy", "--name", f"app{number}", "small_image.py"))
    try:
        assert [run.wait(300) for run in runs] == [0, 0], "".join(run.output for run in runs)
    finally:
        for run in runs:
            run.end()
    # Both may watch the one build; the step itself ran once, which its marker file's layer shows.
    assert any(said in run.output for run in runs)
    look = "import modal; print(modal.Function.from_name('app{}', 'marker').remote())"
    assert [client.python(look.format(number)).stdout.strip() for number in range(2)] == [marker, marker]
    executed = re.findall(rf"(?m)^.*echo this step says {marker}.*$", platform.log())
    assert len(executed) <= 1, executed


def test_another_python_than_the_users_own(client):
    client.work.joinpath("old.py").write_text(
        "import sys, modal\n"
        "app = modal.App('old', image=modal.Image.debian_slim(python_version='3.13'))\n"
        "@app.function()\n"
        "def version(): return list(sys.version_info[:2])\n"
    )
    client.deploy("old.py", timeout=900)
    code = "import modal; print(modal.Function.from_name('old', 'version').remote())"
    assert client.python(code).stdout.strip() == "[3, 13]"


def test_the_users_own_packages_win(client):
    """The client's dependencies are there without touching what the user installed."""
    client.work.joinpath("pinned.py").write_text(
        "import modal\n"
        "image = modal.Image.debian_slim().pip_install('attrs==22.2.0', 'h11==0.14.0')\n"
        "app = modal.App('pinned', image=image)\n"
        "@app.function()\n"
        "def versions():\n"
        "    from importlib.metadata import version\n"
        "    return [version('attrs'), version('h11')]\n"
    )
    client.deploy("pinned.py")
    code = "import modal; print(modal.Function.from_name('pinned', 'versions').remote())"
    assert client.python(code).stdout.strip() == "['22.2.0', '0.14.0']"
