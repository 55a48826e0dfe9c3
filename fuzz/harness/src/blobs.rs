//! The platform's own HTTP: blobs behind signed URLs, and announcements of web hooks.
//!
//! An input is a list of requests: a byte that chooses the kind, a blob or a part, headers, a body. URLs are signed as
//! the platform would; one kind has a path and a query of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::OnceLock;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request};
use http_body_util::BodyExt;
use ionian_blobs::{BlobDeclaration, Capability, ContentHash, Md5Digest};
use ionian_domain::{BlobId, Timestamp};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::bytes_in::BytesIn;
use crate::logs;
use crate::platform::{PATIENCE, Platform};

const MAX_REQUESTS: usize = 12;
/// More is sent by no input.
const MAX_ANSWER_BYTES: usize = 1 << 20;

pub fn run(data: &[u8]) {
    static STATE: OnceLock<Mutex<(Runtime, Option<Platform>)>> = OnceLock::new();
    logs::forbid_errors();
    let state = STATE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Mutex::new((runtime, None))
    });
    let mut state = state.lock();
    let (runtime, platform) = &mut *state;
    runtime.block_on(async {
        let mut current = match platform.take() {
            Some(current) => current,
            None => Platform::start().await,
        };
        let router = ionian_api::http_router(&current.control, &current.signer);
        let mut blobs: BTreeMap<u8, BlobId> = BTreeMap::new();
        let mut input = BytesIn(data);
        for _ in 0..MAX_REQUESTS {
            if input.is_empty() {
                break;
            }
            request(&current, &router, &mut input, &mut blobs).await;
        }
        let healthz = Request::get("/healthz").body(Body::empty()).unwrap();
        let answer = tokio::time::timeout(PATIENCE, router.oneshot(healthz)).await;
        assert_eq!(answer.expect("the router answers no more").unwrap().status(), 200);
        if current.is_used_up() {
            current.stop().await;
        } else {
            *platform = Some(current);
        }
    });
}

async fn request(platform: &Platform, router: &Router, input: &mut BytesIn<'_>, blobs: &mut BTreeMap<u8, BlobId>) {
    let kind = input.byte();
    let which = input.byte();
    let (blob, part) = (which & 3, u32::from(which >> 2));
    if kind.is_multiple_of(8) {
        // What BlobCreate does, with a declaration that is true or not.
        let content = input.short();
        let repeated = u64::from(input.byte()) + 1;
        let declaration = BlobDeclaration {
            content_length: content.len() as u64 * repeated,
            md5: Some(Md5Digest::of(content)),
            sha256: (which & 4 == 0).then(|| ContentHash(Sha256::digest(content).into())),
        };
        if let Ok(upload) = platform.control.blobs().create(declaration).await {
            blobs.insert(blob, upload.blob_id);
        }
        return;
    }
    let blob_id = blobs
        .get(&blob)
        .copied()
        .unwrap_or_else(|| BlobId::from_digest(&[blob; 32]));
    let expires = Timestamp::now() + Duration::from_mins(1);
    let signed = |capability| platform.signer.url("", capability, expires);
    let (method, path) = match kind % 8 {
        1 => (Method::PUT, signed(Capability::PutWhole { blob_id })),
        2 => (Method::PUT, signed(Capability::PutPart { blob_id, part })),
        3 => (Method::POST, signed(Capability::Complete { blob_id })),
        4 => (Method::GET, signed(Capability::Get { blob_id })),
        5 => (Method::HEAD, signed(Capability::Get { blob_id })),
        6 => (Method::POST, "/_ionian/v1/web-ready".to_owned()),
        _ => {
            let method = Method::from_bytes(input.short()).unwrap_or(Method::PUT);
            (method, String::from_utf8_lossy(input.short()).into_owned())
        }
    };
    let mut request = Request::builder().method(method).uri(path);
    if kind & 0x80 != 0 {
        let credential = &platform.credentials[usize::from(which) % platform.credentials.len()];
        request = request
            .header("x-ionian-container", credential)
            .header("content-type", "application/json");
    }
    for (flag, name) in [(0x40, "range"), (0x20, "if-range"), (0x10, "content-md5")] {
        if kind & flag != 0 {
            request = request.header(name, input.short());
        }
    }
    let body = Bytes::copy_from_slice(input.long());
    let body = if kind & 0x08 == 0 {
        Body::from(body)
    } else {
        let cut = body.len() / 2;
        Body::from_stream(stream::iter(
            [body.slice(..cut), body.slice(cut..)].map(Ok::<_, Infallible>),
        ))
    };
    let Ok(request) = request.body(body) else { return };
    let exchange = async {
        let answer = router.clone().oneshot(request).await.unwrap();
        let status = answer.status();
        let declared = answer.headers().get("content-length").cloned();
        let body = answer.into_body().collect().await;
        (status, declared, body.map(http_body_util::Collected::to_bytes))
    };
    let (status, declared, body) = tokio::time::timeout(PATIENCE, exchange)
        .await
        .expect("the request has no answer");
    assert!(status.as_u16() != 500, "{status}: {body:?}");
    let body = body.expect("the body breaks off");
    assert!(body.len() <= MAX_ANSWER_BYTES);
    if let Some(declared) = declared.filter(|_| kind % 8 == 4) {
        assert_eq!(
            declared.to_str().unwrap(),
            body.len().to_string(),
            "the answer has another length"
        );
    }
}
