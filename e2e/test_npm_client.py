"""The official npm client calls functions that the Python client deployed."""

import os
import subprocess

import pytest
from support import paths
from support.client import has_node

SCRIPT = """
import { ModalClient } from "modal";
const modal = new ModalClient();
const square = await modal.functions.fromName("calls", "square");
console.log("square", await square.remote([12]));
const echo = await modal.functions.fromName("calls", "echo");
const sent = new Uint8Array(5_000_000).fill(7);
const back = await echo.remote([sent]);
console.log("echo", back.length, back.every((byte) => byte === 7));
const divide = await modal.functions.fromName("calls", "divide");
try {
  await divide.remote([1, 0]);
} catch (error) {
  console.log("divide", error.message.includes("division by zero"));
}
const Account = await modal.cls.fromName("calls", "Account");
const account = await Account.instance({ owner: "Ada" });
console.log("describe", await account.method("describe").remote([]));
const call = await square.spawn([5]);
console.log("spawn", await call.get());
process.exit(0);
"""


@pytest.mark.skipif(not has_node(), reason="no Node.js")
def test_functions_are_called_from_javascript(client):
    client.deploy("calls.py")
    script = client.work / "call.mjs"
    script.write_text(SCRIPT)
    os.symlink(paths.CACHE / f"npm-{paths.NPM_CLIENT}" / "node_modules", client.work / "node_modules")
    done = subprocess.run(
        ["node", str(script)],
        cwd=client.work,
        env=client.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "square 144",
        "echo 5000000 true",
        "divide true",
        "describe account of Ada: 100",
        "spawn 25",
    ]
