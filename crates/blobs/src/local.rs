//! Finished bytes in a local directory (or any POSIX shared file system).

use std::fs;
use std::io::{self, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::disk::{self, SafeTree, blocking, failed};
use crate::key::Key;
use crate::storage::{Blobs, ByteStream, StorageError};

/// Large enough that the cost per chunk vanishes, small enough for hundreds of readers at once.
const READ_CHUNK_BYTES: usize = 256 * 1024;

/// Keys are paths below a root. Files are replaced by rename and never written in place, so a link to
/// one (a container's rootfs) keeps what it had.
#[derive(Debug, Clone)]
pub struct LocalBlobs {
    tree: SafeTree,
    /// Half-written files. Emptied at every start, since no other process writes here.
    temporary: PathBuf,
}

impl LocalBlobs {
    pub async fn open(root: PathBuf) -> Result<Self, StorageError> {
        // No key begins with a dot.
        let temporary = root.join(".temporary");
        let tree = SafeTree::new(root);
        let opened = Self { tree, temporary };
        let made = opened.temporary.clone();
        blocking(move || disk::empty_directory(&made)).await?;
        Ok(opened)
    }

    fn path_of(&self, key: &Key) -> PathBuf {
        self.tree.root().join(key.as_str())
    }
}

#[async_trait::async_trait]
impl Blobs for LocalBlobs {
    async fn adopt(&self, key: &Key, staged: &Path) -> Result<(), StorageError> {
        let target = self.path_of(key);
        let tree = self.tree.clone();
        let staged = staged.to_owned();
        blocking(move || {
            tree.ensure_parent(&target)?;
            fs::rename(&staged, &target).map_err(failed("rename a finished file to", &target))?;
            disk::sync_parent(&target)
        })
        .await
    }

    async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), StorageError> {
        let target = self.path_of(key);
        let (tree, temporary) = (self.tree.clone(), self.temporary.clone());
        blocking(move || tree.write(&temporary, &target, &bytes)).await
    }

    async fn copy(&self, from: &Key, to: &Key) -> Result<(), StorageError> {
        let source = self.path_of(from);
        let target = self.path_of(to);
        let from = from.clone();
        let tree = self.tree.clone();
        blocking(move || {
            tree.ensure_parent(&target)?;
            match fs::hard_link(&source, &target) {
                Ok(()) => {}
                // Equal keys hold equal bytes, or the caller deletes first.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(StorageError::NotFound { key: from });
                }
                Err(error) => return Err(failed("link", &target)(error)),
            }
            disk::sync_parent(&target)
        })
        .await
    }

    async fn find_length(&self, key: &Key) -> Result<Option<u64>, StorageError> {
        let path = self.path_of(key);
        match tokio::fs::metadata(&path).await {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("look up", &path)(error)),
        }
    }

    async fn read(&self, key: &Key, range: Range<u64>) -> Result<ByteStream, StorageError> {
        let path = self.path_of(key);
        let mut file = match tokio::fs::File::open(&path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StorageError::NotFound { key: key.clone() });
            }
            Err(error) => return Err(failed("open", &path)(error)),
        };
        file.set_max_buf_size(READ_CHUNK_BYTES);
        file.seek(SeekFrom::Start(range.start))
            .await
            .map_err(failed("seek in", &path))?;
        let length = range.end.saturating_sub(range.start);
        let chunks = ReaderStream::with_capacity(file.take(length), READ_CHUNK_BYTES);
        Ok(chunks.map_err(move |error| failed("read", &path)(error)).boxed())
    }

    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        let path = self.path_of(key);
        blocking(move || disk::remove_if_exists(&path)).await
    }

    fn local_path(&self, key: &Key) -> Option<PathBuf> {
        Some(self.path_of(key))
    }
}
