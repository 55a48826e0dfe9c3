"""Single RPCs with the client's own stubs, for what no well-behaved client would send."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

from grpclib.client import Channel
from modal_proto import api_grpc

from support import paths

RPC_SECONDS = 60


def call(url: str, rpc: str, request: Any, token: dict[str, str] | None = None) -> Any:
    """One RPC over a connection of its own; without a token if none is given."""
    metadata = {"x-modal-client-version": paths.NEWEST, "x-modal-client-type": "1"}
    if token:
        metadata["x-modal-token-id"] = token["MODAL_TOKEN_ID"]
        metadata["x-modal-token-secret"] = token["MODAL_TOKEN_SECRET"]

    async def exchange() -> Any:
        split = urlsplit(url)
        channel = Channel(split.hostname, split.port)
        try:
            method = getattr(api_grpc.ModalClientStub(channel), rpc)
            return await method(request, metadata=metadata, timeout=RPC_SECONDS)
        finally:
            channel.close()

    return asyncio.run(asyncio.wait_for(exchange(), RPC_SECONDS + 5))
