"""`ionian uninstall` leaves the host as if the server had never been there."""

import subprocess
from pathlib import Path

from support.waiting import wait_until


def host_state():
    """What a container platform leaves on hosts, by name."""

    def lines(*command):
        return set(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines())

    cgroups = {str(path) for path in Path("/sys/fs/cgroup").glob("**/ionian/*") if path.is_dir()}
    return {
        "links": {line.split(": ")[1].split("@")[0] for line in lines("ip", "-o", "link")},
        "namespaces": lines("ip", "netns", "list"),
        "tables": lines("nft", "list", "tables"),
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "memory": {str(path) for path in Path("/dev/shm").glob("ionian-*")},
        "groups": cgroups,
    }


def test_nothing_is_left(client):
    platform = client.platform
    client.deploy("calls.py")
    client.python("import modal; modal.Function.from_name('calls', 'slow').spawn(600.0)")
    wait_until(lambda: "ta-" in client.modal("container", "list", "--json").stdout, "the container to run")
    used = host_state()
    platform.kill()

    told = platform.command("uninstall", "--data-dir", platform.data_dir).stdout
    assert "--yes" in told
    assert str(platform.data_dir / "ionian.db") in told
    assert (platform.data_dir / "ionian.db").exists()

    note = platform.data_dir / "note-of-the-operator"
    note.write_text("keep me")
    platform.command("uninstall", "--data-dir", platform.data_dir, "--yes")
    assert [path.name for path in platform.data_dir.iterdir()] == [note.name]
    left = host_state()
    # Other tests may run on this machine: what this server had is what is there no more.
    gone = {kind: used[kind] - left[kind] for kind in used}
    assert all(gone[kind] for kind in ("links", "tables", "mounts", "memory", "groups")), gone
    own = str(platform.data_dir.resolve())
    assert not [mount for mount in left["mounts"] if mount.startswith(own)]
    memory = {name.rsplit("ionian-", 1)[1] for name in gone["memory"]}
    for kind in ("links", "namespaces", "tables", "groups"):
        assert not [name for name in left[kind] for short in memory if short in name], (kind, left[kind])


def test_a_running_server_is_not_uninstalled(platform):
    refused = platform.command("uninstall", "--data-dir", platform.data_dir, "--yes", ok=False)
    assert refused.returncode != 0
    assert "another process of the platform runs" in refused.stderr
    assert (platform.data_dir / "ionian.db").exists()


def test_another_directory_is_refused(platform, tmp_path):
    (tmp_path / "keys").mkdir()
    refused = platform.command("uninstall", "--data-dir", tmp_path, "--yes", ok=False)
    assert refused.returncode != 0
    assert "is not the data directory" in refused.stderr
    assert (tmp_path / "keys").exists()
