"""Prints protobuf descriptors as JSON, in a form that two programs can compare.

Run by the interpreter of an installed client, because only there are its descriptors (and a protobuf library):

    python dump_descriptors.py client       what the installed client uses
    python dump_descriptors.py file PATH    what an encoded FileDescriptorSet says

It runs under every supported client, so it uses nothing but the standard library and protobuf.
"""

import importlib.metadata
import json
import sys

from google.protobuf import descriptor_pb2

PACKAGE = "modal.client"

TYPE_NAMES = {number: name for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()}
LABEL_NAMES = {number: name for name, number in descriptor_pb2.FieldDescriptorProto.Label.items()}


def dump(files):
    """The facts of all files of the package that decide about interoperability."""
    schema = {"messages": {}, "enums": {}, "rpcs": {}}
    for file in files:
        if file.package != PACKAGE:
            continue
        prefix = file.package + "."
        for message in file.message_type:
            dump_message(schema, prefix, message)
        for enum in file.enum_type:
            dump_enum(schema, prefix, enum)
        for service in file.service:
            for method in service.method:
                schema["rpcs"][f"{service.name}/{method.name}"] = {
                    "input": method.input_type.lstrip("."),
                    "output": method.output_type.lstrip("."),
                    "client_streaming": method.client_streaming,
                    "server_streaming": method.server_streaming,
                }
    return schema


def dump_message(schema, prefix, message):
    name = prefix + message.name
    schema["messages"][name] = {
        "map_entry": message.options.map_entry,
        "fields": {str(field.number): dump_field(message, field) for field in message.field},
    }
    for nested in message.nested_type:
        dump_message(schema, name + ".", nested)
    for enum in message.enum_type:
        dump_enum(schema, name + ".", enum)


def dump_field(message, field):
    # A field with explicit presence stands in a oneof that the compiler made up; its name carries nothing.
    in_oneof = field.HasField("oneof_index") and not field.proto3_optional
    return {
        "name": field.name,
        "type": TYPE_NAMES[field.type],
        "label": LABEL_NAMES[field.label],
        "of": field.type_name.lstrip("."),
        "optional": field.proto3_optional,
        "oneof": message.oneof_decl[field.oneof_index].name if in_oneof else None,
    }


def dump_enum(schema, prefix, enum):
    schema["enums"][prefix + enum.name] = {str(value.number): value.name for value in enum.value}


def client_files():
    from modal_proto import api_pb2

    file = descriptor_pb2.FileDescriptorProto()
    api_pb2.DESCRIPTOR.CopyToProto(file)
    return [file]


def main(arguments):
    if arguments == ["client"]:
        schema = dump(client_files())
        schema["version"] = importlib.metadata.version("modal")
    elif len(arguments) == 2 and arguments[0] == "file":
        with open(arguments[1], "rb") as encoded:
            schema = dump(descriptor_pb2.FileDescriptorSet.FromString(encoded.read()).file)
    else:
        sys.exit("usage: dump_descriptors.py client | file PATH")
    json.dump(schema, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
