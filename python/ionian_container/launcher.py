"""Starts the official runtime as `python -m modal._container_entrypoint` would, with Ionian's hooks in place.

Run by path, `python -u /__ionian/hook/ionian_container/launcher.py`, and not by `-m`: a module name would need our
folder on PYTHONPATH, where every Python process that the user's code starts would find it too.

What differs from a plain `-m modal._container_entrypoint`, and nothing else does:

- SIGINT, the platform's polite stop, works even if the parent ignored it.
- `IONIAN_CLIENT_DEPS` (a folder, or `1` for /__modal/deps) is appended to `sys.path`: the client's dependencies, for
  images that have none. Last, so that the user's own versions win.
- With `IONIAN_WEB_HOOK=1`, `IONIAN_DEPS` (default /__ionian/deps) is appended after it and the web hook is installed.
- A restart of the platform does not end the runtime, and one whose container was given up ends (`resilience`).
- The container's own address is found where the kernel does not tell it (`own_address`).
- The runtime's own modules are imported with the garbage collector paused and are exempt from it afterwards.
"""

import gc
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path
from types import ModuleType

CLIENT_DEPS_PATH = "/__modal/deps"
RUNTIME_MODULE = "modal._container_entrypoint"


def main() -> None:
    _enable_sigint()
    _use_import_path_of_runtime()
    _append_client_dependencies()
    resilience = _load("resilience")
    own_address = _load("own_address")
    _forget_own_package()
    web_hook = _load_web_hook() if os.environ.get("IONIAN_WEB_HOOK") == "1" else None
    _import_runtime()
    resilience.install()
    own_address.install()
    if web_hook is not None:
        web_hook.install()
    # `alter_sys` makes the runtime `sys.modules["__main__"]`, spec included: multiprocessing's spawn then starts
    # children from that name exactly as it does under `-m`, and never sees this file.
    runpy.run_module(RUNTIME_MODULE, run_name="__main__", alter_sys=True)


def _enable_sigint() -> None:
    # A process started by a shell's `&` or by a careless parent inherits "ignore", and Python then never sees SIGINT:
    # the runtime could not be stopped gracefully.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_runtime() -> None:
    # The runtime's first statement is this import. Done here, the collector does not search a growing heap of modules
    # and classes, none of which is garbage, a dozen times: a tenth of a container's start. What then exists is exempt
    # from later collections too, which the user's own imports gain from; the user's code itself runs as ever.
    gc.disable()
    try:
        importlib.import_module("modal._runtime.user_code_imports")
    except Exception:
        # The runtime is about to fail in the same way, and to say so in its own words.
        pass
    finally:
        gc.freeze()
        gc.enable()


def _use_import_path_of_runtime() -> None:
    # Running by path put this file's folder first in `sys.path`; `-m` would have put the working directory there.
    # With -P or PYTHONSAFEPATH neither is added, and the first entry is then something else.
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
        sys.path[0] = os.getcwd()


def _append_client_dependencies() -> None:
    setting = os.environ.get("IONIAN_CLIENT_DEPS", "")
    if setting not in ("", "0"):
        sys.path.append(CLIENT_DEPS_PATH if setting == "1" else setting)


def _load(name: str) -> ModuleType:
    # Our own package is importable only for this one statement, which loads all that the module needs: user code can
    # neither be shadowed by it nor come to depend on it.
    package_root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, package_root)
    try:
        return importlib.import_module(f"ionian_container.{name}")
    finally:
        sys.path.remove(package_root)


def _forget_own_package() -> None:
    # User code sees no module that it did not import. What was loaded lives on in what it has wrapped.
    for name in [name for name in sys.modules if name.split(".")[0] == "ionian_container"]:
        del sys.modules[name]


def _load_web_hook() -> ModuleType:
    web_hook = _load("web_hook")
    sys.path.append(_load("paths").deps_path())
    return web_hook


if __name__ == "__main__":
    main()
