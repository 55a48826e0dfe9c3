"""A restart of the platform does not end a container, and a container that was given up ends."""

import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_platform import LAUNCHER, function_definition

# Longer than the client's own patience (0.7 s), and short enough for a test.
AWAY_SECONDS = 2.5


def test_an_idle_container_waits_for_the_platform(start, platform):
    container = start(function_definition("plain", "slowly")).wait_until_ready()
    with platform.away():
        time.sleep(AWAY_SECONDS)
        assert container.process.poll() is None
    assert platform.call(0.0) == "done"
    assert container.stop() == 0
    assert container.stderr == ""


def test_a_result_that_is_ready_while_the_platform_is_away_arrives(start, platform):
    container = start(function_definition("plain", "slowly")).wait_until_ready()
    with ThreadPoolExecutor() as pool:
        result = pool.submit(platform.call, 1.0)
        container.wait_for("the input to run", lambda: "running" in container.stdout)
        with platform.away():
            time.sleep(AWAY_SECONDS)
        assert result.result() == "done"
    assert container.stop() == 0


def test_a_container_that_starts_while_the_platform_is_away_becomes_ready(start, platform):
    with platform.away():
        container = start(function_definition("plain", "slowly"))
        time.sleep(AWAY_SECONDS)
    container.wait_until_ready()
    assert platform.call(0.0) == "done"


@pytest.mark.parametrize("function", ["slowly", "stubborn"])
def test_a_container_that_was_given_up_ends_in_the_middle_of_its_input(start, platform, function):
    container = start(function_definition("plain", function), MODAL_HEARTBEAT_INTERVAL="0.5").wait_until_ready()
    arguments = [600.0] if function == "slowly" else []
    platform.submit(*arguments)
    container.wait_for("the input to run", lambda: "running" in container.stdout)
    platform.refuses_credentials = True
    # With 0 if it could be interrupted politely.
    container.wait()
    assert container.stderr.count("has given this container up") == 1


def test_an_idle_container_that_was_given_up_ends(start, platform):
    container = start(function_definition("plain", "slowly")).wait_until_ready()
    with platform.away():
        platform.refuses_credentials = True
    assert container.wait() != 0


def test_a_client_that_is_built_otherwise_is_left_alone():
    code = f"""
        import sys
        sys.path.insert(0, {str(LAUNCHER.parent.parent)!r})
        import modal._utils.grpc_utils as grpc_utils
        import modal._runtime.container_io_manager as manager
        from ionian_container import resilience
        grpc_utils.process_exception_before_retry = lambda error: None
        before = grpc_utils.process_exception_before_retry
        del manager._ContainerIOManager._heartbeat_handle_cancellations
        resilience.install()
        assert grpc_utils.process_exception_before_retry is before
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.count("ionian: this version of the client") == 2, done.stderr
