//! Files by their hash.

#![allow(clippy::unwrap_used, reason = "what tests share may panic as they do")]

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use ionian_blobs::{ContentError, ContentHash, ContentStore, ObjectBlobs, ReadError, open_local};
use ionian_domain::{BlobId, ErrorKind};
use object_store::memory::InMemory;

#[tokio::test]
async fn only_missing_files_have_to_travel() {
    let root = tempfile::tempdir().unwrap();
    let (content, _) = open_local(root.path()).await.unwrap();
    let [known, unknown] = [&b"known"[..], b"unknown"].map(ContentHash::of);
    content.put(known, Bytes::from_static(b"known")).await.unwrap();
    content.put(known, Bytes::from_static(b"known")).await.unwrap();
    assert_eq!(content.missing(&[known, unknown]).await.unwrap(), [unknown]);
    assert!(content.contains(known).await.unwrap());
    assert_eq!(content.read(known, 5).await.unwrap(), "known");
    assert_eq!(
        content.read(known, 4).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    let (length, chunks) = content.open(known).await.unwrap();
    let chunks: Vec<Bytes> = chunks.try_collect().await.unwrap();
    assert_eq!((length, chunks.concat().as_slice()), (5, &b"known"[..]));
    assert!(matches!(
        content.open(unknown).await.map(drop),
        Err(ContentError::NotFound { .. })
    ));
    assert_eq!(std::fs::read(content.local_path(known).unwrap()).unwrap(), b"known");
    assert_eq!(content.local_path(unknown), None);
}

#[tokio::test]
async fn a_file_that_is_not_what_its_name_says_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (content, blobs) = open_local(root.path()).await.unwrap();
    let declared = ContentHash::of(b"what was declared");
    let refused = content
        .put(declared, Bytes::from_static(b"what was sent"))
        .await
        .unwrap_err();
    assert!(matches!(refused, ContentError::WrongChecksum { .. }));
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
    let blob = blobs.put_bytes(Bytes::from_static(b"what was sent")).await.unwrap();
    let refused = content.put_from_blob(declared, &blobs, blob).await.unwrap_err();
    assert!(matches!(refused, ContentError::WrongChecksum { .. }));
    assert!(!content.contains(declared).await.unwrap());
}

#[tokio::test]
async fn a_blob_becomes_a_file_without_a_second_copy() {
    let root = tempfile::tempdir().unwrap();
    let (content, blobs) = open_local(root.path()).await.unwrap();
    let bytes = Bytes::from(vec![9; 100_000]);
    let hash = ContentHash::of(&bytes);
    let blob = blobs.put_bytes(bytes.clone()).await.unwrap();
    content.put_from_blob(hash, &blobs, blob).await.unwrap();
    content.put_from_blob(hash, &blobs, blob).await.unwrap();
    {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(content.local_path(hash).unwrap()).unwrap();
        assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (2, 0o644));
    }
    blobs.delete(blob).await.unwrap();
    assert_eq!(content.read(hash, u64::MAX).await.unwrap(), bytes);
    let absent = content
        .put_from_blob(ContentHash::of(b""), &blobs, blob)
        .await
        .unwrap_err();
    assert!(matches!(absent, ContentError::Blob(ReadError::NotFound { blob_id }) if blob_id == blob));
    assert_eq!(absent.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn an_object_store_has_no_local_paths_but_all_the_rest() {
    let content = ContentStore::new(Arc::new(ObjectBlobs::new(Arc::new(InMemory::new()))));
    let hash = ContentHash::of(b"far away");
    content.put(hash, Bytes::from_static(b"far away")).await.unwrap();
    assert_eq!(content.local_path(hash), None);
    assert_eq!(content.read(hash, 100).await.unwrap(), "far away");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_file_from_many_callers_at_once() {
    let root = tempfile::tempdir().unwrap();
    let (content, blobs) = open_local(root.path()).await.unwrap();
    let bytes = Bytes::from(vec![3; 300_000]);
    let hash = ContentHash::of(&bytes);
    let blob = blobs.put_bytes(bytes.clone()).await.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..32 {
        let (content, blobs, bytes) = (content.clone(), blobs.clone(), bytes.clone());
        callers.spawn(async move {
            if caller % 2 == 0 {
                content.put(hash, bytes.clone()).await.unwrap();
            } else {
                content.put_from_blob(hash, &blobs, blob).await.unwrap();
            }
            assert_eq!(content.read(hash, u64::MAX).await.unwrap(), bytes);
        });
    }
    callers.join_all().await;
}

#[tokio::test]
async fn files_survive_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let hash = ContentHash::of(b"kept");
    let (content, _) = open_local(root.path()).await.unwrap();
    content.put(hash, Bytes::from_static(b"kept")).await.unwrap();
    drop(content);
    let (content, blobs) = open_local(root.path()).await.unwrap();
    assert_eq!(content.read(hash, 10).await.unwrap(), "kept");
    assert_eq!(
        blobs.info(BlobId::generate()).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}
