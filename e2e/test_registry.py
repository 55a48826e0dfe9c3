"""A user's base image comes from a registry. The test runs Debian's `docker-registry` and fills it with skopeo."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest
from support import paths
from support.client import Client
from support.server import free_port
from support.waiting import wait_until

# Packages of a whole small Debian.
MAKE_IMAGE_SECONDS = 600


@contextmanager
def registry(folder):
    port = free_port()
    config = folder / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port), "the registry to answer")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def answers(port):
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return direct.open(f"http://127.0.0.1:{port}/v2/", timeout=5).status == 200
    except OSError:
        return False


def root_file_system():
    """A Debian with Python, as an operator's own base image might be; made once and kept."""
    archive = paths.CACHE / "registry-python.tar.gz"
    if archive.exists():
        return archive
    paths.CACHE.mkdir(exist_ok=True)
    tar = archive.with_suffix(".part.tar")
    customize = (
        'ln -s /usr/bin/python3 "$1/usr/local/bin/python" && ln -s /usr/bin/pip3 "$1/usr/local/bin/pip" && '
        'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED && echo registry > "$1/etc/made-for"'
    )
    command = ["mmdebstrap", "--variant=minbase", "--include=python3,python3-pip,ca-certificates"]
    command += [f"--customize-hook={customize}", "--dpkgopt=path-exclude=/usr/share/doc/*", "bookworm", str(tar)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_IMAGE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    part = archive.with_suffix(".part.gz")
    with tar.open("rb") as plain, gzip.open(part, "wb", compresslevel=1) as packed:
        shutil.copyfileobj(plain, packed)
    tar.unlink()
    part.rename(archive)
    return archive


def write_layout(folder, archive):
    """An OCI layout with one layer."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def add(data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    packed = archive.read_bytes()
    layer = add(packed, "application/vnd.oci.image.layer.v1.tar+gzip")
    diff_id = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    image = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM_BASE=yes"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
    }
    config = add(json.dumps(image).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    }
    entry = add(json.dumps(manifest).encode(), manifest["mediaType"])
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


@pytest.mark.timeout(MAKE_IMAGE_SECONDS + 300)
def test_an_app_on_a_base_image_of_a_registry(start_platform, shared_images, tmp_path):
    layout = write_layout(tmp_path / "layout", root_file_system())
    with registry(tmp_path) as host:
        target = f"docker://{host}/team/python:1"
        subprocess.run(
            ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{layout}", target],
            check=True,
            timeout=120,
            capture_output=True,
        )
        platform = start_platform({"IONIAN_IMAGES_INSECURE_REGISTRIES": host})
        client = Client(platform, platform.state / "home")
        deployed = client.deploy("registry_image.py", REGISTRY=host)
        # The build log says where the image came from.
        assert host in deployed.output
        code = "import modal; print(modal.Function.from_name('registry-image', 'origin').remote())"
        assert client.python(code).stdout.strip() == "registry"
