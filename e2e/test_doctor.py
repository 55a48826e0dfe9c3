"""An operator asks what the host can do."""


def test_the_doctor_names_what_it_looked_at(platform):
    told = platform.command("doctor").stdout
    for subject in ("runc", "overlay", "nft", "cgroup"):
        assert subject in told.lower(), told


def test_the_doctor_tells_whether_functions_can_have_gvisor(platform):
    platform.settings = {"IONIAN_RUNTIME_RUNSC": "/nonexistent/runsc"}
    # Not everybody needs it.
    assert "MISS  gvisor" in platform.command("doctor").stdout
    platform.settings = platform.settings | {"IONIAN_RUNTIME_KIND": "gvisor"}
    missing = platform.command("doctor", ok=False)
    assert missing.returncode != 0
    assert "/nonexistent/runsc cannot be used: there is no such file" in missing.stdout


def test_the_configuration_is_documented(platform):
    printed = platform.command("config").stdout
    for key in ("listen", "images", "IONIAN_RUNTIME_KIND", "IONIAN_RUNTIME_RUNSC", "IONIAN_WEB_HOOK"):
        assert key in printed
