//! Uploads that are repeated, overtaken, cut off by a crash or forgotten.

#![allow(clippy::unwrap_used, reason = "what tests share may panic as they do")]

mod support;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use ionian_blobs::{Blobs, ByteStream, CompletedPart, Key, LocalBlobs, StorageError, SweepReport, UploadError};
use tokio::sync::mpsc;

use support::{body, content, declare, open, open_with, put_parts, staged};

#[tokio::test]
async fn uploads_and_blobs_survive_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let bytes = content(1500);
    let store = open(root.path()).await;
    let kept = store.put_bytes(bytes.clone().into()).await.unwrap();
    let upload = store.create(declare(&bytes)).await.unwrap();
    let first = store
        .put_part(upload.blob_id, 1, &mut body(&bytes[..1000]))
        .await
        .unwrap();
    drop(store);
    let store = open(root.path()).await;
    assert_eq!(store.read_all(kept, 1500).await.unwrap(), bytes);
    let second = store
        .put_part(upload.blob_id, 2, &mut body(&bytes[1000..]))
        .await
        .unwrap();
    let parts = [
        CompletedPart {
            number: 1,
            md5: first.md5,
        },
        CompletedPart {
            number: 2,
            md5: second.md5,
        },
    ];
    store.complete(upload.blob_id, &parts).await.unwrap();
    let store = open(root.path()).await;
    assert_eq!(store.read_all(upload.blob_id, 1500).await.unwrap(), bytes);
}

#[tokio::test]
async fn a_repeated_part_takes_over_from_a_stuck_one() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(900);
    let upload = store.create(declare(&bytes)).await.unwrap();
    // The first attempt's connection is half dead: it delivered something and then nothing.
    let (sender, receiver) = mpsc::channel::<Bytes>(4);
    sender.send(Bytes::from_static(b"garbage")).await.unwrap();
    let stuck = tokio::spawn({
        let store = store.clone();
        let mut body = stream::unfold(receiver, async |mut receiver| {
            Some((Ok(receiver.recv().await?), receiver))
        })
        .boxed();
        async move { store.put_part(upload.blob_id, 1, &mut body).await }
    });
    // Wait until it has taken its first chunk.
    while sender.capacity() < sender.max_capacity() {
        tokio::task::yield_now().await;
    }
    let parts = put_parts(&store, &upload, &bytes).await;
    assert!(matches!(stuck.await.unwrap(), Err(UploadError::Superseded)));
    store.complete(upload.blob_id, &parts).await.unwrap();
    assert_eq!(store.read_all(upload.blob_id, 900).await.unwrap(), bytes);
}

#[tokio::test]
async fn an_upload_in_use_is_not_swept() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(900);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let (sender, receiver) = mpsc::channel::<Bytes>(1);
    let mut slow = stream::unfold(receiver, async |mut receiver| {
        Some((Ok(receiver.recv().await?), receiver))
    })
    .boxed();
    let running = tokio::spawn({
        let store = store.clone();
        async move { store.put_part(upload.blob_id, 1, &mut slow).await }
    });
    sender.send(Bytes::copy_from_slice(&bytes[..10])).await.unwrap();
    sender.send(Bytes::copy_from_slice(&bytes[10..])).await.unwrap();
    assert_eq!(store.sweep(Duration::ZERO).await.unwrap(), SweepReport::default());
    drop(sender);
    running.await.unwrap().unwrap();
    assert_eq!(store.sweep(Duration::ZERO).await.unwrap().expired, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_completions_at_once_make_one_blob() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(2500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (store, parts) = (store.clone(), parts.clone());
        callers.spawn(async move { store.complete(upload.blob_id, &parts).await.unwrap() });
    }
    let infos = callers.join_all().await;
    assert!(infos.iter().all(|info| *info == infos[0]));
    assert_eq!(store.read_all(upload.blob_id, 2500).await.unwrap(), bytes);
}

/// A disk that fails at the nth write, before or after having done it.
#[derive(Debug)]
struct FailsOnce {
    real: LocalBlobs,
    writes: AtomicU64,
    fails_at: u64,
    after_doing_it: bool,
}

impl FailsOnce {
    async fn write(&self, write: impl Future<Output = Result<(), StorageError>>) -> Result<(), StorageError> {
        let fails = self.writes.fetch_add(1, Ordering::Relaxed) == self.fails_at;
        if !fails || self.after_doing_it {
            write.await?;
        }
        if fails { Err(StorageError::ShuttingDown) } else { Ok(()) }
    }
}

#[async_trait::async_trait]
impl Blobs for FailsOnce {
    async fn adopt(&self, key: &Key, staged: &Path) -> Result<(), StorageError> {
        self.write(self.real.adopt(key, staged)).await
    }
    async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), StorageError> {
        self.write(self.real.put(key, bytes)).await
    }
    async fn copy(&self, from: &Key, to: &Key) -> Result<(), StorageError> {
        self.write(self.real.copy(from, to)).await
    }
    async fn find_length(&self, key: &Key) -> Result<Option<u64>, StorageError> {
        self.real.find_length(key).await
    }
    async fn read(&self, key: &Key, range: Range<u64>) -> Result<ByteStream, StorageError> {
        self.real.read(key, range).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StorageError> {
        self.write(self.real.delete(key)).await
    }
    fn local_path(&self, key: &Key) -> Option<PathBuf> {
        self.real.local_path(key)
    }
}

fn kept_files(root: &Path) -> usize {
    let Ok(shards) = std::fs::read_dir(root.join("kept/blobs")) else {
        return 0;
    };
    shards
        .map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap().count())
        .sum()
}

#[tokio::test]
async fn a_completion_cut_off_anywhere_is_carried_through() {
    let bytes = content(2500);
    for (fails_at, after_doing_it) in [(0, false), (0, true), (1, false), (1, true)] {
        for by_sweep in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let real = LocalBlobs::open(root.path().join("kept")).await.unwrap();
            let failing = FailsOnce {
                real,
                writes: AtomicU64::new(0),
                fails_at,
                after_doing_it,
            };
            let store = open_with(Arc::new(failing), root.path()).await;
            let upload = store.create(declare(&bytes)).await.unwrap();
            let parts = put_parts(&store, &upload, &bytes).await;
            let cut_off = store.complete(upload.blob_id, &parts).await;
            let moved_anyway = fails_at == 0 && after_doing_it;
            assert_eq!(cut_off.is_ok(), moved_anyway, "{cut_off:?}");
            // Nothing may write into what was being committed.
            let late = store
                .put_part(upload.blob_id, 1, &mut body(&bytes[..1000]))
                .await
                .unwrap_err();
            assert!(matches!(late, UploadError::AlreadyComplete { .. }));
            drop(store);

            let store = open(root.path()).await;
            if by_sweep {
                let report = store.sweep(Duration::ZERO).await.unwrap();
                assert_eq!(
                    report,
                    SweepReport {
                        completed: u64::from(!moved_anyway),
                        ..SweepReport::default()
                    }
                );
            }
            store.complete(upload.blob_id, &parts).await.unwrap();
            assert_eq!(store.read_all(upload.blob_id, 2500).await.unwrap(), bytes);
            assert_eq!(staged(root.path()), Vec::<PathBuf>::new());
            assert_eq!(kept_files(root.path()), 2);
        }
    }
}

#[tokio::test]
async fn inline_bytes_cut_off_anywhere_leave_nothing() {
    for (fails_at, after_doing_it) in [(0, false), (0, true), (1, false)] {
        let root = tempfile::tempdir().unwrap();
        let real = LocalBlobs::open(root.path().join("kept")).await.unwrap();
        let failing = FailsOnce {
            real,
            writes: AtomicU64::new(0),
            fails_at,
            after_doing_it,
        };
        let store = open_with(Arc::new(failing), root.path()).await;
        store.put_bytes(Bytes::from_static(b"result")).await.unwrap_err();
        let store = open(root.path()).await;
        let report = store.sweep(Duration::ZERO).await.unwrap();
        assert_eq!(
            report,
            SweepReport {
                expired: 1,
                ..SweepReport::default()
            }
        );
        assert_eq!((staged(root.path()), kept_files(root.path())), (vec![], 0));
    }
}

#[tokio::test]
async fn a_note_lost_to_a_power_cut_is_a_note_never_written() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    let directory = root.path().join(format!("staging/uploads/{}", upload.blob_id));
    std::fs::write(directory.join("part-2.json"), b"").unwrap();
    let incomplete = store.complete(upload.blob_id, &parts).await.unwrap_err();
    assert!(matches!(incomplete, UploadError::PartMissing { part: 2, .. }));
    // Bytes that are lost with a note that is not: the disk broke its promise, and the blob is not made.
    put_parts(&store, &upload, &bytes).await;
    std::fs::File::options()
        .write(true)
        .open(directory.join("spans"))
        .unwrap()
        .set_len(1200)
        .unwrap();
    let broken = store.complete(upload.blob_id, &parts).await.unwrap_err();
    assert!(matches!(broken, UploadError::Storage(_)));
    std::fs::write(directory.join("declaration.json"), b"").unwrap();
    let unknown = store.complete(upload.blob_id, &parts).await.unwrap_err();
    assert!(matches!(unknown, UploadError::UnknownUpload { .. }));
}
