//! Ends: what a container's failure or exit means for its inputs, and for the next start.

use std::time::Duration;

use ionian_domain::container::{ContainerExit, StopReason};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::breaks::Break;
use crate::event::ReplyId;
use crate::state::{Container, InputState, Phase, State};
use crate::turn::{Command, Reply, Turn};

/// The pause after the first failure that is not forgiven, doubled by each further one.
const FIRST_START_BACKOFF: Duration = Duration::from_secs(1);

/// The longest pause between two starts of a function whose containers keep failing.
const MAX_START_BACKOFF: Duration = Duration::from_mins(1);

/// Failures in a row that are forgiven without a pause: one request, one try.
const FREE_FAILURES: u32 = 1;

/// A container that ended by itself after this long was of use, even where it served nothing.
const STABLE_AFTER: Duration = Duration::from_mins(1);

/// Pause after the worker lost a container that was starting. That is not the function's fault and is
/// not counted; the pause keeps a worker that loses everything from being asked in a circle.
const LOST_START_PAUSE: Duration = Duration::from_millis(100);

/// Why a container did not become ready.
pub(crate) enum SetupFailure {
    /// Of the user's code: the next container would fail the same way.
    Code,
    /// Of the platform: the next one may succeed.
    Platform,
    /// The worker lost it, or the server was away: nobody knows why it ended.
    Lost,
}

impl State {
    /// The container answered something: its function can be set up. Failures count anew.
    ///
    /// Readiness alone is not enough: a container that is ready and ends at once, again and again, must
    /// be backed off from too.
    pub(crate) fn start_was_worth_it(&mut self, container_id: ContainerId) {
        let Some(container) = self.containers.get(&container_id) else {
            return;
        };
        if let Some(pool) = self.pools.get_mut(&container.function_id)
            && pool.settings.definition_id == container.definition_id
        {
            pool.failures = 0;
        }
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
        let Some(container) = self.containers.get(&container_id) else {
            return;
        };
        let function_id = container.function_id;
        match container.phase {
            Phase::Starting { .. } => {}
            // After readiness a failure concerns this container only (an exit hook, say); its exit
            // decides about its inputs. One that is being stopped may be of an older definition, whose
            // failure says nothing about what waits now.
            Phase::Ready | Phase::Draining { .. } | Phase::Stopping { .. } => return,
        }
        let outcome = Outcome {
            status: OutcomeStatus::InitFailure,
            ..outcome.clone()
        };
        self.setup_failed(now, function_id, container_id, &SetupFailure::Code, &outcome, turn);
        self.stop_soon(now, container_id, StopReason::Requested, turn);
    }

    /// Pauses the starts of a function whose container was of no use, and fails what waits for it where
    /// waiting is in vain.
    pub(crate) fn setup_failed(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        container_id: ContainerId,
        failure: &SetupFailure,
        outcome: &Outcome,
        turn: &mut Turn,
    ) {
        let definition = self.pools.get(&function_id).map(|pool| pool.settings.definition_id);
        let others_serve = !self
            .containers_of(function_id, |container| {
                Some(container.definition_id) == definition
                    && container.ready_at.is_some()
                    && matches!(container.phase, Phase::Ready | Phase::Draining { .. })
            })
            .is_empty();
        let is_final = match failure {
            SetupFailure::Lost => {
                if let Some(pool) = self.pools.get_mut(&function_id) {
                    pool.start_not_before = pool.start_not_before.max(Some(now + LOST_START_PAUSE));
                }
                return;
            }
            SetupFailure::Code => true,
            SetupFailure::Platform => false,
        };
        let failures = self.start_failed(now, function_id, turn);
        // Another container of the function serves: this failure is its own affair.
        if others_serve || !is_final && failures <= FREE_FAILURES {
            return;
        }
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return;
        };
        pool.web_queued = 0;
        if pool.settings.is_web {
            let message = outcome.exception.clone();
            turn.commands.push(Command::WebStartFailed {
                function_id,
                container_id,
                message,
            });
        }
        let delayed = pool.delayed.iter().map(|(_, input_id)| *input_id);
        let waiting: Vec<InputId> = pool.queue.values().copied().chain(delayed).collect();
        for input_id in waiting {
            self.finish_input(now, input_id, Some(container_id), None, outcome.clone(), turn);
        }
    }

    /// Counts a start that was of no use, and pauses after more than is forgiven.
    fn start_failed(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) -> u32 {
        let is_broken = self.is_broken(Break::NeverBacksOff);
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return 0;
        };
        pool.failures += 1;
        if pool.failures > FREE_FAILURES && !is_broken {
            // Sixty seconds are reached by the sixth failure, long before the power overflows.
            let pause = FIRST_START_BACKOFF * 2u32.saturating_pow(pool.failures.min(10));
            let until = now + pause.min(MAX_START_BACKOFF);
            pool.start_not_before = Some(until);
            turn.commands.push(Command::BackedOff {
                function_id,
                failures: pool.failures,
                until,
            });
        }
        pool.failures
    }

    pub(crate) fn worker_exited(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        exit: &ContainerExit,
        turn: &mut Turn,
    ) {
        // An exit is repeated until the desired set no longer names its container.
        turn.desired_changed = true;
        if let Some(container) = self.containers.get(&container_id) {
            self.worker_heard(now, container.worker_id, turn);
        }
        self.container_ended(now, container_id, exit, turn);
    }

    /// Decides what becomes of what a container ran, and of its function.
    pub(crate) fn container_ended(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        exit: &ContainerExit,
        turn: &mut Turn,
    ) {
        let Some(mut container) = self.containers.remove(&container_id) else {
            return;
        };
        let function_id = container.function_id;
        self.dirty.insert(function_id);
        turn.writes.push(Write::ContainerEnded {
            container_id,
            exit: exit.clone(),
            at: now,
        });
        if let Some((poll, _)) = container.poll.take() {
            turn.replies.push(Reply::Empty { poll });
        }
        if let Some(pool) = self.pools.get_mut(&function_id) {
            pool.containers.remove(&container_id);
        }
        let ours = !Self::is_to_blame(&container, exit);
        for input_id in container.running.keys() {
            // An entry can be older than the input's present attempt, which then waits or runs elsewhere.
            let input = self.inputs.get(input_id);
            if input.is_none_or(|input| input.state != (InputState::Running { container_id })) {
                continue;
            }
            if self.is_broken(Break::ForgetsInputsOfTheDead) {
                continue;
            }
            if ours {
                self.attempt_lost(now, *input_id, &exit.to_string(), turn);
            } else {
                let sentence = format!("{exit} while it ran this input; the app's log shows what it printed");
                let outcome = Outcome::decided(OutcomeStatus::Failure, sentence);
                self.attempt_ended(now, *input_id, Some(container_id), None, outcome, turn);
            }
        }
        self.judge_start(now, container_id, &container, exit, turn);
        if container.is_web {
            turn.commands.push(Command::WebGone {
                function_id,
                container_id,
            });
        }
        turn.commands.push(Command::Forget { container_id });
        if self.is_broken(Break::KeepsExitedContainer) {
            container.running.clear();
            self.containers.insert(container_id, container);
        }
        self.drop_pool_if_unused(function_id);
    }

    /// Whether the inputs that a container ran are to blame for its end.
    fn is_to_blame(container: &Container, exit: &ContainerExit) -> bool {
        match container.phase {
            // We ended it.
            Phase::Stopping { .. } => return false,
            Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => {}
        }
        if container.is_unheard() {
            // It may have given up waiting for the server, or have ended while nobody listened.
            return false;
        }
        if container.is_letting_go() {
            // The runtime cancels a synchronous input of a concurrent function by ending its process,
            // and the other inputs with it.
            return false;
        }
        match exit {
            // Killed from outside: by a person, or by the host when it ran out of memory. A program's
            // own crash has other signals, and its own limit of memory is told apart.
            ContainerExit::Signaled { signal: 2 | 9 | 15 }
            | ContainerExit::Lost
            | ContainerExit::StartFailed { .. } => false,
            ContainerExit::Signaled { .. } | ContainerExit::Exited { .. } | ContainerExit::OutOfMemory => true,
        }
    }

    /// Decides what a container's end says about the next start of its function.
    fn judge_start(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        container: &Container,
        exit: &ContainerExit,
        turn: &mut Turn,
    ) {
        let function_id = container.function_id;
        match (container.phase, container.ready_at) {
            (Phase::Starting { .. }, _) | (Phase::Ready, None) => {
                let (failure, status, message) = match exit {
                    // It may have been ready before the server restarted.
                    _ if container.adopted.is_some() => {
                        (SetupFailure::Lost, OutcomeStatus::InternalFailure, exit.to_string())
                    }
                    ContainerExit::Lost => (SetupFailure::Lost, OutcomeStatus::InternalFailure, exit.to_string()),
                    ContainerExit::StartFailed { .. } => {
                        (SetupFailure::Platform, OutcomeStatus::InternalFailure, exit.to_string())
                    }
                    ContainerExit::Exited { .. } | ContainerExit::Signaled { .. } | ContainerExit::OutOfMemory => (
                        SetupFailure::Code,
                        OutcomeStatus::InitFailure,
                        format!("{exit} before it was ready; the app's log shows what it printed"),
                    ),
                };
                let outcome = Outcome::decided(status, message);
                self.setup_failed(now, function_id, container_id, &failure, &outcome, turn);
            }
            (Phase::Ready, Some(ready_at)) => {
                let was_useless = !container.has_served && container.running.is_empty() && container.adopted.is_none();
                if was_useless && *exit != ContainerExit::Lost && now.since(ready_at) < STABLE_AFTER {
                    self.start_failed(now, function_id, turn);
                }
            }
            // We ended it: if it was ready, it could be set up; if not, its end says nothing.
            (Phase::Draining { .. } | Phase::Stopping { .. }, Some(_)) => {
                if let Some(pool) = self.pools.get_mut(&function_id)
                    && pool.settings.definition_id == container.definition_id
                {
                    pool.failures = 0;
                }
            }
            (Phase::Draining { .. } | Phase::Stopping { .. }, None) => {}
        }
    }
}
