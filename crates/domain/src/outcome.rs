//! How an attempt ended. A user function that raises is an outcome, not an error of the platform.

use serde::{Deserialize, Serialize};

use crate::call::Payload;

/// The wire's `GenericResult.GenericStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeStatus {
    Success,
    Failure,
    Terminated,
    Timeout,
    InitFailure,
    InternalFailure,
    IdleTimeout,
}

impl OutcomeStatus {
    /// The number that the protocol gives this status.
    pub fn wire(self) -> i32 {
        match self {
            Self::Success => 1,
            Self::Failure => 2,
            Self::Terminated => 3,
            Self::Timeout => 4,
            Self::InitFailure => 5,
            Self::InternalFailure => 6,
            Self::IdleTimeout => 7,
        }
    }

    pub fn from_wire(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Success,
            2 => Self::Failure,
            3 => Self::Terminated,
            4 => Self::Timeout,
            5 => Self::InitFailure,
            6 => Self::InternalFailure,
            7 => Self::IdleTimeout,
            _ => return None,
        })
    }
}

/// The result of one attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub status: OutcomeStatus,
    /// The value, or the pickled exception.
    pub payload: Payload,
    /// The wire's `DataFormat` number of the payload.
    pub data_format: i32,
    /// One line for people.
    pub exception: String,
    pub traceback: String,
    /// The client's own serialized traceback and its source lines, opaque.
    #[serde(with = "crate::hex_bytes")]
    pub serialized_traceback: bytes::Bytes,
    #[serde(with = "crate::hex_bytes")]
    pub traceback_line_cache: bytes::Bytes,
    pub exit_code: i32,
}

impl Outcome {
    /// An outcome that the platform decided, with a sentence for the user.
    pub fn decided(status: OutcomeStatus, sentence: impl Into<String>) -> Self {
        Self {
            status,
            payload: Payload::EMPTY,
            data_format: 0,
            exception: sentence.into(),
            traceback: String::new(),
            serialized_traceback: bytes::Bytes::new(),
            traceback_line_cache: bytes::Bytes::new(),
            exit_code: 0,
        }
    }

    pub fn is_success(&self) -> bool {
        self.status == OutcomeStatus::Success
    }
}
