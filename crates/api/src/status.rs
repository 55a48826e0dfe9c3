//! The one place that turns the application's errors into gRPC statuses.

use std::time::Duration;

use ionian_blobs::StorageError;
use ionian_control::{DISK_FULL, Error};
use ionian_domain::ErrorKind;
use ionian_proto::client as pb;
use prost::Message as _;
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
        return Status::internal(format!(
            "{} (error id {id}; the server's log has details)",
            error.message()
        ));
    }
    Status::new(code(error.kind()), error.message().to_owned())
}

/// Tells the client to come back after a while. It does for as long as it takes, whatever the code; without
/// this it would give up at once where it does not retry the code by itself.
pub(crate) fn retry_after(status: &Status, pause: Duration) -> Status {
    let policy = pb::RpcRetryPolicy {
        retry_after_secs: pause.as_secs_f32(),
    };
    with_detail(status, &policy)
}

/// Adds a detail that the client looks for.
pub(crate) fn with_detail<M: prost::Message + prost::Name>(status: &Status, detail: &M) -> Status {
    let details = prost_types::Any::from_msg(detail).into_iter().collect();
    let rich = pb::RpcStatus {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details,
    };
    Status::with_details(status.code(), status.message(), rich.encode_to_vec().into())
}

pub(crate) fn invalid(message: impl Into<String>) -> Status {
    Status::invalid_argument(message)
}

/// A blob error in the caller's terms.
pub(crate) fn from_kind(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Status {
    let mut message = error.to_string();
    if kind == ErrorKind::Internal && is_out_of_space(error) {
        return Status::resource_exhausted(DISK_FULL);
    }
    if kind == ErrorKind::Internal {
        let id = hex::encode(rand::random::<[u8; 6]>());
        tracing::error!(error, id, "a request failed");
        message = format!("the server could not use its storage (error id {id}; the server's log has details)");
    }
    Status::new(code(kind), message)
}

fn is_out_of_space(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<StorageError>())
        .any(StorageError::is_out_of_space)
}
