//! Bytes: files named by their SHA-256 (mounts), opaque blobs named by id (call payloads), and the
//! uploads that make them.
//!
//! What lies where:
//!
//! * [`Blobs`] keeps finished bytes under a [`Key`], durably: in a local directory ([`LocalBlobs`]) or in
//!   any object store ([`ObjectBlobs`]).
//! * [`Staging`] is a local directory for bytes that are still arriving. Nothing in it is visible.
//! * [`ContentStore`] and [`BlobStore`] sit on both and decide when arrived bytes become visible: when all
//!   of them are there, the checksums hold, and they are on disk. A crash at any point leaves either the
//!   whole thing or nothing.
//! * [`UrlSigner`] makes and checks the URLs by which clients reach blobs.
//!
//! Bodies are streamed: no operation needs memory in proportion to a blob, except the ones that return
//! [`bytes::Bytes`], which take a limit. There is no HTTP here; the `api` crate serves the URLs.
//!
//! One process owns a data directory. Opening it discards what an earlier process left half-written,
//! except unfinished uploads, which may be continued after a restart until they are swept.

mod blob;
mod body;
mod content;
mod disk;
mod hash;
mod key;
mod lease;
mod local;
mod object;
mod receive;
mod staging;
mod storage;
mod upload;
mod url;

use std::path::Path;
use std::sync::Arc;

pub use blob::{BlobInfo, BlobStore, BodyReceipt, CompletedPart, ReadError, SweepReport, UploadError};
pub use body::BodyError;
pub use content::{ContentError, ContentStore};
pub use hash::{ContentHash, InvalidHash, Md5Digest};
pub use key::{InvalidKey, Key};
pub use local::LocalBlobs;
pub use object::ObjectBlobs;
pub use staging::Staging;
pub use storage::{Blobs, ByteStream, StorageError};
pub use upload::{BlobDeclaration, CreateError, InvalidDeclaration, Upload, UploadLimits};
pub use url::{Capability, DOWNLOAD_URL_LIFETIME, InvalidUrl, UPLOAD_URL_LIFETIME, UploadPlan, UrlSigner};

/// Opens both stores under one local directory: `<root>/kept` for finished bytes, `<root>/staging` for
/// arriving ones. They must share a file system, since bytes move between them by rename.
pub async fn open_local(root: &Path) -> Result<(ContentStore, BlobStore), StorageError> {
    let blobs: Arc<dyn Blobs> = Arc::new(LocalBlobs::open(root.join("kept")).await?);
    let staging = Staging::open(root.join("staging")).await?;
    let blob_store = BlobStore::open(Arc::clone(&blobs), staging, UploadLimits::default()).await?;
    Ok((ContentStore::new(blobs), blob_store))
}
