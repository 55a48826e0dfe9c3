"""Functions that take too much get a typed error, and everybody else goes on.

How much slower the others become is measured by `make bench-neighbours`; here, whether they are answered at all.
"""

import pytest
from support import web


@pytest.fixture
def inside(client):
    client.url = client.deploy("neighbours.py").url("quiet")
    assert web.get_json(client.url) == {"quiet": True}
    return client


CALL = """
import sys, modal
from modal.exception import Error
try:
    print("returned", modal.Function.from_name("neighbours", sys.argv[1]).remote(float(sys.argv[2])))
except Exception as error:
    print(type(error).__module__ + "." + type(error).__qualname__, error)
"""


def outcome(client, function, seconds):
    printed = client.python(CALL, function, str(seconds), timeout=150).stdout.strip()
    # Whatever happened, the platform and the quiet function are there.
    assert client.platform.is_running()
    assert web.get_json(client.url) == {"quiet": True}
    return printed


def test_memory_beyond_the_limit_ends_the_container_and_says_so(inside):
    printed = outcome(inside, "memory_hog", 60)
    assert "memory" in printed
    assert "returned" not in printed


def test_shared_memory_is_bounded(inside):
    printed = outcome(inside, "shared_memory", 60)
    assert printed.startswith("builtins.OSError"), printed
    assert "No space left" in printed


def test_a_fork_bomb_runs_into_its_limit(inside):
    printed = outcome(inside, "fork_bomb", 5)
    # The limit on processes raises in the function; the one on memory, which children need too, ends the container.
    assert "BlockingIOError" in printed or "memory" in printed, printed


def test_a_container_that_prints_all_day_is_read_slowly(inside):
    printed = outcome(inside, "chatter", 3)
    assert printed.startswith("returned"), printed


def test_many_files_cost_only_whoever_makes_them(inside):
    printed = outcome(inside, "many_files", 5)
    assert printed.startswith("returned"), printed
    assert int(printed.split()[1]) > 1000
