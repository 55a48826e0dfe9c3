//! Calls and their inputs.

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, CallId, FunctionId, InputId};
use crate::time::Timestamp;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallKind {
    /// One input.
    Unary,
    /// A stream of inputs (`.map()`).
    Map,
}

/// How the caller awaits the result. Decides how long results are kept and whether reads consume them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Invocation {
    SyncLegacy,
    AsyncLegacy,
    Async,
    Sync,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub id: CallId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub kind: CallKind,
    pub invocation: Invocation,
    /// The input whose code made this call, for the call graph.
    pub parent_input_id: Option<InputId>,
    pub created_at: Timestamp,
    /// The client said that no more inputs will come (`FunctionFinishInputs`), with their number.
    pub finished_inputs: Option<u32>,
}

/// Counts tries of one input; 0 for the first. The wire calls it `retry_count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct AttemptNumber(pub u32);

impl AttemptNumber {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Bytes of an argument or a result: inline, or in a blob that the client uploaded before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Payload {
    Inline(#[serde(with = "crate::hex_bytes")] bytes::Bytes),
    Blob(String),
}

impl Payload {
    pub const EMPTY: Self = Self::Inline(bytes::Bytes::new());

    /// Bytes held in memory by this payload.
    pub fn inline_len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Blob(_) => 0,
        }
    }
}

/// What a call hands to a function: opaque to the platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputPayload {
    pub payload: Payload,
    /// The wire's `DataFormat` number.
    pub data_format: i32,
    pub method_name: Option<String>,
}
