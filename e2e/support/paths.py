"""Where things lie in the checkout, and which versions are tested."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
E2E = REPOSITORY / "e2e"
APPS = E2E / "apps"
EXAMPLES = REPOSITORY / "examples"
CACHE = REPOSITORY / ".cache"
# Layers of images are named by their content, so all servers of all tests share them.
IMAGES = CACHE / "images"
# State directories of failed tests stay here.
STATE = E2E / ".state"

NEWEST = "1.6.4"
OLDEST = "1.5.4"
NPM_CLIENT = "0.11.1"


def server_binary() -> Path:
    return Path(os.environ.get("IONIAN_BIN") or REPOSITORY / "target" / "release" / "ionian")


def client_python(version: str) -> Path:
    return REPOSITORY / f".venv-{version}" / "bin" / "python"
