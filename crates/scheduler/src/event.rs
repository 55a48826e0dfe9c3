//! What happened. Every fact that the scheduler acts on arrives as one of these.

use std::time::Duration;

use ionian_domain::call::{AttemptNumber, Call};
use ionian_domain::container::{ContainerExit, RuntimeKind, StopReason};
use ionian_domain::function::{Autoscaler, Batching, RetryPolicy};
use ionian_domain::record::{NewInput, Recovered};
use ionian_domain::worker::WorkerCapacity;
use ionian_domain::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, Outcome, Timestamp, WorkerId};
use serde::{Deserialize, Serialize};

/// Names the caller that waits for an answer. Drawn by `control`, opaque here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReplyId(pub u64);

/// Names one outstanding poll of a container for inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PollId(pub u64);

/// What the scheduler needs to know about a function.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolSettings {
    pub app_id: AppId,
    pub definition_id: DefinitionId,
    /// Requests come over HTTP, and demand from the ingress.
    pub is_web: bool,
    pub autoscaler: Autoscaler,
    /// Inputs (or requests) that one container takes at a time.
    pub slots: u32,
    /// Slots that the autoscaler plans with; at most `slots`.
    pub target_slots: u32,
    pub batching: Option<Batching>,
    pub retry: RetryPolicy,
    pub timeout: Duration,
    pub startup_timeout: Duration,
    pub single_use: bool,
    pub cpu_millis: u32,
    pub memory_mib: u32,
    #[serde(default = "as_before_it_could_be_chosen")]
    pub runtime: RuntimeKind,
}

/// In journals of that time.
fn as_before_it_could_be_chosen() -> RuntimeKind {
    RuntimeKind::Runc
}

/// One attempt's result, as its container reports it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptReport {
    pub input_id: InputId,
    pub attempt: AttemptNumber,
    pub outcome: Outcome,
    pub started_at: Option<Timestamp>,
}

/// How much a web container is used, as the ingress reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebUse {
    pub container_id: ContainerId,
    pub in_flight: u32,
    pub last_active: Timestamp,
}

/// Why a request to the scheduler was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    UnknownFunction,
    UnknownCall,
    /// The function's queue is full; trying again later helps.
    QueueFull,
    UnknownContainer,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// Sent once, after the functions that may run were activated: what was recorded before a restart. Until
    /// then nothing starts, ends or expires, and whoever asks for something waits.
    Recovered(Recovered),
    /// A function may run from now on, or runs with other settings. A changed definition replaces the
    /// function's containers.
    FunctionActivated {
        function_id: FunctionId,
        settings: PoolSettings,
    },
    /// The function takes no more work; its waiting inputs end with `outcome`.
    FunctionDeactivated {
        function_id: FunctionId,
        reason: StopReason,
        outcome: Outcome,
    },

    CallStarted {
        call: Call,
        inputs: Vec<NewInput>,
        reply: ReplyId,
    },
    InputsPut {
        call_id: CallId,
        inputs: Vec<NewInput>,
        reply: ReplyId,
    },
    CallInputsFinished {
        call_id: CallId,
        count: u32,
        reply: ReplyId,
    },
    CallCancelled {
        call_id: CallId,
        outcome: Outcome,
        terminate_containers: bool,
        reply: ReplyId,
    },
    /// The caller has read every output of a synchronous call.
    CallConsumed { call_id: CallId },

    /// A container asks for inputs. Its first poll says that it is ready.
    PollStarted {
        container_id: ContainerId,
        poll: PollId,
        max_inputs: u32,
    },
    /// The poll's connection is gone or its hold is over.
    PollDropped { container_id: ContainerId, poll: PollId },
    /// Inputs were handed to a poll whose connection was gone: the container never saw them.
    DeliveryLost {
        container_id: ContainerId,
        inputs: Vec<InputId>,
    },
    /// `@app.server` containers never poll; they say that they are ready.
    ServerReady { container_id: ContainerId },
    OutputsReported {
        container_id: ContainerId,
        outputs: Vec<AttemptReport>,
        reply: ReplyId,
    },
    /// The runtime could not set the function up (import error, failing enter hook).
    ContainerFailed {
        container_id: ContainerId,
        outcome: Outcome,
        reply: ReplyId,
    },
    ContainerStopRequested {
        container_id: ContainerId,
        graceful: bool,
        reply: ReplyId,
    },

    /// A worker is there, for the first time or again. It may have other resources than before. Nothing
    /// starts on a worker that has not connected to this process.
    WorkerConnected {
        worker_id: WorkerId,
        capacity: WorkerCapacity,
    },
    /// A sign of life. Due well within `Config::worker_silence`, from an embedded worker too.
    WorkerHeard { worker_id: WorkerId },
    /// The container's process runs; its address is known. Told again after a restart of either side.
    WorkerStarted { container_id: ContainerId },
    WorkerExited {
        container_id: ContainerId,
        exit: ContainerExit,
    },

    /// The ingress' whole view of a function's pool; replaces the one before.
    WebDemand {
        function_id: FunctionId,
        queued: u32,
        containers: Vec<WebUse>,
    },

    /// Settings of the autoscaler changed at run time.
    AutoscalerUpdated {
        function_id: FunctionId,
        autoscaler: Autoscaler,
        reply: ReplyId,
    },
    /// Nothing happened but time.
    Tick,
    /// Stop every container; the process is about to end.
    ShuttingDown,
}
