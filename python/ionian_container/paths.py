"""Where things lie in a container."""

import os


def deps_path() -> str:
    """The folder of the packages in requirements.txt, at the end of the import path of web containers."""
    return os.environ.get("IONIAN_DEPS") or "/__ionian/deps"
