"""Two apps in one file: VICTIM, which has things of its own, and ATTACKER, which sends what it is told to."""

import asyncio
import os
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import modal

image = modal.Image.debian_slim()
CANARY = "the-canary-word"

victim = modal.App("VICTIM", image=image)
attacker = modal.App("ATTACKER", image=image)


@victim.function(secrets=[modal.Secret.from_name("victims-secret")], max_containers=1)
def secret_work(seconds: float = 0.0) -> str:
    """Has something in its arguments, its environment, its output and its result."""
    print(f"log of the victim: {CANARY}", flush=True)
    time.sleep(seconds)
    return CANARY


@victim.function(max_containers=1)
def large(word: bytes) -> bytes:
    """Too large for anything but a blob, in both directions."""
    return word


@victim.function(max_containers=1)
def values(word: bytes):
    yield word
    yield word[:1]


# What a container may do, and must go on to.


@attacker.function(max_containers=2)
def call_others(size: int) -> dict:
    echoed = modal.Function.from_name("VICTIM", "large").remote(b"x" * size)
    yielded = list(modal.Function.from_name("VICTIM", "values").remote_gen(b"y" * size))
    spawned = modal.Function.from_name("VICTIM", "large").spawn(b"z" * size)
    mapped = list(modal.Function.from_name("ATTACKER", "double").map(range(3)))
    return {
        "remote": len(echoed),
        "generator": [len(value) for value in yielded],
        "spawned": spawned.object_id,
        "map": mapped,
        "options": modal.Function.from_name("ATTACKER", "double").with_options(timeout=77).remote(4),
        "app": modal.App.lookup("VICTIM").app_id,
    }


@attacker.function(max_containers=1)
def double(number: int) -> int:
    return 2 * number


@attacker.function(max_containers=1)
def fetch(call_id: str) -> int:
    """In another container than the one that made the call."""
    return len(modal.FunctionCall.from_id(call_id).get(timeout=60))


# What it must not do.


@attacker.function(max_containers=1, timeout=200)
def idle(seconds: float) -> None:
    time.sleep(seconds)


@attacker.function(max_containers=1)
def own() -> dict:
    """What a container is and has; its credential travels in the headers that the client was told to send."""
    _, credential = os.environ["MODAL_OVERRIDE_HEADERS"].split(":", 1)
    return {"task": os.environ["MODAL_TASK_ID"], "credential": credential, "url": os.environ["MODAL_SERVER_URL"]}


@attacker.function(max_containers=1)
def send(rpc: str, kind: str, request: bytes, headers: dict | None = None) -> tuple[str, str, bytes]:
    """One RPC with the container's own credential, or with other headers: status, message, what came."""
    from modal_proto import api_grpc, api_pb2

    message = getattr(api_pb2, kind).FromString(request) if kind != "Empty" else empty()
    metadata = {"x-modal-client-version": modal.__version__, "x-modal-client-type": "3"}
    if headers is None:
        name, value = os.environ["MODAL_OVERRIDE_HEADERS"].split(":", 1)
        headers = {name: value}

    async def exchange(channel):
        method = getattr(api_grpc.ModalClientStub(channel), rpc)
        answer = await method(message, metadata=metadata | headers, timeout=10)
        parts = answer if isinstance(answer, list) else [answer]
        return b"".join(part.SerializeToString() for part in parts)

    return with_channel(exchange)


@attacker.function(max_containers=1)
def connect_as_worker(headers: dict) -> tuple[str, str, bytes]:
    """The worker protocol, with an empty message."""
    from google.protobuf.empty_pb2 import Empty
    from grpclib.const import Cardinality

    async def exchange(channel):
        path = "/ionian.worker.v1.Workers/Connect"
        async with channel.request(
            path, Cardinality.STREAM_STREAM, Empty, Empty, metadata=headers, timeout=10
        ) as stream:
            await stream.send_message(Empty(), end=True)
            answer = await stream.recv_message()
            return answer.SerializeToString() if answer else b""

    return with_channel(exchange)


def empty():
    from google.protobuf.empty_pb2 import Empty

    return Empty()


def with_channel(exchange) -> tuple[str, str, bytes]:
    from grpclib import GRPCError
    from grpclib.client import Channel

    async def run():
        split = urlsplit(os.environ["MODAL_SERVER_URL"])
        channel = Channel(split.hostname, split.port)
        try:
            return "OK", "", await exchange(channel)
        except GRPCError as error:
            return error.status.name, f"{error.message} {error.details}", b""
        finally:
            channel.close()

    return asyncio.run(run())


@attacker.function(max_containers=1)
def http(method: str, path: str, headers: dict, body: bytes | None = None) -> tuple[int, bytes]:
    """Without any credential but those in the headers."""
    request = urllib.request.Request(os.environ["MODAL_SERVER_URL"] + path, method=method, headers=headers, data=body)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
