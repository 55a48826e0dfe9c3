//! Log entries: what containers and builds print, and what the platform says about them.

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, ContainerId, FunctionId};
use crate::time::Timestamp;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    Stdout,
    Stderr,
    /// Said by the platform.
    Info,
}

impl LogStream {
    /// The wire's `FileDescriptor` number.
    pub fn wire(self) -> i32 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Info => 3,
        }
    }

    pub fn from_wire(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Stdout,
            2 => Self::Stderr,
            3 => Self::Info,
            _ => return None,
        })
    }
}

/// A piece of output, usually one line with its newline; long lines come in pieces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    pub at: Timestamp,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub container_id: ContainerId,
    pub stream: LogStream,
    pub text: String,
}
