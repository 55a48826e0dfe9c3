//! Reads what `preload.c` wrote.

use std::path::Path;

use anyhow::{Context, bail, ensure};

const MAGIC: u32 = 0x4c57_4f50;
const HEADER: usize = 56;

/// Directories in which the platform tries what the host can do. The kernel makes files there, too, of which
/// nothing is traced; they are removed before the platform does anything else.
const TRIALS: &str = "containers/.ionian-trial";

/// One call of the traced program. Paths are relative to the root, which is the empty path.
#[derive(Debug)]
pub(crate) struct Record {
    /// Nanoseconds of the monotonic clock, before and after the call.
    pub begun: u64,
    pub ended: u64,
    pub inode: u64,
    pub path: String,
    pub operation: Operation,
}

#[derive(Debug)]
pub(crate) enum Operation {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Truncate {
        length: u64,
    },
    /// Of a file or of a directory.
    Sync,
    /// Opened for creating; it may have been there.
    Create,
    MakeDirectory,
    Rename {
        to: String,
    },
    Link {
        to: String,
    },
    Unlink,
    RemoveDirectory,
}

impl Record {
    pub(crate) fn is_sync(&self) -> bool {
        matches!(self.operation, Operation::Sync)
    }

    pub(crate) fn is_write(&self) -> bool {
        matches!(self.operation, Operation::Write { .. })
    }
}

pub(crate) fn read(trace: &Path, root: &Path) -> anyhow::Result<Vec<Record>> {
    let bytes = std::fs::read(trace).with_context(|| format!("cannot read {}", trace.display()))?;
    let root = root.canonicalize()?;
    let root = root.to_str().context("the root's path is no text")?;
    let mut rest = bytes.as_slice();
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (record, left) =
            one(rest, root).with_context(|| format!("at byte {} of the trace", bytes.len() - rest.len()))?;
        if !record.path.starts_with(TRIALS) {
            records.push(record);
        }
        rest = left;
    }
    Ok(records)
}

fn one<'a>(bytes: &'a [u8], root: &str) -> anyhow::Result<(Record, &'a [u8])> {
    let (header, rest) = bytes.split_at_checked(HEADER).context("it ends within a record")?;
    let number4 = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let number8 = |at: usize| u64::from(number4(at)) | u64::from(number4(at + 4)) << 32;
    ensure!(number4(0) == MAGIC, "no record begins here");
    let (path, rest) = rest
        .split_at_checked(number4(40) as usize)
        .context("it ends within a path")?;
    let (path2, rest) = rest
        .split_at_checked(number4(44) as usize)
        .context("it ends within a path")?;
    let (data, rest) = rest
        .split_at_checked(number4(48) as usize)
        .context("it ends within data")?;
    let path = relative(path, root)?;
    let number = number8(32);
    let operation = match number4(4) {
        1 => Operation::Write {
            offset: number,
            data: data.to_vec(),
        },
        2 => Operation::Truncate { length: number },
        3 => Operation::Sync,
        4 => Operation::Create,
        5 => Operation::MakeDirectory,
        6 => Operation::Rename {
            to: relative(path2, root)?,
        },
        7 => Operation::Link {
            to: relative(path2, root)?,
        },
        8 => Operation::Unlink,
        9 => Operation::RemoveDirectory,
        operation => bail!(
            "operation {operation} on {path} cannot be replayed ({})",
            String::from_utf8_lossy(path2)
        ),
    };
    let record = Record {
        begun: number8(8),
        ended: number8(16),
        inode: number8(24),
        path,
        operation,
    };
    Ok((record, rest))
}

fn relative(path: &[u8], root: &str) -> anyhow::Result<String> {
    let path = std::str::from_utf8(path).context("a path is no text")?;
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    let below = path
        .strip_prefix(root)
        .with_context(|| format!("{path} is not below {root}: the replay would miss a part of what happens"))?;
    Ok(below.trim_matches('/').to_owned())
}
