//! Files named by the SHA-256 of their content: mounts and build contexts.
//!
//! A file is either there, whole and as its name says, or not there. Files never change, so a container
//! may get one by hard link or read-only bind.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use ionian_domain::{BlobId, ErrorKind};

use crate::blob::{BlobStore, ReadError};
use crate::disk::blocking;
use crate::hash::ContentHash;
use crate::key::Key;
use crate::storage::{self, Blobs, ByteStream, StorageError};

#[derive(Debug, Clone)]
pub struct ContentStore {
    blobs: Arc<dyn Blobs>,
}

#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("wrong checksum: the content was declared as {declared} and is {actual}; send it again")]
    WrongChecksum { declared: ContentHash, actual: ContentHash },
    #[error("no file has the content {hash}; upload it first")]
    NotFound { hash: ContentHash },
    #[error("the file with content {hash} has {length} bytes, more than the {limit} that may be read at once")]
    TooLarge { hash: ContentHash, length: u64, limit: u64 },
    #[error("failed to use the uploaded blob")]
    Blob(#[source] ReadError),
    #[error("failed to access the file with content {hash}")]
    Storage { hash: ContentHash, source: StorageError },
}

impl ContentError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::WrongChecksum { .. } | Self::TooLarge { .. } => ErrorKind::InvalidArgument,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Blob(error) => error.kind(),
            Self::Storage { .. } => ErrorKind::Internal,
        }
    }

    fn storage(hash: ContentHash) -> impl FnOnce(StorageError) -> Self {
        move |source| match source {
            StorageError::NotFound { .. } => Self::NotFound { hash },
            StorageError::TooLarge { length, limit, .. } => Self::TooLarge { hash, length, limit },
            source => Self::Storage { hash, source },
        }
    }
}

impl ContentStore {
    pub fn new(blobs: Arc<dyn Blobs>) -> Self {
        Self { blobs }
    }

    pub async fn contains(&self, hash: ContentHash) -> Result<bool, ContentError> {
        Ok(self.find_length(hash).await?.is_some())
    }

    pub async fn find_length(&self, hash: ContentHash) -> Result<Option<u64>, ContentError> {
        self.blobs
            .find_length(&Key::content(&hash))
            .await
            .map_err(ContentError::storage(hash))
    }

    /// Those of the given contents that have to be uploaded, in the given order.
    pub async fn missing(&self, hashes: &[ContentHash]) -> Result<Vec<ContentHash>, ContentError> {
        let mut missing = Vec::new();
        for hash in hashes {
            if !self.contains(*hash).await? {
                missing.push(*hash);
            }
        }
        Ok(missing)
    }

    /// Keeps a file that came inline with a request.
    pub async fn put(&self, hash: ContentHash, bytes: Bytes) -> Result<(), ContentError> {
        let hashed = bytes.clone();
        let actual = blocking(move || Ok(ContentHash::of(&hashed)))
            .await
            .map_err(ContentError::storage(hash))?;
        if actual != hash {
            return Err(ContentError::WrongChecksum { declared: hash, actual });
        }
        if self.contains(hash).await? {
            return Ok(());
        }
        self.blobs
            .put(&Key::content(&hash), bytes)
            .await
            .map_err(ContentError::storage(hash))
    }

    /// Keeps a file that was uploaded as a blob. The blob stays; on a local disk the two share storage.
    ///
    /// The bytes are not read again: the blob store computed the blob's SHA-256 while they arrived.
    pub async fn put_from_blob(
        &self,
        hash: ContentHash,
        blob_store: &BlobStore,
        blob_id: BlobId,
    ) -> Result<(), ContentError> {
        let info = blob_store.info(blob_id).await.map_err(ContentError::Blob)?;
        if info.sha256 != hash {
            return Err(ContentError::WrongChecksum {
                declared: hash,
                actual: info.sha256,
            });
        }
        if self.contains(hash).await? {
            return Ok(());
        }
        let copied = self.blobs.copy(&Key::blob_data(blob_id), &Key::content(&hash)).await;
        copied.map_err(|source| match source {
            StorageError::NotFound { .. } => ContentError::Blob(ReadError::NotFound { blob_id }),
            source => ContentError::Storage { hash, source },
        })
    }

    /// The file itself, where the store is local and has it. Link or bind it; never write to it.
    ///
    /// Asks the file system on the calling thread: one `stat`.
    pub fn local_path(&self, hash: ContentHash) -> Option<PathBuf> {
        self.blobs
            .local_path(&Key::content(&hash))
            .filter(|path| path.is_file())
    }

    /// Reads a whole file of at most `limit` bytes.
    pub async fn read(&self, hash: ContentHash, limit: u64) -> Result<Bytes, ContentError> {
        storage::read_all(&*self.blobs, &Key::content(&hash), limit)
            .await
            .map_err(ContentError::storage(hash))
    }

    /// Reads a file of any length; returns the length with it.
    pub async fn open(&self, hash: ContentHash) -> Result<(u64, ByteStream), ContentError> {
        let length = self.find_length(hash).await?.ok_or(ContentError::NotFound { hash })?;
        let chunks = self
            .blobs
            .read(&Key::content(&hash), 0..length)
            .await
            .map_err(ContentError::storage(hash))?;
        Ok((length, chunks))
    }
}
