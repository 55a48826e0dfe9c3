//! The one place that turns failures into responses.
//!
//! Every answer that the ingress makes itself is JSON with a code from this file, so that callers can
//! tell the platform's faults from the app's. What the app answers is never touched.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use ionian_domain::web::Route;
use rand::RngExt;

use crate::body::{BoxError, ResponseBody};

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What callers who find the waiting room full are told to wait. Containers start in about a second.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("2");

/// A caller's own request id is kept up to this length; longer ones would fill logs.
const MAX_REQUEST_ID: usize = 128;

/// Hosts and paths are echoed up to this many characters.
const MAX_ECHO: usize = 255;

/// Why a request has no answer from the app.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no web endpoint is deployed at '{host}'; hosts of this server begin with '{workspace}--'")]
    NoSuchEndpoint { host: String, workspace: String },
    #[error("there is nothing at '{path}' on this server; web endpoints have hosts of their own")]
    NotFound { path: String },
    #[error("{0}")]
    BadRequest(&'static str),
    #[error("this endpoint wants a proxy token: send its two halves as the headers Modal-Key and Modal-Secret")]
    ProxyAuthRequired,
    #[error("too many requests wait for this endpoint; try again in a moment")]
    Overloaded,
    #[error("no container of this endpoint became ready within {} s", .0.as_secs())]
    NoContainer(Duration),
    #[error("all containers of this endpoint stayed busy for {} s", .0.as_secs())]
    AllBusy(Duration),
    #[error("the app failed to start: {0}")]
    AppFailedToStart(String),
    #[error("the app could not be reached")]
    AppUnreachable(#[source] BoxError),
    #[error("the app's container ended before it answered")]
    ContainerGone,
    #[error("the connection to the app broke before it answered")]
    AppDisconnected(#[source] BoxError),
    #[error("the app raised an error before it answered; its log has the traceback")]
    AppFailed(#[source] BoxError),
    #[error("the app did not answer within its timeout of {} s", .0.as_secs())]
    Timeout(Duration),
    /// Nobody reads this one: the client's own upload broke.
    #[error("the request's body broke off")]
    ClientGone(#[source] BoxError),
}

impl Failure {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchEndpoint { .. } | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::BadRequest(_) | Self::ClientGone(_) => StatusCode::BAD_REQUEST,
            Self::ProxyAuthRequired => StatusCode::UNAUTHORIZED,
            Self::Overloaded | Self::AllBusy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoContainer(_) | Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::AppFailedToStart(_) | Self::AppFailed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::AppUnreachable(_) | Self::ContainerGone | Self::AppDisconnected(_) => StatusCode::BAD_GATEWAY,
        }
    }

    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NoSuchEndpoint { .. } => "no_such_endpoint",
            Self::NotFound { .. } => "not_found",
            Self::BadRequest(_) | Self::ClientGone(_) => "bad_request",
            Self::ProxyAuthRequired => "proxy_auth_required",
            Self::Overloaded | Self::AllBusy(_) => "overloaded",
            Self::NoContainer(_) => "no_container",
            Self::Timeout(_) => "timeout",
            Self::AppFailedToStart(_) => "app_failed_to_start",
            Self::AppFailed(_) => "app_error",
            Self::AppUnreachable(_) | Self::ContainerGone | Self::AppDisconnected(_) => "app_unreachable",
        }
    }
}

/// Names one request in answers, logs and the app.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(HeaderValue);

impl RequestId {
    /// The caller's own id where it is short and printable, else a new one.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        match headers.get(X_REQUEST_ID) {
            Some(value) if is_usable(value) => Self(value.clone()),
            Some(_) | None => Self::generate(),
        }
    }

    pub(crate) fn generate() -> Self {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        // 96 random bits: no two requests of one installation meet.
        let random: [u8; 12] = rand::rng().random();
        let mut text = [0_u8; 27];
        text[..3].copy_from_slice(b"rq-");
        for (i, byte) in random.iter().enumerate() {
            text[3 + 2 * i] = HEX[usize::from(byte >> 4)];
            text[4 + 2 * i] = HEX[usize::from(byte & 15)];
        }
        Self(HeaderValue::from_bytes(&text).expect("hex digits are a header value"))
    }

    pub(crate) fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    fn text(&self) -> &str {
        self.0.to_str().unwrap_or("-")
    }
}

fn is_usable(value: &HeaderValue) -> bool {
    !value.is_empty() && value.len() <= MAX_REQUEST_ID && value.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// Answers a failed request and writes its one log line.
pub(crate) fn failure(failure: &Failure, request_id: &RequestId, route: Option<&Route>) -> Response<ResponseBody> {
    log(failure, request_id, route);
    let status = failure.status();
    let json = serde_json::json!({
        "error": { "code": failure.code(), "message": failure.to_string(), "request_id": request_id.text() }
    });
    let mut response = Response::new(ResponseBody::whole(Bytes::from(json.to_string())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(X_REQUEST_ID, request_id.header());
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
    }
    response
}

/// Logs that a response which had begun could not be finished.
pub(crate) fn log_cut_body(request_id: &RequestId, route: &Route, reason: &(dyn Error + 'static)) {
    tracing::warn!(
        request_id = request_id.text(),
        function = %route.function_id,
        host = route.host_label,
        reason = chain(reason),
        "cut a response that had begun"
    );
}

fn log(failure: &Failure, request_id: &RequestId, route: Option<&Route>) {
    let request_id = request_id.text();
    let function = route.map(|route| tracing::field::display(route.function_id));
    let code = failure.code();
    let reason = chain(failure);
    if failure.status().is_server_error() {
        tracing::warn!(request_id, function, code, reason, "request failed");
    } else {
        tracing::info!(request_id, function, code, reason, "request refused");
    }
}

/// An error with everything that caused it.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Cuts what a caller sent to a length that fits an answer.
pub(crate) fn echo(text: &str) -> String {
    text.chars().take(MAX_ECHO).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_of_callers_are_kept_when_they_are_harmless() {
        let mut headers = HeaderMap::new();
        headers.insert(X_REQUEST_ID, HeaderValue::from_static("abc-1"));
        assert_eq!(RequestId::of(&headers).text(), "abc-1");
        headers.insert(X_REQUEST_ID, HeaderValue::from_str(&"x".repeat(200)).unwrap());
        assert_eq!(RequestId::of(&headers).text().len(), 27);
        headers.insert(X_REQUEST_ID, HeaderValue::from_static("two words"));
        assert!(RequestId::of(&headers).text().starts_with("rq-"));
    }

    #[test]
    fn sources_stay_in_the_log() {
        let failure = Failure::AppUnreachable("10.0.0.3:8000 refused".into());
        assert!(!failure.to_string().contains("10.0.0.3"));
        assert!(chain(&failure).contains("10.0.0.3"));
    }
}
