"""Bare programs in the platform's own images: runc and nothing else, on the same layers, with the same interpreter."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.machine import CPU_SHARES, BenchFailed, wait_until

RUN_SECONDS = 60
STOP_SECONDS = 10


def layers_of(pid: int) -> list[str]:
    """The directories, topmost first, of which the root of a running container is stacked."""
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    root = next(line for line in mounts if line.split()[4] == "/")
    # The kernel prints each directory on its own where it was given so, else all in one.
    found = re.findall(r"lowerdir\+?=([^,]+)", root.split(" - ")[1])
    return [part for group in found for part in group.split(":")]


class Image:
    """A root file system of an image's layers, mounted in a temporary directory, for one program at a time."""

    def __init__(self, layers: list[str], environment: list[str]) -> None:
        self._environment = environment
        self._folder = Path(tempfile.mkdtemp(prefix="ionian-bench-bare-", dir="/var/tmp"))
        self._root = self._folder / "rootfs"
        self._runs = 0
        for name in ("rootfs", "upper", "work", "state"):
            (self._folder / name).mkdir()
        # The platform may remove a container's layers of files with the container: these are copies.
        kept = [self._own(index, layer) for index, layer in enumerate(layers)]
        options = f"lowerdir={':'.join(kept)},upperdir={self._folder}/upper,workdir={self._folder}/work"
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, self._root], check=True, timeout=RUN_SECONDS
        )

    def close(self) -> None:
        subprocess.run(["umount", self._root], check=False, timeout=RUN_SECONDS)
        if os.path.ismount(self._root):
            raise BenchFailed(f"failed to unmount {self._root}")
        shutil.rmtree(self._folder)

    def run(self, *arguments: str) -> float:
        """Runs a program to its end; returns how long `runc run` took, from fork to exit."""
        command = self._command(arguments)
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=self._folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=RUN_SECONDS, check=False
        )
        took = time.monotonic() - began
        if done.returncode:
            raise BenchFailed(f"{' '.join(arguments)} ended with {done.returncode} in runc: {done.stderr!r}")
        return took

    @contextmanager
    def serving(self, port: int, *arguments: str) -> Iterator[int]:
        """A server in the container, on a port of the host; yields its first process."""
        process = subprocess.Popen(self._command(arguments), cwd=self._folder, stdin=subprocess.DEVNULL)
        try:

            def is_open() -> bool:
                if process.poll() is not None:
                    raise BenchFailed(f"{' '.join(arguments)} ended with {process.returncode} in runc")
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_until(is_open, "the bare server's port")
            yield int((self._folder / "pid").read_text())
        finally:
            # runc passes it on.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                subprocess.run(
                    ["runc", "--root", self._folder / "state", "delete", "--force", self._name()],
                    check=False,
                    timeout=STOP_SECONDS,
                )
                process.kill()
                process.wait()

    def _own(self, index: int, layer: str) -> str:
        if Path(layer).parent.parent.name != "mounts":
            return layer
        copy = self._folder / f"files-{index}"
        shutil.copytree(layer, copy, symlinks=True)
        return str(copy)

    def _name(self) -> str:
        return f"{self._folder.name}-{self._runs}"

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        config_file = self._folder / "config.json"
        if not config_file.exists():
            subprocess.run(["runc", "spec"], cwd=self._folder, check=True, timeout=RUN_SECONDS)
        config = json.loads(config_file.read_text())
        config["root"] = {"path": "rootfs", "readonly": False}
        process = config["process"]
        process["terminal"] = False
        process["args"] = list(arguments)
        process["cwd"] = "/root"
        process["env"] = self._environment
        config["linux"]["resources"]["cpu"] = {"shares": CPU_SHARES}
        # On the host's network, as a bare program is.
        namespaces = config["linux"]["namespaces"]
        config["linux"]["namespaces"] = [namespace for namespace in namespaces if namespace["type"] != "network"]
        config_file.write_text(json.dumps(config))
        self._runs += 1
        root = str(self._folder / "state")
        return ["runc", "--root", root, "run", "--pid-file", str(self._folder / "pid"), self._name()]


def environment_of(pid: int) -> list[str]:
    """What a plain program needs of a container's environment."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    wanted = ("PATH=", "LANG=", "HOME=", "PYTHON_VERSION=")
    return [variable for variable in variables if variable.startswith(wanted)]
