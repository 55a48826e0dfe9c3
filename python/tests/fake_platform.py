"""A platform of a few hundred lines, for one container: what the runtime calls, and the announcement of web ports.

It runs in threads of its own, so that tests read from top to bottom: start a container, talk to it, stop it, look at
what it said. `events` has every RPC and announcement in the order of arrival, which several promises are about.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cbor2
import grpclib.server
from google.protobuf import empty_pb2, message_factory
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from modal_proto import api_pb2

APPS = Path(__file__).parent / "apps"
LAUNCHER = Path(__file__).parent.parent / "ionian_container" / "launcher.py"
TASK_ID = "ta-test"
FUNCTION_ID = "fu-test"
IMAGE_ID = "im-test"
CREDENTIALS = {"x-modal-task-id": TASK_ID, "x-ionian-container-token": "secret"}

# Generous, for a machine that is busy with other things; nothing waits this long unless something is broken.
WAIT_SECONDS = 30.0
POLL_SECONDS = 5.0


@dataclass
class Call:
    """One function call with one input, and what came back."""

    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)
    output: "Future[api_pb2.FunctionPutOutputsItem]" = field(default_factory=Future)
    finished: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class FakePlatform:
    """The service, its announcement endpoint, and a record of what the container said."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.announcements: list[dict[str, Any]] = []
        self.announcement_headers: list[dict[str, str]] = []
        self.announcement_status = 200
        self.task_results: list[api_pb2.GenericResult] = []
        self.heartbeats: list[float] = []
        self.refuses_credentials = False
        self._calls: dict[str, Call] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._inputs: asyncio.Queue[api_pb2.FunctionGetInputsItem] = asyncio.Queue()

    @contextlib.contextmanager
    def running(self) -> Iterator["FakePlatform"]:
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        announcements = ThreadingHTTPServer(("127.0.0.1", 0), self._announcement_handler())
        threading.Thread(target=announcements.serve_forever, daemon=True).start()
        self.announce_url = f"http://127.0.0.1:{announcements.server_port}/_ionian/v1/web-ready"
        self._server = self._on_loop(self._start_grpc(0))
        try:
            yield self
        finally:
            announcements.shutdown()
            announcements.server_close()
            self._loop.call_soon_threadsafe(self._server.close)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(WAIT_SECONDS)

    # What tests do.

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The platform is gone, with all its connections, and then there again at the same address."""
        self._on_loop(self._stop_grpc())
        yield
        self._server = self._on_loop(self._start_grpc(int(self.url.rpartition(":")[2])))

    def kill_switch(self) -> None:
        """The platform's graceful stop, given as an input."""
        self._give(api_pb2.FunctionGetInputsItem(kill_switch=True))

    def call(self, *args: Any, method: str = "") -> Any:
        """Call the function through the call lane and decode what it returned."""
        call = self._submit(cbor2.dumps([list(args), {}]), method, [])
        item = call.output.result(WAIT_SECONDS)
        assert item.result.status == api_pb2.GenericResult.GENERIC_STATUS_SUCCESS, item.result.exception
        return cbor2.loads(item.result.data)

    def submit(self, *args: Any) -> None:
        """Give the container an input, and wait for nothing."""
        self._submit(cbor2.dumps([list(args), {}]), "", [])

    def data_channel_get(self, path: str, method: str = "") -> Response:
        """A GET through the runtime's data channel, as the platform does when the hook is not attached."""
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": [[b"host", b"web.localhost"]],
            "client": ["203.0.113.7", 1],
            "extensions": {},
        }
        request = api_pb2.Asgi(http_request=api_pb2.Asgi.HttpRequest(body=b"", more_body=False))
        chunk = api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, index=1, data=request.SerializeToString())
        call = self._submit(cbor2.dumps([[scope], {}]), method, [chunk])
        call.output.result(WAIT_SECONDS)
        response = Response(0, {}, b"")
        for data in call.data_out:
            message = api_pb2.Asgi.FromString(data.data)
            if message.HasField("http_response_start"):
                flat = [part.decode() for part in message.http_response_start.headers]
                response.status = message.http_response_start.status
                response.headers = dict(zip(flat[::2], flat[1::2], strict=True))
            elif message.HasField("http_response_body"):
                response.body += message.http_response_body.body
        return response

    def wait_for(self, what: str, condition: Callable[[], bool], gave_up: Callable[[], str | None]) -> None:
        """Wait until the record satisfies the condition; `gave_up` names a reason to stop waiting early."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while not condition():
                if reason := gave_up():
                    raise AssertionError(f"waiting for {what}: {reason}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"waited {WAIT_SECONDS:g} s for {what}; events: {self.events}")
                self._changed.wait(0.05)

    # What the runtime calls.

    def __mapping__(self) -> dict[str, Handler]:
        service = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
        return {f"/modal.client.ModalClient/{rpc.name}": self._handler(rpc) for rpc in service.methods}

    def _handler(self, rpc: Any) -> Handler:
        implementation = getattr(self, f"_rpc_{rpc.name}", None)

        async def handle(stream: Any) -> None:
            request = await stream.recv_message()
            self._record(rpc.name)
            if self.refuses_credentials:
                raise GRPCError(Status.UNAUTHENTICATED, "the container has ended")
            if implementation is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"the fake platform has no {rpc.name}")
            if rpc.server_streaming:
                await stream.send_initial_metadata()
                async for message in implementation(request):
                    await stream.send_message(message)
            else:
                await stream.send_message(await implementation(request))

        return Handler(
            handle,
            Cardinality.UNARY_STREAM if rpc.server_streaming else Cardinality.UNARY_UNARY,
            message_factory.GetMessageClass(rpc.input_type),
            message_factory.GetMessageClass(rpc.output_type),
        )

    async def _rpc_ContainerHello(self, request: Any) -> Any:
        return empty_pb2.Empty()

    async def _rpc_ContainerHeartbeat(self, request: Any) -> Any:
        self.heartbeats.append(time.monotonic())
        return api_pb2.ContainerHeartbeatResponse()

    async def _rpc_FunctionGetInputs(self, request: Any) -> Any:
        try:
            item = await asyncio.wait_for(self._inputs.get(), POLL_SECONDS)
        except TimeoutError:
            return api_pb2.FunctionGetInputsResponse()
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def _rpc_FunctionPutOutputs(self, request: Any) -> Any:
        for item in request.outputs:
            call = self._calls["fc-" + item.input_id.removeprefix("in-")]
            call.finished.set()
            call.output.set_result(item)
        return empty_pb2.Empty()

    async def _rpc_FunctionCallGetDataIn(self, request: Any) -> Any:
        call = self._calls[request.function_call_id]
        for chunk in call.data_in:
            if chunk.index > request.last_index:
                yield chunk
        await call.finished.wait()

    async def _rpc_FunctionCallPutDataOut(self, request: Any) -> Any:
        self._calls[request.function_call_id].data_out.extend(request.data_chunks)
        return empty_pb2.Empty()

    async def _rpc_TaskResult(self, request: Any) -> Any:
        self.task_results.append(request.result)
        return empty_pb2.Empty()

    # Inside.

    def _announcement_handler(self) -> type[BaseHTTPRequestHandler]:
        platform = self

        class AnnouncementHandler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                platform.announcements.append(json.loads(body))
                platform.announcement_headers.append({k.lower(): v for k, v in self.headers.items()})
                platform._record("announce")
                refusal = b"" if platform.announcement_status == 200 else b"no web endpoint here"
                self.send_response(platform.announcement_status)
                self.send_header("content-length", str(len(refusal)))
                self.end_headers()
                self.wfile.write(refusal)

            def log_message(self, *args: Any) -> None:
                pass

        return AnnouncementHandler

    async def _stop_grpc(self) -> None:
        # First of all, so that nothing is said on the way: a killed process says nothing.
        for protocol in self._server.protocols:
            if transport := getattr(getattr(protocol, "connection", None), "_transport", None):
                transport.abort()
        self._server.close()
        await self._server.wait_closed()

    async def _start_grpc(self, port: int) -> "Server":
        # Made on the loop that serves it, which is where grpclib looks for one.
        server = Server([self])
        listener = socket.create_server(("127.0.0.1", port))
        await server.start(sock=listener)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return server

    def _submit(self, args: bytes, method: str, data_in: Sequence[api_pb2.DataChunk]) -> Call:
        number = next(self._numbers)
        call = self._calls[f"fc-{number}"] = Call(data_in=list(data_in))
        self._give(
            api_pb2.FunctionGetInputsItem(
                input_id=f"in-{number}",
                function_call_id=f"fc-{number}",
                input=api_pb2.FunctionInput(args=args, data_format=api_pb2.DATA_FORMAT_CBOR, method_name=method),
            )
        )
        return call

    def _give(self, item: api_pb2.FunctionGetInputsItem) -> None:
        self._loop.call_soon_threadsafe(self._inputs.put_nowait, item)

    def _record(self, event: str) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_SECONDS)


class Server(grpclib.server.Server):
    """Knows its connections, so that it can lose them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.protocols: list[Any] = []

    def _protocol_factory(self) -> Any:
        protocol = super()._protocol_factory()
        self.protocols.append(protocol)
        return protocol


class Container:
    """The real runtime in a process, given a function to run."""

    def __init__(
        self,
        platform: FakePlatform,
        python: str,
        directory: Path,
        function: api_pb2.Function,
        environment: dict[str, str],
        command: Sequence[str] | None = None,
        preexec: Callable[[], object] | None = None,
    ) -> None:
        self.platform = platform
        arguments = directory / "arguments.bin"
        arguments.write_bytes(container_arguments(function).SerializeToString())
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [python, "-u", *(command or [str(LAUNCHER)])],
                cwd=directory,
                stdout=stdout,
                stderr=stderr,
                preexec_fn=preexec,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(directory),
                    "PYTHONPATH": str(APPS),
                    "MODAL_SERVER_URL": platform.url,
                    "MODAL_IS_REMOTE": "1",
                    "MODAL_TASK_ID": TASK_ID,
                    "MODAL_IMAGE_ID": IMAGE_ID,
                    "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
                    "MODAL_OVERRIDE_HEADERS": ",".join(f"{name}:{value}" for name, value in CREDENTIALS.items()),
                    "MODAL_LOGLEVEL": "WARNING",
                    "IONIAN_ANNOUNCE_URL": platform.announce_url,
                    "IONIAN_WEB_BIND": "127.0.0.1",
                    **environment,
                },
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait_until_ready(self) -> "Container":
        """Ready, for the platform, is the first poll for inputs."""
        self.wait_for("the first FunctionGetInputs", lambda: "FunctionGetInputs" in self.platform.events)
        return self

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        self.platform.wait_for(what, condition, self._why_it_will_not_happen)

    def ports(self) -> dict[str | None, int]:
        assert len(self.platform.announcements) == 1, self.platform.announcements
        return {endpoint["method"]: endpoint["port"] for endpoint in self.platform.announcements[0]["endpoints"]}

    def wait(self) -> int:
        """Wait for the exit and return its code."""
        return self.process.wait(WAIT_SECONDS)

    def stop(self) -> int:
        self.platform.kill_switch()
        return self.wait()

    def destroy(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_SECONDS)

    def _why_it_will_not_happen(self) -> str | None:
        if self.process.poll() is None:
            return None
        return f"the container exited with {self.process.returncode}\n{self.stdout}\n{self.stderr}"


def function_definition(
    module: str, name: str, webhook_type: int = 0, concurrency: int | None = None
) -> api_pb2.Function:
    """What the platform knows of a function; web ones get the concurrency the hook needs, unless told otherwise."""
    web = webhook_type != api_pb2.WEBHOOK_TYPE_UNSPECIFIED
    return api_pb2.Function(
        module_name=module,
        function_name=name,
        app_name=module,
        function_type=(api_pb2.Function.FUNCTION_TYPE_GENERATOR if web else api_pb2.Function.FUNCTION_TYPE_FUNCTION),
        definition_type=api_pb2.Function.DEFINITION_TYPE_FILE,
        webhook_config=_webhook_config(webhook_type),
        max_concurrent_inputs=concurrency if concurrency is not None else (100 if web else 0),
        object_dependencies=[api_pb2.ObjectDependency(object_id=IMAGE_ID)],
        supported_output_formats=[api_pb2.DATA_FORMAT_ASGI] if web else [],
    )


def class_definition(module: str, name: str, methods: dict[str, int]) -> api_pb2.Function:
    """A class; `methods` maps each to its webhook type, 0 for a plain one."""
    definition = function_definition(module, f"{name}.*", concurrency=100)
    definition.is_class = True
    for method, webhook_type in methods.items():
        definition.method_definitions[method].CopyFrom(
            api_pb2.MethodDefinition(function_name=f"{name}.{method}", webhook_config=_webhook_config(webhook_type))
        )
    return definition


def _webhook_config(webhook_type: int) -> api_pb2.WebhookConfig:
    return api_pb2.WebhookConfig(type=webhook_type, method="GET" if webhook_type else "")  # type: ignore[arg-type]


def container_arguments(function: api_pb2.Function) -> api_pb2.ContainerArguments:
    layout = api_pb2.AppLayout(
        objects=[
            api_pb2.Object(
                object_id=FUNCTION_ID,
                function_handle_metadata=api_pb2.FunctionHandleMetadata(function_name=function.function_name),
            ),
            api_pb2.Object(object_id=IMAGE_ID),
        ],
        function_ids={function.function_name: FUNCTION_ID},
    )
    if function.is_class:
        layout.class_ids[function.function_name.removesuffix(".*")] = "cs-test"
        layout.objects.append(api_pb2.Object(object_id="cs-test", class_handle_metadata=api_pb2.ClassHandleMetadata()))
    return api_pb2.ContainerArguments(
        task_id=TASK_ID,
        function_id=FUNCTION_ID,
        app_id="ap-test",
        function_def=function,
        environment_name="main",
        app_layout=layout,
    )
