"""Our `.proto` files say what the client says, field by field; checked against two installed clients.

Needs no server. `IONIAN_CLIENT_PYTHON` and `IONIAN_OLD_CLIENT_PYTHON` name the interpreters of two environments, one
with the newest supported client and one with the oldest.
"""

import copy

import protocol_schema
import pytest


def _python(variable):
    python = protocol_schema.interpreter(variable)
    if python is None:
        pytest.skip(f"{variable} does not name an interpreter with a client installed")
    return python


@pytest.fixture(scope="module")
def newest():
    return protocol_schema.client_schema(_python(protocol_schema.NEWEST_PYTHON))


@pytest.fixture(scope="module")
def oldest():
    return protocol_schema.client_schema(_python(protocol_schema.OLDEST_PYTHON))


@pytest.fixture(scope="module")
def ours():
    return protocol_schema.our_schema(_python(protocol_schema.NEWEST_PYTHON))


@pytest.fixture(scope="module")
def versions():
    return protocol_schema.versions()


def test_the_clients_are_the_ones_that_were_reviewed(newest, oldest, versions):
    assert [newest["version"], oldest["version"]] == [versions["newest"], versions["oldest"]]


def test_our_schema_is_that_of_the_newest_client(ours, newest):
    comparison = protocol_schema.compare(ours, newest)
    assert comparison.mismatches == []
    assert comparison.only_ours == []
    # Declarations are sent back and handed on, so a field that we do not know would be lost on its way.
    assert comparison.only_theirs == []


def test_our_schema_differs_from_the_oldest_client_only_where_reviewed(ours, oldest, versions):
    comparison = protocol_schema.compare(ours, oldest)
    assert comparison.mismatches == versions["renamed since oldest"]["entries"]
    assert comparison.only_ours == versions["newer than oldest"]["entries"]
    assert comparison.only_theirs == versions["gone since oldest"]["entries"]


def test_only_names_of_enum_values_may_differ_between_clients(versions):
    # Whatever else differs under one number would make the server misread one of the clients.
    for entry in versions["renamed since oldest"]["entries"]:
        assert entry.startswith("value ")
        assert ": name is " in entry


def test_the_dump_keeps_the_facts_that_are_compared(ours):
    """A dump that forgot a fact on both sides would make every comparison of it succeed."""
    messages = ours["messages"]
    assert len(messages) > 300
    assert len(ours["rpcs"]) > 100
    assert messages["modal.client.GenericResult"]["fields"]["5"] == {
        "name": "data",
        "type": "TYPE_BYTES",
        "label": "LABEL_OPTIONAL",
        "of": "",
        "optional": False,
        "oneof": "data_oneof",
    }
    assert messages["modal.client.ImageMetadata"]["fields"]["1"]["optional"]
    assert messages["modal.client.Function"]["fields"]["3"]["label"] == "LABEL_REPEATED"
    packages = messages["modal.client.ImageMetadata"]["fields"]["2"]
    assert messages[packages["of"]]["map_entry"]
    assert messages[packages["of"]]["fields"]["2"]["type"] == "TYPE_STRING"
    assert ours["rpcs"]["ModalClient/AppGetLogs"] == {
        "input": "modal.client.AppGetLogsRequest",
        "output": "modal.client.TaskLogsBatch",
        "client_streaming": False,
        "server_streaming": True,
    }


def _field(schema, message, number):
    return schema["messages"][f"modal.client.{message}"]["fields"][number]


def _change_number(schema):
    fields = schema["messages"]["modal.client.FunctionInput"]["fields"]
    fields["12"] = fields.pop("10")


def _drop_field(schema):
    del schema["messages"]["modal.client.Function"]["fields"]["79"]


def _invent_message(schema):
    schema["messages"]["modal.client.InventedMessage"] = {"map_entry": False, "fields": {}}


def _rename_enum(schema):
    schema["enums"]["modal.client.AppStatus"] = schema["enums"].pop("modal.client.AppState")


DELIBERATE_DIFFERENCES = {
    "field number": (_change_number, "only_ours", "field modal.client.FunctionInput 12 data_format"),
    "field left out": (_drop_field, "only_theirs", "field modal.client.Function 79 autoscaler_settings"),
    "field name": (
        lambda schema: _field(schema, "FunctionInput", "11").update(name="method"),
        "mismatches",
        "field modal.client.FunctionInput 11: name",
    ),
    "field type": (
        lambda schema: _field(schema, "BlobCreateRequest", "3").update(type="TYPE_INT32"),
        "mismatches",
        "field modal.client.BlobCreateRequest 3: type",
    ),
    "type of message": (
        lambda schema: _field(schema, "Function", "9").update(of="modal.client.GPUConfig"),
        "mismatches",
        "field modal.client.Function 9: of",
    ),
    "label": (
        lambda schema: _field(schema, "Function", "3").update(label="LABEL_OPTIONAL"),
        "mismatches",
        "field modal.client.Function 3: label",
    ),
    "presence": (
        lambda schema: _field(schema, "FunctionOptions", "5").update(optional=False),
        "mismatches",
        "field modal.client.FunctionOptions 5: optional",
    ),
    "oneof left": (
        lambda schema: _field(schema, "GenericResult", "10").update(oneof=None),
        "mismatches",
        "field modal.client.GenericResult 10: oneof",
    ),
    "map no more": (
        lambda schema: schema["messages"]["modal.client.Image.BuildArgsEntry"].update(map_entry=False),
        "mismatches",
        "message modal.client.Image.BuildArgsEntry",
    ),
    "enum value number": (
        lambda schema: schema["enums"]["modal.client.AppState"].update({"11": "APP_STATE_INVENTED"}),
        "only_ours",
        "value modal.client.AppState 11 APP_STATE_INVENTED",
    ),
    "enum value name": (
        lambda schema: schema["enums"]["modal.client.AppState"].update({"3": "APP_STATE_PUBLISHED"}),
        "mismatches",
        "value modal.client.AppState 3: name",
    ),
    "message name": (_invent_message, "only_ours", "message modal.client.InventedMessage"),
    "enum name": (_rename_enum, "only_ours", "enum modal.client.AppStatus"),
    "rpc input": (
        lambda schema: schema["rpcs"]["ModalClient/FunctionMap"].update(input="modal.client.FunctionGetRequest"),
        "mismatches",
        "rpc ModalClient/FunctionMap: input",
    ),
    "rpc output": (
        lambda schema: schema["rpcs"]["ModalClient/FunctionMap"].update(output="google.protobuf.Empty"),
        "mismatches",
        "rpc ModalClient/FunctionMap: output",
    ),
    "rpc streaming": (
        lambda schema: schema["rpcs"]["ModalClient/AppGetLogs"].update(server_streaming=False),
        "mismatches",
        "rpc ModalClient/AppGetLogs: server_streaming",
    ),
}


@pytest.mark.parametrize("difference", DELIBERATE_DIFFERENCES)
def test_a_deliberate_difference_is_found(difference, ours, newest):
    change, kind, expected = DELIBERATE_DIFFERENCES[difference]
    changed = copy.deepcopy(ours)
    change(changed)
    found = getattr(protocol_schema.compare(changed, newest), kind)
    assert [entry for entry in found if entry.startswith(expected)], found
