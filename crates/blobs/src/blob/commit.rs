//! The end of an upload: its bytes become a blob, or are discarded.

use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ionian_domain::BlobId;
use serde::{Deserialize, Serialize};

use super::{BlobInfo, BlobStore, read_json, to_json};
use crate::disk::{self, blocking, failed};
use crate::key::Key;
use crate::lease::Lease;
use crate::staging::UploadDirectory;
use crate::storage::StorageError;

/// What a sweep did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SweepReport {
    /// Unfinished uploads that were discarded.
    pub expired: u64,
    /// Interrupted completions that were carried through.
    pub completed: u64,
    /// Uploads that could not be swept; the log says why.
    pub failed: u64,
}

/// Step 1 of a completion, as written to `commit.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Commit {
    pub(super) info: BlobInfo,
    staged: StagedAs,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum StagedAs {
    Spans,
    Whole,
}

impl BlobStore {
    /// Discards unfinished uploads that nothing happened to for this long, and carries interrupted
    /// completions through. Idempotent; for a periodic task.
    pub async fn sweep(&self, older_than: Duration) -> Result<SweepReport, StorageError> {
        let uploads = self.inner.staging.uploads().to_owned();
        let found = blocking(move || upload_directories(&uploads)).await?;
        let now = SystemTime::now();
        let mut report = SweepReport::default();
        for (blob_id, touched_at) in found {
            // A clock that went backwards makes an upload young, which only delays its end.
            if now.duration_since(touched_at).unwrap_or_default() < older_than {
                continue;
            }
            let Some(lease) = self.inner.leases.claim_idle(blob_id) else {
                continue;
            };
            match self.sweep_one(blob_id, &lease).await {
                Ok(true) => report.completed += 1,
                Ok(false) => report.expired += 1,
                Err(error) => {
                    tracing::warn!(%blob_id, error = &error as &dyn std::error::Error, "failed to sweep an upload");
                    report.failed += 1;
                }
            }
        }
        Ok(report)
    }

    /// Returns whether the upload turned out to be complete.
    async fn sweep_one(&self, blob_id: BlobId, lease: &Lease) -> Result<bool, StorageError> {
        if self.resume_commit(blob_id, lease).await?.is_some() {
            return Ok(true);
        }
        if self.find_info(blob_id).await?.is_none() {
            // The crash may have come between the bytes and the sidecar.
            self.inner.blobs.delete(&Key::blob_data(blob_id)).await?;
        }
        self.remove_directory(blob_id).await?;
        Ok(false)
    }

    /// Steps 1 to 4. The staged file is synced and the checksums hold.
    pub(super) async fn commit(
        &self,
        blob_id: BlobId,
        info: BlobInfo,
        staged: StagedAs,
        lease: &Arc<Lease>,
    ) -> Result<BlobInfo, StorageError> {
        let directory = self.inner.staging.upload(blob_id);
        let note = to_json(&Commit {
            info: info.clone(),
            staged,
        });
        let held = Arc::clone(lease);
        blocking(move || {
            let written = disk::write_note(&directory.temporary, &directory.commit(), &note);
            drop(held);
            written
        })
        .await?;
        self.resume_commit(blob_id, lease).await?;
        Ok(info)
    }

    /// Steps 2 to 4, if step 1 was reached. Each may have been done before.
    pub(super) async fn resume_commit(
        &self,
        blob_id: BlobId,
        _excludes_others: &Lease,
    ) -> Result<Option<BlobInfo>, StorageError> {
        let directory = self.inner.staging.upload(blob_id);
        let Some(Commit { info, staged }) = read_json::<Commit>(&directory.commit()).await? else {
            return Ok(None);
        };
        let staged = match staged {
            StagedAs::Spans => directory.spans(),
            StagedAs::Whole => directory.whole(),
        };
        let data = Key::blob_data(blob_id);
        let is_staged = tokio::fs::try_exists(&staged)
            .await
            .map_err(failed("look up", &staged))?;
        if is_staged
            && let Err(error) = self.inner.blobs.adopt(&data, &staged).await
            // A move that was begun by a caller who left may have ended just now.
            && self.inner.blobs.find_length(&data).await? != Some(info.length)
        {
            return Err(error);
        }
        self.inner
            .blobs
            .put(&Key::blob_info(blob_id), to_json(&info).into())
            .await?;
        self.remove_directory(blob_id).await?;
        Ok(Some(info))
    }

    pub(super) async fn make_directory(&self, blob_id: BlobId) -> Result<UploadDirectory, StorageError> {
        let directory = self.inner.staging.upload(blob_id);
        let path = directory.path.clone();
        blocking(move || fs::create_dir(&path).map_err(failed("create directory", &path))).await?;
        self.inner.open_uploads.fetch_add(1, Ordering::Relaxed);
        Ok(directory)
    }

    pub(super) async fn remove_directory(&self, blob_id: BlobId) -> Result<(), StorageError> {
        let directory = self.inner.staging.upload(blob_id);
        let removed = blocking(move || {
            // First, so that at no moment a complete upload looks open.
            disk::remove_if_exists(&directory.declaration())?;
            match fs::remove_dir_all(&directory.path) {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(failed("remove", &directory.path)(error)),
            }
        })
        .await?;
        if removed {
            self.inner.open_uploads.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The uploads in the staging area, with the time something last happened to each: every part that
/// arrives renames a file into the directory.
pub(super) fn upload_directories(uploads: &Path) -> Result<Vec<(BlobId, SystemTime)>, StorageError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(uploads).map_err(failed("list", uploads))? {
        let entry = entry.map_err(failed("list", uploads))?;
        let name = entry.file_name();
        let Some(blob_id) = name.to_str().and_then(|name| BlobId::from_str(name).ok()) else {
            tracing::warn!(path = %entry.path().display(), "ignored a foreign file among the uploads");
            continue;
        };
        match entry.metadata().and_then(|metadata| metadata.modified()) {
            Ok(touched_at) => found.push((blob_id, touched_at)),
            // Completed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look up", &entry.path())(error)),
        }
    }
    Ok(found)
}
