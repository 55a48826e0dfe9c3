//! The language between the control process and a worker (D7): a whole desired set one way,
//! observations the other way.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::container::{ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, RuntimeKinds, StopReason};
use crate::ids::ContainerId;

/// Counts versions of a desired set. A worker ignores sets older than the newest it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

/// Everything that should exist on one worker.
#[derive(Debug, Clone, Default)]
pub struct DesiredSet {
    pub generation: Generation,
    pub containers: Vec<DesiredContainer>,
}

#[derive(Debug, Clone)]
pub struct DesiredContainer {
    pub id: ContainerId,
    pub spec: Arc<ContainerSpec>,
    pub state: DesiredState,
    /// A worker has reported it as started, maybe to an earlier control process. A worker that does not
    /// have it says that it is lost, and starts nothing in its place.
    pub must_exist: bool,
}

/// What a worker offers to containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerCapacity {
    /// CPU that containers may ask for in total, in thousandths of a core.
    pub cpu_millis: u32,
    pub memory_mib: u32,
    /// Containers that may be in the first seconds of their start at the same time.
    pub max_starting: u32,
    /// How it can isolate them. Nothing is placed on a worker that does not have its runtime.
    #[serde(default = "as_before_runtimes_were_told")]
    pub runtimes: RuntimeKinds,
}

/// In journals of that time.
fn as_before_runtimes_were_told() -> RuntimeKinds {
    [RuntimeKind::Runc].into()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DesiredState {
    Running,
    /// Ask it to end (SIGINT; the runtime may already be ending by its kill switch), then SIGKILL after
    /// the grace time. Zero grace kills at once.
    Stopped {
        grace: Duration,
        reason: StopReason,
    },
}

/// What a worker tells the control process. Exits are repeated until acknowledged, which the
/// control process does by leaving the container out of the next desired set.
#[derive(Debug, Clone)]
pub enum WorkerReport {
    Started(ContainerStarted),
    Exited {
        container_id: ContainerId,
        exit: ContainerExit,
    },
}
