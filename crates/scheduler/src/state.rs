//! The scheduler's state: pools, containers, calls and inputs, in maps of fixed order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ionian_domain::call::{AttemptNumber, Call};
use ionian_domain::container::StopReason;
use ionian_domain::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, Outcome, Timestamp, WorkerId};

use crate::Config;
use crate::breaks::Break;
use crate::event::{Event, PollId, PoolSettings};
use crate::turn::Turn;
use crate::workers::Worker;

/// Inputs and calls that were forgotten a moment ago, by which a repeated request is known. A repetition
/// whose first try finished earlier finds it in the store, so this covers only requests that overtake
/// each other on their way here; the number bounds the memory.
pub(crate) const REMEMBERED: usize = 8_192;

/// Counts inputs in the order in which they came. An input keeps its number when it must wait again, so
/// that it comes before everything younger, in memory as after a recovery.
pub(crate) type Arrival = u64;

/// Events that may come before the record was read. Nobody is served before that, so only what the platform
/// itself says can come; more than this means that it forgot to read the record.
const EARLY_EVENTS: usize = 65_536;

/// Counts pools in the order in which they asked for the machine.
pub(crate) type Ticket = u64;

/// One function's containers and waiting inputs.
#[derive(Debug)]
pub(crate) struct Pool {
    pub settings: PoolSettings,
    /// False once its app stopped: nothing starts, nothing is accepted.
    pub active: bool,
    pub queue: BTreeMap<Arrival, InputId>,
    /// Retries that wait for their back-off.
    pub delayed: BTreeSet<(Timestamp, InputId)>,
    /// All of its containers, ending ones too.
    pub containers: BTreeSet<ContainerId>,
    /// Requests that wait in the ingress, as it last said.
    pub web_queued: u32,
    /// Containers in a row that were of no use: not set up, or gone before they served anything.
    pub failures: u32,
    /// No container starts before this, after failures.
    pub start_not_before: Option<Timestamp>,
    /// Its place in [`State::line`], while it wants containers that it does not have.
    pub ticket: Option<Ticket>,
    /// It was said that no worker has its runtime.
    pub missing_runtime_told: bool,
    /// As filed in [`State::deadlines`]. Written by `deadlines` alone.
    pub deadline: Option<Timestamp>,
}

/// Where a container is in its life. It leaves the map when its exit was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting {
        deadline: Timestamp,
    },
    Ready,
    /// Gets no new inputs. Once empty it gets its kill switch; at the deadline it is stopped.
    Draining {
        reason: StopReason,
        deadline: Timestamp,
        /// The ingress has not yet said what it has there, since it was told to give no more.
        awaits_ingress: bool,
    },
    /// The worker was told to end it.
    Stopping {
        reason: StopReason,
        grace: Duration,
    },
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct RunningInput {
    pub attempt: AttemptNumber,
    pub deadline: Timestamp,
    /// The attempt was decided already (cancelled, timed out); the runtime has until then to let go.
    pub abandoned_until: Option<Timestamp>,
    /// It was handed over last before the server restarted: nobody knows whether it arrived.
    pub is_doubtful: bool,
}

/// What is special about a container that outlived the server that started it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adopted {
    /// It has not polled or reported since.
    pub is_unheard: bool,
    /// It serves the web, and its worker has not yet said again where it is reached.
    pub awaits_worker: bool,
    /// Its endpoints were known before.
    pub web_was_ready: bool,
}

#[derive(Debug)]
pub(crate) struct Container {
    pub worker_id: WorkerId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub definition_id: DefinitionId,
    pub phase: Phase,
    pub created_at: Timestamp,
    pub running: BTreeMap<InputId, RunningInput>,
    pub poll: Option<(PollId, u32)>,
    /// When its last poll ended, while it has none.
    pub silent_since: Option<Timestamp>,
    /// Set while it has nothing to do.
    pub idle_since: Option<Timestamp>,
    pub web_in_flight: u32,
    pub ready_at: Option<Timestamp>,
    /// It answered an input or a request: its start was worth it.
    pub has_served: bool,
    /// It said by [`Event::ServerReady`] that it is ready, and asks for nothing.
    pub never_polls: bool,
    pub is_web: bool,
    /// When its worker, or it itself, first showed that it exists: it must not be started again.
    pub seen_at: Option<Timestamp>,
    /// Set where it was started by an earlier life of the server.
    pub adopted: Option<Adopted>,
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

    /// Inputs and requests that it has.
    pub(crate) fn load(&self) -> u32 {
        count(self.running.len()).saturating_add(self.web_in_flight)
    }

    /// Whether it still has to let go of an attempt that was taken from it.
    pub(crate) fn is_letting_go(&self) -> bool {
        self.running.values().any(|running| running.abandoned_until.is_some())
    }

    /// Whether it was started by an earlier life of the server, and said nothing since.
    pub(crate) fn is_unheard(&self) -> bool {
        self.adopted.is_some_and(|adopted| adopted.is_unheard)
    }

    pub(crate) fn awaits_worker(&self) -> bool {
        self.adopted.is_some_and(|adopted| adopted.awaits_worker)
    }

    /// Notes when its last input or request left it.
    pub(crate) fn note_idle(&mut self, now: Timestamp) {
        if self.is_empty() && self.idle_since.is_none() && self.ready_at.is_some() {
            self.idle_since = Some(now);
        }
    }

    /// Ends its poll from our side.
    pub(crate) fn take_poll(&mut self, now: Timestamp) -> Option<(PollId, u32)> {
        let poll = self.poll.take();
        if poll.is_some() {
            self.silent_since = Some(now);
        }
        poll
    }
}

#[derive(Debug)]
pub(crate) struct CallState {
    pub call: Call,
    /// Unfinished ones.
    pub inputs: BTreeSet<InputId>,
    pub input_count: u32,
    pub finished_count: u32,
    pub last_sequence: u64,
    pub last_active: Timestamp,
    /// Set once it was cancelled: inputs that were on their way get this outcome.
    pub cancelled: Option<Outcome>,
}

impl CallState {
    pub(crate) fn new(now: Timestamp, call: Call) -> Self {
        Self {
            call,
            inputs: BTreeSet::new(),
            input_count: 0,
            finished_count: 0,
            last_sequence: 0,
            last_active: now,
            cancelled: None,
        }
    }

    /// Whether all that will come has come: such a call is not recovered once its inputs have finished. A
    /// unary call whose input came needs no such word, since it is forgotten with its one result.
    pub(crate) fn is_closed(&self) -> bool {
        self.call.finished_inputs.is_some()
    }
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
    pub arrival: Arrival,
    pub attempt: AttemptNumber,
    pub retries_used: u32,
    pub state: InputState,
    /// From when a batch may wait for more.
    pub waiting_since: Timestamp,
}

impl Input {
    /// Attempts lost through no fault of the user's: those that no retry policy paid for.
    pub(crate) fn lost_attempts(&self) -> u32 {
        self.attempt.0.saturating_sub(self.retries_used)
    }
}

/// The last ids that were forgotten.
#[derive(Debug)]
pub(crate) struct Recent<Id> {
    order: VecDeque<Id>,
    known: BTreeSet<Id>,
}

impl<Id: Ord + Copy> Recent<Id> {
    fn new() -> Self {
        Self {
            order: VecDeque::new(),
            known: BTreeSet::new(),
        }
    }

    pub(crate) fn note(&mut self, id: Id) {
        if self.known.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    pub(crate) fn contains(&self, id: &Id) -> bool {
        self.known.contains(id)
    }
}

#[derive(Debug)]
pub(crate) struct State {
    pub config: Config,
    pub pools: BTreeMap<FunctionId, Pool>,
    pub containers: BTreeMap<ContainerId, Container>,
    pub calls: BTreeMap<CallId, CallState>,
    pub inputs: BTreeMap<InputId, Input>,
    pub recent_inputs: Recent<InputId>,
    pub recent_calls: Recent<CallId>,
    pub next_arrival: Arrival,
    /// Pools that this turn touched; only these are reconciled.
    pub dirty: BTreeSet<FunctionId>,
    /// Pools that want more containers than they could start, first come first served.
    pub line: BTreeMap<Ticket, FunctionId>,
    pub next_ticket: Ticket,
    /// The next deadline of every pool that has one.
    pub deadlines: BTreeSet<(Timestamp, FunctionId)>,
    /// Calls without unfinished inputs, by when something was last heard of them.
    pub quiet_calls: BTreeSet<(Timestamp, CallId)>,
    /// Requests that wait for functions that have no pool: their app stopped meanwhile.
    pub web_waiting: BTreeMap<FunctionId, u32>,
    pub shutting_down: bool,
    pub workers: BTreeMap<WorkerId, Worker>,
    /// Workers that are not given up, by when they were last heard.
    pub silences: BTreeSet<(Timestamp, WorkerId)>,
    /// The record was read.
    pub is_recovered: bool,
    /// What came before that.
    pub early: Vec<Event>,
    #[cfg(test)]
    pub broken: Option<crate::breaks::Break>,
}

impl State {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            pools: BTreeMap::new(),
            containers: BTreeMap::new(),
            calls: BTreeMap::new(),
            inputs: BTreeMap::new(),
            recent_inputs: Recent::new(),
            recent_calls: Recent::new(),
            next_arrival: 0,
            dirty: BTreeSet::new(),
            line: BTreeMap::new(),
            next_ticket: 0,
            deadlines: BTreeSet::new(),
            quiet_calls: BTreeSet::new(),
            web_waiting: BTreeMap::new(),
            shutting_down: false,
            workers: BTreeMap::new(),
            silences: BTreeSet::new(),
            is_recovered: false,
            early: Vec::new(),
            #[cfg(test)]
            broken: None,
        }
    }

    /// Applies an event, or keeps it until the record was read.
    pub(crate) fn take(&mut self, now: Timestamp, event: Event, turn: &mut Turn) {
        let is_first = matches!(
            event,
            Event::Recovered(_) | Event::FunctionActivated { .. } | Event::FunctionDeactivated { .. }
        );
        if !self.is_recovered && !is_first && !self.is_broken(Break::StartsBeforeRecovery) {
            assert!(
                self.early.len() < EARLY_EVENTS,
                "the record is read before anybody is served"
            );
            self.early.push(event);
            return;
        }
        let is_recovery = matches!(event, Event::Recovered(_));
        self.apply(now, event, turn);
        if is_recovery {
            for event in std::mem::take(&mut self.early) {
                self.apply(now, event, turn);
            }
        }
    }

    fn apply(&mut self, now: Timestamp, event: Event, turn: &mut Turn) {
        match event {
            Event::Recovered(recovered) => self.recovered(now, recovered, turn),
            Event::FunctionActivated { function_id, settings } => {
                self.function_activated(now, function_id, settings, turn);
            }
            Event::FunctionDeactivated {
                function_id,
                reason,
                outcome,
            } => {
                self.function_deactivated(now, function_id, reason, &outcome, turn);
            }
            Event::CallStarted { call, inputs, reply } => self.call_started(now, call, inputs, reply, turn),
            Event::InputsPut { call_id, inputs, reply } => self.inputs_put(now, call_id, inputs, reply, turn),
            Event::CallInputsFinished { call_id, count, reply } => {
                self.call_inputs_finished(now, call_id, count, reply, turn);
            }
            Event::CallCancelled {
                call_id,
                outcome,
                terminate_containers,
                reply,
            } => {
                self.call_cancelled(now, call_id, &outcome, terminate_containers, reply, turn);
            }
            Event::CallConsumed { call_id } => self.call_consumed(call_id, turn),
            Event::PollStarted {
                container_id,
                poll,
                max_inputs,
            } => {
                self.poll_started(now, container_id, poll, max_inputs, turn);
            }
            Event::PollDropped { container_id, poll } => self.poll_dropped(now, container_id, poll),
            Event::DeliveryLost { container_id, inputs } => self.delivery_lost(now, container_id, &inputs, turn),
            Event::ServerReady { container_id } => self.server_ready(now, container_id, turn),
            Event::OutputsReported {
                container_id,
                outputs,
                reply,
            } => {
                self.outputs_reported(now, container_id, outputs, reply, turn);
            }
            Event::ContainerFailed {
                container_id,
                outcome,
                reply,
            } => {
                self.container_failed(now, container_id, &outcome, reply, turn);
            }
            Event::ContainerStopRequested {
                container_id,
                graceful,
                reply,
            } => {
                self.container_stop_requested(now, container_id, graceful, reply, turn);
            }
            Event::WorkerConnected { worker_id, capacity } => self.worker_connected(now, worker_id, capacity, turn),
            Event::WorkerHeard { worker_id } => self.worker_heard(now, worker_id, turn),
            Event::WorkerStarted { container_id } => self.worker_started(now, container_id, turn),
            Event::Tick => {}
            Event::WorkerExited { container_id, exit } => self.worker_exited(now, container_id, &exit, turn),
            Event::WebDemand {
                function_id,
                queued,
                containers,
            } => {
                self.web_demand(now, function_id, queued, &containers, turn);
            }
            Event::AutoscalerUpdated {
                function_id,
                autoscaler,
                reply,
            } => {
                self.autoscaler_updated(function_id, autoscaler, reply, turn);
            }
            Event::ShuttingDown => self.shut_down(now, turn),
        }
    }

    /// A pool's containers, in the order of their ids.
    pub(crate) fn containers_in<'a>(
        &'a self,
        pool: &'a Pool,
    ) -> impl Iterator<Item = (ContainerId, &'a Container)> + 'a {
        pool.containers.iter().map(|id| (*id, &self.containers[id]))
    }

    pub(crate) fn containers_of(
        &self,
        function_id: FunctionId,
        filter: impl Fn(&Container) -> bool,
    ) -> Vec<ContainerId> {
        let Some(pool) = self.pools.get(&function_id) else {
            return Vec::new();
        };
        self.containers_in(pool)
            .filter(|(_, container)| filter(container))
            .map(|(id, _)| id)
            .collect()
    }
}

/// Sizes as the wire and people count them.
pub(crate) fn count(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}
