//! Why a blob could not be uploaded or read.

use ionian_domain::{BlobId, ErrorKind};

use crate::body::BodyError;
use crate::receive::ReceiveError;
use crate::storage::StorageError;

/// Why an upload did not succeed. Unless it says otherwise nothing was stored and the step may be repeated.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error("no upload is open for blob {blob_id}: it expired or never existed; create the blob again")]
    UnknownUpload { blob_id: BlobId },
    #[error("blob {blob_id} is uploaded in {part_count} parts; there is no part {part}")]
    NoSuchPart {
        blob_id: BlobId,
        part: u32,
        part_count: u32,
    },
    #[error("the body is longer than the {expected} bytes that were declared; nothing was stored")]
    TooLong { expected: u64 },
    #[error("the upload was truncated: {received} of {expected} bytes arrived; nothing was stored")]
    Truncated { expected: u64, received: u64 },
    #[error("the upload broke off after {received} of {expected} bytes; nothing was stored")]
    Body {
        expected: u64,
        received: u64,
        source: BodyError,
    },
    #[error(
        "wrong checksum: the declared {algorithm} is {declared}, that of the received data is {actual}; \
         nothing was stored; if the data changed while it was sent, send it again"
    )]
    WrongChecksum {
        algorithm: &'static str,
        declared: String,
        actual: String,
    },
    #[error("a newer upload of the same part took over; nothing was stored")]
    Superseded,
    #[error("blob {blob_id} is complete already, with different content; it was not changed")]
    AlreadyComplete { blob_id: BlobId },
    #[error("part {part} of blob {blob_id} has not arrived; upload it before completing")]
    PartMissing { blob_id: BlobId, part: u32 },
    #[error("the completion lists other parts than were uploaded: {reason}")]
    PartsDiffer { reason: String },
    #[error("blob {blob_id} is in use by another upload; try again later")]
    Busy { blob_id: BlobId },
    #[error("failed to store the upload")]
    Storage(#[from] StorageError),
}

impl UploadError {
    pub(super) fn received(error: ReceiveError, expected: u64) -> Self {
        match error {
            ReceiveError::Body { received, source } => Self::Body {
                expected,
                received,
                source,
            },
            ReceiveError::Truncated { received } => Self::Truncated { expected, received },
            ReceiveError::TooLong => Self::TooLong { expected },
            ReceiveError::Superseded => Self::Superseded,
            ReceiveError::Storage(error) => Self::Storage(error),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("there is no blob {blob_id}; its upload was not completed, or it was deleted")]
    NotFound { blob_id: BlobId },
    #[error("blob {blob_id} has {length} bytes, more than the {limit} that may be read at once")]
    TooLarge { blob_id: BlobId, length: u64, limit: u64 },
    #[error("failed to read blob {blob_id}")]
    Storage { blob_id: BlobId, source: StorageError },
}

impl ReadError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::TooLarge { .. } => ErrorKind::InvalidArgument,
            Self::Storage { .. } => ErrorKind::Internal,
        }
    }
}
