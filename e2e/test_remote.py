"""A user calls deployed functions from another process: results, errors, generators, maps, classes, spawned calls."""

import ast
import re

import pytest
from support import web

FUNCTION = "import modal, sys; f = modal.Function.from_name('calls', '{}'); "


@pytest.fixture
def calls(each_client):
    each_client.deploy("calls.py")
    return each_client


@pytest.fixture
def newest_calls(client):
    client.deploy("calls.py")
    return client


def test_a_function_returns_its_result(calls):
    assert calls.python(FUNCTION.format("square") + "print(f.remote(12))").stdout.strip() == "144"


def test_a_model_is_trained_once_and_asked_by_remote_and_by_http(client):
    url = client.deploy("regression.py").url("predict")
    code = "import modal; print(modal.Cls.from_name('regression', 'Regression')().predict.remote([1.0, 2.0]))"
    predicted = ast.literal_eval(client.python(code).stdout)
    assert predicted == pytest.approx([10.0, 13.0])
    answer = web.request(url, "POST", b'{"values": [3]}', {"Content-Type": "application/json"})
    assert answer.status == 200, answer.text
    assert answer.json()["predictions"] == pytest.approx([16.0])


def test_a_map_over_a_thousand_inputs_keeps_their_order(calls):
    code = FUNCTION.format("cube") + "r = list(f.map(range(1000))); print(r == [x**3 for x in range(1000)], len(r))"
    assert calls.python(code, timeout=200).stdout.strip() == "True 1000"


def test_a_map_over_a_thousand_inputs_one_at_a_time(newest_calls):
    code = FUNCTION.format("square") + "print(sum(f.map(range(1000), order_outputs=False)))"
    assert newest_calls.python(code, timeout=200).stdout.strip() == str(sum(x * x for x in range(1000)))


def test_exceptions_of_a_map_can_be_results(newest_calls):
    code = FUNCTION.format("divide") + (
        "r = list(f.starmap([(4, 2), (1, 0), (9, 3)], return_exceptions=True));"
        "print(r[0], 'division by zero' in str(r[1]), r[2])"
    )
    assert newest_calls.python(code).stdout.strip() == "2.0 True 3.0"


def test_an_exception_arrives_as_its_own_type_with_the_remote_traceback(each_client):
    each_client.app("calls.py")
    result = each_client.modal("run", "calls.py::shop")
    assert "2 x tea" in result.output
    assert "caught calls.OutOfStock: coffee, 3 left" in result.output
    # The frames of the container, down to the line that raised.
    assert "in order" in result.output
    assert "in check_stock" in result.output


def test_a_builtin_exception_is_caught_by_its_type(calls):
    code = FUNCTION.format("divide") + (
        "\ntry:\n    f.remote(1, 0)\nexcept ZeroDivisionError as error:\n    print('caught', error)\n"
    )
    assert calls.python(code).stdout.strip() == "caught division by zero"


def test_a_generator_yields_everything_in_order(calls):
    code = FUNCTION.format("countdown") + "print(list(f.remote_gen(500)) == list(range(500, 0, -1)))"
    assert calls.python(code).stdout.strip() == "True"


def test_a_generator_yields_while_it_runs(newest_calls):
    code = FUNCTION.format("countdown") + (
        "import time; times = [time.monotonic() for _ in f.remote_gen(3, 1.5)]; print(times[-1] - times[0])"
    )
    assert float(newest_calls.python(code).stdout) > 2.0


def test_a_spawned_call_is_fetched_by_another_process(calls):
    spawned = calls.python(FUNCTION.format("slow") + "print(f.spawn(1.0).object_id)").stdout.strip()
    assert re.fullmatch(r"fc-\w+", spawned)
    get = f"import modal; print(modal.FunctionCall.from_id('{spawned}').get(timeout=60))"
    assert calls.python(get).stdout.strip() == "done"
    # Reading does not use the result up.
    assert calls.python(get).stdout.strip() == "done"


def test_a_spawned_call_can_be_polled(newest_calls):
    code = FUNCTION.format("slow") + (
        "call = f.spawn(20.0)\n"
        "try:\n    call.get(timeout=0)\nexcept TimeoutError:\n    print('not yet')\n"
        "call.cancel()\n"
        "try:\n    call.get(timeout=30)\nexcept Exception as error:\n    print(type(error).__name__)\n"
    )
    printed = newest_calls.python(code).stdout.split("\n")
    assert printed[0] == "not yet"
    assert printed[1] in ("InputCancellation", "RemoteError")


def test_a_class_has_parameters_an_enter_hook_and_methods(calls):
    code = (
        "import modal; Account = modal.Cls.from_name('calls', 'Account'); ada = Account(owner='Ada');"
        "bob = Account(owner='Bob', balance=5); print(ada.describe.remote()); print(bob.describe.remote());"
        "print(bob.withdraw.remote(2))"
    )
    printed = calls.python(code).stdout.splitlines()
    assert printed == ["account of Ada: 100", "account of Bob: 5", "3"]


def test_arguments_and_results_of_ten_megabytes(calls):
    code = FUNCTION.format("echo") + (
        "import hashlib, os; data = os.urandom(10_000_000); back = f.remote(data); print(back == data, len(back))"
    )
    assert calls.python(code).stdout.strip() == "True 10000000"


def test_a_large_result_of_a_spawned_call(newest_calls):
    code = FUNCTION.format("echo") + "call = f.spawn(b'x' * 3_000_000); print(len(call.get(timeout=60)))"
    assert newest_calls.python(code).stdout.strip() == "3000000"


def test_a_function_that_takes_too_long_times_out(newest_calls):
    code = FUNCTION.format("too_slow") + (
        "\ntry:\n    f.remote()\nexcept modal.exception.FunctionTimeoutError as error:\n    print('timed out', error)\n"
    )
    assert newest_calls.python(code).stdout.startswith("timed out")


def test_a_container_that_dies_fails_its_call_with_words(newest_calls):
    code = FUNCTION.format("die") + (
        "\ntry:\n    f.remote()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    printed = newest_calls.python(code, timeout=200).stdout
    assert printed.strip(), "no exception reached the caller"
    assert "square" not in printed
    # The function's other calls are not affected.
    assert newest_calls.python(FUNCTION.format("square") + "print(f.remote(3))").stdout.strip() == "9"


def test_a_failing_function_is_tried_again_as_often_as_it_asks(newest_calls):
    code = FUNCTION.format("third_time_lucky") + "print(f.remote('a')); print(f.spawn('b').get(timeout=60))"
    assert newest_calls.python(code).stdout.splitlines() == ["try 3 worked", "try 3 worked"]


def test_inputs_of_a_batched_function_run_together(newest_calls):
    code = FUNCTION.format("batch") + "print(list(f.map(range(8))))"
    results = ast.literal_eval(newest_calls.python(code).stdout)
    assert [number for number, _ in results] == list(range(8))
    assert max(size for _, size in results) == 4


def test_an_unknown_function_is_named(client):
    client.deploy("calls.py")
    unknown = client.python(FUNCTION.format("no_such_function") + "f.remote()", ok=False)
    assert "NotFoundError" in unknown.output
    assert "no_such_function" in unknown.output
