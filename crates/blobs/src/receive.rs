//! Writes an arriving body into a place in a file, hashing as it goes, in constant memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use md5::{Digest, Md5};
use sha2::Sha256;
use tokio_util::sync::CancellationToken;

use crate::body::BodyError;
use crate::disk::{blocking, failed};
use crate::hash::{ContentHash, Md5Digest};
use crate::storage::StorageError;

/// Bytes gathered before they go to a blocking thread: enough to make the hop cheap, and with at most a
/// few hundred uploads at once little memory.
const WRITE_BATCH_BYTES: usize = 512 * 1024;

/// Where a body goes, and what must stay alive while it is being written there.
pub(crate) struct Destination<G> {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
    /// Exactly this many bytes must arrive.
    pub(crate) length: u64,
    /// A lease or a temporary file: released after the last write has ended, even if the caller is gone.
    pub(crate) guard: G,
}

/// What arrived. It is on disk.
pub(crate) struct Received<G> {
    pub(crate) md5: Md5Digest,
    pub(crate) sha256: ContentHash,
    pub(crate) guard: G,
}

#[derive(Debug)]
pub(crate) enum ReceiveError {
    Body { received: u64, source: BodyError },
    Truncated { received: u64 },
    TooLong,
    Superseded,
    Storage(StorageError),
}

impl From<StorageError> for ReceiveError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

struct Writer<G> {
    destination: Destination<G>,
    position: u64,
    md5: Md5,
    sha256: Sha256,
}

/// Receives exactly `destination.length` bytes. On failure the bytes written so far are garbage, which
/// nothing refers to.
pub(crate) async fn receive<G: Send + 'static>(
    body: &mut (impl Stream<Item = Result<Bytes, BodyError>> + Unpin),
    destination: Destination<G>,
    superseded: &CancellationToken,
) -> Result<Received<G>, ReceiveError> {
    let length = destination.length;
    let position = destination.offset;
    let mut writer = Writer {
        destination,
        position,
        md5: Md5::new(),
        sha256: Sha256::new(),
    };
    let mut received: u64 = 0;
    let mut batch: Vec<Bytes> = Vec::new();
    let mut batched = 0;
    loop {
        // Only waiting for the sender is interruptible: a write that has begun always ends.
        let chunk = tokio::select! {
            chunk = body.next() => chunk,
            () = superseded.cancelled() => return Err(ReceiveError::Superseded),
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|source| ReceiveError::Body { received, source })?;
        received += chunk.len() as u64;
        if received > length {
            return Err(ReceiveError::TooLong);
        }
        batched += chunk.len();
        batch.push(chunk);
        if batched >= WRITE_BATCH_BYTES {
            let full = std::mem::take(&mut batch);
            batched = 0;
            writer = blocking(move || writer.write(&full)).await?;
        }
    }
    if received < length {
        return Err(ReceiveError::Truncated { received });
    }
    Ok(blocking(move || writer.write(&batch)?.finish()).await?)
}

impl<G> Writer<G> {
    fn write(mut self, batch: &[Bytes]) -> Result<Self, StorageError> {
        let Destination { file, path, .. } = &self.destination;
        for chunk in batch {
            file.write_all_at(chunk, self.position).map_err(failed("write", path))?;
            self.position += chunk.len() as u64;
            self.md5.update(chunk);
            self.sha256.update(chunk);
        }
        Ok(self)
    }

    fn finish(self) -> Result<Received<G>, StorageError> {
        let Destination { file, path, guard, .. } = self.destination;
        file.sync_all().map_err(failed("sync", &path))?;
        Ok(Received {
            md5: Md5Digest::from_hasher(self.md5),
            sha256: ContentHash::from_hasher(self.sha256),
            guard,
        })
    }
}
