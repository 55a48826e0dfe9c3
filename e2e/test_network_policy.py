"""What a function may reach outside is enforced, and the platform is reached in any case."""

import json
import socket

import pytest
from support import web
from support.client import BUILD_SECONDS, Client
from support.gvisor import HAS_GVISOR
from support.outside import HOST_SIDE, SERVERS, TCP_PORT, Outside

NEEDS_GVISOR = pytest.mark.skipif(not HAS_GVISOR, reason="this machine has no runsc; `make setup` installs it")
SLOW_SECONDS = 180

BOTH, NEITHER = [True, True], [False, False]
LISTED, OTHER = SERVERS


@pytest.fixture(scope="module")
def outside():
    outside = Outside()
    try:
        yield outside.start()
    finally:
        outside.stop()


@pytest.fixture(params=["runc", pytest.param("gvisor", marks=NEEDS_GVISOR)])
def runtime(request):
    return request.param


def call(client, function, *arguments):
    code = (
        "import json, modal, sys;"
        f"print(json.dumps(modal.Function.from_name('network-policy', '{function}').remote(*json.loads(sys.argv[1]))))"
    )
    return json.loads(client.python(code, json.dumps(arguments), timeout=SLOW_SECONDS).stdout)


def test_what_is_reached_is_what_may_be(outside, each_client, runtime):
    client = each_client
    url = client.deploy("network_policy.py", CHOSEN=runtime).url("site")
    # The servers answer, so that a refusal means something.
    assert call(client, "everything", SERVERS) == {LISTED: BOTH, OTHER: BOTH}
    assert call(client, "listed", SERVERS) == {LISTED: BOTH, OTHER: NEITHER}
    assert call(client, "nothing", SERVERS) == {LISTED: NEITHER, OTHER: NEITHER}
    code = f"import modal; print(modal.Cls.from_name('network-policy', 'Closed')().reach.remote({SERVERS!r}))"
    assert client.python(code, timeout=SLOW_SECONDS).stdout.strip() == str({LISTED: NEITHER, OTHER: NEITHER})
    # Requests come in where nothing goes out.
    assert web.get_json(f"{url}/reach/{LISTED}") == {LISTED: NEITHER}
    # What the container has to say to the platform arrives: lines, small results, and those that go as blobs.
    assert client.wait_for_log("network-policy", "trying 2 hosts")
    size = 8 << 20
    code = f"import modal; print(len(modal.Function.from_name('network-policy', 'large').remote({size})))"
    assert client.python(code, timeout=SLOW_SECONDS).stdout.strip() == str(size)


def test_a_blocked_network_stays_blocked_when_the_server_is_killed(outside, client, runtime):
    client.deploy("network_policy.py", CHOSEN=runtime)
    assert call(client, "nothing", SERVERS) == {LISTED: NEITHER, OTHER: NEITHER}
    client.platform.kill()
    client.platform.start()
    assert call(client, "nothing", SERVERS) == {LISTED: NEITHER, OTHER: NEITHER}
    assert "a container was adopted" in client.platform.log()


def test_what_is_chosen_for_the_base_holds_for_its_variants(outside, client):
    client.deploy("network_policy.py", CHOSEN="runc")
    code = (
        "import modal;"
        "closed = modal.Cls.from_name('network-policy', 'Closed').with_options(timeout=77)();"
        f"print(closed.reach.remote({SERVERS!r}))"
    )
    assert client.python(code, timeout=SLOW_SECONDS).stdout.strip() == str({LISTED: NEITHER, OTHER: NEITHER})


def test_a_list_opens_nothing_of_the_host(outside, client):
    app = client.app("network_policy.py", **{"CHOSEN": "runc", "198.51.100.0/24, 203.0.113.7/32": "0.0.0.0/0"})
    client.deploy(app)
    assert call(client, "listed", [LISTED, HOST_SIDE]) == {LISTED: BOTH, HOST_SIDE: NEITHER}


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ("10.0.0.0/8,10.0.0.0/33", "'10.0.0.0/33' on the allow list is not a range of addresses"),
        ("example.com", "'example.com' on the allow list is not a range of addresses"),
        ("", "the allow list is empty"),
        (",".join(f"10.0.{number}.0/24" for number in range(257)), "more than 256 ranges"),
    ],
)
def test_a_list_that_cannot_be_kept_is_refused_at_deploy(client, ranges, said):
    app = client.app("one_list.py", RANGES=ranges)
    assert said in client.modal("deploy", app, ok=False, timeout=BUILD_SECONDS).words


def test_ranges_that_allow_nothing_are_pointed_out(client):
    words = client.deploy("one_list.py", RANGES="10.0.0.0/8,2001:db8::/32").words
    assert "containers have no IPv6" in words


def test_a_server_that_cannot_keep_it_refuses_it_at_deploy(start_platform, shared_images):
    platform = start_platform({"IONIAN_RUNTIME_KIND": "process"})
    client = Client(platform, platform.state / "home")
    app = client.app("one_list.py", RANGES="10.0.0.0/8")
    words = client.modal("deploy", app, ok=False, timeout=BUILD_SECONDS).words
    assert "cannot limit what a function reaches" in words


def test_the_stand_in_is_not_the_host(outside):
    # Nothing here listens on the same port by chance.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST_SIDE, TCP_PORT), timeout=3)
