//! The local directory in which uploads arrive.
//!
//! ```text
//! <root>/temporary/            files without a home yet; emptied at every start
//! <root>/uploads/<blob id>/    one upload: declaration.json, spans, part-<n>.json, commit.json
//! ```
//!
//! An upload's directory exists until its blob is complete, so one that is left over after a crash also
//! marks a blob that may have been half committed.

use std::path::{Path, PathBuf};

use ionian_domain::BlobId;

use crate::disk::{self, blocking, failed};
use crate::storage::StorageError;

#[derive(Debug, Clone)]
pub struct Staging {
    temporary: PathBuf,
    uploads: PathBuf,
}

impl Staging {
    /// For a local [`crate::Blobs`], the directory must be on its file system.
    pub async fn open(root: PathBuf) -> Result<Self, StorageError> {
        let staging = Self {
            temporary: root.join("temporary"),
            uploads: root.join("uploads"),
        };
        let made = staging.clone();
        blocking(move || {
            disk::empty_directory(&made.temporary)?;
            std::fs::create_dir_all(&made.uploads).map_err(failed("create directory", &made.uploads))
        })
        .await?;
        Ok(staging)
    }

    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    pub(crate) fn uploads(&self) -> &Path {
        &self.uploads
    }

    pub(crate) fn upload(&self, id: BlobId) -> UploadDirectory {
        UploadDirectory {
            path: self.uploads.join(id.to_string()),
            temporary: self.temporary.clone(),
        }
    }
}

/// The files of one upload, by name.
#[derive(Debug, Clone)]
pub(crate) struct UploadDirectory {
    pub(crate) path: PathBuf,
    pub(crate) temporary: PathBuf,
}

impl UploadDirectory {
    pub(crate) fn declaration(&self) -> PathBuf {
        self.path.join("declaration.json")
    }

    /// All parts, each at its own offset.
    pub(crate) fn spans(&self) -> PathBuf {
        self.path.join("spans")
    }

    /// The body of a single PUT.
    pub(crate) fn whole(&self) -> PathBuf {
        self.path.join("whole")
    }

    /// Exists when the part has arrived and is on disk.
    pub(crate) fn receipt(&self, part: u32) -> PathBuf {
        self.path.join(format!("part-{part}.json"))
    }

    /// Exists when the checksums hold and the blob is being made visible.
    pub(crate) fn commit(&self) -> PathBuf {
        self.path.join("commit.json")
    }
}
