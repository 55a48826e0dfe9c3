//! What a turn decided.

use ionian_domain::call::{AttemptNumber, Invocation};
use ionian_domain::container::RuntimeKind;
use ionian_domain::record::Write;
use ionian_domain::worker::DesiredState;
use ionian_domain::{CallId, ContainerId, DefinitionId, FunctionId, InputId, Timestamp, WorkerId};
use serde::{Deserialize, Serialize};

use crate::event::{PollId, Refusal, ReplyId};

/// An input handed to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    pub input_id: InputId,
    pub call_id: CallId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub invocation: Invocation,
}

/// Released after the commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Accepted(ReplyId),
    Refused {
        reply: ReplyId,
        refusal: Refusal,
    },
    /// Answers a poll with inputs.
    Deliver {
        poll: PollId,
        inputs: Vec<Delivery>,
    },
    /// Answers a poll: end yourself.
    KillSwitch {
        poll: PollId,
    },
    /// Answers a poll that nobody will serve; the container may ask again.
    Empty {
        poll: PollId,
    },
}

/// Released after the commit, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Outputs of this call can be read, up to this sequence number.
    OutputsReady { call_id: CallId, last_sequence: u64 },
    /// Tell the container's runtime, over its heartbeat, to cancel these inputs.
    CancelInputs {
        container_id: ContainerId,
        input_ids: Vec<InputId>,
    },
    WebReady {
        function_id: FunctionId,
        container_id: ContainerId,
    },
    WebDraining {
        function_id: FunctionId,
        container_id: ContainerId,
    },
    WebGone {
        function_id: FunctionId,
        container_id: ContainerId,
    },
    /// Requests that wait for this function fail with this sentence.
    WebStartFailed {
        function_id: FunctionId,
        container_id: ContainerId,
        message: String,
    },
    /// The container has ended; forget its credential, streams and caches.
    Forget { container_id: ContainerId },
    /// A function whose containers keep failing is given a pause; said in its app's log.
    BackedOff {
        function_id: FunctionId,
        failures: u32,
        until: Timestamp,
    },
    /// Workers are connected, and none has this function's runtime: it waits for one. Said once, in its app's log.
    RuntimeMissing {
        function_id: FunctionId,
        runtime: RuntimeKind,
    },
}

/// One line of the desired set; `control` adds what the worker needs to know to start it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredEntry {
    pub worker_id: WorkerId,
    pub container_id: ContainerId,
    pub function_id: FunctionId,
    pub definition_id: DefinitionId,
    pub state: DesiredState,
    /// As in [`ionian_domain::worker::DesiredContainer::must_exist`].
    pub must_exist: bool,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Turn {
    pub writes: Vec<Write>,
    pub replies: Vec<Reply>,
    pub commands: Vec<Command>,
    /// [`crate::Scheduler::desired`] differs from before this turn.
    pub desired_changed: bool,
    /// When `handle` must be called again, at the latest.
    pub wake_at: Option<Timestamp>,
}
