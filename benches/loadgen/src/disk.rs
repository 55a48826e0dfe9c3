//! How fast a disk takes one sync after the other.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

/// One page of a database.
const WRITE_BYTES: usize = 4096;

/// Written once before the clock runs, then overwritten in turn: a sync that has no new length or block to record is
/// the fastest that there is, and what a write-ahead log does after its first round.
const FILE_WRITES: u64 = 1024;

/// Writes and syncs pages for a while, one after the other; returns how many per second.
pub(crate) fn syncs_per_second(directory: &Path, length: Duration) -> anyhow::Result<f64> {
    let path = directory.join(format!("fdatasync-{:016x}", rand::random::<u64>()));
    let measured = measure(&path, length).with_context(|| format!("cannot measure syncs of {}", path.display()));
    std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    measured
}

fn measure(path: &Path, length: Duration) -> anyhow::Result<f64> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut page = [0x5a; WRITE_BYTES];
    for number in 0..FILE_WRITES {
        write(&file, &page, number)?;
    }
    file.sync_all()?;
    let begun = Instant::now();
    let mut syncs: u64 = 0;
    while begun.elapsed() < length {
        page[..8].copy_from_slice(&syncs.to_le_bytes());
        write(&file, &page, syncs)?;
        file.sync_data()?;
        syncs += 1;
    }
    Ok(syncs as f64 / begun.elapsed().as_secs_f64())
}

fn write(file: &File, page: &[u8], number: u64) -> std::io::Result<()> {
    file.write_all_at(page, number % FILE_WRITES * WRITE_BYTES as u64)
}
