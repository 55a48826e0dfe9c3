"""Fills a directory with the client package, its dependencies and the web server's.

Runs inside an image, with that image's own Python, because only it knows which wheels fit. The image
is not changed: what this leaves anywhere but in the output directory is thrown away. Arguments: the
output directory, the client's version, whether older pins are accepted, and the pinned requirements of
the web server.

Works on every Python that the client supports, with nothing but the standard library and pip.
"""

import compileall
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys

EXIT_NO_PIP = 77
# What containers import from /pkg. The packages that deployers' own code may want come elsewhere.
PKG_PARTS = {"modal", "modal_proto", "modal_version", "synchronicity"}
# Which of the client's lists of pins is used; the oldest supported client has it already.
PINS = "2025.06.txt"
# Where the parts are mounted in containers.
PKG_DIR, DEPS_DIR, EXTRA_DIR = "/pkg", "/__modal/deps", "/__ionian/deps"

SITECUSTOMIZE = f'''"""Appends what the platform brings, so that the image's own packages win."""

import sys

sys.path.extend(path for path in ("{DEPS_DIR}", "{EXTRA_DIR}") if path not in sys.path)
'''

# Imports what a container will, with the directories where they are now.
SMOKE_TEST = """
import sys
pkg, deps, extra = sys.argv[1:]
sys.path.insert(0, pkg)
sys.path += [deps, extra]
import modal, modal._container_entrypoint
import cbor2, click, h11, httptools, uvicorn, uvloop, websockets
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.websockets import websockets_impl
expected = {modal: pkg, uvicorn: extra}
for module, directory in expected.items():
    assert module.__file__.startswith(directory), f"{module.__name__} came from {module.__file__}"
"""


# Pins that may be replaced in one bundle; more than a few is a broken index.
MAX_REPLACED_PINS = 4


def fail(output, message, code=1):
    """Leaves the reason where the caller finds it, and in the log."""
    print(message, file=sys.stderr, flush=True)
    with open(os.path.join(output, "failure.txt"), "w", encoding="utf-8", errors="replace") as file:
        file.write(message)
    sys.exit(code)


def run(arguments):
    """Runs this Python, copies its output to the log, and returns its status and the end of that output."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    tail = []
    for line in process.stdout:
        print(line, end="", flush=True)
        tail = [*tail[-19:], line]
    return process.wait(), "".join(tail)


def must_run(output, what, arguments):
    status, tail = run(arguments)
    if status != 0:
        fail(output, f"{what} failed:\n{tail}")


def ensure_pip(output):
    if importlib.util.find_spec("pip"):
        return
    attempt = subprocess.run([sys.executable, "-m", "ensurepip"], capture_output=True, text=True, errors="replace")
    importlib.invalidate_caches()
    if attempt.returncode != 0 or not importlib.util.find_spec("pip"):
        reason = (attempt.stderr or attempt.stdout).strip()[-500:]
        fail(output, f"this image's Python ({sys.executable}) has no pip, and ensurepip failed: {reason}", EXIT_NO_PIP)


def pip_install(target, *what):
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--no-cache-dir", "--target", target]
    return ["-m", "pip", "install", *options, *what]


def install(output, part, *what):
    target = os.path.join(output, part)
    must_run(output, f"pip install {' '.join(what)}", pip_install(target, *what))
    return target


def install_pins(output, part, pins, accepts_older):
    """Installs the client's pinned dependencies.

    Indexes of companies hold new releases back, so a pin can be missing there that the public index has.
    If allowed, the newest older release of the same major version stands in for it, and the log says so.
    """
    target = os.path.join(output, part)
    with open(pins, encoding="utf-8") as file:
        lines = file.read().splitlines()
    replaced = os.path.join(output, "pins.txt")
    for _ in range(MAX_REPLACED_PINS + 1):
        with open(replaced, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        status, tail = run(pip_install(target, "--requirement", replaced))
        if status == 0:
            os.remove(replaced)
            return target
        missing = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", tail)
        if not missing or not accepts_older:
            break
        name, version = missing.groups()
        pin, older = f"{name}=={version}", f"{name}>={version.split('.')[0]},<{version}"
        print(f"note: the package index has no {pin}, which the client pins; looking for {older}", flush=True)
        lines = [line.replace(pin, older) if re.match(rf"{re.escape(pin)}(\s|;|$)", line) else line for line in lines]
    fail(output, f"pip install --requirement {PINS} failed:\n{tail}")


def synchronicity_requirement(pkg):
    """The client's own requirement on synchronicity; its pins do not have it."""
    for name in os.listdir(pkg):
        if re.fullmatch(r"modal-.*\.dist-info", name):
            with open(os.path.join(pkg, name, "METADATA"), encoding="utf-8") as file:
                for line in file:
                    match = re.fullmatch(r"Requires-Dist: (synchronicity\s*[^;]*?)\s*(;.*)?\n", line)
                    if match:
                        return match.group(1).replace(" ", "")
    return None


def tidy(root):
    """Scripts are not on anybody's PATH, and everyone may read the rest."""
    shutil.rmtree(os.path.join(root, "bin"), ignore_errors=True)
    for directory, _, files in os.walk(root):
        os.chmod(directory, 0o755)
        for name in files:
            path = os.path.join(directory, name)
            os.chmod(path, 0o755 if os.stat(path).st_mode & 0o100 else 0o644)


def compile_part(root, mounted_at):
    # Hashes that nobody checks: the files never change, and their times do when they are copied.
    compileall.compile_dir(
        root,
        maxlevels=20,
        quiet=2,
        stripdir=root,
        prependdir=mounted_at,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def main():
    output, version, older_pins, *extra = sys.argv[1:]
    ensure_pip(output)
    pkg = install(output, "pkg", f"modal=={version}")
    requirement = synchronicity_requirement(pkg)
    if requirement:
        install(output, "pkg", requirement)
    pins = os.path.join(pkg, "modal", "builder", PINS)
    if not os.path.exists(pins):
        fail(output, f"client {version} has no list of pinned dependencies {PINS}")
    deps = install_pins(output, "deps", pins, older_pins == "accept-older-pins")
    extra = install(output, "extra", *extra)

    for name in os.listdir(pkg):
        if name not in PKG_PARTS:
            path = os.path.join(pkg, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    missing = PKG_PARTS - set(os.listdir(pkg))
    if missing:
        fail(output, f"client {version} lacks {', '.join(sorted(missing))}")
    with open(os.path.join(pkg, "sitecustomize.py"), "w", encoding="utf-8") as file:
        file.write(SITECUSTOMIZE)

    for root, mounted_at in ((pkg, PKG_DIR), (deps, DEPS_DIR), (extra, EXTRA_DIR)):
        tidy(root)
        compile_part(root, mounted_at)
    must_run(output, "importing the client", ["-I", "-c", SMOKE_TEST, pkg, deps, extra])


main()
