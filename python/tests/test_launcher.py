"""The launcher is invisible: a function sees what it would see under `python -m modal._container_entrypoint`."""

from fake_platform import function_definition

PLAIN = ["-m", "modal._container_entrypoint"]


def surroundings(start, platform, **options):
    container = start(function_definition("plain", "surroundings"), **options).wait_until_ready()
    seen = platform.call()
    assert container.stop() == 0
    assert container.stderr == ""
    return seen


def test_function_sees_no_difference(start, platform):
    ours = surroundings(start, platform)
    platform.events.clear()
    official = surroundings(start, platform, command=PLAIN)
    assert ours == official
    assert ours["main"] == "modal._container_entrypoint"
    assert ours["path"][0] == ours["cwd"]
    assert ours["ours"] == []


def test_async_function_runs_on_the_loop_it_always_had(start, platform):
    start(function_definition("plain", "loop_type")).wait_until_ready()
    assert platform.call().startswith("asyncio")


def test_multiprocessing_spawn(start, platform):
    container = start(function_definition("plain", "spawned")).wait_until_ready()
    assert platform.call() == [1, 2]
    assert container.stop() == 0
    assert container.stderr == ""


def test_client_dependencies_come_last(start, platform):
    path = surroundings(start, platform, IONIAN_CLIENT_DEPS="1")["path"]
    assert path[-1] == "/__modal/deps"


def test_client_dependencies_can_be_elsewhere_or_off(start, platform):
    assert surroundings(start, platform, IONIAN_CLIENT_DEPS="/somewhere/deps")["path"][-1] == "/somewhere/deps"
    platform.events.clear()
    assert "/__modal/deps" not in surroundings(start, platform, IONIAN_CLIENT_DEPS="0")["path"]


def test_the_safe_path_option_is_respected(start, platform):
    ours = surroundings(start, platform, PYTHONSAFEPATH="1")
    platform.events.clear()
    assert ours == surroundings(start, platform, command=PLAIN, PYTHONSAFEPATH="1")


def test_a_module_that_cannot_be_imported_is_a_task_result(start, platform):
    container = start(function_definition("broken", "anything"))
    assert container.wait() == 0
    assert "this module is broken" in platform.task_results[0].exception


def test_a_missing_client_is_reported_by_python_itself(start, tmp_path):
    """The hook must not hide or change why the runtime cannot start."""
    (tmp_path / "modal.py").write_text("raise RuntimeError('not the modal you expect')\n")
    container = start(function_definition("plain", "surroundings"), IONIAN_WEB_HOOK="1")
    assert container.wait() == 1
    assert "not the modal you expect" in container.stderr
    assert "ionian:" not in container.stderr
