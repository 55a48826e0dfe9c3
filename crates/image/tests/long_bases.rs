//! Base images from a real Debian mirror, and what clients do upon them. These need root, a network and
//! minutes, so they run when `IONIAN_LONG_TESTS=1` says so. `IONIAN_TEST_LAYERS` keeps the layers.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, which clippy does not see as tests"
)]

mod support;

use std::path::PathBuf;
use std::time::Instant;

use ionian_domain::image::BuiltImage;
use ionian_image::base::{BaseConfig, BaseImages, BaseRequest, BaseSource};
use ionian_image::client_bundle::{ClientBundles, ClientBundlesConfig};
use ionian_image::{BuildLog, LayerStore, StepExit};
use support::{ChrootRunner, RecordedLog, shell};

/// Pins of the 2024.10 builder, as the client sends them in `/modal_requirements.txt`.
const REQUIREMENTS_2024_10: &str = "aiohappyeyeballs==2.4.3\naiohttp==3.10.8\naiosignal==1.3.1\n\
    async-timeout==4.0.3 ; python_version < \"3.11\"\nattrs==24.2.0\ncertifi==2024.8.30\nfrozenlist==1.4.1\n\
    grpclib==0.4.7\nh2==4.1.0\nhpack==4.0.0\nhyperframe==6.0.1\nidna==3.10\nmultidict==6.1.0\n\
    protobuf>=3.20,<6\ntyping_extensions==4.12.2\nyarl==1.13.1\n";

fn skipped() -> bool {
    let wanted = std::env::var("IONIAN_LONG_TESTS").is_ok_and(|value| value == "1");
    if !wanted || !support::is_root() {
        println!("skipped: set IONIAN_LONG_TESTS=1 and run as root");
        return true;
    }
    false
}

struct Place {
    layers: LayerStore,
    bases: BaseImages,
    scratch: tempfile::TempDir,
}

fn place() -> Place {
    let scratch = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("IONIAN_TEST_LAYERS").map(PathBuf::from);
    let layers = LayerStore::open(kept.unwrap_or_else(|| scratch.path().join("layers"))).unwrap();
    // No registry is asked: these tests are about sites that have none.
    let mut config = BaseConfig::new(scratch.path().join("tmp"));
    config.sources = vec![BaseSource::Bootstrap];
    Place {
        layers,
        bases: BaseImages::new(config).unwrap(),
        scratch,
    }
}

async fn base(place: &Place, reference: &str, log: &BuildLog) -> BuiltImage {
    let request = BaseRequest {
        reference: reference.to_owned(),
        auth: None,
        force: false,
    };
    let started = Instant::now();
    let image = place
        .bases
        .resolve(request, &place.layers, &ChrootRunner, log)
        .await
        .unwrap();
    println!("{reference}: {:.1} s", started.elapsed().as_secs_f64());
    image
}

async fn run_all(
    place: &Place,
    image: &BuiltImage,
    uppers: &mut Vec<PathBuf>,
    commands: &[&str],
    recorded: &RecordedLog,
    log: &BuildLog,
) {
    for command in commands {
        let started = Instant::now();
        let exit = shell(image, &place.layers, uppers, place.scratch.path(), command, log).await;
        println!("{:6.1} s  {command}", started.elapsed().as_secs_f64());
        let text = recorded.text();
        let tail: Vec<&str> = text.lines().rev().take(40).collect();
        assert_eq!(
            exit,
            StepExit::Exited(0),
            "{command}:\n{}",
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
}

/// The steps of `debian_slim()` for both builder generations, then installs by uv and by pip.
async fn debian_slim(reference: &str, minor: &str) {
    let place = place();
    let (recorded, log) = RecordedLog::start();
    let image = base(&place, reference, &log).await;
    let root = place.layers.fs_path(&image.layers[0]);
    assert!(!root.join("etc/hostname").exists() && !root.join("etc/resolv.conf").exists());
    assert_eq!(std::fs::read_dir(root.join("dev")).unwrap().count(), 0);

    let request = BaseRequest {
        reference: "ghcr.io/astral-sh/uv:latest".to_owned(),
        auth: None,
        force: false,
    };
    let uv = place
        .bases
        .copy_source(request, &place.layers, &ChrootRunner, &log)
        .await
        .unwrap();
    let uv_root = place.layers.fs_path(&uv.layers[0]);

    let mut uppers = Vec::new();
    let checks = format!(
        "set -e; for p in python python3 pip pip3; do test \"$(command -v $p)\" = /usr/local/bin/$p; done; \
         python -c 'import sys; assert sys.version.startswith(\"{minor}.\"), sys.version'; \
         python -c 'import os, platform; assert os.environ[\"PYTHON_VERSION\"] == platform.python_version()'; \
         python -c 'import ssl, sqlite3, ctypes, lzma, bz2, zlib, curses, readline, venv, ensurepip'; \
         test -e \"$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')/Python.h\"; \
         python -m venv /tmp/venv && /tmp/venv/bin/python -m pip --version; ! ls /usr/lib/python3*/EXTERNALLY-MANAGED"
    );
    run_all(
        &place,
        &image,
        &mut uppers,
        &[
            &checks,
            "apt-get update",
            "apt-get install -y gcc gfortran build-essential",
            "pip install --upgrade pip wheel uv",
            "echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections",
        ],
        &recorded,
        &log,
    )
    .await;
    let slim = uppers.clone();

    // Builder 2024.10: its requirements go into the image.
    if minor == "3.11" {
        std::fs::write(
            uppers.last().unwrap().join("modal_requirements.txt"),
            REQUIREMENTS_2024_10,
        )
        .unwrap();
        run_all(
            &place,
            &image,
            &mut uppers,
            &[
                "uv pip install --system --compile-bytecode --no-cache --no-deps -r /modal_requirements.txt",
                "rm /modal_requirements.txt",
                "python -c 'import aiohttp, grpclib, google.protobuf'",
            ],
            &recorded,
            &log,
        )
        .await;
    }

    // Builder 2025.06: `COPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv`.
    uppers = slim;
    let copied = place.scratch.path().join("copied");
    std::fs::create_dir_all(copied.join(".uv")).unwrap();
    std::fs::copy(uv_root.join("uv"), copied.join(".uv/uv")).unwrap();
    uppers.push(copied);
    run_all(
        &place,
        &image,
        &mut uppers,
        &[
            "/.uv/uv pip install --python $(command -v python) --compile-bytecode numpy",
            "python -c \"import numpy; print(numpy.__version__, numpy.__file__)\"",
            "python -m pip install httpx && python -c 'import httpx'",
            // A C extension from its source, against the headers and with the compiler of the image.
            "python -m pip install --no-binary markupsafe markupsafe && python -c 'import markupsafe._speedups'",
        ],
        &recorded,
        &log,
    )
    .await;
    assert!(uv_root.join("uvx").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn debian_slim_works_upon_a_bootstrapped_python_3_11() {
    if !skipped() {
        debian_slim("python:3.11.12-slim-bookworm", "3.11").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn debian_slim_works_upon_a_bootstrapped_python_3_13() {
    if !skipped() {
        debian_slim("python:3.13-slim-trixie", "3.13").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_is_bundled_for_an_image() {
    if skipped() {
        return;
    }
    let place = place();
    let (recorded, log) = RecordedLog::start();
    let image = base(&place, "python:3.11-slim-bookworm", &log).await;
    let bundles = ClientBundles::new(ClientBundlesConfig::default());
    for version in ["1.5.4", "1.6.4"] {
        let started = Instant::now();
        let bundle = match bundles
            .ensure(version, &image, &place.layers, &ChrootRunner, &log)
            .await
        {
            Ok(bundle) => bundle,
            Err(error) => panic!("{error}\n{}", recorded.text()),
        };
        let first = started.elapsed();
        let started = Instant::now();
        assert_eq!(
            bundles
                .ensure(version, &image, &place.layers, &ChrootRunner, &log)
                .await
                .unwrap(),
            bundle
        );
        println!(
            "client {version}: {:.1} s, again {:?}",
            first.as_secs_f64(),
            started.elapsed()
        );
        let version_file = std::fs::read_to_string(bundle.pkg_dir.join("modal_version/__init__.py")).unwrap();
        assert!(version_file.contains(version), "{version_file}");
        for path in [
            bundle.pkg_dir.join("synchronicity"),
            bundle.pkg_dir.join("modal/__pycache__"),
            bundle.deps_dir.join("grpclib"),
            bundle.extra_dir.join("uvloop"),
        ] {
            assert!(path.is_dir(), "{}", path.display());
        }
    }
}
