//! The one place that turns the application's errors into gRPC statuses.

use ionian_control::Error;
use ionian_domain::ErrorKind;
use tonic::{Code, Status};

/// The code is exact, because clients branch on it: they retry `INTERNAL` and `UNKNOWN`, and tell
/// `NOT_FOUND` from `ALREADY_EXISTS`.
pub(crate) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::PreconditionFailed => Code::FailedPrecondition,
        ErrorKind::PermissionDenied => Code::PermissionDenied,
        ErrorKind::Unauthenticated => Code::Unauthenticated,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Deadline => Code::DeadlineExceeded,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
    }
}

/// Logs what is our fault, with an id that the user can quote; the rest is the caller's to read.
#[expect(clippy::needless_pass_by_value, reason = "the shape that `map_err` wants")]
pub(crate) fn from_error(error: Error) -> Status {
    if error.kind() == ErrorKind::Internal {
        let id = hex::encode(rand::random::<[u8; 6]>());
        tracing::error!(error = &error as &dyn std::error::Error, id, "a request failed");
        return Status::internal(format!("{} (error id {id}; the server's log has details)", error.message()));
    }
    Status::new(code(error.kind()), error.message().to_owned())
}

pub(crate) fn invalid(message: impl Into<String>) -> Status {
    Status::invalid_argument(message)
}

/// A blob error in the caller's terms.
pub(crate) fn from_kind(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Status {
    let mut message = error.to_string();
    if kind == ErrorKind::Internal {
        let id = hex::encode(rand::random::<[u8; 6]>());
        tracing::error!(error, id, "a request failed");
        message = format!("the server could not use its storage (error id {id}; the server's log has details)");
    }
    Status::new(code(kind), message)
}
