"""A user runs an app without deploying it."""

import json

from support.waiting import wait_until


def test_a_local_entrypoint_takes_arguments(each_client):
    result = each_client.modal("run", each_client.app("hello.py"), "--name", "Ada", "--times", "2")
    assert result.stdout.count("Hello, Ada, from Python") == 2
    # What the function prints in its container is shown where the user looks.
    assert "greeting Ada" in result.output


def test_a_function_is_run_by_name(each_client):
    each_client.app("hello.py")
    result = each_client.modal("run", "hello.py::greet", "--name", "Grace")
    assert "greeting Grace" in result.output


def test_the_progress_looks_as_users_know_it(client):
    result = client.modal("run", client.app("hello.py"))
    for words in ("Initialized", "Created objects", "Created Function greet", "App completed"):
        assert words in result.output, words


def test_the_result_is_written_to_a_file(client):
    client.app("hello.py")
    client.modal("run", "--write-result", "out.txt", "hello.py::greet", "--name", "Grace")
    assert (client.work / "out.txt").read_text().startswith("Hello, Grace")


def test_an_app_that_ran_is_stopped_afterwards(client):
    client.modal("run", client.app("hello.py"))

    def stopped():
        rows = json.loads(client.modal("app", "list", "--json").stdout)
        return rows and all("stopped" in str(row) for row in rows)

    wait_until(stopped, "the app to be stopped")


def test_a_detached_run_goes_on_without_its_client(client):
    client.app("calls.py")
    run = client.start("run", "--detach", "calls.py::slow", "--seconds", "6")
    try:
        run.wait_for("View app")
        wait_until(lambda: json.loads(client.modal("container", "list", "--json").stdout), "the container to start")
    finally:
        # Like a laptop that is closed: nothing is said to the server.
        run.end()
    rows = json.loads(client.modal("app", "list", "--json").stdout)
    assert any("detached" in str(row) for row in rows), rows


def test_a_run_whose_function_raises_fails_with_its_traceback(client):
    client.app("calls.py")
    result = client.modal("run", "calls.py::divide", "--x", "1", "--y", "0", ok=False)
    assert "ZeroDivisionError: division by zero" in result.words
    assert "divide" in result.output
