//! Opaque blobs by id: how an upload becomes one, and how one is read.
//!
//! An upload has a directory in the staging area from its declaration to its completion. It is completed
//! under a lease that excludes every writer, in steps that may be cut off anywhere and repeated:
//!
//! 1. the bytes are on disk and their checksums hold → `commit.json` says so;
//! 2. the bytes move to their key;
//! 3. the [`BlobInfo`] sidecar is written: from here on the blob exists;
//! 4. the upload's directory is removed.
//!
//! Whoever finds a `commit.json` goes on with step 2. Whoever finds a directory without one may discard
//! the upload. A repeated request finds the blob complete and gets the same answer as the first.

mod commit;
mod error;
mod parts;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::Stream;
use ionian_domain::{BlobId, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use self::commit::SweepReport;
use self::commit::{Commit, StagedAs, upload_directories};
pub use self::error::{ReadError, UploadError};
use self::parts::{check, compare_parts, hash_file, multipart_etag};
use crate::body::BodyError;
use crate::disk::{self, TempFile, blocking};
use crate::hash::{ContentHash, Md5Digest};
use crate::key::Key;
use crate::lease::{Claim, InUse, Lease, Leases};
use crate::receive::{Destination, receive};
use crate::staging::Staging;
use crate::storage::{self, Blobs, ByteStream, StorageError};
use crate::upload::{BlobDeclaration, CreateError, Upload, UploadLimits};

/// Sidecars are a few hundred bytes; more is not one of ours.
const MAX_INFO_BYTES: u64 = 64 * 1024;

/// What is known about a complete blob. Kept beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobInfo {
    pub length: u64,
    /// Computed by us while the bytes arrived.
    pub sha256: ContentHash,
    /// Of the whole blob; `None` where it arrived in several parts.
    pub md5: Option<Md5Digest>,
    /// Without quotes: the MD5 of a blob that came in one body, else S3's form for several parts.
    pub etag: String,
    pub created_at: Timestamp,
}

/// What arrived in the body of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BodyReceipt {
    pub md5: Md5Digest,
    pub sha256: ContentHash,
}

/// What a client says about a part when it completes an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompletedPart {
    pub number: u32,
    pub md5: Md5Digest,
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    blobs: Arc<dyn Blobs>,
    staging: Staging,
    leases: Leases,
    limits: UploadLimits,
    /// Directories in the staging area; written by `create` and `remove_directory`.
    open_uploads: AtomicU64,
}

enum Progress {
    Open {
        declaration: BlobDeclaration,
        upload: Upload,
    },
    Complete(BlobInfo),
}

impl BlobStore {
    pub async fn open(blobs: Arc<dyn Blobs>, staging: Staging, limits: UploadLimits) -> Result<Self, StorageError> {
        let uploads = staging.uploads().to_owned();
        let open = blocking(move || Ok::<_, StorageError>(upload_directories(&uploads)?.len() as u64)).await?;
        let open_uploads = AtomicU64::new(open);
        Ok(Self {
            inner: Arc::new(Inner {
                blobs,
                staging,
                leases: Leases::default(),
                limits,
                open_uploads,
            }),
        })
    }

    /// Begins an upload.
    pub async fn create(&self, declaration: BlobDeclaration) -> Result<Upload, CreateError> {
        let limits = &self.inner.limits;
        if declaration.content_length > limits.max_blob_bytes {
            let declared = declaration.content_length;
            return Err(CreateError::TooLarge {
                declared,
                limit: limits.max_blob_bytes,
            });
        }
        if self.inner.open_uploads.load(Ordering::Relaxed) >= limits.max_open_uploads {
            return Err(CreateError::TooManyOpen {
                limit: limits.max_open_uploads,
            });
        }
        let blob_id = BlobId::generate();
        let directory = self.make_directory(blob_id).await?;
        let note = to_json(&declaration);
        blocking(move || disk::write_note(&directory.temporary, &directory.declaration(), &note)).await?;
        Ok(Upload::plan(blob_id, declaration.content_length, limits))
    }

    /// Receives the whole blob in one body. `content_md5` is what the request's own header says.
    pub async fn put_whole(
        &self,
        blob_id: BlobId,
        content_md5: Option<Md5Digest>,
        body: &mut (impl Stream<Item = Result<Bytes, BodyError>> + Unpin),
    ) -> Result<BodyReceipt, UploadError> {
        let length = match self.progress(blob_id).await? {
            Progress::Open { declaration, .. } => declaration.content_length,
            // A repetition, probably. It has to be read to be compared.
            Progress::Complete(info) => info.length,
        };
        let temporary = self.inner.staging.temporary().to_owned();
        let (temp, file) = blocking(move || TempFile::create(&temporary)).await?;
        let path = temp.path().to_owned();
        let destination = Destination {
            file,
            path,
            offset: 0,
            length,
            guard: temp,
        };
        let received = receive(body, destination, &CancellationToken::new())
            .await
            .map_err(|error| UploadError::received(error, length))?;
        let receipt @ BodyReceipt { md5, sha256 } = BodyReceipt {
            md5: received.md5,
            sha256: received.sha256,
        };
        check("MD5", content_md5, Some(md5))?;

        let lease = Arc::new(self.claim(blob_id, Claim::Whole).await?);
        self.resume_commit(blob_id, &lease).await?;
        match self.progress(blob_id).await? {
            Progress::Complete(info) if info.sha256 == sha256 => Ok(receipt),
            Progress::Complete(_) => Err(UploadError::AlreadyComplete { blob_id }),
            Progress::Open { declaration, .. } => {
                check("MD5", declaration.md5, Some(md5))?;
                check("SHA-256", declaration.sha256, Some(sha256))?;
                let info = BlobInfo {
                    length,
                    sha256,
                    md5: Some(md5),
                    etag: md5.to_string(),
                    created_at: Timestamp::now(),
                };
                let target = self.inner.staging.upload(blob_id).whole();
                let (temp, held) = (received.guard, Arc::clone(&lease));
                blocking(move || {
                    let renamed = temp.rename(&target);
                    drop(held);
                    renamed
                })
                .await?;
                self.commit(blob_id, info, StagedAs::Whole, &lease).await?;
                Ok(receipt)
            }
        }
    }

    /// Receives one part, numbered from 1. A repeated part replaces the earlier one.
    pub async fn put_part(
        &self,
        blob_id: BlobId,
        part: u32,
        body: &mut (impl Stream<Item = Result<Bytes, BodyError>> + Unpin),
    ) -> Result<BodyReceipt, UploadError> {
        let lease = self.claim(blob_id, Claim::Part(part)).await?;
        let Progress::Open { upload, .. } = self.progress(blob_id).await? else {
            return Err(UploadError::AlreadyComplete { blob_id });
        };
        let span = upload.span(part).ok_or(UploadError::NoSuchPart {
            blob_id,
            part,
            part_count: upload.part_count,
        })?;
        let length = span.end - span.start;
        let directory = self.inner.staging.upload(blob_id);
        let spans = directory.spans();
        let note = directory.receipt(part);
        let (path, stale) = (spans.clone(), note.clone());
        let superseded = lease.superseded();
        // The lease goes along, so that it outlasts the work even if this caller is dropped.
        let (file, lease) = blocking(move || {
            // While the part is being replaced it has not arrived.
            disk::remove_if_exists(&stale)?;
            Ok::<_, StorageError>((disk::open_for_spans(&path)?, lease))
        })
        .await?;
        let destination = Destination {
            file,
            path: spans,
            offset: span.start,
            length,
            guard: lease,
        };
        let received = receive(body, destination, &superseded)
            .await
            .map_err(|error| UploadError::received(error, length))?;
        let receipt = BodyReceipt {
            md5: received.md5,
            sha256: received.sha256,
        };
        let lease = received.guard;
        blocking(move || {
            let written = disk::write_note(&directory.temporary, &note, &to_json(&receipt));
            drop(lease);
            written
        })
        .await?;
        Ok(receipt)
    }

    /// Makes a blob of the uploaded parts. The client lists all of them, with the MD5s it was told.
    pub async fn complete(&self, blob_id: BlobId, parts: &[CompletedPart]) -> Result<BlobInfo, UploadError> {
        let lease = Arc::new(self.claim(blob_id, Claim::Whole).await?);
        self.resume_commit(blob_id, &lease).await?;
        let (declaration, upload) = match self.progress(blob_id).await? {
            Progress::Complete(info) if info.etag == multipart_etag(parts) => return Ok(info),
            Progress::Complete(_) => return Err(UploadError::AlreadyComplete { blob_id }),
            Progress::Open { declaration, upload } => (declaration, upload),
        };
        let receipts = self.receipts(&upload).await?;
        compare_parts(parts, &receipts)?;
        let (md5, sha256) = match receipts.as_slice() {
            [only] => (Some(only.md5), only.sha256),
            _several => {
                // The SHA-256 is the stronger check, so a second hash is computed only in its absence.
                let with_md5 = declaration.sha256.is_none() && declaration.md5.is_some();
                let path = self.inner.staging.upload(blob_id).spans();
                blocking(move || hash_file(&path, upload.content_length, with_md5)).await?
            }
        };
        if declaration.sha256.is_none() || md5.is_some() {
            check("MD5", declaration.md5, md5)?;
        }
        check("SHA-256", declaration.sha256, Some(sha256))?;
        let info = BlobInfo {
            length: upload.content_length,
            sha256,
            md5,
            etag: multipart_etag(parts),
            created_at: Timestamp::now(),
        };
        Ok(self.commit(blob_id, info, StagedAs::Spans, &lease).await?)
    }

    /// Keeps bytes that the server itself has, such as a result that came inline.
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<BlobId, StorageError> {
        let blob_id = BlobId::generate();
        // A lease, so that a sweep does not take the marker for a forgotten upload.
        let Ok(_lease) = self.inner.leases.claim(blob_id, Claim::Whole).await else {
            unreachable!("nobody else knows the id yet");
        };
        let hashed = bytes.clone();
        let (sha256, md5) =
            blocking(move || Ok::<_, StorageError>((ContentHash::of(&hashed), Md5Digest::of(&hashed)))).await?;
        let info = BlobInfo {
            length: bytes.len() as u64,
            sha256,
            md5: Some(md5),
            etag: md5.to_string(),
            created_at: Timestamp::now(),
        };
        // The directory marks a blob that may be half there, for a sweep after a crash.
        self.make_directory(blob_id).await?;
        self.inner.blobs.put(&Key::blob_data(blob_id), bytes).await?;
        self.inner
            .blobs
            .put(&Key::blob_info(blob_id), to_json(&info).into())
            .await?;
        self.remove_directory(blob_id).await?;
        Ok(blob_id)
    }

    pub async fn info(&self, blob_id: BlobId) -> Result<BlobInfo, ReadError> {
        match self.find_info(blob_id).await {
            Ok(Some(info)) => Ok(info),
            Ok(None) => Err(ReadError::NotFound { blob_id }),
            Err(source) => Err(ReadError::Storage { blob_id, source }),
        }
    }

    /// Streams a part of a blob. The range must lie within its length.
    pub async fn read(&self, blob_id: BlobId, range: Range<u64>) -> Result<ByteStream, ReadError> {
        let read = self.inner.blobs.read(&Key::blob_data(blob_id), range).await;
        read.map_err(|source| match source {
            StorageError::NotFound { .. } => ReadError::NotFound { blob_id },
            source => ReadError::Storage { blob_id, source },
        })
    }

    /// Reads a whole blob of at most `limit` bytes.
    pub async fn read_all(&self, blob_id: BlobId, limit: u64) -> Result<Bytes, ReadError> {
        // An upload that is being completed has its bytes in place before it exists.
        self.info(blob_id).await?;
        let read = storage::read_all(&*self.inner.blobs, &Key::blob_data(blob_id), limit).await;
        read.map_err(|source| match source {
            StorageError::NotFound { .. } => ReadError::NotFound { blob_id },
            StorageError::TooLarge { length, limit, .. } => ReadError::TooLarge { blob_id, length, limit },
            source => ReadError::Storage { blob_id, source },
        })
    }

    /// Makes sure that the blob does not exist. Content that was made from it stays.
    pub async fn delete(&self, blob_id: BlobId) -> Result<(), StorageError> {
        // The sidecar goes last: while it is there, a repeated delete knows that there may be bytes.
        self.inner.blobs.delete(&Key::blob_data(blob_id)).await?;
        self.inner.blobs.delete(&Key::blob_info(blob_id)).await
    }

    async fn claim(&self, blob_id: BlobId, claim: Claim) -> Result<Lease, UploadError> {
        self.inner
            .leases
            .claim(blob_id, claim)
            .await
            .map_err(|InUse| UploadError::Busy { blob_id })
    }

    /// Where the upload stands. A completion that was begun counts as done, since it is only ever
    /// carried through.
    async fn progress(&self, blob_id: BlobId) -> Result<Progress, UploadError> {
        let directory = self.inner.staging.upload(blob_id);
        if let Some(commit) = read_json::<Commit>(&directory.commit()).await? {
            return Ok(Progress::Complete(commit.info));
        }
        if let Some(declaration) = read_json::<BlobDeclaration>(&directory.declaration()).await? {
            let upload = Upload::plan(blob_id, declaration.content_length, &self.inner.limits);
            return Ok(Progress::Open { declaration, upload });
        }
        match self.find_info(blob_id).await? {
            Some(info) => Ok(Progress::Complete(info)),
            None => Err(UploadError::UnknownUpload { blob_id }),
        }
    }

    async fn find_info(&self, blob_id: BlobId) -> Result<Option<BlobInfo>, StorageError> {
        let key = Key::blob_info(blob_id);
        match storage::read_all(&*self.inner.blobs, &key, MAX_INFO_BYTES).await {
            Ok(bytes) => from_json(&bytes, key.as_str()).map(Some),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn receipts(&self, upload: &Upload) -> Result<Vec<BodyReceipt>, UploadError> {
        let blob_id = upload.blob_id;
        let directory = self.inner.staging.upload(blob_id);
        let mut receipts = Vec::new();
        for part in 1..=upload.part_count {
            let receipt = read_json::<BodyReceipt>(&directory.receipt(part)).await?;
            receipts.push(receipt.ok_or(UploadError::PartMissing { blob_id, part })?);
        }
        Ok(receipts)
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("our own descriptions have string keys only")
}

fn from_json<T: DeserializeOwned>(bytes: &[u8], name: &str) -> Result<T, StorageError> {
    serde_json::from_slice(bytes).map_err(|source| StorageError::Description {
        name: name.to_owned(),
        source,
    })
}

async fn read_json<T: DeserializeOwned + Send + 'static>(path: &Path) -> Result<Option<T>, StorageError> {
    let path = path.to_owned();
    blocking(move || match disk::read_if_exists(&path)? {
        // Notes are not synced: a power cut may leave the name without the text, which is as if it had
        // never been written.
        Some(bytes) if bytes.is_empty() => Ok(None),
        Some(bytes) => from_json(&bytes, &path.to_string_lossy()).map(Some),
        None => Ok(None),
    })
    .await
}
