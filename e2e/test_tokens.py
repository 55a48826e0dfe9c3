"""An operator gives out tokens and takes them back; a user sets them up."""

import json

import pytest
from grpclib import GRPCError, Status
from modal_proto import api_pb2
from support import rpc

HINT = "ionian token new"


def test_a_wrong_token_is_explained(client):
    wrong = client.modal("app", "list", ok=False, environment={"MODAL_TOKEN_SECRET": "as-wrong"})
    assert "token is not valid" in wrong.words
    assert HINT in wrong.words
    unknown = client.modal("app", "list", ok=False, environment={"MODAL_TOKEN_ID": "ak-unknown"})
    assert "token is not valid" in unknown.words


def test_a_missing_token_is_explained(client):
    """The client itself refuses to start without one, so an anonymous request is made by hand."""
    with pytest.raises(GRPCError) as caught:
        rpc.call(client.platform.url, "AppList", api_pb2.AppListRequest())
    assert caught.value.status is Status.UNAUTHENTICATED
    assert HINT in caught.value.message
    none = {"MODAL_TOKEN_ID": None, "MODAL_TOKEN_SECRET": None}
    assert "token" in client.modal("app", "list", ok=False, environment=none).words.lower()


def test_a_revoked_token_is_worthless_at_once(client):
    platform = client.platform
    other = platform.new_token("leaver")
    as_other = {"environment": other}
    client.modal("app", "list", **as_other)
    listed = platform.command("token", "list", "--data-dir", platform.data_dir).stdout
    assert other["MODAL_TOKEN_ID"] in listed
    assert other["MODAL_TOKEN_SECRET"] not in listed
    platform.command("token", "revoke", "--data-dir", platform.data_dir, other["MODAL_TOKEN_ID"])
    refused = client.modal("app", "list", ok=False, **as_other).words
    assert f"the token {other['MODAL_TOKEN_ID']} was revoked" in refused
    assert HINT in refused
    # Everyone else's goes on working.
    client.modal("app", "list")


def test_a_token_is_set_up_in_a_profile(each_client):
    token = each_client.token
    no_token = {"MODAL_TOKEN_ID": None, "MODAL_TOKEN_SECRET": None}
    each_client.modal(
        "token",
        "set",
        "--token-id",
        token["MODAL_TOKEN_ID"],
        "--token-secret",
        token["MODAL_TOKEN_SECRET"],
        "--profile",
        "self-hosted",
        environment=no_token,
    )
    # From now on the profile has everything, the server's address included.
    profile_only = {**no_token, "MODAL_SERVER_URL": None}
    each_client.modal("profile", "activate", "self-hosted", environment=profile_only)
    info = each_client.modal("token", "info", environment=profile_only).words
    assert token["MODAL_TOKEN_ID"] in info
    assert "ionian" in info
    profiles = json.loads(each_client.modal("profile", "list", "--json", environment=profile_only).stdout)
    assert any("self-hosted" in str(row) and "ionian" in str(row) for row in profiles), profiles
    each_client.modal("app", "list", environment=profile_only)


def test_a_wrong_token_is_not_set_up(client):
    refused = client.modal("token", "set", "--token-id", "ak-x", "--token-secret", "as-x", "--profile", "p", ok=False)
    assert "token is not valid" in refused.words


def test_the_printed_lines_name_this_server(client):
    assert client.token["MODAL_SERVER_URL"] == client.platform.url
    assert client.token["MODAL_TOKEN_ID"].startswith("ak-")
    assert client.token["MODAL_TOKEN_SECRET"].startswith("as-")


def test_a_container_has_credentials_for_its_own_app_and_no_more(client):
    """Code in a container can call functions of its app; it cannot make or change what only users may."""
    client.work.joinpath("inside.py").write_text(
        "import modal\n"
        "app = modal.App('inside', image=modal.Image.debian_slim())\n"
        "@app.function()\n"
        "def helper(): return 'helped'\n"
        "@app.function()\n"
        "def ask(): return helper.remote()\n"
        "@app.function()\n"
        "def take():\n"
        "    try:\n"
        "        modal.Secret.objects.list()\n"
        "    except Exception as error:\n"
        "        return f'{type(error).__name__}: {error}'\n"
        "    return 'listed the secrets'\n"
    )
    client.deploy("inside.py")
    call = "import modal; print(modal.Function.from_name('inside', '{}').remote())"
    assert client.python(call.format("ask")).stdout.strip() == "helped"
    refused = client.python(call.format("take")).stdout
    assert "PermissionDenied" in refused or "Auth" in refused, refused
