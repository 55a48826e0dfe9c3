//! The kinds of failure that cross a layer. `api` maps them to gRPC codes and `ingress` to HTTP codes.

use std::fmt;

/// What went wrong, in the caller's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    NotFound,
    AlreadyExists,
    InvalidArgument,
    PreconditionFailed,
    PermissionDenied,
    Unauthenticated,
    /// A limit was reached; trying again later may help.
    Exhausted,
    Unavailable,
    Deadline,
    /// Refused on purpose: the platform does not offer this.
    Unimplemented,
    /// Our fault.
    Internal,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "not found",
            Self::AlreadyExists => "already exists",
            Self::InvalidArgument => "invalid argument",
            Self::PreconditionFailed => "precondition failed",
            Self::PermissionDenied => "permission denied",
            Self::Unauthenticated => "unauthenticated",
            Self::Exhausted => "exhausted",
            Self::Unavailable => "unavailable",
            Self::Deadline => "deadline exceeded",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
        })
    }
}
