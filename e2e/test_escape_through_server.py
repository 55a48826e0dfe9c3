"""What code in a container gets out of the server that is not its own: nothing.

Each attempt is made from inside a running container, over the address that containers have, with the container's own
credential, with a changed one, with none, or with one of another kind. It must be refused with a status that says so,
and nothing that is sent back may hold the canary, which lies in another app's secret, arguments, results, logs, code
and blobs. What containers may do is done first, so that a refusal is no accident.

`IONIAN_WRITE_TABLES=1` writes the table in docs/escape-suite.md anew.
"""

import asyncio
import base64
import json
import os
import pickle
import re
import sqlite3
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from grpclib import GRPCError
from grpclib.client import Channel
from modal_proto import api_grpc
from modal_proto import api_pb2 as pb
from support import rpc
from support.client import Client
from support.waiting import wait_until

CANARY = "the-canary-word"
# Results beyond it travel as blobs: the client's limit is 2 MiB.
LARGE = 3 * 1024 * 1024
DENIED = {"PERMISSION_DENIED", "NOT_FOUND", "UNAUTHENTICATED", "UNIMPLEMENTED"}

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "escape-suite.md"
TABLE_BEGIN = "<!-- The table through the server begins. -->"
TABLE_END = "<!-- The table through the server ends. -->"


class Attacker:
    """The container from which everything is tried."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rows: list[tuple[str, str]] = []

    def call(self, function: str, *arguments: object) -> object:
        return self.calls(function, [arguments])[0]

    def calls(self, function: str, many: list[tuple]) -> list:
        """Calls a function of the attacker's app, in one container and one process of the client."""
        code = (
            "import base64, modal, pickle, sys;"
            "many = pickle.loads(base64.b64decode(open(sys.argv[2]).read()));"
            "function = modal.Function.from_name('attacker', sys.argv[1]);"
            "results = list(function.starmap(many));"
            "print(base64.b64encode(pickle.dumps(results)).decode())"
        )
        path = self.client.work / "many"
        path.write_text(base64.b64encode(pickle.dumps(many)).decode())
        printed = self.client.python(code, function, str(path)).stdout
        return pickle.loads(base64.b64decode(printed.split()[-1]))

    def all_denied(self, function: str, attempts: dict[str, tuple]) -> None:
        for what, (status, message, sent) in zip(attempts, self.calls(function, list(attempts.values())), strict=True):
            assert status in DENIED, f"{what}: {status} {message} {sent[:200]}"
            self.leaked_nothing(what, f"{message}".encode() + sent)
            self.rows.append((what, status.lower().replace("_", " ")))

    def all_refused(self, attempts: dict[str, tuple]) -> None:
        """Requests over HTTP."""
        for what, (status, sent) in zip(attempts, self.calls("http", list(attempts.values())), strict=True):
            assert status in (400, 401, 403, 404, 405), f"{what}: {status} {sent[:200]}"
            self.leaked_nothing(what, sent)
            self.rows.append((what, str(status)))

    def leaked_nothing(self, what: str, sent: bytes) -> None:
        assert CANARY.encode() not in sent, f"{what} leaked: {sent[:500]}"
        assert b"x" * 1000 not in sent, what


class Victim:
    """What the other app has, as its developer knows it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.token = {name: client.token[name] for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")}
        code = (
            "import json, modal;"
            "F = lambda name: modal.Function.from_name('victim', name);"
            f"done = F('large').spawn(b'{CANARY}' + b'x' * {LARGE}); done.get(timeout=100);"
            "word = F('secret_work').spawn(); word.get(timeout=100);"
            "running = F('secret_work').spawn(100.0);"
            "yielded = F('values'); yielded.hydrate();"
            "print(json.dumps([done.object_id, word.object_id, running.object_id, F('secret_work').hydrate().object_id,"
            " modal.App.lookup('victim').app_id]))"
        )
        printed = client.python(code).stdout.splitlines()[-1]
        self.large_call, self.word_call, self.running_call, self.function, self.app = json.loads(printed)
        output = self.rpc(
            "FunctionGetOutputs", pb.FunctionGetOutputsRequest(function_call_id=self.large_call, timeout=1)
        )
        self.blob = output.outputs[0].result.data_blob_id
        assert self.blob, "the result is a blob"
        self.blob_url = self.rpc("BlobGet", pb.BlobGetRequest(blob_id=self.blob)).download_url
        definition = self.rpc("FunctionGetById", pb.FunctionGetByIdRequest(function_id=self.function)).function
        definition = definition.ranked_functions[0].function
        self.secret, self.image = definition.secret_ids[0], definition.image_id
        self.mounts = list(definition.mount_ids)
        self.task = wait_until(self._running_task, "the victim's container")
        self.input = self._input_of(self.running_call)

    def rpc(self, name: str, request: object) -> object:
        return rpc.call(self.client.platform.url, name, request, self.token)

    def _running_task(self) -> str | None:
        listed = self.rpc("TaskList", pb.TaskListRequest(app_id=self.app)).tasks
        return listed[-1].task_id if listed else None

    def _input_of(self, call_id: str) -> str:
        """Of a call that runs; the database knows it, no answer to anybody does."""
        path = self.client.platform.data_dir / "ionian.db"
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("SELECT id FROM inputs WHERE call_id = ?", [call_id]).fetchone()[0]


@pytest.fixture
def two_apps(client):
    secret = pb.SecretGetOrCreateRequest(
        deployment_name="victims-secret",
        object_creation_type=pb.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
        env_dict={"CANARY": CANARY},
    )
    token = {name: client.token[name] for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")}
    rpc.call(client.platform.url, "SecretGetOrCreate", secret, token)
    client.app("escape.py", VICTIM="victim", ATTACKER="attacker")
    for app in ("victim", "attacker"):
        client.modal("deploy", f"escape.py::{app}", timeout=900)
    return client


@pytest.mark.timeout(600)
def test_a_containers_credential_opens_what_is_its_own_and_nothing_else(two_apps):
    client = two_apps
    attacker = Attacker(client)

    # What it may do, at first: all of it goes through the same checks.
    seen = attacker.call("call_others", LARGE)
    assert seen["remote"] == LARGE
    assert seen["generator"] == [LARGE, 1]
    assert seen["map"] == [0, 2, 4]
    assert seen["options"] == 8
    assert attacker.call("fetch", seen["spawned"]) == LARGE

    victim = Victim(client)
    assert seen["app"] == victim.app
    own = attacker.call("own")
    attacker.all_denied("send", foreign_objects(victim, own) | developers_requests(victim))
    attacker.all_denied("send", other_credentials(victim, own, client))
    attacker.all_denied("connect_as_worker", workers_requests(client, own))
    what_is_bound_to_another_app(attacker, victim)
    blob_urls(attacker, victim, own, client)

    # A container that has ended has no credential any more.
    client.modal("app", "stop", "attacker", "--yes", ok=None)
    header = {"x-ionian-container": own["credential"]}
    assert_unauthenticated(client, header)

    # The victim's input was not touched.
    summary = victim.rpc("FunctionGetOutputs", pb.FunctionGetOutputsRequest(function_call_id=victim.running_call))
    assert summary.num_unfinished_inputs == 1
    assert not summary.outputs
    write_table(attacker.rows)


def foreign_objects(victim: Victim, own: dict) -> dict[str, tuple]:
    """RPCs that a container may send, about what is another app's."""

    def attempt(name: str, request: object) -> tuple:
        return name, type(request).DESCRIPTOR.name, request.SerializeToString()

    item = pb.FunctionPutInputsItem(idx=0, input=pb.FunctionInput(args_blob_id=victim.blob, data_format=1))
    output = pb.FunctionPutOutputsItem(
        input_id=victim.input, result=pb.GenericResult(status=1, data=b"forged"), data_format=1
    )
    chunk = pb.DataChunk(data_format=1, index=1, data=b"forged")
    call = victim.large_call
    return {
        "inputs of another function": attempt(
            "FunctionGetInputs", pb.FunctionGetInputsRequest(function_id=victim.function)
        ),
        "a result for another container's input": attempt(
            "FunctionPutOutputs", pb.FunctionPutOutputsRequest(outputs=[output])
        ),
        "results of another app's call": attempt(
            "FunctionGetOutputs", pb.FunctionGetOutputsRequest(function_call_id=call, timeout=1)
        ),
        "what another app's call is": attempt(
            "FunctionCallFromId", pb.FunctionCallFromIdRequest(function_call_id=call)
        ),
        "inputs for another app's call": attempt(
            "FunctionPutInputs",
            pb.FunctionPutInputsRequest(function_id=victim.function, function_call_id=victim.running_call),
        ),
        "the end of another app's call": attempt(
            "FunctionFinishInputs", pb.FunctionFinishInputsRequest(function_call_id=victim.running_call, num_inputs=9)
        ),
        "cancel another app's call": attempt(
            "FunctionCallCancel", pb.FunctionCallCancelRequest(function_call_id=victim.running_call)
        ),
        "values that another app's generator yields": attempt(
            "FunctionCallGetDataOut", pb.FunctionCallGetDataRequest(function_call_id=call)
        ),
        "requests to another app's web endpoint": attempt(
            "FunctionCallGetDataIn", pb.FunctionCallGetDataRequest(function_call_id=victim.running_call)
        ),
        "values in the name of another container": attempt(
            "FunctionCallPutDataOut",
            pb.FunctionCallPutDataRequest(function_call_id=victim.running_call, data_chunks=[chunk]),
        ),
        "another app's blob by its id": attempt("BlobGet", pb.BlobGetRequest(blob_id=victim.blob)),
        "the same with a signature made up": attempt(
            "BlobGet", pb.BlobGetRequest(blob_id=f"{victim.blob}.{'00' * 16}")
        ),
        "another app's blob as an argument to a function": attempt(
            "FunctionMap",
            pb.FunctionMapRequest(function_id=victim.function, function_call_type=1, pipelined_inputs=[item]),
        ),
        "another app's blob as an own result": attempt(
            "TaskResult", pb.TaskResultRequest(result=pb.GenericResult(status=2, data_blob_id=victim.blob))
        ),
        "another app's image": attempt("ImageFromId", pb.ImageFromIdRequest(image_id=other_image(victim.image))),
        "a function with another app's secret": attempt(
            "FunctionBindParams",
            pb.FunctionBindParamsRequest(
                function_id=victim.function,
                function_options=pb.FunctionOptions(secret_ids=[victim.secret], replace_secret_ids=True),
            ),
        ),
        "a function with another app's files": attempt(
            "FunctionBindParams",
            pb.FunctionBindParamsRequest(
                function_id=victim.function,
                function_options=pb.FunctionOptions(mount_ids=["mo-" + "A" * 22]),
            ),
        ),
        "stop another container": attempt("ContainerStop", pb.ContainerStopRequest(task_id=victim.task)),
        "make an app": attempt("AppGetOrCreate", pb.AppGetOrCreateRequest(app_name="mine", object_creation_type=1)),
        "make an environment": attempt(
            "EnvironmentGetOrCreate", pb.EnvironmentGetOrCreateRequest(deployment_name="mine", object_creation_type=1)
        ),
    }


def other_image(image: str) -> str:
    """Both apps have the same image; one with another id is as far away as any."""
    return image[:-1] + ("a" if image[-1] != "a" else "b")


def developers_requests(victim: Victim) -> dict[str, tuple]:
    """RPCs that containers may not send at all."""

    def attempt(name: str, request: object) -> tuple:
        return name, type(request).DESCRIPTOR.name, request.SerializeToString()

    secret = pb.SecretGetOrCreateRequest(deployment_name="victims-secret")
    deployment = pb.AppPublishRequest(app_id=victim.app, name="victim", app_state=3)
    definition = pb.Function(module_name="m", function_name="f")
    return {
        "logs of another app, live": attempt("AppGetLogs", pb.AppGetLogsRequest(app_id=victim.app, timeout=1)),
        "logs of another app, stored": attempt("AppFetchLogs", pb.AppFetchLogsRequest(app_id=victim.app)),
        "counts of another app's logs": attempt("AppCountLogs", pb.AppCountLogsRequest(app_id=victim.app)),
        "a secret by name": attempt("SecretGetOrCreate", secret),
        "the list of secrets": attempt("SecretList", pb.SecretListRequest()),
        "a secret by id": attempt("SecretGetInfo", pb.SecretGetInfoRequest(secret_id=victim.secret)),
        "delete a secret": attempt("SecretDelete", pb.SecretDeleteRequest(secret_id=victim.secret)),
        "the list of apps": attempt("AppList", pb.AppListRequest()),
        "the list of containers": attempt("TaskList", pb.TaskListRequest()),
        "deploy": attempt("AppPublish", deployment),
        "create a function": attempt(
            "FunctionCreate", pb.FunctionCreateRequest(app_id=victim.app, function=definition)
        ),
        "stop an app": attempt("AppStop", pb.AppStopRequest(app_id=victim.app)),
        "scale a function": attempt(
            "FunctionUpdateSchedulingParams", pb.FunctionUpdateSchedulingParamsRequest(function_id=victim.function)
        ),
        "whether a file is there": attempt("MountPutFile", pb.MountPutFileRequest(sha256_hex="00" * 32)),
        "a mount": attempt("MountGetOrCreate", pb.MountGetOrCreateRequest()),
        "build an image": attempt("ImageGetOrCreate", pb.ImageGetOrCreateRequest()),
        "follow an image's build": attempt(
            "ImageJoinStreaming", pb.ImageJoinStreamingRequest(image_id=victim.image, timeout=1)
        ),
        "make a token": attempt("TokenFlowCreate", pb.TokenFlowCreateRequest()),
        "a token's owner": attempt("TokenInfoGet", pb.TokenInfoGetRequest()),
    }


def other_credentials(victim: Victim, own: dict, client: Client) -> dict[str, tuple]:
    """One request that the container's own credential is good for, with other ones."""
    task, signature = own["credential"].split(".", 1)
    flipped = ("1" if signature[0] == "0" else "0") + signature[1:]
    join = join_token(client)
    header = "x-ionian-container"
    attempts = {
        "no credential": {},
        "another container's id with the own signature": {header: f"{victim.task}.{signature}"},
        "the own id with a changed signature": {header: f"{task}.{flipped}"},
        "the own id without a signature": {header: f"{task}."},
        "a worker's join token as a container's credential": {header: join},
        "a worker's join token as an API token": {"x-modal-token-id": join, "x-modal-token-secret": join},
        "the container's credential as an API token": {
            "x-modal-token-id": task,
            "x-modal-token-secret": own["credential"],
        },
        "a token's id with a made-up secret": {
            "x-modal-token-id": client.token["MODAL_TOKEN_ID"],
            "x-modal-token-secret": "as-" + "A" * 22,
        },
        "a JWT of AuthTokenGet alone": {"x-modal-auth-token": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0YSJ9."},
    }
    request = pb.AppGetByDeploymentNameRequest(name="victim").SerializeToString()
    return {
        what: ("AppGetByDeploymentName", "AppGetByDeploymentNameRequest", request, headers)
        for what, headers in attempts.items()
    }


def join_token(client: Client) -> str:
    made = client.platform.command("token", "new", "--worker", "--data-dir", client.platform.data_dir).stdout
    return re.search(r"wj-[0-9a-f]+\.[0-9a-f]+", made).group(0)


def workers_requests(client: Client, own: dict) -> dict[str, tuple]:
    """The worker protocol is not spoken on the address that containers reach, not even to a worker."""
    return {
        "the worker protocol with the container's credential": (
            {"x-ionian-container": own["credential"], "authorization": f"Bearer {own['credential']}"},
        ),
        "the worker protocol with an API token": ({"authorization": f"Bearer {client.token['MODAL_TOKEN_SECRET']}"},),
        "the worker protocol with a join token": ({"authorization": f"Bearer {join_token(client)}"},),
    }


def what_is_bound_to_another_app(attacker: Attacker, victim: Victim) -> None:
    """A look-up by name is allowed, and tells nothing but how to call the function."""
    lookup = pb.FunctionGetRequest(app_name="victim", object_tag="secret_work")
    status, _, sent = attacker.call("send", "FunctionGet", "FunctionGetRequest", lookup.SerializeToString())
    assert status == "OK"
    found = pb.FunctionGetResponse.FromString(sent)
    assert found.function_id == victim.function
    definition = found.function.ranked_functions[0].function
    assert not definition.function_serialized
    assert not definition.secret_ids
    assert not definition.mount_ids
    for hidden in (victim.secret, victim.image, *victim.mounts, CANARY):
        assert hidden.encode() not in sent, hidden
    attacker.rows.append(("another app's code, secrets and files through a look-up", "not in the answer"))


def blob_urls(attacker: Attacker, victim: Victim, own: dict, client: Client) -> None:
    """A URL is all the permission that a blob's bytes need, so none may be guessed from another."""
    # A blob of the container's own, as the attacker's sample of a good URL.
    declared = pb.BlobCreateRequest(content_length=4, content_md5="jXd/OF09/siBXSD3SWAm3A==")
    status, message, sent = attacker.call("send", "BlobCreate", "BlobCreateRequest", declared.SerializeToString())
    assert status == "OK", message
    upload = pb.BlobCreateResponse.FromString(sent)
    put = urlsplit(upload.upload_url)
    put_path = f"{put.path}?{put.query}"
    assert attacker.call("http", "PUT", put_path, {}, b"data")[0] == 200
    asked = pb.BlobGetRequest(blob_id=upload.blob_id).SerializeToString()
    status, message, sent = attacker.call("send", "BlobGet", "BlobGetRequest", asked)
    assert status == "OK", message
    good = urlsplit(pb.BlobGetResponse.FromString(sent).download_url)
    assert attacker.call("http", "GET", f"{good.path}?{good.query}", {}) == (200, b"data")

    blob = upload.blob_id.split(".")[0]
    fields = dict(pair.split("=") for pair in good.query.split("&"))
    expires, signature = fields["expires"], fields["signature"]
    flipped = ("1" if signature[0] == "0" else "0") + signature[1:]
    theirs = f"/_blobs/v1/get/{victim.blob}/0"
    credential = {"x-ionian-container": own["credential"]}

    def get(path: str, headers: dict | None = None) -> tuple:
        return "GET", path, headers or {}

    attacker.all_refused(
        {
            "a blob's URL without a signature": get(theirs),
            "the same with the container's credential": get(theirs, credential),
            "an own URL with another blob's id": get(f"{theirs}?{good.query}"),
            "another blob's id behind an own one": get(f"{good.path}/../../{victim.blob}/0?{good.query}"),
            "the same, encoded": get(f"/_blobs/v1/get/{blob}%2f..%2f{victim.blob}/0?{good.query}"),
            "a changed signature": get(f"{good.path}?expires={expires}&signature={flipped}"),
            "a later expiry": get(f"{good.path}?expires={int(expires) + 3600}&signature={signature}"),
            "an expiry in the past": get(f"{good.path}?expires=1&signature={signature}"),
            "no expiry": get(f"{good.path}?signature={signature}"),
            "a signature of nothing": get(f"{theirs}?expires={expires}&signature="),
            "PUT to a URL for reading": ("PUT", f"{good.path}?{good.query}", {}, b"evil"),
            "DELETE of a blob": ("DELETE", f"{good.path}?{good.query}", {}),
            "GET of a URL for writing": get(put_path),
            "an upload onto another app's blob": (
                "PUT",
                f"/_blobs/v1/put/{victim.blob}/0?{put.query}",
                {},
                b"evil",
            ),
            "a file of a mount, from the workers' door": get(f"/_ionian/worker/v1/content/{'00' * 32}", credential),
            "an endpoint announced for another container": (
                "POST",
                "/_ionian/v1/web-ready",
                {
                    "x-ionian-container": f"{victim.task}.{own['credential'].split('.', 1)[1]}",
                    "content-type": "application/json",
                },
                b'{"endpoints": [{"method": null, "port": 1}]}',
            ),
        }
    )
    # The victim's blob is as it was, and its own URL works where its owner has it.
    path = urlsplit(victim.blob_url)
    with urllib.request.urlopen(f"{client.platform.url}{path.path}?{path.query}", timeout=30) as answer:
        assert CANARY.encode() in answer.read(1000)


def assert_unauthenticated(client: Client, header: dict) -> None:
    """From outside, where the platform itself answers: the refusal is the credential's, not the network's."""

    async def exchange() -> str:
        channel = Channel("127.0.0.1", client.platform.port)
        try:
            stub = api_grpc.ModalClientStub(channel)
            await stub.AppGetByDeploymentName(
                pb.AppGetByDeploymentNameRequest(name="victim"), metadata=header, timeout=10
            )
            return "OK"
        except GRPCError as error:
            return error.status.name
        finally:
            channel.close()

    wait_until(lambda: asyncio.run(exchange()) == "UNAUTHENTICATED", "the end of the credential", 60)


def write_table(rows: list[tuple[str, str]]) -> None:
    table = "\n".join(["| from inside a container | answer |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    text = DOCUMENT.read_text()
    before, rest = text.split(TABLE_BEGIN)
    _, after = rest.split(TABLE_END)
    wanted = f"{before}{TABLE_BEGIN}\n{table}\n{TABLE_END}{after}"
    if os.environ.get("IONIAN_WRITE_TABLES") == "1":
        DOCUMENT.write_text(wanted)
    assert DOCUMENT.read_text() == wanted, "the table is not the documented one; write it with IONIAN_WRITE_TABLES=1"
