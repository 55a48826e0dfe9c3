//! `POST /_ionian/v1/web-ready`: a container's web hook says where it serves.
//!
//! It comes before the container's first poll, which is what makes the container ready. A hook that
//! gets anything but 200 closes its socket and leaves the official data channel alone.

use axum::Json;
use axum::extract::State;
use http::{HeaderMap, StatusCode};
use ionian_control::Control;
use ionian_domain::web::AnnouncedEndpoint;
use serde::Deserialize;

/// A class has at most some dozens of web methods.
const MAX_ENDPOINTS: usize = 1_000;

#[derive(Debug, Deserialize)]
pub(crate) struct Announcement {
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    method: Option<String>,
    port: u16,
}

pub(crate) async fn web_ready(
    State(control): State<Control>,
    headers: HeaderMap,
    Json(announcement): Json<Announcement>,
) -> (StatusCode, &'static str) {
    let credential = headers
        .get(ionian_control::dispatch::CREDENTIAL_HEADER)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let Some(entry) = control.containers().authenticate(credential) else {
        return (StatusCode::UNAUTHORIZED, "the container's credential is not valid");
    };
    if announcement.endpoints.len() > MAX_ENDPOINTS {
        return (StatusCode::BAD_REQUEST, "too many endpoints");
    }
    let endpoints = announcement
        .endpoints
        .into_iter()
        .map(|endpoint| AnnouncedEndpoint {
            method: endpoint.method,
            port: endpoint.port,
        })
        .collect();
    control.announce(&entry, endpoints);
    (StatusCode::OK, "ok")
}
