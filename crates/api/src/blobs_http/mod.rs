//! Blob transfer over HTTP: what stands behind the signed URLs that blob RPCs hand out.
//!
//! | Request | Answer |
//! |---|---|
//! | `PUT /_blobs/v1/put/<id>/0` | 200, `ETag` = MD5 of the body |
//! | `PUT /_blobs/v1/part/<id>/<n>` | 200, `ETag` = MD5 of the body |
//! | `POST /_blobs/v1/complete/<id>/0` with S3's XML | 200, XML with the blob's `ETag` |
//! | `GET` or `HEAD /_blobs/v1/get/<id>/0` | 200 or 206 |
//!
//! The forms are S3's, since that is what the clients speak. A URL is all the permission that is needed;
//! it is checked before anything else. Refusals are a status and one sentence in plain text, which the
//! clients show to their users.
//!
//! Bodies stream in both directions. A chunked body is as good as one with a length: the declaration of
//! the upload says how much must come, so there is no 411. The listener and its connections belong to
//! the server, which mounts [`router`].

mod completion;
mod range;
mod refusal;
mod upload_body;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use futures_util::TryStreamExt;
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, Method, StatusCode};
use ionian_blobs::{BlobStore, BodyReceipt, Capability, Md5Digest, UrlSigner};
use ionian_domain::{BlobId, Timestamp};
use serde::Deserialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use self::range::Requested;
use self::refusal::Refusal;
use self::upload_body::UploadBody;

/// Uploads at once. Each holds up to a megabyte, and this many keep any disk busy; the next client is told
/// to come back, which all of them do.
const MAX_CONCURRENT_UPLOADS: usize = 256;
/// A sender that is silent for this long is cut off. Clients that live send their next chunk within
/// seconds, and repeat a part that was cut.
const UPLOAD_IDLE_LIMIT: Duration = Duration::from_secs(30);
/// A completion lists a hundred bytes for each of at most 128 parts.
const MAX_COMPLETION_BYTES: usize = 256 * 1024;

const CONTENT_MD5: HeaderName = HeaderName::from_static("content-md5");

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct BlobsHttp {
    blobs: BlobStore,
    signer: UrlSigner,
    uploads: Arc<Semaphore>,
    upload_idle_limit: Duration,
}

impl BlobsHttp {
    pub fn new(blobs: BlobStore, signer: UrlSigner) -> Self {
        let uploads = Arc::new(Semaphore::new(MAX_CONCURRENT_UPLOADS));
        Self {
            blobs,
            signer,
            uploads,
            upload_idle_limit: UPLOAD_IDLE_LIMIT,
        }
    }

    fn authorize(&self, capability: Capability, url: &Signature) -> Result<(), Refusal> {
        let verified = self
            .signer
            .verify_capability(capability, &url.expires, &url.signature, Timestamp::now());
        verified.map_err(Refusal::forbidden)
    }

    fn upload_permit(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        self.uploads
            .try_acquire()
            .map_err(|_| Refusal::overloaded(MAX_CONCURRENT_UPLOADS))
    }

    fn upload_body(&self, body: Body) -> UploadBody {
        UploadBody::new(body, self.upload_idle_limit)
    }
}

pub fn router(state: BlobsHttp) -> Router {
    Router::new()
        .route("/_blobs/v1/put/{blob_id}/0", put(put_whole))
        .route("/_blobs/v1/part/{blob_id}/{part}", put(put_part))
        .route("/_blobs/v1/complete/{blob_id}/0", post(complete))
        .route("/_blobs/v1/get/{blob_id}/0", get(download))
        .with_state(state)
}

/// The query of a signed URL. A missing field reads as empty, and so as a forgery.
#[derive(Deserialize)]
struct Signature {
    #[serde(default)]
    expires: String,
    #[serde(default)]
    signature: String,
}

async fn put_whole(
    State(state): State<BlobsHttp>,
    Path(blob_id): Path<String>,
    Query(url): Query<Signature>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let mut body = state.upload_body(body);
    let received = async {
        let blob_id = blob_id_of(&blob_id)?;
        state.authorize(Capability::PutWhole { blob_id }, &url)?;
        let _permit = state.upload_permit()?;
        let content_md5 = content_md5_of(&headers)?;
        state
            .blobs
            .put_whole(blob_id, content_md5, &mut body)
            .await
            .map_err(Refusal::put)
    }
    .await;
    answer_put(received, body).await
}

async fn put_part(
    State(state): State<BlobsHttp>,
    Path((blob_id, part)): Path<(String, String)>,
    Query(url): Query<Signature>,
    body: Body,
) -> Response {
    let mut body = state.upload_body(body);
    let received = async {
        let blob_id = blob_id_of(&blob_id)?;
        let part: u32 = part.parse().map_err(|_| Refusal::no_such_url())?;
        state.authorize(Capability::PutPart { blob_id, part }, &url)?;
        let _permit = state.upload_permit()?;
        state
            .blobs
            .put_part(blob_id, part, &mut body)
            .await
            .map_err(Refusal::put)
    }
    .await;
    answer_put(received, body).await
}

async fn answer_put(received: Result<BodyReceipt, Refusal>, body: UploadBody) -> Response {
    match received {
        Ok(receipt) => [(ETAG, quoted(&receipt.md5.to_string()))].into_response(),
        Err(refusal) => {
            // Many clients read an answer only after they have sent everything.
            body.drain().await;
            refusal.into_response()
        }
    }
}

async fn complete(
    State(state): State<BlobsHttp>,
    Path(blob_id): Path<String>,
    Query(url): Query<Signature>,
    body: Body,
) -> Result<Response, Refusal> {
    let blob_id = blob_id_of(&blob_id)?;
    state.authorize(Capability::Complete { blob_id }, &url)?;
    let request = state.upload_body(body).read_all(MAX_COMPLETION_BYTES).await?;
    let parts = completion::parse(&request).map_err(Refusal::bad_request)?;
    let info = state.blobs.complete(blob_id, &parts).await.map_err(Refusal::complete)?;
    Ok(([(CONTENT_TYPE, "application/xml")], completion::render(&info.etag)).into_response())
}

/// Serves `HEAD`, too: the same headers without the body.
async fn download(
    State(state): State<BlobsHttp>,
    Path(blob_id): Path<String>,
    Query(url): Query<Signature>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let blob_id = blob_id_of(&blob_id)?;
    state.authorize(Capability::Get { blob_id }, &url)?;
    let info = state.blobs.info(blob_id).await.map_err(Refusal::read)?;
    let etag = quoted(&info.etag);
    let text_of = |name| {
        headers
            .get(name)
            .and_then(|value: &http::HeaderValue| value.to_str().ok())
    };
    let range = match text_of(IF_RANGE) {
        // What the client has a part of is not what is here.
        Some(wanted) if wanted != etag => None,
        _ => text_of(RANGE),
    };
    let (status, span) = match range::parse(range, info.length) {
        Requested::All => (StatusCode::OK, 0..info.length),
        Requested::Span(span) => (StatusCode::PARTIAL_CONTENT, span),
        Requested::Unsatisfiable => return Err(Refusal::unsatisfiable_range(info.length)),
    };
    let mut response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/octet-stream")
        // The bytes are a user's and share their origin with the dashboard: no browser may guess a type.
        .header(X_CONTENT_TYPE_OPTIONS, "nosniff")
        .header(CACHE_CONTROL, "private")
        .header(ACCEPT_RANGES, "bytes")
        .header(ETAG, etag)
        .header(CONTENT_LENGTH, span.end - span.start);
    if status == StatusCode::PARTIAL_CONTENT {
        let content_range = format!("bytes {}-{}/{}", span.start, span.end - 1, info.length);
        response = response.header(CONTENT_RANGE, content_range);
    }
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        let chunks = state.blobs.read(blob_id, span).await.map_err(Refusal::read)?;
        // The status is out by then; the client sees a body that is too short.
        Body::from_stream(chunks.inspect_err(move |error| {
            tracing::error!(%blob_id, error = error as &dyn std::error::Error, "failed to send a blob");
        }))
    };
    response.body(body).map_err(Refusal::internal)
}

fn blob_id_of(text: &str) -> Result<BlobId, Refusal> {
    text.parse().map_err(|_| Refusal::no_such_url())
}

fn content_md5_of(headers: &HeaderMap) -> Result<Option<Md5Digest>, Refusal> {
    let Some(value) = headers.get(CONTENT_MD5) else {
        return Ok(None);
    };
    let md5 = value.to_str().ok().and_then(|text| Md5Digest::from_base64(text).ok());
    md5.map(Some)
        .ok_or_else(|| Refusal::bad_request("the Content-MD5 header is not an MD5 in base64".to_owned()))
}

fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}
