"""The official client, as a user has it: a shell, a home directory, a folder with apps, a token."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support import paths
from support.server import Platform
from support.waiting import wait_until

# A command that builds no image. A cold container starts in about a second, ten on a loaded machine.
COMMAND_SECONDS = 120
# The first build of a base image makes it from packages.
BUILD_SECONDS = 900

_WEB_URL = re.compile(r"https?://[a-z0-9-]+--[a-z0-9-]+\.localhost(?::\d+)?")


@dataclass
class Result:
    """What a command printed. `output` is both streams together, as in a terminal."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def words(self) -> str:
        """The output in one line without box characters: the client wraps and frames what it prints."""
        return " ".join(re.sub(r"[│╭╮╰╯─━┃]", " ", self.output).split())


class Deployment:
    """What `modal deploy` printed."""

    def __init__(self, result: Result) -> None:
        self.output = result.output
        self.words = result.words
        self.urls = list(dict.fromkeys(_WEB_URL.findall(result.output.replace("\n", " "))))

    def url(self, function: str = "") -> str:
        """The URL whose host ends in the name of a function; the only one where no name is given."""
        wanted = function.replace("_", "-").lower()
        matching = [url for url in self.urls if url.split(".")[0].endswith(wanted)]
        assert len(matching) == 1, f"{len(matching)} URLs for {function!r} in:\n{self.output}"
        return matching[0]


class Client:
    def __init__(self, platform: Platform, home: Path, version: str = paths.NEWEST) -> None:
        self.platform = platform
        self.version = version
        self.home = home
        self.work = home / "work"
        self.work.mkdir(parents=True)
        self.token = platform.new_token()

    def environment(self, **extra: str | None) -> dict[str, str]:
        """`None` removes a variable."""
        # Nothing that the machine's own user has set for a client, or for Python, is seen.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MODAL_", "IONIAN_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "COV_"))
        }
        ours = {
            "HOME": str(self.home),
            "NO_PROXY": "*",
            "COLUMNS": "200",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
        }
        environment = inherited | ours | self.token
        # The token's URL is what a user gets; port 0 and restarts keep it right.
        for name, value in extra.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        return environment

    def app(self, name: str, **replace: str) -> Path:
        """Copies an app of the tests or the examples to the user's folder. Keywords replace words in it."""
        source = next(folder / name for folder in (paths.APPS, paths.EXAMPLES) if (folder / name).exists())
        target = self.work / name
        text = source.read_text()
        for old, new in replace.items():
            assert old in text, f"{name} does not mention {old}"
            text = text.replace(old, new)
        target.write_text(text)
        return target

    def command_line(self, *arguments: str | Path) -> list[str]:
        return [str(paths.client_python(self.version)), "-m", "modal", *map(str, arguments)]

    def modal(
        self,
        *arguments: str | Path,
        ok: bool | None = True,
        timeout: float = COMMAND_SECONDS,
        environment: dict[str, str | None] | None = None,
    ) -> Result:
        """Runs `modal ...`. It must succeed, or fail with `ok=False`; `None` takes both."""
        return self._run(self.command_line(*arguments), ok, timeout, environment)

    def python(
        self,
        code: str,
        *arguments: str,
        ok: bool | None = True,
        timeout: float = COMMAND_SECONDS,
        environment: dict[str, str | None] | None = None,
    ) -> Result:
        """Runs a script of the user with the client."""
        # With -c, the user's folder is not where the script lies but where it runs; both are in sys.path.
        return self._run([str(paths.client_python(self.version)), "-c", code, *arguments], ok, timeout, environment)

    def deploy(self, app: str | Path, *options: str, timeout: float = BUILD_SECONDS, **replace: str) -> Deployment:
        if isinstance(app, str) and (self.work / app).exists() is False and app.endswith(".py"):
            app = self.app(app, **replace)
        return Deployment(self.modal("deploy", *options, app, timeout=timeout))

    def start(self, *arguments: str | Path) -> "Running":
        """A command that goes on while the test does something else."""
        return self._start(self.command_line(*arguments))

    def start_python(self, script: Path) -> "Running":
        """A script of the user that goes on while the test does something else."""
        return self._start([str(paths.client_python(self.version)), str(script)])

    def _start(self, command: Sequence[str]) -> "Running":
        process = subprocess.Popen(
            command,
            cwd=self.work,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        return Running(process)

    def app_logs(self, app: str) -> str:
        return self.modal("app", "logs", app, "--tail", "1000").output

    def wait_for_log(self, app: str, text: str, timeout: float = 20) -> str:
        """The client prints stored logs and exits, so it is asked until the text is there."""

        def found() -> str | None:
            logs = self.app_logs(app)
            return logs if text in logs else None

        return wait_until(found, f"{text!r} in the logs of {app}", timeout)

    def _run(
        self, command: Sequence[str], ok: bool | None, timeout: float, environment: dict[str, str | None] | None
    ) -> Result:
        try:
            done = subprocess.run(
                command,
                cwd=self.work,
                env=self.environment(**(environment or {})),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            printed = "".join(_text(part) for part in (late.stdout, late.stderr))
            raise AssertionError(f"{_short(command)} did not end within {timeout} s:\n{printed}") from None
        result = Result(done.returncode, done.stdout, done.stderr)
        if ok is not None:
            assert (result.code == 0) == ok, f"{_short(command)} ended with {result.code}:\n{result.output}"
        return result


class Running:
    """A command in the background, its output collected as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str, timeout: float = COMMAND_SECONDS) -> None:
        def found() -> bool:
            if text not in self.output and self.process.poll() is not None and not self._reader.is_alive():
                raise AssertionError(f"ended with {self.process.returncode} without {text!r}:\n{self.output}")
            return text in self.output

        wait_until(found, f"{text!r} in the output of a command", timeout)

    def wait(self, timeout: float = COMMAND_SECONDS) -> int:
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def has_node() -> bool:
    return shutil.which("node") is not None and (paths.CACHE / f"npm-{paths.NPM_CLIENT}" / "made").exists()


def _text(part: bytes | str | None) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


def _short(command: Sequence[str]) -> str:
    return " ".join(argument if len(argument) < 80 else argument[:77] + "..." for argument in command)
