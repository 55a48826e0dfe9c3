//! [`Blobs`]: where finished bytes are kept, and what can go wrong there.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::key::Key;

/// Chunks of one object, in order. An error ends the stream.
pub type ByteStream = BoxStream<'static, Result<Bytes, StorageError>>;

/// Keeps finished bytes. When a writing method returns `Ok`, the bytes survive a power cut; until then
/// readers see what was there before. Every method may be repeated.
#[async_trait::async_trait]
pub trait Blobs: fmt::Debug + Send + Sync {
    /// Takes over a complete file, whose writer has synced it to disk, and removes it from its place.
    async fn adopt(&self, key: &Key, staged: &Path) -> Result<(), StorageError>;

    /// Keeps a small object, replacing what was there.
    async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), StorageError>;

    /// Makes `to` hold what `from` holds. The two may share storage: kept bytes never change in place.
    async fn copy(&self, from: &Key, to: &Key) -> Result<(), StorageError>;

    /// The length in bytes, or `None` where nothing is kept.
    async fn find_length(&self, key: &Key) -> Result<Option<u64>, StorageError>;

    /// Reads a part of an object. The range must lie within it.
    async fn read(&self, key: &Key, range: Range<u64>) -> Result<ByteStream, StorageError>;

    /// Makes sure that nothing is kept under the key.
    async fn delete(&self, key: &Key) -> Result<(), StorageError>;

    /// The file that holds the object, where the backend keeps files. It says nothing about existence.
    fn local_path(&self, key: &Key) -> Option<PathBuf>;
}

/// The platform's side of a failure: the disk or the object store.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("failed to {action} {}", path.display())]
    Disk {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to {action} object {key}")]
    Object {
        action: &'static str,
        key: Key,
        source: object_store::Error,
    },
    #[error("nothing is kept under {key}")]
    NotFound { key: Key },
    #[error("{name} holds no valid description of a blob")]
    Description { name: String, source: serde_json::Error },
    #[error("{key} has {length} bytes, more than the {limit} that may be read at once")]
    TooLarge { key: Key, length: u64, limit: u64 },
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl StorageError {
    /// Whether an operator has to make room before the operation can succeed.
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Disk { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Object { .. }
            | Self::NotFound { .. }
            | Self::Description { .. }
            | Self::TooLarge { .. }
            | Self::ShuttingDown => false,
        }
    }
}

/// Reads a whole object into memory, if it has at most `limit` bytes.
pub(crate) async fn read_all(blobs: &dyn Blobs, key: &Key, limit: u64) -> Result<Bytes, StorageError> {
    let length = blobs
        .find_length(key)
        .await?
        .ok_or_else(|| StorageError::NotFound { key: key.clone() })?;
    if length > limit {
        return Err(StorageError::TooLarge {
            key: key.clone(),
            length,
            limit,
        });
    }
    if length == 0 {
        return Ok(Bytes::new());
    }
    let mut chunks = blobs.read(key, 0..length).await?;
    let mut all = BytesMut::with_capacity(length as usize);
    while let Some(chunk) = chunks.next().await {
        all.extend_from_slice(&chunk?);
    }
    Ok(all.freeze())
}
