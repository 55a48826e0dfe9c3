"""An operator asks what the host can do."""


def test_the_doctor_names_what_it_looked_at(platform):
    told = platform.command("doctor").stdout
    for subject in ("runc", "overlay", "nft", "cgroup"):
        assert subject in told.lower(), told


def test_the_configuration_is_documented(platform):
    printed = platform.command("config").stdout
    for key in ("listen", "images", "IONIAN_RUNTIME_KIND", "IONIAN_WEB_HOOK"):
        assert key in printed
