"""Whether this machine has gVisor: `make setup` installs it where it can."""

import shutil

HAS_GVISOR = shutil.which("runsc") is not None
