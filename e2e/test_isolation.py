"""What code in a container can reach and see, and what it cannot."""

import json
import socket
import threading

import pytest


@pytest.fixture
def inside(client):
    client.deploy("isolation.py")
    return client


def call(client, function, *arguments):
    code = (
        "import json, modal, sys;"
        f"print(json.dumps(modal.Function.from_name('isolation', '{function}').remote(*json.loads(sys.argv[1]))))"
    )
    return json.loads(client.python(code, json.dumps(arguments)).stdout)


def test_containers_cannot_reach_each_other(inside):
    code = (
        "import modal; F = modal.Function.from_name;"
        "other = F('isolation', 'listen').remote_gen(); address = next(other);"
        "print(address, F('isolation', 'can_connect').remote([[address, 7000]]))"
    )
    address, reached = inside.python(code).stdout.strip().split(" ", 1)
    socket.inet_aton(address)
    assert reached == "[False]"


def test_containers_reach_nothing_of_the_host_but_the_platform(inside):
    gateway = call(inside, "gateway")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: only the route is looked up.
        probe.connect(("192.0.2.1", 9))
        host = probe.getsockname()[0]
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=accept_all, args=(listener,), daemon=True).start()
        # The listener works, so that a refusal means something.
        socket.create_connection((host, port), timeout=5).close()
        targets = [[gateway, port], [host, port], [host, inside.platform.port], [gateway, inside.platform.port]]
        assert call(inside, "can_connect", targets) == [False, False, False, False]


def accept_all(listener):
    while True:
        try:
            listener.accept()[0].close()
        except OSError:
            return


def test_a_container_is_confined(inside):
    seen = call(inside, "surroundings")
    assert seen["pids"] < 20
    assert seen["interfaces"] == ["eth0", "lo"]
    assert seen["no_new_privs"] == "1"
    assert seen["seccomp"] == "2"
    assert seen["can_mount"] is False
    assert "MODAL_TOKEN_SECRET" not in seen["environment"]
    inside_id, outside_id, count = seen["ids"]
    told = inside.platform.command("doctor").stdout.splitlines()
    if any(line.startswith("ok") and "user namespaces" in line for line in told):
        assert (inside_id, count) == ("0", "65536")
        assert int(outside_id) >= 0x7000_0000
