//! gRPC in, domain out: the service that the official clients and the official runtime speak to.
//!
//! [`Api::call`] answers gRPC requests; [`http_router`] the HTTP requests of the platform itself (blob
//! transfer, announcements of web hooks). A [`WorkerGateway`] takes workers in that are processes of their own.
//! The listener and its connections belong to `ingress`.

#![allow(
    clippy::unused_async,
    reason = "handlers have one shape, whether or not they wait for something"
)]

mod arguments;
pub mod blobs_http;
mod client;
mod container;
mod context;
mod coverage;
mod decode;
mod encode;
mod reach;
mod request_body;
mod service;
mod status;
mod worker;

use axum::Router;
use axum::routing::{get, post};
use ionian_blobs::UrlSigner;
use ionian_control::Control;

pub use arguments::encode as encode_container_arguments;
pub use service::{Api, MAX_MESSAGE_BYTES};
pub use worker::{JoinTokens, RemoteBuilds, WorkerGateway, WorkerHost, WorkerTimes};

/// An announcement names a class's web methods; nothing else is sent to these paths.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// The platform's own HTTP paths: `/_blobs/…`, `/_ionian/…` and `/healthz`.
pub fn http_router(control: &Control, signer: &UrlSigner) -> Router {
    let announce = Router::new()
        .route("/_ionian/v1/web-ready", post(container::announce::web_ready))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(control.clone());
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .merge(announce)
        .merge(blobs_http::router(blobs_http::BlobsHttp::new(
            control.blobs().clone(),
            signer.clone(),
        )))
}
