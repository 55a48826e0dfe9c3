//! The one place that turns errors into HTTP answers for blobs.

use std::error::Error;

use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, StatusCode};
use ionian_blobs::{BodyError, InvalidUrl, ReadError, StorageError, UploadError};
use ionian_control::DISK_FULL;

/// The Python client looks for this sentence of S3's, and then tells its user that a file probably
/// changed while it was uploaded.
pub(super) const CHECKSUM_SENTENCE: &str = "The Content-MD5 you specified did not match what we received.";

/// A status and a sentence.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    sentence: String,
    header: Option<(HeaderName, String)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, sentence: impl Into<String>) -> Self {
        Self {
            status,
            sentence: sentence.into(),
            header: None,
        }
    }

    pub(super) fn bad_request(sentence: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, sentence)
    }

    pub(super) fn no_such_url() -> Self {
        Self::new(StatusCode::NOT_FOUND, "this is not a blob URL of ours")
    }

    pub(super) fn forbidden(error: InvalidUrl) -> Self {
        Self::new(StatusCode::FORBIDDEN, error.to_string())
    }

    pub(super) fn overloaded(limit: usize) -> Self {
        let sentence = format!("{limit} uploads are under way; try again in a second");
        let header = Some((RETRY_AFTER, "1".to_owned()));
        Self {
            header,
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, sentence)
        }
    }

    pub(super) fn unsatisfiable_range(length: u64) -> Self {
        let sentence = format!("the range lies outside of the blob's {length} bytes");
        let header = Some((CONTENT_RANGE, format!("bytes */{length}")));
        Self {
            header,
            ..Self::new(StatusCode::RANGE_NOT_SATISFIABLE, sentence)
        }
    }

    pub(super) fn body(error: &BodyError) -> Self {
        let status = match error {
            BodyError::Stalled { .. } => StatusCode::REQUEST_TIMEOUT,
            BodyError::Broken { .. } => StatusCode::BAD_REQUEST,
        };
        Self::new(status, error.to_string())
    }

    pub(super) fn put(error: UploadError) -> Self {
        match error {
            UploadError::WrongChecksum { .. } => Self::bad_request(format!("{error}\n{CHECKSUM_SENTENCE}")),
            error => Self::complete(error),
        }
    }

    pub(super) fn complete(error: UploadError) -> Self {
        let status = match error {
            UploadError::UnknownUpload { .. } | UploadError::NoSuchPart { .. } => StatusCode::NOT_FOUND,
            UploadError::TooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            UploadError::Body {
                source: BodyError::Stalled { .. },
                ..
            } => StatusCode::REQUEST_TIMEOUT,
            UploadError::Truncated { .. }
            | UploadError::Body {
                source: BodyError::Broken { .. },
                ..
            }
            | UploadError::WrongChecksum { .. }
            | UploadError::PartMissing { .. }
            | UploadError::PartsDiffer { .. } => StatusCode::BAD_REQUEST,
            UploadError::Superseded | UploadError::AlreadyComplete { .. } => StatusCode::CONFLICT,
            UploadError::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
            UploadError::Storage(error) => return Self::storage(error),
        };
        let sentence = match &error {
            UploadError::Body { source, .. } => format!("{error}: {source}"),
            error => error.to_string(),
        };
        Self::new(status, sentence)
    }

    pub(super) fn read(error: ReadError) -> Self {
        match error {
            ReadError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, error.to_string()),
            ReadError::TooLarge { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, error.to_string()),
            ReadError::Storage { source, .. } => Self::storage(source),
        }
    }

    /// Our fault, whose details stay in the log.
    pub(super) fn internal(error: impl Error + 'static) -> Self {
        let error_id = format!("{:08x}", rand::random::<u32>());
        tracing::error!(error_id, error = &error as &dyn Error, "blob transfer failed");
        let sentence = format!("the server failed to store or read the blob; its log has the details under {error_id}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, sentence)
    }

    fn storage(error: StorageError) -> Self {
        if error.is_out_of_space() {
            // Its operator is told by the message, which names the file.
            tracing::warn!(
                error = &error as &dyn Error,
                "a blob could not be stored: the disk is full"
            );
            return Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                format!("{DISK_FULL}; ask its operator to make room"),
            );
        }
        Self::internal(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self {
            status,
            sentence,
            header,
        } = self;
        let mut response = (status, [(CONTENT_TYPE, "text/plain; charset=utf-8")], sentence + "\n").into_response();
        if let Some((name, value)) = header {
            match value.parse() {
                Ok(value) => {
                    response.headers_mut().insert(name, value);
                }
                Err(error) => tracing::error!(%name, %error, "a header that we made is unusable"),
            }
        }
        response
    }
}
