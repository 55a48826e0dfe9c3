"""The reviewed list of tests that may be skipped. A skip that is not in it is a failure.

Used by conftest.py for the tests in this folder and by scripts/test for all suites.
"""

import fnmatch
import tomllib
from pathlib import Path

LIST = Path(__file__).resolve().parents[1] / "skips.toml"


def allowed_reason(suite: str, test: str, file: Path = LIST) -> str | None:
    """Why a test of a suite (`rust`, `python`, `e2e`) may be skipped, or None when it may not."""
    for entry in tomllib.loads(file.read_text()).get(suite, []):
        if fnmatch.fnmatchcase(test, entry["test"]):
            return entry["reason"]
    return None
