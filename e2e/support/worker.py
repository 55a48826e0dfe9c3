"""A worker that is a process of its own, for a platform whose server has none."""

import os
import signal
import subprocess

from support import paths
from support.server import STOP_SECONDS, Platform


class Worker:
    """Start it, kill it, freeze it. `destroy` leaves nothing of it on the host."""

    def __init__(self, platform: Platform, name: str = "worker", settings: dict[str, str] | None = None) -> None:
        self.platform = platform
        self.settings = settings or {}
        self.data_dir = platform.state / name
        self.log_file = platform.state / f"{name}.log"
        self._token_file = platform.state / f"{name}.token"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Worker":
        """Also starts it again, on the same data."""
        assert self._process is None, "the worker runs already"
        if not self._token_file.exists():
            made = self.platform.command("token", "new", "--worker", "--data-dir", self.platform.data_dir)
            self.write_token(made.stdout)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self.arguments(), env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def arguments(self) -> list[str]:
        return [
            str(paths.server_binary()),
            "worker",
            "--data-dir",
            str(self.data_dir),
            "--server",
            self.platform.url,
            "--join-token-file",
            str(self._token_file),
        ]

    def write_token(self, token: str) -> None:
        self._token_file.touch(mode=0o600)
        self._token_file.write_text(token)

    def run(self, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """For a worker that ends by itself."""
        return subprocess.run(
            self.arguments(),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("IONIAN_", "MODAL_"))}
        return inherited | {"IONIAN_IMAGES_DIR": str(paths.IMAGES), "NO_COLOR": "1"} | self.settings

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """As an operator stops it."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process = None
        assert code == 0, f"the worker ended with {code}\n{self.tail()}"

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def has_container(self, container: str) -> bool:
        return (self.data_dir / "worker" / "containers" / "run" / container).exists()

    def destroy(self) -> None:
        if self._process is not None:
            self.thaw()
        try:
            self.stop()
        finally:
            self.platform.command("reap", "--data-dir", self.data_dir)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def tail(self) -> str:
        return f"--- end of {self.log_file}\n" + "\n".join(self.log().splitlines()[-60:])
