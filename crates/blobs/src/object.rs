//! Finished bytes in an object store: S3 and its likes, through the `object_store` crate.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::buffered::BufWriter;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use crate::disk::failed;
use crate::key::Key;
use crate::storage::{Blobs, ByteStream, StorageError};

/// What one request carries; S3 wants at least 5 MiB for all parts but the last.
const PART_BYTES: usize = 8 * 1024 * 1024;
/// Parts under way at once: with [`PART_BYTES`] it bounds the memory of one transfer to 32 MiB.
const PARTS_IN_FLIGHT: usize = 4;

/// Keys are object names below the store's own prefix. The store is as durable as its service is.
#[derive(Debug, Clone)]
pub struct ObjectBlobs {
    store: Arc<dyn ObjectStore>,
}

impl ObjectBlobs {
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    async fn upload(&self, key: &Key, staged: &Path) -> Result<(), StorageError> {
        let file = tokio::fs::File::open(staged).await.map_err(failed("open", staged))?;
        let mut chunks = ReaderStream::with_capacity(file, 1024 * 1024);
        let mut writer = BufWriter::with_capacity(Arc::clone(&self.store), location(key), PART_BYTES)
            .with_max_concurrency(PARTS_IN_FLIGHT);
        let written = async {
            while let Some(chunk) = chunks.next().await {
                let chunk = chunk.map_err(failed("read", staged))?;
                writer.put(chunk).await.map_err(object_failed("write", key))?;
            }
            Ok(())
        }
        .await;
        match written {
            Ok(()) => writer.shutdown().await.map_err(|source| {
                let source = object_store::Error::Generic {
                    store: "upload",
                    source: source.into(),
                };
                object_failed("finish", key)(source)
            }),
            Err(error) => {
                if let Err(abort) = writer.abort().await {
                    tracing::warn!(%key, error = %abort, "failed to abort an upload to the object store");
                }
                Err(error)
            }
        }
    }
}

#[async_trait::async_trait]
impl Blobs for ObjectBlobs {
    async fn adopt(&self, key: &Key, staged: &Path) -> Result<(), StorageError> {
        self.upload(key, staged).await?;
        tokio::fs::remove_file(staged).await.map_err(failed("remove", staged))
    }

    async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), StorageError> {
        self.store
            .put(&location(key), bytes.into())
            .await
            .map_err(object_failed("write", key))?;
        Ok(())
    }

    async fn copy(&self, from: &Key, to: &Key) -> Result<(), StorageError> {
        self.store
            .copy(&location(from), &location(to))
            .await
            .map_err(object_failed("copy", from))
    }

    async fn find_length(&self, key: &Key) -> Result<Option<u64>, StorageError> {
        match self.store.head(&location(key)).await {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(object_failed("look up", key)(error)),
        }
    }

    async fn read(&self, key: &Key, range: Range<u64>) -> Result<ByteStream, StorageError> {
        if range.is_empty() {
            // Object stores refuse empty ranges. The object must still be there.
            self.store
                .head(&location(key))
                .await
                .map_err(object_failed("read", key))?;
            return Ok(futures_util::stream::empty().boxed());
        }
        let options = GetOptions {
            range: Some(GetRange::Bounded(range)),
            ..GetOptions::default()
        };
        let found = self
            .store
            .get_opts(&location(key), options)
            .await
            .map_err(object_failed("read", key))?;
        let key = key.clone();
        Ok(found
            .into_stream()
            .map_err(move |error| object_failed("read", &key)(error))
            .boxed())
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        match self.store.delete(&location(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(object_failed("delete", key)(error)),
        }
    }

    fn local_path(&self, _key: &Key) -> Option<PathBuf> {
        None
    }
}

fn location(key: &Key) -> object_store::path::Path {
    object_store::path::Path::from(key.as_str())
}

fn object_failed<'a>(action: &'static str, key: &'a Key) -> impl FnOnce(object_store::Error) -> StorageError + use<'a> {
    move |source| match source {
        object_store::Error::NotFound { .. } => StorageError::NotFound { key: key.clone() },
        source => StorageError::Object {
            action,
            key: key.clone(),
            source,
        },
    }
}
