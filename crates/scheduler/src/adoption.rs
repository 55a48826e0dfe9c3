//! Adoption: containers that outlived the server that started them.
//!
//! What is recorded of a container is what was decided, not what it knows. It goes on in its recorded
//! place: what it ran is still running there, as the same attempt and until the same deadline. What was
//! not recorded is treated with care until the container speaks again: whether it was ready, whether it
//! was told to end, and whether the last inputs that it was given ever reached it.

use std::collections::BTreeMap;
use std::time::Duration;

use ionian_domain::container::{ContainerExit, RuntimeKind, StopReason};
use ionian_domain::function::{Autoscaler, RetryPolicy};
use ionian_domain::record::{PendingContainer, Write};
use ionian_domain::{AppId, ContainerId, DefinitionId, InputId, Timestamp};

use crate::breaks::Break;
use crate::event::{AttemptReport, PoolSettings};
use crate::state::{Adopted, Container, InputState, Phase, Pool, RunningInput, State};
use crate::turn::{Command, Turn};

/// A container goes on trying to report for about this long while the server is away.
const LATE_REPORT: Duration = Duration::from_mins(1);

impl PoolSettings {
    /// Stands for a function that is gone, while its last containers end. How much they hold is not known,
    /// so nothing starts beside them.
    fn of_a_function_that_is_gone(app_id: AppId, definition_id: DefinitionId) -> Self {
        Self {
            app_id,
            definition_id,
            is_web: false,
            autoscaler: Autoscaler {
                min_containers: 0,
                max_containers: None,
                buffer_containers: 0,
                scaledown_window: Duration::ZERO,
            },
            slots: 1,
            target_slots: 1,
            batching: None,
            retry: RetryPolicy::NONE,
            timeout: Duration::ZERO,
            startup_timeout: Duration::ZERO,
            single_use: false,
            cpu_millis: u32::MAX,
            memory_mib: u32::MAX,
            runtime: RuntimeKind::Runc,
        }
    }
}

impl State {
    /// Takes a container that had not ended when the server stopped. Its worker has `worker_silence` to
    /// say whether it still exists.
    pub(crate) fn adopt(&mut self, now: Timestamp, pending: &PendingContainer, turn: &mut Turn) {
        let origin = pending.origin.filter(|_| !self.is_broken(Break::ForgetsSurvivors));
        let Some((worker_id, definition_id)) = origin else {
            // Recorded by a version whose containers ended with it.
            turn.writes.push(Write::ContainerEnded {
                container_id: pending.id,
                exit: ContainerExit::Lost,
                at: now,
            });
            turn.commands.push(Command::Forget {
                container_id: pending.id,
            });
            return;
        };
        self.expect_worker(now, worker_id);
        let gone = || Pool {
            active: false,
            ..Pool::new(PoolSettings::of_a_function_that_is_gone(pending.app_id, definition_id))
        };
        let waits_for_worker = !self.is_broken(Break::ServesUnseenWebContainers);
        let pool = self.pools.entry(pending.function_id).or_insert_with(gone);
        pool.containers.insert(pending.id);
        self.dirty.insert(pending.function_id);
        let settings = &pool.settings;
        // One of an older definition serves nobody: nothing is sent to it before it ends.
        let is_web = settings.is_web && settings.definition_id == definition_id;
        let container = Container {
            worker_id,
            app_id: pending.app_id,
            function_id: pending.function_id,
            definition_id,
            phase: Phase::Starting {
                deadline: now + settings.startup_timeout,
            },
            created_at: pending.created_at,
            running: BTreeMap::new(),
            poll: None,
            silent_since: None,
            idle_since: None,
            web_in_flight: 0,
            ready_at: None,
            has_served: false,
            never_polls: false,
            is_web,
            seen_at: Some(now),
            adopted: Some(Adopted {
                is_unheard: true,
                awaits_worker: is_web && waits_for_worker,
                web_was_ready: pending.web_ready_at.is_some(),
            }),
            // An older definition may have asked for something else, which is not recorded.
            cpu_millis: settings.cpu_millis,
            memory_mib: settings.memory_mib,
        };
        self.containers.insert(pending.id, container);
    }

    /// Puts an input back into the container that runs it, which therefore was ready.
    pub(crate) fn adopt_input(
        &mut self,
        now: Timestamp,
        input_id: InputId,
        container_id: ContainerId,
        started_at: Timestamp,
        is_doubtful: bool,
    ) {
        let input = &self.inputs[&input_id];
        let settings = &self.pools[&input.function_id].settings;
        let container = self
            .containers
            .get_mut(&container_id)
            .expect("only an input of an adopted container is adopted");
        // What ran out of time while nobody listened may have ended in time, and be about to say so.
        let deadline = (started_at + settings.timeout).max(now + LATE_REPORT);
        let running = RunningInput {
            attempt: input.attempt,
            deadline,
            abandoned_until: None,
            is_doubtful,
        };
        container.running.insert(input_id, running);
        container.ready_at.get_or_insert(now);
        container.has_served = true;
        container.phase = if settings.single_use {
            // It ends by itself after this input.
            Phase::Draining {
                reason: StopReason::ScaleDown,
                deadline: deadline + self.config.drain_grace,
                awaits_ingress: false,
            }
        } else {
            Phase::Ready
        };
    }

    /// Ends adopted containers that would not be started today.
    pub(crate) fn end_outdated(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get(&container_id) else {
            return;
        };
        let pool = &self.pools[&container.function_id];
        if self.is_broken(Break::KeepsOutdatedSurvivors) {
            return;
        }
        if !pool.active {
            let grace = self.config.stop_grace;
            self.stop_with(now, container_id, StopReason::AppStopped, grace, turn);
        } else if pool.settings.definition_id != container.definition_id {
            self.drain(now, container_id, StopReason::Superseded, turn);
        }
    }

    /// An adopted container asks for work: what it was given last, and never reported, did not reach it.
    ///
    /// A runtime that takes one input (or batch) at a time asks when it has none, so this is certain. One
    /// that takes several may have got it; it then runs twice, and the first result is refused.
    pub(crate) fn adopted_polls(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        let Some(adopted) = &mut container.adopted else {
            return;
        };
        adopted.is_unheard = false;
        // It does ask for work, so its silence would mean something.
        container.never_polls = false;
        if self.is_broken(Break::TrustsTheLastDelivery) {
            return;
        }
        let container = self.containers.get_mut(&container_id).expect("it was just found");
        let doubtful: Vec<InputId> = container
            .running
            .iter()
            .filter(|(_, running)| running.is_doubtful)
            .map(|(id, _)| *id)
            .collect();
        for input_id in &doubtful {
            container.running.remove(input_id);
        }
        container.note_idle(now);
        for input_id in doubtful {
            let is_held = |state| state == InputState::Running { container_id };
            if self.inputs.get(&input_id).is_some_and(|input| is_held(input.state)) {
                self.attempt_lost(now, input_id, "the server restarted while it was handed over", turn);
            }
        }
    }

    /// An adopted container reports: who has one input of a delivery has all of it.
    pub(crate) fn adopted_reports(&mut self, container_id: ContainerId, outputs: &[AttemptReport]) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        let Some(adopted) = &mut container.adopted else {
            return;
        };
        adopted.is_unheard = false;
        let has_it = outputs.iter().any(|report| {
            let running = container.running.get(&report.input_id);
            running.is_some_and(|running| running.is_doubtful && running.attempt == report.attempt)
        });
        if has_it {
            for running in container.running.values_mut() {
                running.is_doubtful = false;
            }
        }
    }

    /// The worker said where an adopted web container is reached: requests may go there.
    pub(crate) fn adopted_web_ready(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        let Some(adopted) = &mut container.adopted else {
            return;
        };
        if !std::mem::take(&mut adopted.awaits_worker) {
            return;
        }
        if adopted.web_was_ready || container.poll.is_some() || container.never_polls {
            // A plain server never polls. Which kind it is shows when it does.
            container.never_polls = container.poll.is_none();
            self.container_ready(now, container_id, turn);
        }
        self.end_if_drained(now, container_id, turn);
    }
}
