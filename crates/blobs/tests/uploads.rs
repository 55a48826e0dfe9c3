//! Uploads: what becomes a blob and what does not.

#![allow(clippy::unwrap_used, reason = "what tests share may panic as they do")]

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use ionian_blobs::{
    BlobDeclaration, BlobInfo, BlobStore, Blobs, CompletedPart, ContentHash, CreateError, LocalBlobs, Md5Digest,
    ObjectBlobs, ReadError, Staging, SweepReport, UploadError, UploadLimits,
};
use ionian_domain::{BlobId, ErrorKind};
use object_store::memory::InMemory;
use proptest::prelude::*;

use support::{LIMITS, body, broken_after, content, declare, open, put_parts, staged};

#[tokio::test]
async fn one_put_makes_a_blob_and_may_be_repeated() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(2500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let id = upload.blob_id;
    assert!(matches!(store.info(id).await, Err(ReadError::NotFound { .. })));
    let content_md5 = Some(Md5Digest::of(&bytes));
    let receipt = store.put_whole(id, content_md5, &mut body(&bytes)).await.unwrap();
    assert_eq!(receipt.md5, Md5Digest::of(&bytes));
    let info = store.info(id).await.unwrap();
    assert_eq!(info.etag, Md5Digest::of(&bytes).to_string());
    assert_eq!((info.length, info.sha256), (2500, ContentHash::of(&bytes)));
    assert_eq!(store.read_all(id, 2500).await.unwrap(), bytes);
    assert_eq!(store.put_whole(id, None, &mut body(&bytes)).await.unwrap(), receipt);
    assert_eq!(store.info(id).await.unwrap(), info);
    let other = store
        .put_whole(id, None, &mut body(&content(2501)[1..]))
        .await
        .unwrap_err();
    assert!(matches!(other, UploadError::AlreadyComplete { .. }));
    assert_eq!(store.read_all(id, 2500).await.unwrap(), bytes);
    assert_eq!(staged(root.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn parts_make_a_blob_and_completing_may_be_repeated() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(2500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    let info = store.complete(upload.blob_id, &parts).await.unwrap();
    // `md5sum` of the three parts' MD5s in binary, and their number.
    let joined: Vec<u8> = bytes.chunks(1000).flat_map(|part| Md5Digest::of(part).0).collect();
    assert_eq!(info.etag, format!("{}-3", Md5Digest::of(&joined)));
    assert_eq!((info.sha256, info.md5), (ContentHash::of(&bytes), None));
    assert_eq!(store.complete(upload.blob_id, &parts).await.unwrap(), info);
    assert_eq!(store.read_all(upload.blob_id, 2500).await.unwrap(), bytes);
    let late = store
        .put_part(upload.blob_id, 1, &mut body(&bytes[..1000]))
        .await
        .unwrap_err();
    assert!(matches!(late, UploadError::AlreadyComplete { .. }));
    assert_eq!(staged(root.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn empty_blobs_exist() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let by_part = store.create(declare(b"")).await.unwrap();
    let receipt = store.put_part(by_part.blob_id, 1, &mut body(b"")).await.unwrap();
    store
        .complete(
            by_part.blob_id,
            &[CompletedPart {
                number: 1,
                md5: receipt.md5,
            }],
        )
        .await
        .unwrap();
    let whole = store.create(declare(b"")).await.unwrap();
    store
        .put_whole(whole.blob_id, None, &mut stream::empty().boxed())
        .await
        .unwrap();
    for id in [
        by_part.blob_id,
        whole.blob_id,
        store.put_bytes(Bytes::new()).await.unwrap(),
    ] {
        assert_eq!(store.read_all(id, 0).await.unwrap(), "");
        assert_eq!(store.info(id).await.unwrap().length, 0);
    }
}

#[tokio::test]
async fn truncated_broken_and_overlong_bodies_store_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let id = store.create(declare(&bytes)).await.unwrap().blob_id;
    let truncated = store.put_whole(id, None, &mut body(&bytes[..1499])).await.unwrap_err();
    assert_eq!(
        truncated.to_string(),
        "the upload was truncated: 1499 of 1500 bytes arrived; nothing was stored"
    );
    let broken = store.put_whole(id, None, &mut broken_after(&bytes)).await.unwrap_err();
    assert!(matches!(
        broken,
        UploadError::Body {
            received: 1500,
            expected: 1500,
            ..
        }
    ));
    let overlong = store.put_whole(id, None, &mut body(&content(1501))).await.unwrap_err();
    assert!(matches!(overlong, UploadError::TooLong { expected: 1500 }));
    let truncated = store.put_part(id, 1, &mut body(&bytes[..999])).await.unwrap_err();
    assert!(matches!(
        truncated,
        UploadError::Truncated {
            expected: 1000,
            received: 999
        }
    ));
    let overlong = store.put_part(id, 2, &mut body(&bytes[..501])).await.unwrap_err();
    assert!(matches!(overlong, UploadError::TooLong { expected: 500 }));
    let absent = store.put_part(id, 3, &mut body(b"")).await.unwrap_err();
    assert!(matches!(
        absent,
        UploadError::NoSuchPart {
            part: 3,
            part_count: 2,
            ..
        }
    ));
    let absent = store.put_part(id, 0, &mut body(b"")).await.unwrap_err();
    assert!(matches!(absent, UploadError::NoSuchPart { part: 0, .. }));
    assert!(matches!(store.info(id).await, Err(ReadError::NotFound { .. })));
    let nothing = CompletedPart {
        number: 1,
        md5: Md5Digest::of(b""),
    };
    let incomplete = store.complete(id, &[nothing, nothing]).await.unwrap_err();
    assert!(matches!(incomplete, UploadError::PartMissing { part: 1, .. }));
    // The upload is still good.
    store.put_whole(id, None, &mut body(&bytes)).await.unwrap();
    assert_eq!(staged(root.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_part_that_is_cut_off_while_repeated_has_not_arrived() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    store
        .put_part(upload.blob_id, 2, &mut broken_after(b"x"))
        .await
        .unwrap_err();
    let incomplete = store.complete(upload.blob_id, &parts).await.unwrap_err();
    assert!(matches!(incomplete, UploadError::PartMissing { part: 2, .. }));
}

#[tokio::test]
async fn wrong_checksums_store_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let (md5, sha256) = (Some(Md5Digest::of(b"other")), Some(ContentHash::of(b"other")));
    let right = declare(&bytes);
    for declaration in [
        BlobDeclaration { md5, ..right },
        BlobDeclaration { sha256, ..right },
        BlobDeclaration {
            md5,
            sha256: None,
            ..right
        },
    ] {
        let upload = store.create(declaration).await.unwrap();
        let id = upload.blob_id;
        let error = store.put_whole(id, None, &mut body(&bytes)).await.unwrap_err();
        assert!(matches!(error, UploadError::WrongChecksum { .. }), "{error}");
        if declaration.sha256 != right.sha256 {
            let parts = put_parts(&store, &upload, &bytes).await;
            let error = store.complete(id, &parts).await.unwrap_err();
            assert!(matches!(error, UploadError::WrongChecksum { .. }), "{error}");
        }
        assert!(matches!(store.info(id).await, Err(ReadError::NotFound { .. })));
    }
    // The header of a single request counts like a declaration.
    let id = store
        .create(BlobDeclaration { md5: None, ..right })
        .await
        .unwrap()
        .blob_id;
    let error = store.put_whole(id, md5, &mut body(&bytes)).await.unwrap_err();
    assert!(matches!(error, UploadError::WrongChecksum { algorithm: "MD5", .. }));
    // One part is the whole: its MD5 counts, too.
    store.sweep(Duration::ZERO).await.unwrap();
    let small = content(10);
    let upload = store.create(BlobDeclaration { md5, ..declare(&small) }).await.unwrap();
    let parts = put_parts(&store, &upload, &small).await;
    assert!(matches!(
        store.complete(upload.blob_id, &parts).await,
        Err(UploadError::WrongChecksum { .. })
    ));
}

#[tokio::test]
async fn undeclared_checksums_are_not_needed() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let upload = store
        .create(BlobDeclaration {
            md5: None,
            sha256: None,
            ..declare(&bytes)
        })
        .await
        .unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    let info = store.complete(upload.blob_id, &parts).await.unwrap();
    assert_eq!(info.sha256, ContentHash::of(&bytes));
}

#[tokio::test]
async fn a_completion_must_list_what_arrived() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(1500);
    let upload = store.create(declare(&bytes)).await.unwrap();
    let parts = put_parts(&store, &upload, &bytes).await;
    let mut wrong = parts.clone();
    wrong[1].md5 = Md5Digest::of(b"");
    let mut swapped = parts.clone();
    swapped.swap(0, 1);
    for (listed, reason) in [
        (vec![], "0 are listed and 2 are expected"),
        (parts[..1].to_vec(), "1 are listed and 2 are expected"),
        (swapped, "part 2 stands where part 1 belongs"),
        (wrong, "part 2 is listed as d41d8cd98f00b204e9800998ecf8427e and is"),
    ] {
        let error = store.complete(upload.blob_id, &listed).await.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    store.complete(upload.blob_id, &parts).await.unwrap();
}

#[tokio::test]
async fn limits_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let large = BlobDeclaration {
        content_length: 1_000_001,
        md5: None,
        sha256: None,
    };
    let error = store.create(large).await.unwrap_err();
    assert!(matches!(
        error,
        CreateError::TooLarge {
            declared: 1_000_001,
            limit: 1_000_000
        }
    ));
    for _ in 0..LIMITS.max_open_uploads {
        store.create(declare(b"x")).await.unwrap();
    }
    let error = store.create(declare(b"x")).await.unwrap_err();
    assert_eq!(
        (error.kind(), matches!(error, CreateError::TooManyOpen { limit: 4 })),
        (ErrorKind::Exhausted, true)
    );
    // They are counted again after a restart, and a sweep makes room.
    let store = open(root.path()).await;
    store.create(declare(b"x")).await.unwrap_err();
    assert_eq!(
        store.sweep(Duration::from_mins(1)).await.unwrap(),
        SweepReport::default()
    );
    let report = store.sweep(Duration::ZERO).await.unwrap();
    assert_eq!(
        report,
        SweepReport {
            expired: 4,
            ..SweepReport::default()
        }
    );
    store.create(declare(b"x")).await.unwrap();
    let id = store.put_bytes(Bytes::from_static(b"12345")).await.unwrap();
    let error = store.read_all(id, 4).await.unwrap_err();
    assert!(matches!(
        error,
        ReadError::TooLarge {
            length: 5,
            limit: 4,
            ..
        }
    ));
}

#[tokio::test]
async fn unknown_uploads_are_named() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let id = BlobId::generate();
    for error in [
        store.put_whole(id, None, &mut body(b"x")).await.unwrap_err(),
        store.put_part(id, 1, &mut body(b"x")).await.unwrap_err(),
        store.complete(id, &[]).await.unwrap_err(),
    ] {
        assert!(matches!(error, UploadError::UnknownUpload { blob_id } if blob_id == id));
    }
}

#[tokio::test]
async fn any_range_can_be_read() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path()).await;
    let bytes = content(700_000);
    let id = store.put_bytes(bytes.clone().into()).await.unwrap();
    for range in [0..0, 0..1, 0..700_000, 699_999..700_000, 300_000..300_001, 100..600_000] {
        let read: Vec<Bytes> = store
            .read(id, range.clone())
            .await
            .unwrap()
            .try_collect()
            .await
            .unwrap();
        assert!(
            read.concat() == bytes[range.start as usize..range.end as usize],
            "{range:?}"
        );
        assert!(read.iter().all(|chunk| chunk.len() <= 256 * 1024));
    }
    store.delete(id).await.unwrap();
    store.delete(id).await.unwrap();
    assert!(matches!(
        store.read(id, 0..1).await.map(drop),
        Err(ReadError::NotFound { .. })
    ));
    assert!(matches!(store.read_all(id, 1).await, Err(ReadError::NotFound { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// However a body is cut into chunks and parts, and in whatever order parts arrive, the blob is the
    /// body; on a local disk and on an object store.
    #[test]
    fn any_cut_gives_the_same_blob(
        bytes in prop::collection::vec(any::<u8>(), 0..6_000),
        part_bytes in 1u64..3_000,
        chunk_lengths in prop::collection::vec(1usize..700, 1..8),
        order in any::<u64>(),
        local in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let info: BlobInfo = runtime.block_on(async {
            let root = tempfile::tempdir().unwrap();
            let blobs: Arc<dyn Blobs> = if local {
                Arc::new(LocalBlobs::open(root.path().join("kept")).await.unwrap())
            } else {
                Arc::new(ObjectBlobs::new(Arc::new(InMemory::new())))
            };
            let staging = Staging::open(root.path().join("staging")).await.unwrap();
            let limits = UploadLimits { part_bytes, ..LIMITS };
            let store = BlobStore::open(blobs, staging, limits).await.unwrap();
            let upload = store.create(declare(&bytes)).await.unwrap();
            let mut numbers: Vec<u32> = (1..=upload.part_count).collect();
            let rotation = (order % numbers.len() as u64) as usize;
            numbers.rotate_left(rotation);
            if order % 2 == 0 {
                numbers.reverse();
            }
            let mut parts = Vec::new();
            for number in numbers {
                let start = (u64::from(number - 1) * upload.part_length) as usize;
                let mut part = &bytes[start..bytes.len().min(start + upload.part_length as usize)];
                let mut chunks = Vec::new();
                for length in chunk_lengths.iter().cycle() {
                    if part.is_empty() {
                        break;
                    }
                    let (chunk, rest) = part.split_at(part.len().min(*length));
                    chunks.push(Ok(Bytes::copy_from_slice(chunk)));
                    part = rest;
                }
                let receipt = store.put_part(upload.blob_id, number, &mut stream::iter(chunks)).await.unwrap();
                parts.push(CompletedPart { number, md5: receipt.md5 });
            }
            parts.sort_by_key(|part| part.number);
            let info = store.complete(upload.blob_id, &parts).await.unwrap();
            assert!(store.read_all(upload.blob_id, 6_000).await.unwrap() == bytes);
            info
        });
        prop_assert_eq!(info.sha256, ContentHash::of(&bytes));
        prop_assert_eq!(info.length, bytes.len() as u64);
    }
}
