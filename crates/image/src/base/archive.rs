//! Turns the tar stream of an OCI layer into a directory that overlayfs can stack.
//!
//! A layer archive comes from a stranger and is unpacked by root, so this module decides what may be in
//! one: every path is resolved inside the target directory by the kernel (`openat2`), `..` and device
//! nodes are refused, attributes that overlayfs itself reads are refused, and entries, sizes and header
//! records are bounded. What Docker calls a whiteout (`.wh.name`, `.wh..wh..opq`) becomes what overlayfs
//! calls one. It never writes outside the target directory and never follows a link on the host.

mod entry;
mod unpacker;

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tar::EntryType;

pub(crate) use entry::MAX_HEADER_RECORD_BYTES;
use entry::{EntryInfo, ExtraHeaders, read_long_name};
use unpacker::Unpacker;

/// What one archive may unpack to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UnpackLimits {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

/// CUDA images have layers of 5 GiB; more than ten times that is a bomb. A full Anaconda has 300,000 files.
pub(crate) const UNPACK_LIMITS: UnpackLimits = UnpackLimits {
    bytes: 64 << 30,
    entries: 4_000_000,
};

const COPY_BUFFER_BYTES: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("failed to {action} '{entry}' of a layer")]
    Io {
        action: &'static str,
        entry: String,
        source: io::Error,
    },
    #[error("failed to read the layer's archive")]
    Read(#[source] io::Error),
    #[error("the layer's archive has an entry '{entry}' that is refused: {why}")]
    Refused { entry: String, why: &'static str },
    #[error("the layer's archive is too large: more than {limit} {what}")]
    TooLarge { limit: u64, what: &'static str },
    #[error("the layer's content is not what its image says: expected {expected}, got {actual}")]
    Digest { expected: String, actual: String },
}

/// What an unpacked layer amounts to, for the build log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unpacked {
    pub entries: u64,
    pub bytes: u64,
}

/// Unpacks a layer blob (tar, gzip or zstd, told apart by their first bytes) into `target`.
///
/// `lowers` are the layers below, base first: a path whose parent directories are not in the archive
/// takes them over from there, so that `/tmp` keeps its mode when a layer only adds `/tmp/file`.
/// The content must have the digest `diff_id`; on any error `target` holds rubbish.
pub(super) fn unpack_layer(
    blob: File,
    diff_id: &str,
    target: &Path,
    lowers: &[PathBuf],
) -> Result<Unpacked, UnpackError> {
    unpack_layer_within(UNPACK_LIMITS, blob, diff_id, target, lowers)
}

pub(super) fn unpack_layer_within(
    limits: UnpackLimits,
    blob: File,
    diff_id: &str,
    target: &Path,
    lowers: &[PathBuf],
) -> Result<Unpacked, UnpackError> {
    let mut content = ContentReader::new(decompressor(blob)?, limits.bytes);
    let unpacked = unpack_tar(&mut content, limits.entries, target, lowers);
    let entries = match unpacked {
        Ok(entries) => entries,
        Err(_) if content.exceeded() => {
            return Err(UnpackError::TooLarge {
                limit: limits.bytes,
                what: "bytes",
            });
        }
        Err(error) => return Err(error),
    };
    // The digest covers the padding behind the archive's end too.
    io::copy(&mut content, &mut io::sink()).map_err(UnpackError::Read)?;
    let bytes = content.count;
    let actual = content.digest();
    if actual != diff_id {
        return Err(UnpackError::Digest {
            expected: diff_id.to_owned(),
            actual,
        });
    }
    Ok(Unpacked { entries, bytes })
}

/// The sha256 digest (`sha256:…`) of a file from its start; leaves the file at its start.
pub(super) fn file_digest(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
    }
    file.rewind()?;
    Ok(format!("sha256:{}", hex::encode(hash.finalize())))
}

fn decompressor(mut blob: File) -> Result<Box<dyn Read>, UnpackError> {
    let mut magic = [0; 4];
    blob.rewind().map_err(UnpackError::Read)?;
    let mut known = 0;
    while known < magic.len() {
        match blob.read(&mut magic[known..]).map_err(UnpackError::Read)? {
            0 => break,
            count => known += count,
        }
    }
    blob.rewind().map_err(UnpackError::Read)?;
    let blob = BufReader::with_capacity(COPY_BUFFER_BYTES, blob);
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            Box::new(zstd::stream::read::Decoder::with_buffer(blob).map_err(UnpackError::Read)?)
        }
        _ => Box::new(blob),
    })
}

/// Hashes and counts what passes through it, and stops a decompression bomb.
struct ContentReader<R> {
    inner: R,
    hash: Sha256,
    count: u64,
    limit: u64,
}

impl<R: Read> ContentReader<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            count: 0,
            limit,
        }
    }

    fn exceeded(&self) -> bool {
        self.count > self.limit
    }

    fn digest(self) -> String {
        format!("sha256:{}", hex::encode(self.hash.finalize()))
    }
}

impl<R: Read> Read for ContentReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        if self.exceeded() {
            return Err(io::Error::other("the layer is too large"));
        }
        Ok(count)
    }
}

fn unpack_tar(content: impl Read, max_entries: u64, target: &Path, lowers: &[PathBuf]) -> Result<u64, UnpackError> {
    let mut unpacker = Unpacker::open(target, lowers)?;
    let mut archive = tar::Archive::new(content);
    let mut extra = ExtraHeaders::default();
    let mut count = 0;
    // Raw, because the library would read header records of any length into memory.
    for entry in archive.entries().map_err(UnpackError::Read)?.raw(true) {
        let mut entry = entry.map_err(UnpackError::Read)?;
        match entry.header().entry_type() {
            EntryType::XHeader => extra.read_pax(&mut entry)?,
            EntryType::GNULongName => extra.path = Some(read_long_name(&mut entry)?),
            EntryType::GNULongLink => extra.link = Some(read_long_name(&mut entry)?),
            // Global headers carry comments (git archive writes one).
            EntryType::XGlobalHeader => {}
            _ => {
                count += 1;
                if count > max_entries {
                    return Err(UnpackError::TooLarge {
                        limit: max_entries,
                        what: "entries",
                    });
                }
                let headers = std::mem::take(&mut extra);
                let entry_info = EntryInfo::new(entry.header(), headers)?;
                unpacker.unpack(&entry_info, &mut entry)?;
            }
        }
    }
    unpacker.finish()?;
    Ok(count)
}

#[cfg(test)]
mod tests;
