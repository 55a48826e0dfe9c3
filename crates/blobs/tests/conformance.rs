//! One suite for every `Blobs`.

#![allow(clippy::unwrap_used, reason = "what tests share may panic as they do")]

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;
use ionian_blobs::{Blobs, Key, LocalBlobs, ObjectBlobs, StorageError};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;

async fn read(blobs: &dyn Blobs, key: &Key, range: std::ops::Range<u64>) -> Vec<u8> {
    let chunks: Vec<Bytes> = blobs.read(key, range).await.unwrap().try_collect().await.unwrap();
    chunks.concat()
}

async fn conforms(blobs: &dyn Blobs, staging: &Path) {
    let key: Key = "things/a/one".parse().unwrap();
    let other: Key = "things/a/other".parse().unwrap();

    // Nothing there yet.
    assert_eq!(blobs.find_length(&key).await.unwrap(), None);
    assert!(matches!(
        blobs.read(&key, 0..1).await.map(drop),
        Err(StorageError::NotFound { .. })
    ));
    assert!(matches!(
        blobs.copy(&key, &other).await,
        Err(StorageError::NotFound { .. })
    ));
    blobs.delete(&key).await.unwrap();

    // Small objects, replaced.
    blobs.put(&key, Bytes::from_static(b"first version")).await.unwrap();
    blobs.put(&key, Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(blobs.find_length(&key).await.unwrap(), Some(6));
    assert_eq!(read(blobs, &key, 0..6).await, b"second");
    assert_eq!(read(blobs, &key, 2..5).await, b"con");
    assert_eq!(read(blobs, &key, 3..3).await, b"");

    // A copy outlives its original, and may be repeated.
    blobs.copy(&key, &other).await.unwrap();
    blobs.copy(&key, &other).await.unwrap();
    blobs.delete(&key).await.unwrap();
    assert_eq!(blobs.find_length(&key).await.unwrap(), None);
    assert_eq!(read(blobs, &other, 0..6).await, b"second");

    // Adopted files, small, empty and larger than any buffer.
    for length in [0, 1, 20_000_000usize] {
        let content: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
        let staged = staging.join(format!("staged-{length}"));
        std::fs::write(&staged, &content).unwrap();
        blobs.adopt(&key, &staged).await.unwrap();
        assert!(!staged.exists());
        assert_eq!(blobs.find_length(&key).await.unwrap(), Some(length as u64));
        assert!(read(blobs, &key, 0..length as u64).await == content);
    }
    assert_eq!(
        read(blobs, &key, 19_999_990..19_999_993).await,
        [19_999_990u32, 19_999_991, 19_999_992].map(|index| (index % 251) as u8)
    );

    // Where there is a path, it is the file.
    if let Some(path) = blobs.local_path(&other) {
        assert_eq!(std::fs::read(path).unwrap(), b"second");
    }
    blobs.delete(&key).await.unwrap();
    blobs.delete(&other).await.unwrap();
}

#[tokio::test]
async fn local_directory() {
    let root = tempfile::tempdir().unwrap();
    let blobs = LocalBlobs::open(root.path().join("kept")).await.unwrap();
    conforms(&blobs, root.path()).await;
    let left = std::fs::read_dir(root.path().join("kept/.temporary")).unwrap().count();
    assert_eq!(left, 0, "temporary files were left behind");
}

#[tokio::test]
async fn object_store_in_memory() {
    let root = tempfile::tempdir().unwrap();
    conforms(&ObjectBlobs::new(Arc::new(InMemory::new())), root.path()).await;
}

#[tokio::test]
async fn object_store_in_a_directory() {
    let root = tempfile::tempdir().unwrap();
    let kept = root.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    let store = LocalFileSystem::new_with_prefix(&kept).unwrap();
    conforms(&ObjectBlobs::new(Arc::new(store)), root.path()).await;
}

#[tokio::test]
async fn half_written_files_of_an_earlier_process_are_discarded() {
    let root = tempfile::tempdir().unwrap();
    let temporary = root.path().join(".temporary");
    std::fs::create_dir(&temporary).unwrap();
    std::fs::write(temporary.join("half"), b"hal").unwrap();
    LocalBlobs::open(root.path().to_owned()).await.unwrap();
    assert!(!temporary.join("half").exists());
}
