"""A user keeps secrets on the platform: functions that ask for one get it, and nobody else ever sees it."""

import hashlib
import json
import uuid


def names(client):
    rows = json.loads(client.modal("secret", "list", "--json").stdout)
    return [next(value for key, value in row.items() if key.lower() == "name") for row in rows]


def remote(client, function):
    return client.python(f"import modal; print(modal.Function.from_name('keys', '{function}').remote())").stdout.strip()


def test_secrets_are_created_listed_and_deleted(client):
    client.modal("secret", "create", "first", "A=1")
    client.modal("secret", "create", "second", "B=2")
    assert sorted(names(client)) == ["first", "second"]
    taken = client.modal("secret", "create", "first", "A=3", ok=False)
    assert "already exists" in taken.words
    client.modal("secret", "create", "--force", "first", "A=3")
    client.modal("secret", "delete", "--yes", "first")
    assert names(client) == ["second"]
    assert "not found" in client.modal("secret", "delete", "--yes", "first", ok=False).words.lower()


def test_only_functions_that_ask_get_a_secret(client):
    client.modal("secret", "create", "my-keys", "API_KEY=abc=def", "REGION=eu")
    client.app("keys.py")
    client.modal("deploy", "keys.py", environment={"FROM_THE_SHELL": "typed here"})
    assert remote(client, "stored") == "['abc=def', 'eu']"
    assert remote(client, "inline") == "typed here"
    assert remote(client, "none") == "[]"


def test_a_missing_secret_is_named(client):
    client.app("keys.py")
    assert "my-keys" in client.modal("deploy", "keys.py", ok=False).words


def test_a_secret_is_nowhere_in_the_clear(client):
    platform = client.platform
    value, inline = f"hidden-{uuid.uuid4().hex}", f"inline-{uuid.uuid4().hex}"
    client.modal("secret", "create", "my-keys", f"API_KEY={value}", "REGION=eu")
    client.app("keys.py")
    client.modal("deploy", "keys.py", environment={"FROM_THE_SHELL": inline})
    # The search finds what is in the clear.
    assert platform.files_containing('from_name("my-keys")'), "the app's own source should be found"
    wanted = [hashlib.sha256(secret.encode()).hexdigest() for secret in (value, inline)]
    assert remote(client, "fingerprints") == str(wanted)
    for secret in (value, inline):
        assert platform.files_containing(secret) == [], "while its container may be running"
    client.modal("app", "stop", "--yes", "keys")
    platform.stop()
    for secret in (value, inline):
        assert platform.files_containing(secret) == [], "after the server has stopped"
    platform.start()
    assert names(client) == ["my-keys"]


def test_the_value_of_a_token_is_not_kept(client):
    """Only its hash."""
    assert client.platform.files_containing(client.token["MODAL_TOKEN_SECRET"]) == []
