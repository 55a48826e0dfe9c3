"""One platform per test: the real binary, the official client, containers on runc.

What is shared between tests is content-addressed and nothing else: layers of images (.cache/images). A failed test
keeps its state directory (e2e/.state/...) and says where it is. After each test the server's log has no ERROR line
that the test did not announce with `platform.expect_error(...)`.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import paths, skips
from support.client import BUILD_SECONDS, Client
from support.server import Platform

# Per test, image builds of its own included. The images that all share are built before, with a limit of their own.
TEST_SECONDS = 300

# The tests of the schema need no server, and build xtask where nobody has.
os.environ.setdefault("IONIAN_CLIENT_PYTHON", str(paths.client_python(paths.NEWEST)))
os.environ.setdefault("IONIAN_OLD_CLIENT_PYTHON", str(paths.client_python(paths.OLDEST)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs in `make test-all` only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wants_slow = os.environ.get("IONIAN_LONG_TESTS") == "1"
    slow = [item for item in items if item.get_closest_marker("slow")]
    if not wants_slow and slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    for item in items:
        if "platform" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("timeout"):
            # Fixtures are not counted: the first test builds the shared images.
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and skips.allowed_reason("e2e", item.nodeid.removeprefix("e2e/")) is None:
        report.outcome = "failed"
        report.longrepr = f"skipped, and e2e/skips.toml has no entry for it: {report.longrepr}"
    if report.failed:
        item.stash[FAILED] = True


FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def shared_images() -> None:
    """Builds what nearly all apps stand on, so that no test's own time depends on who comes first."""
    state = _new_state("images")
    platform = Platform(state)
    try:
        platform.start()
        client = Client(platform, state / "home")
        client.deploy("shared_images.py", timeout=2 * BUILD_SECONDS)
        client.modal("run", "shared_images.py", timeout=BUILD_SECONDS)
    except BaseException:
        print(f"state kept in {state}\n{platform.tail()}")
        raise
    finally:
        platform.destroy()
    shutil.rmtree(state)


@pytest.fixture
def platform_settings() -> dict[str, str]:
    """Settings of the server as environment variables; test files override this."""
    return {}


@pytest.fixture
def start_platform(request: pytest.FixtureRequest) -> Iterator[Callable[..., Platform]]:
    """For tests that start the server themselves, with settings or with none yet."""
    platforms: list[Platform] = []

    def start(settings: dict[str, str] | None = None, data_dir: Path | None = None) -> Platform:
        platform = Platform(_new_state(request.node.name), settings)
        platform.data_dir = data_dir or platform.data_dir
        platforms.append(platform)
        return platform.start()

    yield start
    for platform in platforms:
        _end(platform, request)


@pytest.fixture
def platform(
    request: pytest.FixtureRequest,
    start_platform: Callable[..., Platform],
    platform_settings: dict[str, str],
    shared_images: None,
) -> Platform:
    return start_platform(platform_settings)


def _end(platform: Platform, request: pytest.FixtureRequest) -> None:
    problems = []
    try:
        platform.destroy()
    except AssertionError as error:
        problems.append(str(error))
    problems += platform.unexpected_errors()
    if problems or request.node.stash.get(FAILED, False):
        print(f"state kept in {platform.state}\n{platform.tail()}")
    else:
        shutil.rmtree(platform.state, ignore_errors=True)
    assert not problems, "the server had errors that the test did not announce:\n" + "\n".join(problems)


def _new_state(test: str) -> Path:
    # Short: paths of unix sockets, which may lie in it, have 107 characters.
    name = re.sub(r"[^a-z0-9]+", "-", test.removeprefix("test_").lower()).strip("-")[:24]
    state = paths.STATE / f"{name}-{uuid.uuid4().hex[:6]}"
    state.mkdir(parents=True)
    return state


@pytest.fixture
def client(platform: Platform) -> Client:
    """The newest supported client."""
    return Client(platform, platform.state / "home")


@pytest.fixture(params=[paths.NEWEST, paths.OLDEST])
def each_client(request: pytest.FixtureRequest, platform: Platform) -> Client:
    """The newest supported client, then the oldest."""
    return Client(platform, platform.state / "home", request.param)
