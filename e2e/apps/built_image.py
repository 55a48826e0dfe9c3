"""An image with a step that no test has built before: MARKER is replaced."""

import os
import subprocess
from pathlib import Path

import modal

image = (
    modal.Image.debian_slim()
    .apt_install("hello")
    .uv_pip_install("humanize")
    .run_commands("echo this step says MARKER", "mkdir /made && echo MARKER > /made/by-run")
    .env({"FROM_ENV": "set"})
    .workdir("/made")
    .add_local_file("notes.txt", "/made/notes.txt", copy=True)
    .add_local_dir("pictures", "/made/pictures", copy=True)
    .add_local_file("notes.txt", "/late/notes.txt")
    .add_local_python_source("user_package")
)
app = modal.App("built-image", image=image)


@app.function()
def look() -> dict:
    import humanize
    import user_package

    return {
        "hello": subprocess.run(["hello"], capture_output=True, text=True, check=True).stdout.strip(),
        "humanize": humanize.intcomma(1234567),
        "env": os.environ["FROM_ENV"],
        "workdir": os.getcwd(),
        "by_run": Path("/made/by-run").read_text().strip(),
        "notes": Path("/made/notes.txt").read_text(),
        "late": Path("/late/notes.txt").read_text(),
        "pictures": sorted(path.name for path in Path("/made/pictures").iterdir()),
        "package": user_package.ANSWER,
    }
