//! Containers: from their first poll to their exit.

use std::time::Duration;

use ionian_domain::container::{ContainerExit, StopReason};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::event::{Refusal, ReplyId};
use crate::state::{InputState, Phase, State};
use crate::turn::{Command, Reply, Turn};

/// The longest pause between two starts of a function whose containers keep failing.
const MAX_START_BACKOFF: Duration = Duration::from_secs(60);

/// Failures in a row that are forgiven without a pause: one request, one try.
const FREE_FAILURES: u32 = 1;

impl State {
    /// The container takes work from now on. Called on every poll; only the first changes anything.
    pub(crate) fn container_ready(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else { return };
        if !matches!(container.phase, Phase::Starting { .. }) {
            return;
        }
        container.phase = Phase::Ready;
        container.ever_ready = true;
        container.idle_since = Some(now);
        let function_id = container.function_id;
        if container.is_web {
            turn.commands.push(Command::WebReady { function_id, container_id });
        }
        if let Some(pool) = self.pools.get_mut(&function_id) {
            pool.failures = 0;
            pool.start_not_before = None;
        }
        self.dirty.insert(function_id);
        // One start fewer is under way: others may begin.
        self.dirty.append(&mut self.starved);
    }

    /// The runtime reported that it cannot set the function up. Inputs that wait for the function would
    /// meet the same error, so they get it now.
    pub(crate) fn container_failed(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        outcome: &Outcome,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        turn.replies.push(Reply::Accepted(reply));
        let Some(container) = self.containers.get(&container_id) else { return };
        let (function_id, ever_ready) = (container.function_id, container.ever_ready);
        if ever_ready {
            // After readiness a failure concerns this container only (an exit hook, say); its exit
            // decides about its inputs.
            return;
        }
        let outcome = Outcome { status: OutcomeStatus::InitFailure, ..outcome.clone() };
        let message = outcome.exception.clone();
        self.setup_failed(now, function_id, container_id, &outcome, &message, turn);
        self.stop_soon(now, container_id, StopReason::Requested, turn);
    }

    /// Fails what waits for a function whose container could not be set up, and pauses its starts.
    fn setup_failed(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        container_id: ContainerId,
        outcome: &Outcome,
        message: &str,
        turn: &mut Turn,
    ) {
        // Another container of the function serves: this failure is its own affair.
        let others_serve =
            self.containers.values().any(|c| c.function_id == function_id && c.phase == Phase::Ready);
        let Some(pool) = self.pools.get_mut(&function_id) else { return };
        pool.failures += 1;
        if pool.failures > FREE_FAILURES {
            let pause = Duration::from_secs(1) * 2u32.saturating_pow(pool.failures.min(10));
            let until = now + pause.min(MAX_START_BACKOFF);
            pool.start_not_before = Some(until);
            turn.commands.push(Command::BackedOff { function_id, failures: pool.failures, until });
        }
        if others_serve {
            return;
        }
        pool.web_queued = 0;
        let waiting: Vec<InputId> =
            pool.queue.iter().copied().chain(pool.delayed.iter().map(|(_, input_id)| *input_id)).collect();
        for input_id in waiting {
            self.finish_input(now, input_id, Some(container_id), None, outcome.clone(), turn);
        }
        turn.commands.push(Command::WebStartFailed { function_id, container_id, message: message.to_owned() });
    }

    pub(crate) fn worker_exited(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        exit: &ContainerExit,
        turn: &mut Turn,
    ) {
        let Some(container) = self.containers.remove(&container_id) else {
            // Repeated until the desired set no longer names it.
            turn.desired_changed = true;
            return;
        };
        let function_id = container.function_id;
        turn.desired_changed = true;
        turn.writes.push(Write::ContainerEnded { container_id, exit: exit.clone(), at: now });
        if container.is_web {
            turn.commands.push(Command::WebGone { function_id, container_id });
        }
        if let Some((poll, _)) = container.poll {
            turn.replies.push(Reply::Empty { poll });
        }
        for (input_id, running) in container.running.clone() {
            let holds = self.inputs.get(&input_id).is_some_and(|input| {
                input.attempt == running.attempt && input.state == (InputState::Running { container_id })
            });
            if holds {
                self.attempt_died(now, input_id, container_id, container.phase, exit, turn);
            }
        }
        if !container.ever_ready && container.is_starting() {
            let (status, message) = match exit {
                ContainerExit::StartFailed { .. } | ContainerExit::Lost => {
                    (OutcomeStatus::InternalFailure, exit.to_string())
                }
                ContainerExit::Exited { .. } | ContainerExit::Signaled { .. } | ContainerExit::OutOfMemory => (
                    OutcomeStatus::InitFailure,
                    format!("{exit} before it was ready; the app's log shows what it printed"),
                ),
            };
            let outcome = Outcome::decided(status, message.clone());
            self.setup_failed(now, function_id, container_id, &outcome, &message, turn);
        }
        turn.commands.push(Command::Forget { container_id });
        self.dirty.insert(function_id);
        self.dirty.append(&mut self.starved);
        self.drop_pool_if_unused(function_id);
    }

    /// What becomes of an input whose container ended under it.
    fn attempt_died(
        &mut self,
        now: Timestamp,
        input_id: InputId,
        container_id: ContainerId,
        phase: Phase,
        exit: &ContainerExit,
        turn: &mut Turn,
    ) {
        let ours = match phase {
            // We ended it: the input is not to blame.
            Phase::Stopping { .. } => true,
            Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => {
                matches!(exit, ContainerExit::Lost | ContainerExit::StartFailed { .. })
            }
        };
        if ours {
            self.attempt_lost(now, input_id, &exit.to_string(), turn);
        } else {
            let outcome = Outcome::decided(
                OutcomeStatus::Failure,
                format!("{exit} while it ran this input; the app's log shows what it printed"),
            );
            self.attempt_ended(now, input_id, Some(container_id), None, outcome, turn);
        }
    }

    pub(crate) fn container_stop_requested(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        graceful: bool,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        if !self.containers.contains_key(&container_id) {
            turn.replies.push(Reply::Refused { reply, refusal: Refusal::UnknownContainer });
            return;
        }
        if graceful {
            self.drain(now, container_id, StopReason::Requested, turn);
        } else {
            self.stop_soon(now, container_id, StopReason::Requested, turn);
        }
        turn.replies.push(Reply::Accepted(reply));
    }

    /// Gives the container no new work; it ends when it is empty, or at a deadline that leaves its
    /// running inputs their time.
    pub(crate) fn drain(&mut self, now: Timestamp, container_id: ContainerId, reason: StopReason, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else { return };
        match container.phase {
            Phase::Starting { .. } => {
                // Nothing runs on it yet: no reason to wait.
                self.stop_now(container_id, reason, turn);
                return;
            }
            Phase::Ready => {}
            Phase::Draining { .. } | Phase::Stopping { .. } => return,
        }
        let timeout = self.pools.get(&container.function_id).map_or(Duration::ZERO, |pool| pool.settings.timeout);
        let busy = if container.is_empty() { Duration::ZERO } else { timeout };
        container.phase =
            Phase::Draining { reason, deadline: now + busy + self.config.drain_grace, kill_switch_sent: false };
        self.dirty.insert(container.function_id);
        if container.is_web {
            turn.commands.push(Command::WebDraining { function_id: container.function_id, container_id });
            if container.web_in_flight == 0 && container.running.is_empty() {
                // The ingress may have given it a request that its last report did not show: its next
                // report, which draining provokes, decides.
                return;
            }
        }
        self.send_kill_switch_if_drained(container_id, turn);
    }

    /// Answers the poll of an empty, draining container with its kill switch.
    pub(crate) fn send_kill_switch_if_drained(&mut self, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else { return };
        match &mut container.phase {
            Phase::Draining { kill_switch_sent, .. } if container.running.is_empty() && container.web_in_flight == 0 => {
                if let Some((poll, _)) = container.poll.take() {
                    *kill_switch_sent = true;
                    turn.replies.push(Reply::KillSwitch { poll });
                }
            }
            Phase::Stopping { .. } => {
                if let Some((poll, _)) = container.poll.take() {
                    turn.replies.push(Reply::KillSwitch { poll });
                }
            }
            Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => {}
        }
    }

    /// Ends the container whether or not it is busy, with the time that exit hooks need.
    pub(crate) fn stop_soon(&mut self, now: Timestamp, container_id: ContainerId, reason: StopReason, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else { return };
        if container.phase == Phase::Ready && container.is_empty() && !container.is_web {
            // Idle: its kill switch is the gentlest way, and as fast.
            self.drain(now, container_id, reason, turn);
            return;
        }
        self.stop_with(container_id, reason, self.config.stop_grace, turn);
    }

    /// Kills the container.
    pub(crate) fn stop_now(&mut self, container_id: ContainerId, reason: StopReason, turn: &mut Turn) {
        self.stop_with(container_id, reason, Duration::ZERO, turn);
    }

    fn stop_with(&mut self, container_id: ContainerId, reason: StopReason, grace: Duration, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else { return };
        if let Phase::Stopping { grace: current, .. } = container.phase
            && current <= grace
        {
            return;
        }
        let was_live = container.is_live();
        container.phase = Phase::Stopping { reason, grace };
        turn.desired_changed = true;
        self.dirty.insert(container.function_id);
        if container.is_web && was_live {
            turn.commands.push(Command::WebDraining { function_id: container.function_id, container_id });
        }
        self.send_kill_switch_if_drained(container_id, turn);
    }

    /// Stops containers that did not become ready, or did not end, in their time.
    pub(crate) fn expire_containers(&mut self, now: Timestamp, turn: &mut Turn) {
        let mut late_starts = Vec::new();
        let mut late_drains = Vec::new();
        for (container_id, container) in &self.containers {
            match container.phase {
                Phase::Starting { deadline } if deadline <= now => late_starts.push((*container_id, container.function_id)),
                Phase::Draining { deadline, reason, .. } if deadline <= now => late_drains.push((*container_id, reason)),
                Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } | Phase::Stopping { .. } => {}
            }
        }
        for (container_id, function_id) in late_starts {
            let seconds =
                self.pools.get(&function_id).map_or(0, |pool| pool.settings.startup_timeout.as_secs());
            let message = format!(
                "the container was not ready after its startup timeout of {seconds}s; raise `startup_timeout=` (or `timeout=`) if it needs longer"
            );
            let outcome = Outcome::decided(OutcomeStatus::InitFailure, message.clone());
            self.setup_failed(now, function_id, container_id, &outcome, &message, turn);
            self.stop_now(container_id, StopReason::TimedOut, turn);
        }
        for (container_id, reason) in late_drains {
            self.stop_with(container_id, reason, self.config.stop_grace, turn);
        }
    }

    pub(crate) fn shut_down(&mut self, turn: &mut Turn) {
        self.shutting_down = true;
        let all: Vec<ContainerId> = self.containers.keys().copied().collect();
        for container_id in all {
            self.stop_with(container_id, StopReason::ShuttingDown, self.config.stop_grace, turn);
        }
    }
}

impl crate::state::Container {
    /// Whether its exit means that it could not be set up. A container that we stop while it starts
    /// says nothing about the function.
    fn is_starting(&self) -> bool {
        matches!(self.phase, Phase::Starting { .. })
    }
}
