"""One running platform: the real binary with a data directory of its own, on a port that the system chose."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from support import paths
from support.waiting import wait_until

# The first start makes keys and a database; more is a hang.
START_SECONDS = 30
# Running containers are stopped, and requests in flight get their grace.
STOP_SECONDS = 40
COMMAND_SECONDS = 60
LOG_TAIL_LINES = 60

_READY = re.compile(r"^ionian ready url=(http://127\.0\.0\.1:(\d+))$")
_EXPORT = re.compile(r"^export (MODAL_[A-Z_]+)=(.*)$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# As the server's log format writes it: time, level, message.
_ERROR_LINE = re.compile(r"^\S+\s+ERROR\s")


class Platform:
    """Start it, talk to it, stop it. Whatever it leaves on the host goes with `destroy`."""

    def __init__(self, state: Path, settings: dict[str, str] | None = None) -> None:
        self.state = state
        self.data_dir = state / "data"
        self.log_file = state / "server.log"
        self.settings = settings or {}
        self.url = ""
        self.port = 0
        # Where it listens, if not on a socket of its own: as systemd passes one.
        self.socket: socket.socket | None = None
        # From the start of the process to its ready line, the last time.
        self.start_seconds = 0.0
        self._stdout_file = state / "server.stdout"
        self._process: subprocess.Popen[bytes] | None = None
        self._expected_errors: list[re.Pattern[str]] = []
        state.mkdir(parents=True, exist_ok=True)

    # Life

    def start(self) -> "Platform":
        """Also starts it again, on the same data and the same port."""
        assert self._process is None, "the server runs already"
        command = [paths.server_binary(), "serve", "--data-dir", self.data_dir, "--listen", f"127.0.0.1:{self.port}"]
        passed: tuple[int, ...] = ()
        if self.socket is not None:
            passed = (self.socket.fileno(),)
            # The variable names the process that the socket is meant for, which the shell becomes.
            script = f'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&{passed[0]}'
            command = ["bash", "-c", script, "bash", *command]
        started = time.monotonic()
        with self._stdout_file.open("wb") as stdout, self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, pass_fds=passed
            )
        ready = wait_until(self._ready, "the server's ready line", START_SECONDS)
        self.start_seconds = time.monotonic() - started
        self.url, self.port = ready.group(1), int(ready.group(2))
        return self

    def _ready(self) -> re.Match[str] | None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the server ended with {self._process.returncode} before it was ready\n{self.tail()}")
        lines = self._stdout_file.read_text().splitlines()
        return _READY.match(lines[0]) if lines else None

    def stop(self) -> None:
        """As an operator stops it. It must end by itself, in time and without complaint."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the server did not stop within {STOP_SECONDS} s\n{self.tail()}") from None
        finally:
            self._process = None
        assert code == 0, f"the server ended with {code} when it was told to stop\n{self.tail()}"
        assert len(self._stdout_file.read_text().splitlines()) == 1, "more on stdout than the ready line"

    def kill(self) -> None:
        """As a power cut ends it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def destroy(self) -> None:
        """Stops the server and removes what it has on the host. Only the state directory is left."""
        try:
            self.stop()
        finally:
            self.command("reap", "--data-dir", self.data_dir)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    # Commands of the binary

    def command(self, *arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [paths.server_binary(), *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if ok:
            assert done.returncode == 0, f"ionian {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        return done

    def new_token(self, name: str = "test") -> dict[str, str]:
        """What the three printed lines would set in a shell."""
        printed = self.command("token", "new", "--data-dir", self.data_dir, "--name", name).stdout.splitlines()
        matches = [_EXPORT.match(line) for line in printed]
        assert all(matches), f"not only export lines: {printed}"
        variables = {match.group(1): match.group(2).strip("'\"") for match in matches if match}
        assert variables.keys() == {"MODAL_SERVER_URL", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"}
        return variables

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("IONIAN_", "MODAL_", "PYTEST_"))
        }
        return inherited | {"IONIAN_IMAGES_DIR": str(paths.IMAGES), "NO_COLOR": "1"} | self.settings

    # Log

    def log(self) -> str:
        return _ANSI.sub("", self.log_file.read_text(errors="replace")) if self.log_file.exists() else ""

    def tail(self) -> str:
        lines = self.log().splitlines()[-LOG_TAIL_LINES:]
        return f"--- end of {self.log_file}\n" + "\n".join(lines)

    def expect_error(self, pattern: str) -> None:
        """Announces an ERROR line. Every other one fails the test."""
        self._expected_errors.append(re.compile(pattern))

    def unexpected_errors(self) -> list[str]:
        errors = [line for line in self.log().splitlines() if _ERROR_LINE.match(line)]
        return [line for line in errors if not any(pattern.search(line) for pattern in self._expected_errors)]

    # What the data directory holds

    def files_containing(self, text: str) -> list[Path]:
        """Files in which a text stands in the clear: the data directory, as far as it is on disk, and the log."""
        needle = text.encode()
        found = [self.log_file] if text in self.log() else []
        device = self.data_dir.stat().st_dev
        for folder, folders, files in os.walk(self.data_dir):
            # Root file systems of running containers are mounts, and so are not what a thief of the disk gets.
            folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_dev == device]
            for path in (Path(folder, name) for name in files):
                # What ends while we look is not where data is kept.
                try:
                    if path.is_file() and not path.is_symlink() and needle in path.read_bytes():
                        found.append(path)
                except FileNotFoundError:
                    continue
        return found


def free_port() -> int:
    """A port for something other than the server, which takes port 0 itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
