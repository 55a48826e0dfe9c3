//! What the upload tests share.

#![expect(
    unreachable_pub,
    reason = "each test file includes this module and uses a part of it"
)]
#![allow(dead_code, reason = "each test file includes this module and uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use ionian_blobs::{
    BlobDeclaration, BlobStore, Blobs, BodyError, CompletedPart, ContentHash, LocalBlobs, Md5Digest, Staging, Upload,
    UploadLimits,
};

pub const LIMITS: UploadLimits = UploadLimits {
    max_blob_bytes: 1_000_000,
    part_bytes: 1000,
    max_parts: 50,
    max_open_uploads: 4,
};

pub type Body = BoxStream<'static, Result<Bytes, BodyError>>;

pub fn body(bytes: &[u8]) -> Body {
    stream::iter(vec![Ok(Bytes::copy_from_slice(bytes))]).boxed()
}

pub fn broken_after(bytes: &[u8]) -> Body {
    let broken = BodyError::Broken {
        source: "connection reset".into(),
    };
    stream::iter(vec![Ok(Bytes::copy_from_slice(bytes)), Err(broken)]).boxed()
}

pub fn content(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 % 253) as u8).collect()
}

pub fn declare(bytes: &[u8]) -> BlobDeclaration {
    BlobDeclaration {
        content_length: bytes.len() as u64,
        md5: Some(Md5Digest::of(bytes)),
        sha256: Some(ContentHash::of(bytes)),
    }
}

pub async fn open(root: &Path) -> BlobStore {
    let blobs = LocalBlobs::open(root.join("kept")).await.unwrap();
    open_with(Arc::new(blobs), root).await
}

pub async fn open_with(blobs: Arc<dyn Blobs>, root: &Path) -> BlobStore {
    let staging = Staging::open(root.join("staging")).await.unwrap();
    BlobStore::open(blobs, staging, LIMITS).await.unwrap()
}

pub async fn put_parts(store: &BlobStore, upload: &Upload, bytes: &[u8]) -> Vec<CompletedPart> {
    let mut parts = Vec::new();
    for (number, chunk) in (1..).zip(bytes.chunks(upload.part_length as usize)) {
        let receipt = store.put_part(upload.blob_id, number, &mut body(chunk)).await.unwrap();
        assert_eq!(receipt.md5, Md5Digest::of(chunk));
        parts.push(CompletedPart {
            number,
            md5: receipt.md5,
        });
    }
    assert_eq!(parts.len(), upload.part_count as usize);
    parts
}

/// Everything below the staging directory, to see that nothing is left behind.
pub fn staged(root: &Path) -> Vec<PathBuf> {
    ["staging/temporary", "staging/uploads", "kept/.temporary"]
        .iter()
        .filter_map(|directory| std::fs::read_dir(root.join(directory)).ok())
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect()
}
