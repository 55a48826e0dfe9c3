"""A user runs an app without deploying it."""

import json

from support import web
from support.client import Deployment, Result
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
    run = client.start("run", "--detach", "calls.py::slow", "--seconds", "8")
    try:
        run.wait_for("Created objects")
        wait_until(lambda: json.loads(client.modal("container", "list", "--json").stdout), "the container to start")
    finally:
        # Like a laptop that is closed: nothing is said to the server.
        run.end()
    rows = json.loads(client.modal("app", "list", "--json").stdout)
    assert any("detached" in str(row) for row in rows), rows
    assert json.loads(client.modal("container", "list", "--json").stdout), "the container goes on"


def test_a_detached_run_ends_when_its_work_is_done(client):
    client.app("hello.py")
    done = client.modal("run", "--detach", "hello.py", "--name", "Ada")
    assert "Hello, Ada" in done.output
    # The log stream ends with the app, so the client does not wait for more.
    assert "Timed out waiting for final app logs" not in done.output


def test_a_run_whose_function_raises_fails_with_its_traceback(client):
    client.app("calls.py")
    result = client.modal("run", "calls.py::divide", "--x", "1", "--y", "0", ok=False)
    assert "ZeroDivisionError: division by zero" in result.words
    assert "divide" in result.output


def test_an_app_is_served_while_it_is_edited(client):
    app = client.app("fastapi_modal_app.py")
    serving = client.start("serve", "fastapi_modal_app.py")
    try:
        serving.wait_for("-dev.localhost")
        url = Deployment(Result(0, serving.output, "")).url()
        # The client prints the URL a moment before it publishes the app.
        wait_until(lambda: web.request(f"{url}/hello").status == 200, "the app to be published")
        assert web.get_json(f"{url}/hello") == {"message": "Hello, world!"}
        app.write_text(app.read_text().replace("Hello, ", "Edited, "))
        wait_until(lambda: web.get_json(f"{url}/hello") == {"message": "Edited, world!"}, "the edited app to answer")
    finally:
        serving.end()
