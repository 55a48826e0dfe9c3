//! What a turn of the scheduler records, and what recovery reads back.
//!
//! The scheduler decides; `store` commits these in one transaction; only then do replies and orders
//! leave the process. Recovery folds what was recorded into the same state.

use serde::{Deserialize, Serialize};

use crate::call::{AttemptNumber, Call, InputPayload};
use crate::container::ContainerExit;
use crate::ids::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, WorkerId};
use crate::outcome::Outcome;
use crate::time::Timestamp;

/// An input as it is first recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewInput {
    pub id: InputId,
    /// Position in the call, counted by the client.
    pub index: u32,
    pub payload: InputPayload,
}

/// One change, in the order in which it was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Write {
    CallCreated {
        call: Call,
    },
    InputsCreated {
        call_id: CallId,
        function_id: FunctionId,
        inputs: Vec<NewInput>,
        at: Timestamp,
    },
    /// An attempt was handed to a container.
    InputStarted {
        input_id: InputId,
        container_id: ContainerId,
        attempt: AttemptNumber,
        at: Timestamp,
    },
    /// The input waits again: its container was lost, or it is retried by policy.
    InputRequeued {
        input_id: InputId,
        attempt: AttemptNumber,
        not_before: Timestamp,
        /// How many tries by the user's retry policy are used up.
        retries_used: u32,
    },
    /// The one recorded outcome of an input. `sequence` counts the outputs of its call from 1, and is
    /// what readers resume from.
    InputFinished {
        input_id: InputId,
        call_id: CallId,
        sequence: u64,
        attempt: AttemptNumber,
        container_id: Option<ContainerId>,
        outcome: Outcome,
        started_at: Option<Timestamp>,
        at: Timestamp,
    },
    /// The client said how many inputs the call has.
    CallInputsFinished {
        call_id: CallId,
        count: u32,
    },
    /// The reader of a synchronous call has its results; they need not be kept.
    CallConsumed {
        call_id: CallId,
    },
    ContainerCreated {
        container_id: ContainerId,
        worker_id: WorkerId,
        app_id: AppId,
        function_id: FunctionId,
        definition_id: DefinitionId,
        at: Timestamp,
    },
    ContainerEnded {
        container_id: ContainerId,
        exit: ContainerExit,
        at: Timestamp,
    },
}

/// An output as readers get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputRecord {
    pub sequence: u64,
    pub input_id: InputId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub container_id: Option<ContainerId>,
    pub outcome: Outcome,
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

/// An unfinished input, without its payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingInput {
    pub id: InputId,
    pub call_id: CallId,
    pub function_id: FunctionId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub retries_used: u32,
    /// Set while an attempt is with a container.
    pub running: Option<(ContainerId, Timestamp)>,
    pub not_before: Option<Timestamp>,
    pub created_at: Timestamp,
}

/// A call with unfinished inputs, or one whose inputs are still being put.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCall {
    pub call: Call,
    pub input_count: u32,
    pub finished_count: u32,
    /// The sequence number of its newest output; 0 for none.
    pub last_sequence: u64,
}

/// A container that had not ended when the process stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingContainer {
    pub id: ContainerId,
    /// Where and from what it was started; `None` for one that was recorded before these were.
    pub origin: Option<(WorkerId, DefinitionId)>,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub created_at: Timestamp,
    /// When its web endpoints were noted as announced. The note is written behind the announcement, so
    /// `None` may also mean that the process died in between.
    pub web_ready_at: Option<Timestamp>,
}

/// Everything the scheduler needs to go on where it stopped.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Recovered {
    pub calls: Vec<PendingCall>,
    pub inputs: Vec<PendingInput>,
    pub containers: Vec<PendingContainer>,
}
