//! What a client declares before it uploads, and how the upload is cut into parts. Pure.

use std::ops::Range;

use ionian_domain::{BlobId, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::hash::{ContentHash, InvalidHash, Md5Digest};
use crate::storage::StorageError;

/// Files over 1 GiB carry this in place of their MD5, which the client does not want to compute.
const PLACEHOLDER_MD5: Md5Digest = Md5Digest([
    0xba, 0xad, 0xba, 0xad, 0xba, 0xad, 0xba, 0xad, 0xba, 0xad, 0xba, 0xad, 0xba, 0xad, 0xba, 0xad,
]);

/// How large blobs may be and how they are cut. The server uses the defaults; tests use small numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadLimits {
    /// The largest blob.
    pub max_blob_bytes: u64,
    /// The length of a part, unless there would be too many of them.
    pub part_bytes: u64,
    /// The most parts of one upload.
    pub max_parts: u64,
    /// The most unfinished uploads at once.
    pub max_open_uploads: u64,
}

impl Default for UploadLimits {
    fn default() -> Self {
        Self {
            // Above any model file in use, below what fills a large disk by one mistake.
            max_blob_bytes: 1024 * 1024 * 1024 * 1024,
            // A part is what the client repeats when a connection breaks.
            part_bytes: 64 * 1024 * 1024,
            // The client opens the file once per part, and macOS allows 256 open files by default.
            max_parts: 128,
            // A directory of two small files each. Far more than any fleet has under way at once;
            // it stops a loop that declares and never uploads.
            max_open_uploads: 100_000,
        }
    }
}

/// What the client says that it will upload. Checksums are present where they are real.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobDeclaration {
    pub content_length: u64,
    pub md5: Option<Md5Digest>,
    pub sha256: Option<ContentHash>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDeclaration {
    #[error("a blob cannot have {length} bytes")]
    NegativeLength { length: i64 },
    #[error("the declared checksum is unreadable: {0}")]
    Checksum(InvalidHash),
}

impl BlobDeclaration {
    /// Reads the fields of an upload request. Checksums are base64, and empty where unknown.
    pub fn from_wire(content_length: i64, md5_base64: &str, sha256_base64: &str) -> Result<Self, InvalidDeclaration> {
        let content_length =
            u64::try_from(content_length).map_err(|_| InvalidDeclaration::NegativeLength { length: content_length })?;
        let md5 = match md5_base64 {
            "" => None,
            text => Some(Md5Digest::from_base64(text).map_err(InvalidDeclaration::Checksum)?),
        };
        let sha256 = match sha256_base64 {
            "" => None,
            text => Some(ContentHash::from_base64(text).map_err(InvalidDeclaration::Checksum)?),
        };
        Ok(Self {
            content_length,
            md5: md5.filter(|md5| *md5 != PLACEHOLDER_MD5),
            sha256,
        })
    }
}

/// Why no upload was begun.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("a blob of {declared} bytes is too large: the limit is {limit} bytes")]
    TooLarge { declared: u64, limit: u64 },
    #[error("{limit} uploads are unfinished; wait for some of them to end")]
    TooManyOpen { limit: u64 },
    #[error("failed to begin an upload")]
    Storage(#[from] StorageError),
}

impl CreateError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLarge { .. } => ErrorKind::InvalidArgument,
            Self::TooManyOpen { .. } => ErrorKind::Exhausted,
            Self::Storage(_) => ErrorKind::Internal,
        }
    }
}

/// An upload that was begun. It is done either by one PUT of everything, or by all parts and a
/// completion; the first that ends decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upload {
    pub blob_id: BlobId,
    pub content_length: u64,
    /// The length of every part but the last, which has the rest.
    pub part_length: u64,
    /// At least one: an empty blob has one empty part.
    pub part_count: u32,
}

impl Upload {
    pub(crate) fn plan(blob_id: BlobId, content_length: u64, limits: &UploadLimits) -> Self {
        let part_length = limits.part_bytes.max(content_length.div_ceil(limits.max_parts)).max(1);
        let part_count = content_length.div_ceil(part_length).max(1);
        let part_count = u32::try_from(part_count).expect("the number of parts is limited");
        Self {
            blob_id,
            content_length,
            part_length,
            part_count,
        }
    }

    /// The bytes of a part, numbered from 1, or `None` where there is no such part.
    pub(crate) fn span(&self, part: u32) -> Option<Range<u64>> {
        if part == 0 || part > self.part_count {
            return None;
        }
        let start = u64::from(part - 1) * self.part_length;
        Some(start..self.content_length.min(start + self.part_length))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn placeholder_and_empty_checksums_are_no_checksums() {
        let placeholder = "uq26rbqtuq26rbqtuq26rQ==";
        let declared = BlobDeclaration::from_wire(2 << 30, placeholder, "").unwrap();
        assert_eq!(
            declared,
            BlobDeclaration {
                content_length: 2 << 30,
                md5: None,
                sha256: None
            }
        );
        let declared = BlobDeclaration::from_wire(5, "XUFAKrxLKna5cZ2REBfFkg==", "").unwrap();
        assert_eq!(declared.md5, Some(Md5Digest::of(b"hello")));
    }

    #[test]
    fn nonsense_is_refused_with_its_name() {
        let error = BlobDeclaration::from_wire(-1, "", "").unwrap_err();
        assert_eq!(error.to_string(), "a blob cannot have -1 bytes");
        let error = BlobDeclaration::from_wire(1, "", "short").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the declared checksum is unreadable: 'short' is not a SHA-256 in base64"
        );
    }

    #[test]
    fn five_gigabytes_are_eighty_parts_and_huge_blobs_have_larger_parts() {
        let limits = UploadLimits::default();
        let plan = |length| {
            let upload = Upload::plan(BlobId::generate(), length, &limits);
            (upload.part_length >> 20, upload.part_count)
        };
        assert_eq!(plan(0), (64, 1));
        assert_eq!(plan(1 << 20), (64, 1));
        assert_eq!(plan(5 << 30), (64, 80));
        assert_eq!(plan(1 << 40), (8192, 128));
    }

    proptest! {
        #[test]
        fn parts_cover_the_blob_once(length in 0u64..100_000, part_bytes in 1u64..5_000, max_parts in 1u64..50) {
            let limits = UploadLimits { part_bytes, max_parts, ..UploadLimits::default() };
            let upload = Upload::plan(BlobId::generate(), length, &limits);
            prop_assert!(u64::from(upload.part_count) <= max_parts.max(1));
            let mut end = 0;
            for part in 1..=upload.part_count {
                let span = upload.span(part).unwrap();
                prop_assert_eq!(span.start, end);
                prop_assert!(part == upload.part_count || span.end - span.start == upload.part_length);
                end = span.end;
            }
            prop_assert_eq!(end, length);
            prop_assert_eq!(upload.span(0), None);
            prop_assert_eq!(upload.span(upload.part_count + 1), None);
        }
    }
}
