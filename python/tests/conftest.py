"""Fixtures: a platform per test, and containers that run the real client, in its newest and oldest supported version.

    IONIAN_CLIENT_PYTHON      an interpreter with the newest client and requirements.txt; runs pytest too
    IONIAN_OLD_CLIENT_PYTHON  the same with the oldest supported client

A test whose interpreter is not named is skipped.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fake_platform import Container, FakePlatform
from modal_proto import api_pb2

StartContainer = Callable[..., Container]


@pytest.fixture(params=["IONIAN_CLIENT_PYTHON", "IONIAN_OLD_CLIENT_PYTHON"], ids=["newest", "oldest"])
def client_python(request: pytest.FixtureRequest) -> str:
    python = os.environ.get(request.param)
    if not python:
        pytest.skip(f"{request.param} is not set")
    return python


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    with FakePlatform().running() as platform:
        yield platform


@pytest.fixture
def start(platform: FakePlatform, client_python: str, tmp_path: Path) -> Iterator[StartContainer]:
    """Start a container for a function; keyword arguments are environment variables."""
    containers: list[Container] = []

    def start_container(
        function: api_pb2.Function,
        command: Sequence[str] | None = None,
        preexec: Callable[[], object] | None = None,
        **environment: str,
    ) -> Container:
        container = Container(platform, client_python, tmp_path, function, environment, command, preexec)
        containers.append(container)
        return container

    yield start_container
    for container in containers:
        container.destroy()
        print(f"--- container stdout\n{container.stdout}\n--- container stderr\n{container.stderr}")
