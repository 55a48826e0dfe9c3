"""A user reads what functions print."""

import itertools
import time

from support import web
from support.waiting import wait_until

SAY = "import modal; modal.Function.from_name('chatty', 'say').remote({!r}, {!r})"


def test_what_a_function_prints_is_in_the_logs(each_client):
    each_client.deploy("chatty.py")
    each_client.python(SAY.format("to be read later", False))
    each_client.python(SAY.format("a complaint", True))
    each_client.wait_for_log("chatty", "to be read later")
    each_client.wait_for_log("chatty", "a complaint")


def test_logs_are_filtered_by_source(client):
    client.deploy("chatty.py")
    client.python(SAY.format("on stdout", False))
    client.python(SAY.format("on stderr", True))
    client.wait_for_log("chatty", "on stdout")
    client.wait_for_log("chatty", "on stderr")
    filtered = client.modal("app", "logs", "chatty", "--source", "stderr").output
    assert "on stderr" in filtered
    assert "on stdout" not in filtered


def test_logs_are_followed_live(client):
    client.deploy("chatty.py")
    follower = client.start("app", "logs", "chatty", "--follow")
    try:
        numbers = itertools.count()

        # What is printed before the follower has connected may be missed, so each round prints something new.
        def call_and_look():
            client.python(SAY.format(f"live {next(numbers)}", False))
            return "live " in follower.output

        wait_until(call_and_look, "a line in the followed log", 60)
    finally:
        follower.end()


def test_logs_outlive_the_server(client):
    client.deploy("chatty.py")
    client.python(SAY.format("before the restart", False))
    client.wait_for_log("chatty", "before the restart")
    client.platform.restart()
    client.wait_for_log("chatty", "before the restart")


def test_a_container_that_prints_a_lot_slows_only_itself(client):
    client.deploy("chatty.py")
    url = client.deploy("fastapi_modal_app.py").url()
    assert web.request(f"{url}/healthz").status == 200
    flood = "import modal; modal.Function.from_name('chatty', 'flood').spawn(50)"
    client.python(flood)
    slowest = 0.0

    def answers_until_the_flood_ends():
        nonlocal slowest
        start = time.monotonic()
        assert web.request(f"{url}/healthz").status == 200
        slowest = max(slowest, time.monotonic() - start)
        return "end of the flood" in client.modal("app", "logs", "chatty", "--tail", "5").output

    wait_until(answers_until_the_flood_ends, "the flood to end", 120)
    print(f"slowest answer during the flood: {slowest:.3f} s")
    assert slowest < 2
