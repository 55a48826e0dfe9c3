"""gVisor, for single functions and for all: the same as on runc, on a kernel of their own."""

import json
import os
import re
import signal
import uuid
from pathlib import Path

import pytest
from support import web
from support.client import BUILD_SECONDS, Client
from support.gvisor import HAS_GVISOR
from support.waiting import wait_until
from support.worker import Worker

pytestmark = pytest.mark.skipif(not HAS_GVISOR, reason="this machine has no runsc; `make setup` installs it")

# Sandboxes start in two or three seconds here, and their calls of the kernel are slow without hardware for it.
SLOW_SECONDS = 180


def call(client, function, *arguments, app="gvisor"):
    code = (
        "import json, modal, sys;"
        f"print(json.dumps(modal.Function.from_name('{app}', '{function}').remote(*json.loads(sys.argv[1]))))"
    )
    return json.loads(client.python(code, json.dumps(arguments), timeout=SLOW_SECONDS).stdout)


def refused(client, runtime: str) -> str:
    """Deploys a function with this runtime, and gives the client's words."""
    app = client.app("one_runtime.py", RUNTIME=runtime)
    return client.modal("deploy", app, ok=False, timeout=BUILD_SECONDS).words


def spawn(client, function: str, pause: float) -> str:
    """Starts a call, and returns its id once it runs."""
    code = f"import modal; print(modal.Function.from_name('gvisor', '{function}').spawn({pause}).object_id)"
    before = client.app_logs("gvisor").count("identifying")
    call_id = client.python(code).stdout.strip()
    wait_until(lambda: client.app_logs("gvisor").count("identifying") > before, "the call to run", SLOW_SECONDS)
    return call_id


def result_of(client, call_id: str) -> dict:
    code = f"import json, modal; print(json.dumps(modal.FunctionCall.from_id('{call_id}').get(timeout=90)))"
    return json.loads(client.python(code, timeout=SLOW_SECONDS).stdout)


def processes_of_sandbox(container: str, word: str = "runsc") -> list[int]:
    """The programs of a container's sandbox: what runs it, or only what `word` names (`boot` is the kernel)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if all(text in command for text in (b"runsc", word.encode(), container.encode())):
                found.append(int(entry.name))
    return found


# By function, beside runc.


def test_functions_choose_gvisor(each_client):
    client = each_client
    client.deploy("gvisor.py")
    assert call(client, "plain_kernel") == "host"
    assert call(client, "sandboxed_kernel") == "gvisor"
    client.wait_for_log("gvisor", "looking around")
    code = "import modal; print(list(modal.Function.from_name('gvisor', 'squares').remote_gen(3)))"
    values = client.python(code, timeout=SLOW_SECONDS).stdout.strip()
    assert values == "[(0, 'gvisor'), (1, 'gvisor'), (4, 'gvisor')]"
    code = (
        "import modal; counter = modal.Cls.from_name('gvisor', 'Counter')(start=1);"
        "print(counter.add.remote(2), list(counter.add.map([1, 1, 1])))"
    )
    added = client.python(code, timeout=SLOW_SECONDS).stdout.strip()
    assert added == "[3, 'gvisor'] [[4, 'gvisor'], [5, 'gvisor'], [6, 'gvisor']]"


def test_a_web_endpoint_is_served_from_a_sandbox(client):
    deployment = client.deploy("gvisor.py")
    url = deployment.url("site")
    assert web.get_json(f"{url}/whoami")["kernel"] == "gvisor"
    answer = web.request(deployment.url("plain_server"))
    assert (answer.status, "Directory listing" in answer.text) == (200, True)
    pieces = web.stream(f"{url}/stream")
    assert next(pieces)[1] == b"first"
    # The rest is only made once this second request has come.
    assert web.request(f"{url}/go-on", "POST").status == 200
    assert b"".join(piece for _, piece in pieces) == b"second"


def test_what_a_user_does_wrong_in_a_sandbox_is_told_from_its_death(client):
    client.deploy("gvisor.py")

    def fails(how: str) -> str:
        code = f"import modal; modal.Function.from_name('gvisor', 'fail').remote('{how}')"
        return client.python(code, ok=False, timeout=SLOW_SECONDS).output

    assert "ValueError: a mistake of the user" in fails("raise")
    assert "exited with code 7" in fails("exit")
    assert "killed by signal 11" in fails("signal")
    # None of it is the platform's end.
    assert call(client, "sandboxed_kernel") == "gvisor"


def test_a_call_whose_sandbox_is_killed_runs_again_in_another(client):
    platform = client.platform
    client.deploy("gvisor.py")
    first = result_of(client, spawn(client, "identify_sandboxed", 0.0))["container"]
    call_id = spawn(client, "identify_sandboxed", 20.0)
    for pid in processes_of_sandbox(first, "boot"):
        os.kill(pid, signal.SIGKILL)
    result = result_of(client, call_id)
    assert result["container"] != first
    assert (result["kernel"], result["served"]) == ("gvisor", 1)
    assert "killed by signal 9" in platform.log()


@pytest.mark.parametrize("runtime", ["kata", "process", ""])
def test_an_unknown_runtime_is_refused_at_deploy(each_client, runtime):
    assert "the runtimes are runc and gvisor" in refused(each_client, runtime)


def test_an_unknown_option_of_ours_is_refused_at_deploy(client):
    app = client.app("one_runtime.py", **{"ionian.runtime": "ionian.runtimes"})
    words = client.modal("deploy", app, ok=False, timeout=BUILD_SECONDS).words
    assert "no experimental option 'ionian.runtimes'" in words


# Where it is not there.


@pytest.fixture
def without_gvisor(start_platform, shared_images):
    platform = start_platform({"IONIAN_RUNTIME_RUNSC": "/nonexistent/runsc"})
    return Client(platform, platform.state / "home")


def test_a_server_without_gvisor_refuses_it_at_deploy(without_gvisor):
    assert "no worker of this server has the runtime gvisor; there is runc" in refused(without_gvisor, "gvisor")
    # What asks for what is there, or for nothing, runs.
    without_gvisor.deploy(without_gvisor.app("one_runtime.py", RUNTIME="runc"))
    assert call(without_gvisor, "kernel", app="one-runtime") == "host"


def test_containers_go_to_the_worker_that_has_their_runtime(start_platform, shared_images):
    platform = start_platform({"IONIAN_WORKER_EMBEDDED": "false"})
    client = Client(platform, platform.state / "home")
    plain = Worker(platform, "plain", {"IONIAN_RUNTIME_RUNSC": "/nonexistent/runsc"}).start()
    sandboxing = Worker(platform, "sandboxing")
    try:
        wait_until(lambda: "a worker connected" in platform.log(), "the first worker")
        assert "there is runc" in refused(client, "gvisor")
        sandboxing.start()
        wait_until(lambda: platform.log().count("a worker connected") == 2, "the second worker")
        client.deploy("gvisor.py")
        first = result_of(client, spawn(client, "identify_sandboxed", 0.0))
        assert first["kernel"] == "gvisor"
        assert sandboxing.has_container(first["container"])
        # It is found again by the next process of the worker.
        sandboxing.kill()
        sandboxing.start()
        again = result_of(client, spawn(client, "identify_sandboxed", 0.0))
        assert (again["container"], again["born"], again["served"]) == (first["container"], first["born"], 2)
        # Once nobody has it any more, that is said, and the call waits for somebody.
        sandboxing.destroy()
        client.deploy("gvisor.py", "--tag", "again")
        code = "import modal; print(modal.Function.from_name('gvisor', 'sandboxed_kernel').spawn().object_id)"
        call_id = client.python(code).stdout.strip()
        client.wait_for_log("gvisor", "no worker of this server has the runtime gvisor", SLOW_SECONDS)
        sandboxing.start()
        code = f"import modal; print(modal.FunctionCall.from_id('{call_id}').get(timeout=90))"
        assert client.python(code, timeout=SLOW_SECONDS).stdout.strip() == "gvisor"
    finally:
        plain.destroy()
        sandboxing.destroy()


# A crash of the server.


def test_containers_of_both_runtimes_outlive_a_killed_server(each_client):
    client, platform = each_client, each_client.platform
    url = client.deploy("gvisor.py").url("site")
    site = web.get_json(f"{url}/whoami")
    calls = {name: spawn(client, name, 6.0) for name in ("identify_plain", "identify_sandboxed")}
    platform.kill()
    platform.start()
    first = {name: result_of(client, call_id) for name, call_id in calls.items()}
    assert {name: result["served"] for name, result in first.items()} == dict.fromkeys(calls, 1)
    assert first["identify_plain"]["kernel"] == "host"
    assert first["identify_sandboxed"]["kernel"] == "gvisor"
    for name in calls:
        again = result_of(client, spawn(client, name, 0.0))
        assert (again["container"], again["born"], again["served"]) == (
            first[name]["container"],
            first[name]["born"],
            2,
        )
    again = web.get_json(f"{url}/whoami")
    assert (again["container"], again["born"], again["served"]) == (site["container"], site["born"], 2)
    assert platform.log().count("a container was adopted") == 3


def test_a_sandbox_that_nobody_wants_any_more_is_removed_by_the_next_server(client):
    platform = client.platform
    client.deploy("gvisor.py")
    result_of(client, spawn(client, "identify_sandboxed", 0.0))
    platform.kill()
    reaped = platform.command("reap", "--data-dir", platform.data_dir)
    assert "nothing" in reaped.stdout
    assert str(platform.data_dir.resolve()) not in Path("/proc/mounts").read_text()
    platform.start()
    assert result_of(client, spawn(client, "identify_sandboxed", 0.0))["served"] == 1


def test_sandboxes_end_with_the_program_that_ran_them(client):
    platform = client.platform
    client.deploy("gvisor.py")
    container = result_of(client, spawn(client, "identify_sandboxed", 0.0))["container"]
    platform.kill()
    assert processes_of_sandbox(container)
    platform.settings = platform.settings | {"IONIAN_RUNTIME_RUNSC": "/nonexistent/runsc"}
    platform.start()
    wait_until(lambda: not processes_of_sandbox(container), "the sandbox to be removed")
    assert call(client, "plain_kernel") == "host"


def test_what_runs_is_not_kept_on_a_weaker_runtime_than_is_asked_for_now(client):
    platform = client.platform
    client.deploy("gvisor.py")
    call_id = spawn(client, "identify_plain", 5.0)
    platform.kill()
    platform.settings = platform.settings | {"IONIAN_RUNTIME_KIND": "gvisor"}
    platform.start()
    # It ran again, by the same call, in a sandbox.
    result = result_of(client, call_id)
    assert (result["kernel"], result["served"]) == ("gvisor", 1)


# For all.


@pytest.fixture
def all_on_gvisor(start_platform, shared_images):
    def start(**settings: str) -> Client:
        platform = start_platform({"IONIAN_RUNTIME_KIND": "gvisor"} | settings)
        return Client(platform, platform.state / "home")

    return start


def built_on(client) -> list:
    client.deploy("built_where.py", NONCE=uuid.uuid4().hex)
    return call(client, "look", app="built-where")


def test_everything_runs_on_gvisor(all_on_gvisor):
    client = all_on_gvisor()
    client.deploy("gvisor.py")
    assert call(client, "plain_kernel") == "gvisor"
    assert "the runtime runc isolates less than gvisor" in refused(client, "runc")
    # The commands of a build as well, with what they did to files kept.
    assert built_on(client) == ["gvisor", "kept", 12, 34, "0o640", False]
    assert not re.search("WARN.*(runc|host's kernel)", client.platform.log())


def test_the_operator_may_allow_less(all_on_gvisor):
    client = all_on_gvisor(IONIAN_RUNTIME_ALLOW_WEAKER="true", IONIAN_RUNTIME_BUILDS="runc")
    client.deploy("one_runtime.py", RUNTIME="runc")
    assert call(client, "kernel", app="one-runtime") == "host"
    assert built_on(client)[0] == "host"
    client.deploy("gvisor.py")
    assert call(client, "plain_kernel") == "gvisor"
    assert "image builds run on runc" in client.platform.log()


def test_a_server_that_is_to_use_gvisor_does_not_start_without(platform):
    platform.stop()
    platform.settings = {"IONIAN_RUNTIME_KIND": "gvisor", "IONIAN_RUNTIME_RUNSC": "/nonexistent/runsc"}
    refused = platform.command("serve", "--data-dir", platform.data_dir, "--listen", "127.0.0.1:0", ok=False)
    assert refused.returncode != 0
    assert "cannot use the gvisor runtime" in refused.stderr
    assert "/nonexistent/runsc cannot be used: there is no such file" in refused.stderr
