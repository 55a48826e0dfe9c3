"""One Ionian server with the benchmark's app deployed, and requests to it."""

import http.client
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from bench import machine
from bench.machine import BenchFailed, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("IONIAN_BIN") or REPOSITORY / "target" / "release" / "ionian")
CLIENT_PYTHON = Path(os.environ.get("IONIAN_CLIENT_PYTHON") or REPOSITORY / ".venv-1.6.4" / "bin" / "python")
IMAGES = Path(os.environ.get("IONIAN_IMAGES_DIR") or REPOSITORY / ".cache" / "images")
APPS = REPOSITORY / "benches" / "apps"

START_SECONDS = 30
STOP_SECONDS = 40
# The first run makes a Python image out of Debian packages and installs FastAPI in it.
DEPLOY_SECONDS = 900
COMMAND_SECONDS = 120
REQUEST_SECONDS = 120

# The one debug line that is read here tells of the steps of a container's start.
LOG_FILTER = "info,ionian_control::dispatch=debug"

# What runs in a container, as its host sees it.
_RUNTIME = "ionian_container/launcher.py"


class Server:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ionian-bench-", dir="/var/tmp"))
        self.data_dir = self.folder / "data"
        self.work = self.folder / "work"
        self.log_file = self.folder / "server.log"
        self.token: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        shutil.copytree(APPS, self.work, ignore=shutil.ignore_patterns("__pycache__"))

    # Life

    def start(self) -> None:
        stdout_file = self.folder / "server.stdout"
        with stdout_file.open("wb") as stdout, self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "serve", "--data-dir", self.data_dir, "--listen", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                env=self._environment(),
                # Ctrl-C is for the benchmark, which then stops the server in order. A session of its own would take it
                # out of the benchmark's priority.
                process_group=0,
            )

        def ready() -> re.Match[str] | None:
            if self._process is None or self._process.poll() is not None:
                raise BenchFailed(f"the server ended before it was ready; see {self.log_file}")
            return re.match(r"ionian ready url=http://127\.0\.0\.1:(\d+)\n", stdout_file.read_text())

        self.port = int(wait_until(ready, "the server's ready line", START_SECONDS)[1])
        printed = self._run([BINARY, "token", "new", "--data-dir", self.data_dir], COMMAND_SECONDS)
        self.token = dict(re.findall(r"^export (MODAL_[A-Z_]+)=(\S+)$", printed, re.MULTILINE))

    def destroy(self) -> None:
        """Nothing stays on the machine, whatever happened before."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process is not None:
            self._run([BINARY, "reap", "--data-dir", self.data_dir], COMMAND_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # The client

    def deploy(self, **environment: str) -> str:
        printed = self._run([CLIENT_PYTHON, "-m", "modal", "deploy", "hello.py"], DEPLOY_SECONDS, **environment)
        self._hosts = dict(re.findall(r"https?://([a-z0-9-]+--bench-([a-z]+))\.localhost", printed))
        if not {"warm", "cold"} <= set(self._hosts.values()):
            raise BenchFailed(f"modal deploy printed no URLs:\n{printed}")
        return printed

    def deploy_app(self, file: str, function: str) -> str:
        """Deploys another app from the work folder; returns the host of one of its endpoints."""
        printed = self._run([CLIENT_PYTHON, "-m", "modal", "deploy", file], DEPLOY_SECONDS)
        found = re.search(rf"https?://([a-z0-9-]+--[a-z0-9-]+-{function}\.localhost:\d+)", printed.replace("\n", " "))
        if found is None:
            raise BenchFailed(f"modal deploy printed no URL of {function}:\n{printed}")
        return found[1]

    def start_python(self, code: str) -> subprocess.Popen[bytes]:
        """A user's script that goes on meanwhile."""
        return subprocess.Popen(
            [CLIENT_PYTHON, "-c", code],
            cwd=self.work,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def python(self, code: str) -> str:
        return self._run([CLIENT_PYTHON, "-c", code], COMMAND_SECONDS)

    # Requests

    def host(self, function: str) -> str:
        label = next(label for label, name in self._hosts.items() if name == function)
        return f"{label}.localhost:{self.port}"

    def get(self, function: str, path: str) -> tuple[bytes, float, float]:
        """On a new connection. Returns the body and the times of sending and of the first byte that came back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            sent = time.monotonic()
            connection.request("GET", path, headers={"Host": self.host(function)})
            response = connection.getresponse()
            received = time.monotonic()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise BenchFailed(f"GET {path} of {function} was answered with {response.status}: {body!r}")
        return body, sent, received

    # Containers, as the host sees them

    def containers(self) -> list[int]:
        """The first processes of all containers."""
        return [pid for pid in machine.descendants(self.pid) if _RUNTIME in machine.command_line(pid)]

    def wait_for_containers(self, count: int) -> None:
        """Until no more than this many are left."""
        wait_until(lambda: len(self.containers()) <= count, f"all containers but {count} to end")

    def wait_for_no_container(self) -> None:
        def gone() -> bool:
            return not list(machine.descendants(self.pid))

        wait_until(gone, "the containers' end")

    def log_size(self) -> int:
        return self.log_file.stat().st_size

    def log_since(self, size: int) -> str:
        with self.log_file.open("rb") as log:
            log.seek(size)
            return log.read().decode(errors="replace")

    def _environment(self, **extra: str) -> dict[str, str]:
        dropped = ("IONIAN_", "MODAL_", "PYTHON", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        # Layers are kept from run to run, as a server on this machine would keep them.
        ours = {"IONIAN_IMAGES_DIR": str(IMAGES), "IONIAN_LOG": LOG_FILTER, "NO_PROXY": "*", "NO_COLOR": "1"}
        return kept | ours | {"COLUMNS": "200"} | self.token | extra

    def _run(self, command: list[str | Path], timeout: float, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self._environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            shown = " ".join(str(part) for part in command)
            raise BenchFailed(f"{shown} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout
