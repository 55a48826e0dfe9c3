//! Temporary directories, in memory where the system has such a file system: fuzzers write thousands of files a second.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

const IN_MEMORY: &str = "/dev/shm";

pub(crate) fn parent() -> PathBuf {
    if Path::new(IN_MEMORY).is_dir() {
        IN_MEMORY.into()
    } else {
        std::env::temp_dir()
    }
}

pub(crate) fn directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("ionian-fuzz-")
        .tempdir_in(parent())
        .unwrap()
}
