//! A blob of any size needs constant memory. Alone in its file, so that it is alone in its process.

#![allow(clippy::unwrap_used, reason = "what tests share may panic as they do")]
#![cfg(target_os = "linux")]

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use ionian_blobs::{BlobDeclaration, BodyError, CompletedPart, open_local};

const CHUNK_BYTES: usize = 256 * 1024;
const BLOB_BYTES: u64 = 256 * 1024 * 1024;
/// A few batches and the allocator's slack; an eighth of the blob.
const ALLOWED_GROWTH_BYTES: u64 = 32 * 1024 * 1024;

fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// A body that is made while it is read.
fn body(length: u64) -> impl futures_util::Stream<Item = Result<Bytes, BodyError>> + Unpin {
    stream::iter(0..length / CHUNK_BYTES as u64).map(|index| Ok(Bytes::from(vec![index as u8; CHUNK_BYTES])))
}

#[tokio::test]
async fn memory_does_not_grow_with_the_blob() {
    let root = tempfile::tempdir().unwrap();
    let (content, blobs) = open_local(root.path()).await.unwrap();
    let declaration = BlobDeclaration {
        content_length: BLOB_BYTES,
        md5: None,
        sha256: None,
    };
    let before = peak_memory_bytes();

    let upload = blobs.create(declaration).await.unwrap();
    assert_eq!(upload.part_count, 4);
    let mut parts = Vec::new();
    for number in 1..=upload.part_count {
        let receipt = blobs
            .put_part(upload.blob_id, number, &mut body(upload.part_length))
            .await
            .unwrap();
        parts.push(CompletedPart {
            number,
            md5: receipt.md5,
        });
    }
    let info = blobs.complete(upload.blob_id, &parts).await.unwrap();

    let whole = blobs.create(declaration).await.unwrap();
    blobs
        .put_whole(whole.blob_id, None, &mut body(BLOB_BYTES))
        .await
        .unwrap();

    content
        .put_from_blob(info.sha256, &blobs, upload.blob_id)
        .await
        .unwrap();
    let read = blobs.read(upload.blob_id, 0..BLOB_BYTES).await.unwrap();
    let length = read
        .fold(0, async |length, chunk| length + chunk.unwrap().len() as u64)
        .await;
    assert_eq!(length, BLOB_BYTES);

    let growth = peak_memory_bytes() - before;
    println!(
        "256 MiB by parts, by one PUT and read back: peak memory grew by {} KiB",
        growth / 1024
    );
    assert!(growth < ALLOWED_GROWTH_BYTES, "peak memory grew by {growth} bytes");
}
