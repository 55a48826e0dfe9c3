//! Runs mmdebstrap, its output going to the build log.

use std::path::Path;
use std::process::Stdio;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use super::super::oci::host_architecture;
use super::super::reference::BaseReference;
use super::mirror::Mirrors;
use super::recipe::{Flavor, Recipe};
use super::{BaseError, DebianConfig, rootfs};
use crate::step::{BuildLog, LogStream};

/// Lines of mmdebstrap's output that an error repeats.
const ERROR_LINES: usize = 15;
/// Longer lines are cut; none of apt's are.
const MAX_LINE_BYTES: usize = 8 * 1024;

const PYTHON_PACKAGES: &[&str] = &[
    "ca-certificates",
    "netbase",
    "tzdata",
    "python3",
    "python3-venv",
    "python3-dev",
    "python3-pip-whl",
];
const PLAIN_PACKAGES: &[&str] = &["ca-certificates"];

/// Runs mmdebstrap into `target`.
pub(super) async fn run(
    config: &DebianConfig,
    recipe: &Recipe,
    mirrors: &Mirrors,
    reference: &BaseReference,
    target: &Path,
    log: &BuildLog,
) -> Result<(), BaseError> {
    let failed = |why: String| BaseError::Debian {
        reference: reference.to_string(),
        mirror: mirrors.archive.clone(),
        why,
    };
    let mut command = Command::new(&config.mmdebstrap);
    command.args(arguments(config, recipe, mirrors, target));
    // Its environment would reach the maintainer scripts of the packages.
    command
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive");
    for name in [
        "PATH",
        "TMPDIR",
        "SSL_CERT_FILE",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    ] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // A group of its own, so that a timeout ends apt and its children too.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| {
        failed(format!(
            "{} could not be started ({error}); install the package mmdebstrap",
            config.mmdebstrap.display()
        ))
    })?;
    let group = ProcessGroup(child.id());
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let run = async {
        // Both at once: a pipe that nobody reads would stop mmdebstrap.
        let (_, tail) = tokio::join!(copy_lines(stdout, log), copy_lines(stderr, log));
        (child.wait().await, tail)
    };
    let Ok((status, tail)) = tokio::time::timeout(config.timeout, run).await else {
        drop(group);
        return Err(failed(format!(
            "mmdebstrap was stopped after {} s",
            config.timeout.as_secs()
        )));
    };
    let status = status.map_err(|error| failed(format!("mmdebstrap was lost ({error})")))?;
    if !status.success() {
        return Err(failed(format!("mmdebstrap ended with {status}\n{}", tail.join("\n"))));
    }
    std::mem::forget(group);
    Ok(())
}

/// Ends everything that mmdebstrap started, also when the build is cancelled.
struct ProcessGroup(Option<u32>);

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        let Some(id) = self.0.and_then(|id| i32::try_from(id).ok()) else {
            return;
        };
        // SIGTERM first would let it clean up its mounts, but they are in a mount namespace of its own
        // and go with its last process. A group that has gone already is no error.
        let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGKILL);
    }
}

fn arguments(config: &DebianConfig, recipe: &Recipe, mirrors: &Mirrors, target: &Path) -> Vec<String> {
    let mut packages: Vec<&str> = match recipe.flavor {
        Flavor::Python => PYTHON_PACKAGES.to_vec(),
        Flavor::Plain => PLAIN_PACKAGES.to_vec(),
    };
    if recipe.flavor == Flavor::Python {
        packages.extend(recipe.release.extra_packages);
    }
    let mut arguments: Vec<String> = [
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        // The image gets none of the host's devices.
        "--skip=output/dev",
        "--aptopt=Acquire::Languages \"none\";",
        "--aptopt=APT::Install-Recommends \"false\";",
        // Mirrors at the other end of a thin line break off now and then.
        "--aptopt=Acquire::Retries \"3\";",
        "--dpkgopt=force-unsafe-io",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.push(format!("--architectures={}", host_architecture()));
    arguments.extend(config.apt_options.iter().map(|line| format!("--aptopt={line}")));
    arguments.extend(rootfs::DPKG_EXCLUDES.iter().map(|line| format!("--dpkgopt={line}")));
    if let Some(keyring) = &mirrors.keyring {
        arguments.push(format!("--keyring={}", keyring.display()));
    }
    arguments.push(format!("--include={}", packages.join(",")));
    if recipe.flavor == Flavor::Python {
        arguments.push(format!("--customize-hook={}", rootfs::seed_hook(&recipe.release)));
    }
    arguments.push(recipe.release.codename.to_owned());
    arguments.push(target.display().to_string());
    arguments.extend(mirrors.source_lines());
    arguments
}

/// Copies output to the build log by lines and keeps the last ones.
async fn copy_lines(stream: Option<impl AsyncRead + Unpin>, log: &BuildLog) -> Vec<String> {
    let mut tail: std::collections::VecDeque<String> = std::collections::VecDeque::new();
    let Some(stream) = stream else { return Vec::new() };
    let mut reader = BufReader::with_capacity(MAX_LINE_BYTES, stream);
    loop {
        // A chunk of the buffer at most: a line without end cannot grow.
        let chunk = match reader.fill_buf().await {
            Ok([]) | Err(_) => return tail.into(),
            Ok(buffer) => {
                let end = buffer
                    .iter()
                    .position(|byte| *byte == b'\n')
                    .map_or(buffer.len(), |at| at + 1);
                Bytes::copy_from_slice(&buffer[..end])
            }
        };
        reader.consume(chunk.len());
        let line = String::from_utf8_lossy(&chunk).trim_end().to_owned();
        if tail.len() == ERROR_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
        log.chunk(LogStream::Stderr, chunk).await;
    }
}
