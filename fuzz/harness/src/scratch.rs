//! Temporary directories, in memory where the system has such a file system: fuzzers write thousands of files a second.
//!
//! They carry the number of their process: what lives as long as the process is never dropped, so each process removes
//! what dead ones left.

use std::path::{Path, PathBuf};
use std::sync::Once;

use tempfile::TempDir;

const IN_MEMORY: &str = "/dev/shm";
const PREFIX: &str = "ionian-fuzz-";
/// Of the length that seeds of archives expect.
const ARCHIVE_PREFIX: &str = "ifz.";

fn parent() -> PathBuf {
    static SWEPT: Once = Once::new();
    let parent = if Path::new(IN_MEMORY).is_dir() {
        IN_MEMORY.into()
    } else {
        std::env::temp_dir()
    };
    SWEPT.call_once(|| sweep(&parent));
    parent
}

fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        let owner = owner.or_else(|| name.strip_prefix(ARCHIVE_PREFIX));
        let Some(pid) = owner.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            // Another process may sweep at the same time.
            let _gone = std::fs::remove_dir_all(entry.path());
        }
    }
}

pub(crate) fn directory() -> TempDir {
    tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir_in(parent())
        .unwrap()
}

/// The one directory of this process in which archives are unpacked.
pub(crate) fn for_archives() -> PathBuf {
    parent().join(format!("{ARCHIVE_PREFIX}{:010}", std::process::id()))
}
