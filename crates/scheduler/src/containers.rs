//! Containers: from their first poll to the order to end. What their end means is decided in `exits`.

use std::time::Duration;

use ionian_domain::container::StopReason;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{ContainerId, FunctionId, Outcome, Timestamp};

use crate::event::{Refusal, ReplyId};
use crate::exits::SetupFailure;
use crate::state::{Phase, State};
use crate::turn::{Command, Reply, Turn};

impl State {
    /// The container takes work from now on. Called on every poll; only the first changes anything.
    pub(crate) fn container_ready(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        if !matches!(container.phase, Phase::Starting { .. }) || container.awaits_worker() {
            return;
        }
        container.phase = Phase::Ready;
        container.ready_at = Some(now);
        container.idle_since = Some(now);
        let function_id = container.function_id;
        if container.is_web {
            turn.commands.push(Command::WebReady {
                function_id,
                container_id,
            });
        }
        if let Some(pool) = self.pools.get_mut(&function_id) {
            pool.start_not_before = None;
        }
        self.dirty.insert(function_id);
    }

    /// Notes that the container exists: from now on a worker that does not have it has lost it.
    pub(crate) fn container_seen(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        if let Some(container) = self.containers.get_mut(&container_id)
            && container.seen_at.is_none()
        {
            container.seen_at = Some(now);
            turn.desired_changed = true;
        }
    }

    /// `@app.server` containers never poll, neither for work nor for their kill switch.
    pub(crate) fn server_ready(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        self.container_seen(now, container_id, turn);
        if let Some(container) = self.containers.get_mut(&container_id) {
            container.never_polls = true;
        }
        self.container_ready(now, container_id, turn);
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
            self.refuse(reply, Refusal::UnknownContainer, turn);
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
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        match container.phase {
            Phase::Starting { .. } if container.adopted.is_none() => {
                // Nothing runs on it yet: no reason to wait.
                self.stop_now(now, container_id, reason, turn);
                return;
            }
            // One that outlived the server may have been ready long ago: its exit hooks run.
            Phase::Starting { .. } | Phase::Ready => {}
            Phase::Draining { .. } | Phase::Stopping { .. } => return,
        }
        let timeout = self
            .pools
            .get(&container.function_id)
            .map_or(Duration::ZERO, |pool| pool.settings.timeout);
        let busy = if container.is_empty() { Duration::ZERO } else { timeout };
        // The ingress may have given it a request that its last report did not show: its next report,
        // which draining provokes, decides.
        let awaits_ingress = container.is_web && container.ready_at.is_some();
        let deadline = now + busy + self.config.drain_grace;
        container.phase = Phase::Draining {
            reason,
            deadline,
            awaits_ingress,
        };
        self.dirty.insert(container.function_id);
        if awaits_ingress {
            turn.commands.push(Command::WebDraining {
                function_id: container.function_id,
                container_id,
            });
        }
        self.end_if_drained(now, container_id, turn);
    }

    /// Ends a container that drains and is empty: by the answer to its poll, which it is told to make its
    /// last, or by the worker where it has none to be told by.
    pub(crate) fn end_if_drained(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        let is_empty = container.is_empty();
        match &mut container.phase {
            Phase::Draining {
                reason,
                deadline,
                awaits_ingress: false,
            } if is_empty => {
                *deadline = (now + self.config.drain_grace).min(*deadline);
                let reason = *reason;
                self.dirty.insert(container.function_id);
                if let Some((poll, _)) = container.take_poll(now) {
                    turn.replies.push(Reply::KillSwitch { poll });
                } else if container.never_polls {
                    self.stop_with(now, container_id, reason, self.config.stop_grace, turn);
                }
            }
            Phase::Stopping { .. } => {
                if let Some((poll, _)) = container.take_poll(now) {
                    turn.replies.push(Reply::KillSwitch { poll });
                }
            }
            Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => {}
        }
    }

    /// Ends the container whether or not it is busy, with the time that exit hooks need.
    pub(crate) fn stop_soon(&mut self, now: Timestamp, container_id: ContainerId, reason: StopReason, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        if container.phase == Phase::Ready && container.is_empty() && !container.is_web {
            // Idle: its kill switch is the gentlest way, and as fast.
            self.drain(now, container_id, reason, turn);
            return;
        }
        self.stop_with(now, container_id, reason, self.config.stop_grace, turn);
    }

    /// Kills the container.
    pub(crate) fn stop_now(&mut self, now: Timestamp, container_id: ContainerId, reason: StopReason, turn: &mut Turn) {
        self.stop_with(now, container_id, reason, Duration::ZERO, turn);
    }

    pub(crate) fn stop_with(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        reason: StopReason,
        grace: Duration,
        turn: &mut Turn,
    ) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        if let Phase::Stopping { grace: current, .. } = container.phase
            && current <= grace
        {
            return;
        }
        let was_serving = container.phase == Phase::Ready;
        container.phase = Phase::Stopping { reason, grace };
        turn.desired_changed = true;
        self.dirty.insert(container.function_id);
        if container.is_web && was_serving {
            turn.commands.push(Command::WebDraining {
                function_id: container.function_id,
                container_id,
            });
        }
        self.end_if_drained(now, container_id, turn);
    }

    /// Stops containers of a pool that did not become ready, did not end or do not answer, in their time.
    pub(crate) fn expire_containers(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) {
        let Some(pool) = self.pools.get(&function_id) else {
            return;
        };
        let startup_timeout = pool.settings.startup_timeout.as_secs_f64();
        let due = self.containers_of(function_id, |container| {
            container.phase_deadline().is_some_and(|deadline| deadline <= now)
        });
        for container_id in due {
            let container = &self.containers[&container_id];
            match container.phase {
                // It may have been ready before the server restarted: its silence says nothing about the next.
                Phase::Starting { .. } if container.adopted.is_some() => {
                    self.stop_now(now, container_id, StopReason::TimedOut, turn);
                }
                Phase::Starting { .. } => {
                    let sentence = format!(
                        "the container was not ready after its startup timeout of {startup_timeout}s; \
                         raise `startup_timeout=` (or `timeout=`) if it needs longer"
                    );
                    let outcome = Outcome::decided(OutcomeStatus::InitFailure, sentence);
                    self.setup_failed(now, function_id, container_id, &SetupFailure::Code, &outcome, turn);
                    self.stop_now(now, container_id, StopReason::TimedOut, turn);
                }
                // Idle, and it asks for nothing: its runtime hangs. Another takes its place.
                Phase::Ready => {
                    self.stop_with(now, container_id, StopReason::TimedOut, self.config.stop_grace, turn);
                }
                Phase::Draining { reason, .. } => {
                    self.stop_with(now, container_id, reason, self.config.stop_grace, turn);
                }
                Phase::Stopping { .. } => {}
            }
        }
    }

    pub(crate) fn shut_down(&mut self, now: Timestamp, turn: &mut Turn) {
        self.shutting_down = true;
        // Those that wait for room do not get what becomes free now.
        self.dirty.extend(self.pools.keys());
        let all: Vec<ContainerId> = self.containers.keys().copied().collect();
        for container_id in all {
            self.stop_with(
                now,
                container_id,
                StopReason::ShuttingDown,
                self.config.stop_grace,
                turn,
            );
        }
    }
}
