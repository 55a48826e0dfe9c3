"""Compares our protobuf schema with the one inside an installed client. Used by the schema and coverage tests.

Schemas are the dictionaries that `dump_descriptors.py` prints. Differences are sentences, and each names its place.

    python e2e/protocol_schema.py    rewrites protocol_schema_versions.json (set the variables below first)
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
DUMP_PROGRAM = HERE / "dump_descriptors.py"
VERSIONS_FILE = HERE / "protocol_schema_versions.json"

# Interpreters of two environments, with the newest and the oldest supported client installed.
NEWEST_PYTHON = "IONIAN_CLIENT_PYTHON"
OLDEST_PYTHON = "IONIAN_OLD_CLIENT_PYTHON"

# Reading descriptors takes a second; building xtask on a cold machine takes minutes.
DUMP_TIMEOUT_SECONDS = 60
BUILD_TIMEOUT_SECONDS = 1200


@dataclass
class Comparison:
    """What `ours` and `theirs` do not agree about."""

    # Both have it, and it is not the same: data would be misread.
    mismatches: list[str] = field(default_factory=list)
    # We have it, they do not.
    only_ours: list[str] = field(default_factory=list)
    # They have it in a message or an enum that we have too, we do not: data would be lost.
    only_theirs: list[str] = field(default_factory=list)


def compare(ours, theirs) -> Comparison:
    """Everything that we declare is looked up in theirs. What they have and we never mention is no difference."""
    result = Comparison()
    for kind in ("messages", "enums", "rpcs"):
        for name in ours[kind].keys() - theirs[kind].keys():
            result.only_ours.append(f"{kind[:-1]} {name}")

    for name in ours["messages"].keys() & theirs["messages"].keys():
        our_message, their_message = ours["messages"][name], theirs["messages"][name]
        if our_message["map_entry"] != their_message["map_entry"]:
            result.mismatches.append(f"message {name}: only one of us has a map here")
        _compare_members(result, "field", name, our_message["fields"], their_message["fields"])
    for name in ours["enums"].keys() & theirs["enums"].keys():
        our_values = {number: {"name": value} for number, value in ours["enums"][name].items()}
        their_values = {number: {"name": value} for number, value in theirs["enums"][name].items()}
        _compare_members(result, "value", name, our_values, their_values)
    for name in ours["rpcs"].keys() & theirs["rpcs"].keys():
        _compare_facts(result, f"rpc {name}", ours["rpcs"][name], theirs["rpcs"][name])

    for differences in (result.mismatches, result.only_ours, result.only_theirs):
        differences.sort()
    return result


def _compare_members(result, kind, parent, ours, theirs):
    """Members are matched by number, which is what travels. A wrong number shows up as two lonely members."""
    for number, our_member in ours.items():
        if number in theirs:
            _compare_facts(result, f"{kind} {parent} {number}", our_member, theirs[number])
        else:
            result.only_ours.append(f"{kind} {parent} {number} {our_member['name']}")
    for number in theirs.keys() - ours.keys():
        result.only_theirs.append(f"{kind} {parent} {number} {theirs[number]['name']}")


def _compare_facts(result, place, ours, theirs):
    for fact in ours:
        if ours[fact] != theirs[fact]:
            result.mismatches.append(f"{place}: {fact} is {ours[fact]!r} with us and {theirs[fact]!r} with them")


def interpreter(variable) -> str | None:
    """The interpreter that a variable names, or None when it is not set."""
    return os.environ.get(variable) or None


@functools.cache
def client_schema(python):
    """The schema of the client that is installed beside this interpreter, with its `version`."""
    return _dump(python, "client")


@functools.cache
def our_schema(python):
    """Our own schema, as it is compiled into the server; `python` is any interpreter with protobuf."""
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder) / "descriptors.binpb"
        command = ["cargo", "xtask", "descriptors", str(encoded)]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=BUILD_TIMEOUT_SECONDS)
        return _dump(python, "file", str(encoded))


def _dump(python, *arguments):
    # Isolated (-I): an interpreter of another version must not see this one's PYTHONPATH.
    command = [python, "-I", str(DUMP_PROGRAM), *arguments]
    done = subprocess.run(command, check=True, timeout=DUMP_TIMEOUT_SECONDS, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def versions():
    """The reviewed differences between the newest and the oldest supported client."""
    return json.loads(VERSIONS_FILE.read_text())


def write_versions(newest_python, oldest_python):
    """Rewrites the list from what is installed. The result is reviewed like any other change."""
    ours, newest, oldest = our_schema(newest_python), client_schema(newest_python), client_schema(oldest_python)
    comparison = compare(ours, oldest)
    content = {
        "newest": newest["version"],
        "oldest": oldest["version"],
        "newer than oldest": {
            "reason": f"newer than {oldest['version']}: an old client neither sends it nor looks at it",
            "entries": comparison.only_ours,
        },
        "gone since oldest": {
            "reason": f"the newest client has dropped it, and {oldest['version']} sends it empty and expects it empty",
            "entries": comparison.only_theirs,
        },
        "renamed since oldest": {
            "reason": "names do not travel; the number means the same place in both",
            "entries": comparison.mismatches,
        },
    }
    VERSIONS_FILE.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    pythons = [interpreter(NEWEST_PYTHON), interpreter(OLDEST_PYTHON)]
    if None in pythons:
        sys.exit(f"set {NEWEST_PYTHON} and {OLDEST_PYTHON} to the interpreters of two environments with clients")
    write_versions(*pythons)
