//! What a use case can fail with, in the caller's terms.

use std::fmt;

use ionian_domain::ErrorKind;
use ionian_scheduler::Refusal;

/// The whole message of an error for which a full disk is the reason. `api` adds which directory it is.
pub const DISK_FULL: &str = "the server's disk is full";

/// A refused or failed use case. The message is for the user: it names the thing and says what to do.
/// Causes that a user cannot act on are kept as the source, for the log.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::PreconditionFailed, message)
    }

    pub fn denied(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::PermissionDenied, message)
    }

    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unauthenticated, message)
    }

    /// Our fault: `doing` says what failed, the source goes to the log.
    pub fn internal(doing: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            kind: ErrorKind::Internal,
            message: doing.into(),
            source: Some(source.into()),
        }
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

impl From<ionian_store::StoreError> for Error {
    fn from(source: ionian_store::StoreError) -> Self {
        match source.kind() {
            ErrorKind::Internal => Self::internal("the server could not use its database", source),
            ErrorKind::Exhausted => Self {
                kind: ErrorKind::Exhausted,
                message: DISK_FULL.to_owned(),
                source: Some(Box::new(source)),
            },
            kind => Self {
                kind,
                message: source.source.to_string(),
                source: Some(Box::new(source)),
            },
        }
    }
}

impl From<ionian_domain::InvalidId> for Error {
    fn from(source: ionian_domain::InvalidId) -> Self {
        Self::invalid(source.to_string())
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::UnknownFunction => Self::precondition(
                "the function is not running: its app was stopped, or it was not published yet; deploy it again",
            ),
            Refusal::UnknownCall => Self::not_found("the function call is unknown or has expired"),
            Refusal::QueueFull => Self::new(
                ErrorKind::Exhausted,
                "too many inputs wait for this function; slow down and try again",
            ),
            Refusal::UnknownContainer => Self::not_found("the container is not running"),
        }
    }
}
