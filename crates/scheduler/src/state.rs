//! The scheduler's state: pools, containers, calls and inputs, in maps of fixed order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ionian_domain::call::{AttemptNumber, Call};
use ionian_domain::container::StopReason;
use ionian_domain::worker::DesiredState;
use ionian_domain::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, Timestamp};

use crate::event::{Event, PollId, PoolSettings, WebUse};
use crate::turn::{DesiredEntry, Turn};
use crate::Config;

/// One function's containers and waiting inputs.
#[derive(Debug)]
pub(crate) struct Pool {
    pub settings: PoolSettings,
    /// False once its app stopped: nothing starts, nothing is accepted.
    pub active: bool,
    pub queue: VecDeque<InputId>,
    /// Retries that wait for their back-off.
    pub delayed: BTreeSet<(Timestamp, InputId)>,
    /// When the oldest waiting input of a batched function arrived.
    pub batch_opened: Option<Timestamp>,
    pub web_queued: u32,
    /// Containers in a row that failed before they were ready.
    pub failures: u32,
    /// No container starts before this, after failures.
    pub start_not_before: Option<Timestamp>,
}

/// Where a container is in its life. It leaves the map when its exit was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting { deadline: Timestamp },
    Ready,
    /// Gets no new inputs. Once empty it gets its kill switch; at the deadline it is stopped.
    Draining { reason: StopReason, deadline: Timestamp, kill_switch_sent: bool },
    /// The worker was told to end it.
    Stopping { reason: StopReason, grace: std::time::Duration },
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct RunningInput {
    pub attempt: AttemptNumber,
    pub deadline: Timestamp,
    /// The input has its outcome already (cancelled, timed out); the runtime has until then to let go.
    pub abandoned_until: Option<Timestamp>,
}

#[derive(Debug)]
pub(crate) struct Container {
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub definition_id: DefinitionId,
    pub phase: Phase,
    pub created_at: Timestamp,
    pub started: bool,
    pub running: BTreeMap<InputId, RunningInput>,
    pub poll: Option<(PollId, u32)>,
    /// Set while it has nothing to do.
    pub idle_since: Option<Timestamp>,
    pub web_in_flight: u32,
    pub ever_ready: bool,
    pub is_web: bool,
    pub cpu_millis: u32,
    pub memory_mib: u32,
}

impl Container {
    /// Whether new work may be planned onto it.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. } | Phase::Ready)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.web_in_flight == 0
    }
}

#[derive(Debug)]
pub(crate) struct CallState {
    pub call: Call,
    pub inputs: BTreeSet<InputId>,
    pub input_count: u32,
    pub finished_count: u32,
    pub last_sequence: u64,
    pub last_active: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputState {
    Queued,
    Delayed { until: Timestamp },
    Running { container_id: ContainerId },
}

/// An unfinished input. Finished ones are in the store only.
#[derive(Debug)]
pub(crate) struct Input {
    pub call_id: CallId,
    pub function_id: FunctionId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub retries_used: u32,
    /// Attempts lost through no fault of the user's.
    pub lost_attempts: u32,
    pub state: InputState,
    pub created_at: Timestamp,
}

#[derive(Debug)]
pub(crate) struct State {
    pub config: Config,
    pub pools: BTreeMap<FunctionId, Pool>,
    pub containers: BTreeMap<ContainerId, Container>,
    pub calls: BTreeMap<CallId, CallState>,
    pub inputs: BTreeMap<InputId, Input>,
    /// Pools that this turn touched; only these are reconciled.
    pub dirty: BTreeSet<FunctionId>,
    /// Pools that want more containers than the machine holds; retried whenever something ends.
    pub starved: BTreeSet<FunctionId>,
    pub shutting_down: bool,
    pub calls_swept_at: Timestamp,
}

/// A container, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    pub id: ContainerId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub created_at: Timestamp,
    pub ready: bool,
    /// It was told to end.
    pub ending: bool,
    pub running_inputs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    pub backlog: u32,
    pub containers: u32,
    pub running_inputs: u32,
    pub free_slots: u32,
}

impl State {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            pools: BTreeMap::new(),
            containers: BTreeMap::new(),
            calls: BTreeMap::new(),
            inputs: BTreeMap::new(),
            dirty: BTreeSet::new(),
            starved: BTreeSet::new(),
            shutting_down: false,
            calls_swept_at: Timestamp::default(),
        }
    }

    pub(crate) fn apply(&mut self, now: Timestamp, event: Event, turn: &mut Turn) {
        match event {
            Event::Recovered(recovered) => self.recovered(now, recovered, turn),
            Event::FunctionActivated { function_id, settings } => {
                self.function_activated(now, function_id, settings, turn);
            }
            Event::FunctionDeactivated { function_id, reason, outcome } => {
                self.function_deactivated(now, function_id, reason, &outcome, turn);
            }
            Event::CallStarted { call, inputs, reply } => self.call_started(now, call, inputs, reply, turn),
            Event::InputsPut { call_id, inputs, reply } => self.inputs_put(now, call_id, inputs, reply, turn),
            Event::CallInputsFinished { call_id, count, reply } => {
                self.call_inputs_finished(now, call_id, count, reply, turn);
            }
            Event::CallCancelled { call_id, outcome, terminate_containers, reply } => {
                self.call_cancelled(now, call_id, &outcome, terminate_containers, reply, turn);
            }
            Event::CallConsumed { call_id } => self.call_consumed(call_id, turn),
            Event::PollStarted { container_id, poll, max_inputs } => {
                self.poll_started(now, container_id, poll, max_inputs, turn);
            }
            Event::PollDropped { container_id, poll } => self.poll_dropped(container_id, poll),
            Event::DeliveryLost { container_id, inputs } => self.delivery_lost(now, container_id, &inputs, turn),
            Event::ServerReady { container_id } => self.container_ready(now, container_id, turn),
            Event::OutputsReported { container_id, outputs, reply } => {
                self.outputs_reported(now, container_id, outputs, reply, turn);
            }
            Event::ContainerFailed { container_id, outcome, reply } => {
                self.container_failed(now, container_id, &outcome, reply, turn);
            }
            Event::ContainerStopRequested { container_id, graceful, reply } => {
                self.container_stop_requested(now, container_id, graceful, reply, turn);
            }
            Event::WorkerStarted { container_id } => {
                if let Some(container) = self.containers.get_mut(&container_id) {
                    container.started = true;
                }
            }
            Event::WorkerExited { container_id, exit } => self.worker_exited(now, container_id, &exit, turn),
            Event::WebDemand { function_id, queued, containers } => {
                self.web_demand(now, function_id, queued, &containers, turn);
            }
            Event::AutoscalerUpdated { function_id, autoscaler, reply } => {
                self.autoscaler_updated(function_id, autoscaler, reply, turn);
            }
            Event::Tick => {}
            Event::ShuttingDown => self.shut_down(turn),
        }
    }

    fn web_demand(&mut self, now: Timestamp, function_id: FunctionId, queued: u32, uses: &[WebUse], turn: &mut Turn) {
        let Some(pool) = self.pools.get_mut(&function_id) else { return };
        pool.web_queued = if pool.active { queued } else { 0 };
        self.dirty.insert(function_id);
        for use_ in uses {
            let Some(container) =
                self.containers.get_mut(&use_.container_id).filter(|c| c.function_id == function_id)
            else {
                // A report that crossed the container's exit.
                continue;
            };
            container.web_in_flight = use_.in_flight;
            // The ingress' clock is ours (one process), but a report may be older than the readiness
            // that opened the idle time: idle time never starts before that.
            container.idle_since = (use_.in_flight == 0 && container.running.is_empty())
                .then(|| container.idle_since.map_or(use_.last_active, |since| since.max(use_.last_active)).min(now));
        }
        let drained: Vec<ContainerId> = uses.iter().filter(|u| u.in_flight == 0).map(|u| u.container_id).collect();
        for container_id in drained {
            self.send_kill_switch_if_drained(container_id, turn);
        }
    }

    pub(crate) fn desired(&self) -> Vec<DesiredEntry> {
        self.containers
            .iter()
            .map(|(id, container)| DesiredEntry {
                container_id: *id,
                function_id: container.function_id,
                definition_id: container.definition_id,
                state: match container.phase {
                    Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => DesiredState::Running,
                    Phase::Stopping { reason, grace } => DesiredState::Stopped { grace, reason },
                },
            })
            .collect()
    }

    pub(crate) fn container_views(&self) -> Vec<ContainerView> {
        self.containers
            .iter()
            .map(|(id, container)| ContainerView {
                id: *id,
                app_id: container.app_id,
                function_id: container.function_id,
                created_at: container.created_at,
                ready: container.phase == Phase::Ready,
                ending: !container.is_live(),
                running_inputs: u32::try_from(container.running.len()).unwrap_or(u32::MAX) + container.web_in_flight,
            })
            .collect()
    }

    pub(crate) fn pool_stats(&self, function_id: FunctionId) -> PoolStats {
        let Some(pool) = self.pools.get(&function_id) else { return PoolStats::default() };
        let mut stats = PoolStats {
            backlog: u32::try_from(pool.queue.len() + pool.delayed.len()).unwrap_or(u32::MAX) + pool.web_queued,
            ..PoolStats::default()
        };
        for container in self.containers.values().filter(|c| c.function_id == function_id && c.is_live()) {
            let running = u32::try_from(container.running.len()).unwrap_or(u32::MAX) + container.web_in_flight;
            stats.containers += 1;
            stats.running_inputs += running;
            if container.phase == Phase::Ready {
                stats.free_slots += pool.settings.slots.saturating_sub(running);
            }
        }
        stats
    }
}
