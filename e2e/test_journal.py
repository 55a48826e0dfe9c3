"""What a real server decided is decided again by its scheduler alone."""

import re

import pytest


@pytest.fixture
def platform_settings(tmp_path):
    return {"IONIAN_DEBUG_JOURNAL": str(tmp_path / "journal.jsonl")}


def test_the_journal_of_a_real_run_replays(client, tmp_path):
    platform = client.platform
    client.deploy("calls.py")
    code = (
        "import modal; print(sum(modal.Function.from_name('calls', 'square').map(range(100))));"
        "modal.Function.from_name('calls', 'die').spawn();"
        "print(modal.Function.from_name('calls', 'slow').spawn(2.0).object_id)"
    )
    total, call_id = client.python(code).stdout.split()
    assert total == str(sum(x * x for x in range(100)))
    platform.kill()
    platform.start()
    assert client.python(f"import modal; print(modal.FunctionCall.from_id('{call_id}').get())").stdout.strip() == "done"
    platform.stop()
    replayed = platform.command("replay", tmp_path / "journal.jsonl").stdout
    turns, events, lives = map(int, re.findall(r"\d+", replayed))
    assert lives == 2
    assert events >= turns > 20
