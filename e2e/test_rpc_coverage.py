"""The coverage table lists every RPC of the client's service, once, with what a user is told."""

import tomllib

import protocol_schema
import pytest

TABLE = protocol_schema.REPOSITORY / "crates" / "api" / "rpc-coverage.toml"
SERVICE = "ModalClient/"


def _python():
    python = protocol_schema.interpreter(protocol_schema.NEWEST_PYTHON)
    if python is None:
        pytest.skip(f"{protocol_schema.NEWEST_PYTHON} does not name an interpreter with a client installed")
    return python


@pytest.fixture(scope="module")
def table():
    return tomllib.loads(TABLE.read_text())["rpc"]


def _rpcs(schema):
    return {name.removeprefix(SERVICE) for name in schema["rpcs"] if name.startswith(SERVICE)}


def test_the_table_lists_exactly_the_rpcs_of_the_service(table):
    of_the_client = _rpcs(protocol_schema.client_schema(_python()))
    assert sorted(of_the_client - table.keys()) == []
    assert sorted(table.keys() - of_the_client) == []


def test_every_row_has_a_known_status(table):
    unknown = {name: row for name, row in table.items() if row["status"] not in ("implemented", "refused", "not-yet")}
    assert unknown == {}


def test_every_row_that_is_not_implemented_tells_the_user_why(table):
    for name, row in table.items():
        if row["status"] == "implemented":
            assert row.keys() == {"status"}, f"{name} is implemented and needs no excuse"
        else:
            assert row.keys() == {"status", "sentence"}, name
            sentence = row["sentence"]
            # The client shows it behind its own words: a clause in lower case, with something in it.
            assert len(sentence.split()) >= 5, f"{name}: {sentence!r} does not explain anything"
            assert sentence[0].islower() or sentence[0] in "`@", f"{name}: {sentence!r}"
            assert not sentence.endswith("."), f"{name}: {sentence!r}"


def test_implemented_rpcs_are_declared_in_our_schema(table):
    declared = _rpcs(protocol_schema.our_schema(_python()))
    implemented = {name for name, row in table.items() if row["status"] == "implemented"}
    assert sorted(implemented - declared) == []
