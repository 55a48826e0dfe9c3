//! Blob URLs from the outside: requests as the clients make them, and as they should not.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_RANGE, RANGE, RETRY_AFTER};
use http_body_util::BodyExt;
use ionian_blobs::{
    BlobDeclaration, BlobStore, ContentHash, LocalBlobs, Md5Digest, Staging, UploadLimits, UploadPlan, UrlSigner,
    open_local,
};
use ionian_domain::{BlobId, Timestamp};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

use super::*;

/// URLs in these tests are paths: requests reach the router directly.
const BASE: &str = "";

struct Platform {
    root: TempDir,
    blobs: BlobStore,
    signer: UrlSigner,
    http: BlobsHttp,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn header(&self, name: HeaderName) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

async fn platform() -> Platform {
    let root = tempfile::tempdir().unwrap();
    let kept = LocalBlobs::open(root.path().join("kept")).await.unwrap();
    let staging = Staging::open(root.path().join("staging")).await.unwrap();
    let limits = UploadLimits {
        part_bytes: 1000,
        ..UploadLimits::default()
    };
    let blobs = BlobStore::open(Arc::new(kept), staging, limits).await.unwrap();
    let signer = UrlSigner::new([42; 32]);
    let http = BlobsHttp::new(blobs.clone(), signer.clone());
    Platform {
        root,
        blobs,
        signer,
        http,
    }
}

impl Platform {
    async fn plan(&self, bytes: &[u8]) -> UploadPlan {
        self.plan_of(BlobDeclaration {
            content_length: bytes.len() as u64,
            md5: Some(Md5Digest::of(bytes)),
            sha256: Some(ContentHash::of(bytes)),
        })
        .await
    }

    async fn plan_of(&self, declaration: BlobDeclaration) -> UploadPlan {
        let upload = self.blobs.create(declaration).await.unwrap();
        self.signer
            .upload_plan(BASE, &upload, Timestamp::now() + Duration::from_mins(1))
    }

    fn download_url(&self, id: BlobId) -> String {
        self.signer
            .download_url(BASE, id, Timestamp::now() + Duration::from_mins(1))
    }

    async fn send(&self, request: Request<Body>) -> Answer {
        let response = router(self.http.clone()).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    async fn request(&self, method: &str, url: &str, body: impl Into<Body>) -> Answer {
        self.send(Request::builder().method(method).uri(url).body(body.into()).unwrap())
            .await
    }

    async fn put(&self, url: &str, body: &[u8]) -> Answer {
        self.request("PUT", url, Body::from(Bytes::copy_from_slice(body))).await
    }

    async fn exists(&self, id: BlobId) -> bool {
        self.blobs.info(id).await.is_ok()
    }

    fn temporary_files(&self) -> usize {
        std::fs::read_dir(self.root.path().join("staging/temporary"))
            .unwrap()
            .count()
    }

    /// Serves on a real socket, for what only a connection can do.
    async fn listen(&self) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = router(self.http.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 % 253) as u8).collect()
}

/// The body that the Python client sends to complete an upload.
fn completion(etags: &[String]) -> String {
    let mut lines = vec!["<CompleteMultipartUpload>".to_owned()];
    for (number, etag) in (1..).zip(etags) {
        lines.push(format!(
            "<Part>\n<PartNumber>{number}</PartNumber>\n<ETag>{etag}</ETag>\n</Part>"
        ));
    }
    lines.push("</CompleteMultipartUpload>".to_owned());
    lines.join("\n")
}

async fn put_parts(platform: &Platform, plan: &UploadPlan, bytes: &[u8]) -> Vec<String> {
    let mut etags = Vec::new();
    for (url, part) in plan.part_urls.iter().zip(bytes.chunks(plan.part_length as usize)) {
        let answer = platform.put(url, part).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header(ETAG), format!("\"{}\"", Md5Digest::of(part)));
        etags.push(answer.header(ETAG).to_owned());
    }
    etags
}

#[tokio::test]
async fn the_python_client_uploads_in_parts() {
    let platform = platform().await;
    let bytes = content(2500);
    let plan = platform.plan(&bytes).await;
    assert_eq!((plan.part_urls.len(), plan.part_length), (3, 1000));
    let etags = put_parts(&platform, &plan, &bytes).await;
    let answer = platform.request("POST", &plan.completion_url, completion(&etags)).await;
    assert_eq!(answer.status, StatusCode::OK);
    let joined: Vec<u8> = bytes.chunks(1000).flat_map(|part| Md5Digest::of(part).0).collect();
    assert!(
        answer.text().contains(&format!("{}-3", Md5Digest::of(&joined))),
        "{}",
        answer.text()
    );
    let answer = platform.request("GET", &platform.download_url(plan.blob_id), "").await;
    assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &bytes[..]));
    assert_eq!(answer.header(CONTENT_LENGTH), "2500");
    assert_eq!(answer.header(X_CONTENT_TYPE_OPTIONS), "nosniff");
}

#[tokio::test]
async fn the_npm_client_uploads_with_one_put() {
    let platform = platform().await;
    let bytes = content(2500);
    let plan = platform.plan(&bytes).await;
    let answer = platform.put(&plan.single_put_url, &bytes).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header(ETAG), format!("\"{}\"", Md5Digest::of(&bytes)));
    // Its answer was lost, and it repeats the request.
    let again = platform.put(&plan.single_put_url, &bytes).await;
    assert_eq!(
        (again.status, again.header(ETAG)),
        (StatusCode::OK, answer.header(ETAG))
    );
    assert_eq!(platform.blobs.read_all(plan.blob_id, 2500).await.unwrap(), bytes);
}

#[tokio::test]
async fn a_changed_file_is_recognised_by_the_client() {
    let platform = platform().await;
    let plan = platform.plan(&content(2500)).await;
    let mut changed = content(2500);
    changed[2000] ^= 1;
    let answer = platform.put(&plan.single_put_url, &changed).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(
        answer.text().contains("wrong checksum: the declared MD5 is"),
        "{}",
        answer.text()
    );
    assert!(
        answer
            .text()
            .contains("The Content-MD5 you specified did not match what we received.")
    );
    // In parts it shows at the end.
    let etags = put_parts(&platform, &plan, &changed).await;
    let answer = platform.request("POST", &plan.completion_url, completion(&etags)).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(
        answer.text().starts_with("wrong checksum: the declared SHA-256 is"),
        "{}",
        answer.text()
    );
    assert!(!platform.exists(plan.blob_id).await);
    assert_eq!(platform.temporary_files(), 0);
}

#[tokio::test]
async fn the_content_md5_header_counts() {
    let platform = platform().await;
    let plan = platform
        .plan_of(BlobDeclaration {
            content_length: 5,
            md5: None,
            sha256: None,
        })
        .await;
    let put = |md5: &'static str| {
        Request::builder()
            .method("PUT")
            .uri(&plan.single_put_url)
            .header(CONTENT_MD5, md5)
            .body("hello".into())
            .unwrap()
    };
    let answer = platform.send(put("1B2M2Y8AsgTpgAmY7PhCfg==")).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.text().contains(refusal::CHECKSUM_SENTENCE));
    assert_eq!(platform.send(put("nonsense")).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(
        platform.send(put("XUFAKrxLKna5cZ2REBfFkg==")).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn forged_and_expired_urls_permit_nothing() {
    let platform = platform().await;
    let bytes = content(10);
    let plan = platform.plan(&bytes).await;
    let expired = platform
        .blobs
        .create(BlobDeclaration {
            content_length: 10,
            md5: None,
            sha256: None,
        })
        .await
        .unwrap();
    let expired = platform
        .signer
        .upload_plan(BASE, &expired, Timestamp::now() - Duration::from_secs(1));
    let stranger = UrlSigner::new([43; 32]);
    let forged = stranger.download_url(BASE, plan.blob_id, Timestamp::now() + Duration::from_mins(1));
    let unsigned = plan.single_put_url.split('?').next().unwrap();
    // A permission to upload is none to read, and one part's URL is not another's.
    let swapped = plan.single_put_url.replace("/put/", "/get/");
    let other_part = plan.part_urls[0].replace("/1?", "/2?");
    for (method, url, sentence) in [
        ("GET", forged.as_str(), "the URL's signature is missing or wrong\n"),
        ("GET", &swapped, "the URL's signature is missing or wrong\n"),
        ("PUT", unsigned, "the URL's signature is missing or wrong\n"),
        ("PUT", &other_part, "the URL's signature is missing or wrong\n"),
        (
            "PUT",
            &expired.single_put_url,
            "the URL has expired; ask for a new one\n",
        ),
        ("PUT", &expired.part_urls[0], "the URL has expired; ask for a new one\n"),
        (
            "POST",
            &expired.completion_url,
            "the URL has expired; ask for a new one\n",
        ),
    ] {
        let answer = platform.request(method, url, Body::from(bytes.clone())).await;
        assert_eq!(
            (answer.status, answer.text()),
            (StatusCode::FORBIDDEN, sentence),
            "{method} {url}"
        );
    }
    assert!(!platform.exists(plan.blob_id).await && !platform.exists(expired.blob_id).await);
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let platform = platform().await;
    let answer = platform
        .request("GET", &platform.download_url(BlobId::generate()), "")
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert!(answer.text().starts_with("there is no blob bl-"), "{}", answer.text());
    let plan = platform.plan(b"x").await;
    assert_eq!(
        platform
            .request("GET", &platform.download_url(plan.blob_id), "")
            .await
            .status,
        StatusCode::NOT_FOUND
    );
    platform.blobs.sweep(Duration::ZERO).await.unwrap();
    let answer = platform.put(&plan.single_put_url, b"x").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert!(
        answer
            .text()
            .contains("it expired or never existed; create the blob again"),
        "{}",
        answer.text()
    );
    for path in [
        "/_blobs/v1/get/nonsense/0",
        "/_blobs/v1/get/../0",
        "/_blobs/v2/get/x/0",
        "/_blobs/v1/part/x/y",
    ] {
        let answer = platform.request("GET", path, "").await;
        assert!(
            answer.status == StatusCode::NOT_FOUND || answer.status == StatusCode::METHOD_NOT_ALLOWED,
            "{path}"
        );
    }
}

#[tokio::test]
async fn lengths_are_checked() {
    let platform = platform().await;
    let bytes = content(1500);
    let plan = platform.plan(&bytes).await;
    let answer = platform.put(&plan.single_put_url, &bytes[..1499]).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(
        answer.text(),
        "the upload was truncated: 1499 of 1500 bytes arrived; nothing was stored\n"
    );
    let answer = platform.put(&plan.single_put_url, &content(1501)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let answer = platform.put(&plan.part_urls[1], &bytes[..501]).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let huge = " ".repeat(MAX_COMPLETION_BYTES + 1);
    let answer = platform.request("POST", &plan.completion_url, huge).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    // Without a length, in chunks of any size, is fine.
    let chunks: Vec<_> = bytes
        .chunks(77)
        .map(|chunk| Ok::<_, std::io::Error>(Bytes::copy_from_slice(chunk)))
        .collect();
    let answer = platform
        .request("PUT", &plan.single_put_url, Body::from_stream(stream::iter(chunks)))
        .await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn incomplete_and_unreadable_completions_are_explained() {
    let platform = platform().await;
    let bytes = content(1500);
    let plan = platform.plan(&bytes).await;
    platform.put(&plan.part_urls[0], &bytes[..1000]).await;
    let etag = |bytes| format!("\"{}\"", Md5Digest::of(bytes));
    for (body, sentence) in [
        (
            String::new(),
            "the completion is not a CompleteMultipartUpload document",
        ),
        (
            completion(&["\"x\"".to_owned()]),
            "the ETag of part 1 is not one that we gave out",
        ),
        (
            completion(&[etag(&bytes[..1000]), etag(&bytes[1000..])]),
            "part 2 of blob bl-",
        ),
    ] {
        let answer = platform.request("POST", &plan.completion_url, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(answer.text().starts_with(sentence), "{}", answer.text());
    }
    platform.put(&plan.part_urls[1], &bytes[1000..]).await;
    let answer = platform
        .request("POST", &plan.completion_url, completion(&[etag(&bytes[..1000])]))
        .await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(
        answer.text().contains("1 are listed and 2 are expected"),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_completion_that_is_too_long_is_refused() {
    let platform = platform().await;
    let plan = platform.plan(&content(1500)).await;
    let answer = platform
        .request("POST", &plan.completion_url, "x".repeat(256 * 1024 + 1))
        .await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn ranges_and_heads() {
    let platform = platform().await;
    let bytes = content(5000);
    let id = platform.blobs.put_bytes(bytes.clone().into()).await.unwrap();
    let url = platform.download_url(id);
    let etag = format!("\"{}\"", Md5Digest::of(&bytes));
    let get = |method: &str, headers: &[(HeaderName, &str)]| {
        let mut request = Request::builder().method(method).uri(&url);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        platform.send(request.body(Body::empty()).unwrap())
    };
    let head = get("HEAD", &[]).await;
    assert_eq!(
        (head.status, head.header(CONTENT_LENGTH), head.header(ETAG)),
        (StatusCode::OK, "5000", etag.as_str())
    );
    assert!(head.body.is_empty());
    let part = get("GET", &[(RANGE, "bytes=1000-1999")]).await;
    assert_eq!(
        (part.status, &part.body[..]),
        (StatusCode::PARTIAL_CONTENT, &bytes[1000..2000])
    );
    assert_eq!(
        (part.header(CONTENT_RANGE), part.header(CONTENT_LENGTH)),
        ("bytes 1000-1999/5000", "1000")
    );
    let part = get("GET", &[(RANGE, "bytes=-1"), (IF_RANGE, &etag)]).await;
    assert_eq!(
        (part.status, &part.body[..]),
        (StatusCode::PARTIAL_CONTENT, &bytes[4999..])
    );
    let all = get("GET", &[(RANGE, "bytes=-1"), (IF_RANGE, "\"older\"")]).await;
    assert_eq!((all.status, all.body.len()), (StatusCode::OK, 5000));
    let outside = get("GET", &[(RANGE, "bytes=5000-")]).await;
    assert_eq!(
        (outside.status, outside.header(CONTENT_RANGE)),
        (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */5000")
    );
}

#[tokio::test]
async fn a_connection_that_dies_in_the_middle_stores_nothing() {
    let platform = platform().await;
    let bytes = content(900);
    let plan = platform.plan(&bytes).await;
    let address = platform.listen().await;
    for url in [&plan.single_put_url, &plan.part_urls[0]] {
        let mut connection = TcpStream::connect(address).await.unwrap();
        let head = format!("PUT {url} HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n");
        connection.write_all(head.as_bytes()).await.unwrap();
        connection.write_all(&bytes[..800]).await.unwrap();
        connection.shutdown().await.unwrap();
        // The server is done with it when it closes its side, too.
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        assert!(!answer.contains("200 OK"), "{answer}");
    }
    assert!(!platform.exists(plan.blob_id).await);
    let etag = format!("\"{}\"", Md5Digest::of(&bytes));
    let answer = platform
        .request("POST", &plan.completion_url, completion(&[etag]))
        .await;
    assert!(answer.text().contains("has not arrived"), "{}", answer.text());
    assert_eq!(platform.temporary_files(), 0);
}

#[tokio::test]
async fn a_silent_sender_is_cut_off() {
    let mut platform = platform().await;
    platform.http.upload_idle_limit = Duration::from_millis(50);
    let plan = platform.plan(&content(900)).await;
    for url in [&plan.single_put_url, &plan.part_urls[0]] {
        let silent = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"first"))]).chain(stream::pending());
        let answer = platform.request("PUT", url, Body::from_stream(silent)).await;
        assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
        assert!(
            answer.text().contains("broke off after 5 of 900 bytes"),
            "{}",
            answer.text()
        );
    }
    assert!(!platform.exists(plan.blob_id).await);
}

#[tokio::test]
async fn a_refused_client_can_finish_sending_before_it_reads() {
    let platform = platform().await;
    let address = platform.listen().await;
    let bytes = vec![1; 4 * 1024 * 1024];
    let mut connection = TcpStream::connect(address).await.unwrap();
    let path = format!("/_blobs/v1/put/{}/0", BlobId::generate());
    let head = format!(
        "PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        bytes.len()
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    connection.write_all(&bytes).await.unwrap();
    let mut answer = [0; 12];
    connection.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 403");
}

#[tokio::test]
async fn too_many_uploads_are_asked_to_come_back() {
    let platform = platform().await;
    let plan = platform.plan(b"hello").await;
    let all = platform
        .http
        .uploads
        .clone()
        .acquire_many_owned(MAX_CONCURRENT_UPLOADS as u32)
        .await
        .unwrap();
    let answer = platform.put(&plan.part_urls[0], b"hello").await;
    assert_eq!(
        (answer.status, answer.header(RETRY_AFTER)),
        (StatusCode::SERVICE_UNAVAILABLE, "1")
    );
    drop(all);
    assert_eq!(platform.put(&plan.part_urls[0], b"hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_failing_disk_is_our_fault_and_keeps_its_paths_to_itself() {
    let platform = platform().await;
    let id = platform.blobs.put_bytes(Bytes::from_static(b"x")).await.unwrap();
    let shard = &id.suffix()[..2];
    std::fs::write(
        platform.root.path().join(format!("kept/blobs/{shard}/{id}.json")),
        b"{broken",
    )
    .unwrap();
    let answer = platform.request("GET", &platform.download_url(id), "").await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(!answer.text().contains("kept"), "{}", answer.text());
}

/// In its own process under `cargo nextest`; the other tests here need next to nothing.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn memory_does_not_grow_with_the_body() {
    const LENGTH: usize = 256 * 1024 * 1024;
    fn peak_memory_bytes() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    }
    let root = tempfile::tempdir().unwrap();
    let (_, blobs) = open_local(root.path()).await.unwrap();
    let signer = UrlSigner::new([1; 32]);
    let platform = Platform {
        root,
        http: BlobsHttp::new(blobs.clone(), signer.clone()),
        blobs,
        signer,
    };
    let declaration = BlobDeclaration {
        content_length: LENGTH as u64,
        md5: None,
        sha256: None,
    };
    let plan = platform.plan_of(declaration).await;
    let address = platform.listen().await;
    let before = peak_memory_bytes();

    let chunk = vec![7; 1024 * 1024];
    let mut connection = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "PUT {} HTTP/1.1\r\nhost: x\r\ncontent-length: {LENGTH}\r\n\r\n",
        plan.single_put_url
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..LENGTH / chunk.len() {
        connection.write_all(&chunk).await.unwrap();
    }
    let mut answer = [0; 15];
    connection.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");

    let mut connection = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "GET {} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        platform.download_url(plan.blob_id)
    );
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 1024 * 1024];
    let mut received = 0;
    loop {
        match connection.read(&mut buffer).await.unwrap() {
            0 => break,
            length => received += length,
        }
    }
    assert!(received > LENGTH, "{received} bytes with the head");

    let growth = peak_memory_bytes() - before;
    println!(
        "256 MiB up and down over HTTP: peak memory grew by {} KiB",
        growth / 1024
    );
    assert!(growth < 48 * 1024 * 1024, "peak memory grew by {growth} bytes");
}
