//! What an upload in parts adds up to. No state.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use md5::{Digest, Md5};
use sha2::Sha256;

use super::{BodyReceipt, CompletedPart, UploadError};
use crate::disk::failed;
use crate::hash::{ContentHash, Md5Digest};
use crate::storage::StorageError;

/// Read size when an upload's parts are hashed as one.
const HASH_CHUNK_BYTES: usize = 1024 * 1024;

/// S3's form for a blob in parts: the MD5 of the parts' MD5s, and their number.
pub(super) fn multipart_etag(parts: &[CompletedPart]) -> String {
    let joined: Vec<u8> = parts.iter().flat_map(|part| part.md5.0).collect();
    format!("{}-{}", Md5Digest::of(&joined), parts.len())
}

pub(super) fn compare_parts(listed: &[CompletedPart], received: &[BodyReceipt]) -> Result<(), UploadError> {
    if listed.len() != received.len() {
        let reason = format!("{} are listed and {} are expected", listed.len(), received.len());
        return Err(UploadError::PartsDiffer { reason });
    }
    for ((expected_number, listed), received) in (1..).zip(listed).zip(received) {
        if listed.number != expected_number {
            let reason = format!("part {} stands where part {expected_number} belongs", listed.number);
            return Err(UploadError::PartsDiffer { reason });
        }
        if listed.md5 != received.md5 {
            let reason = format!(
                "part {expected_number} is listed as {} and is {}",
                listed.md5, received.md5
            );
            return Err(UploadError::PartsDiffer { reason });
        }
    }
    Ok(())
}

pub(super) fn check<H: PartialEq + ToString>(
    algorithm: &'static str,
    declared: Option<H>,
    actual: Option<H>,
) -> Result<(), UploadError> {
    match (declared, actual) {
        (Some(declared), Some(actual)) if declared != actual => Err(UploadError::WrongChecksum {
            algorithm,
            declared: declared.to_string(),
            actual: actual.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Hashes a file whose parts arrived in any order.
pub(super) fn hash_file(
    path: &Path,
    length: u64,
    with_md5: bool,
) -> Result<(Option<Md5Digest>, ContentHash), StorageError> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    let mut sha256 = Sha256::new();
    let mut md5 = with_md5.then(Md5::new);
    let mut buffer = vec![0; HASH_CHUNK_BYTES];
    let mut left = length;
    while left > 0 {
        let chunk = &mut buffer[..left.min(HASH_CHUNK_BYTES as u64) as usize];
        // All parts have arrived, so a shorter file is a failure of the disk.
        file.read_exact(chunk).map_err(failed("read", path))?;
        left -= chunk.len() as u64;
        sha256.update(&chunk);
        if let Some(md5) = &mut md5 {
            md5.update(&chunk);
        }
    }
    Ok((md5.map(Md5Digest::from_hasher), ContentHash::from_hasher(sha256)))
}
