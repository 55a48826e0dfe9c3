//! Attempts: what comes back from containers, and what becomes of an input then.

use std::time::Duration;

use ionian_domain::container::StopReason;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::breaks::Break;
use crate::event::{AttemptReport, Refusal, ReplyId};
use crate::state::{InputState, State};
use crate::turn::{Command, Reply, Turn};

/// An input whose containers keep being lost through no fault of its own is given up after this many
/// tries, so that it cannot go round for ever. It follows from what is recorded (attempts that no retry
/// policy paid for), so a restart does not begin the count anew.
const MAX_LOST_ATTEMPTS: u32 = 8;

impl State {
    /// Takes a container's report that attempts ended.
    ///
    /// A report can be late: the input was cancelled, timed out, or went to another container. Only the
    /// live attempt decides, so that an input has exactly one outcome.
    pub(crate) fn outputs_reported(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        outputs: Vec<AttemptReport>,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        let is_fenced = !self.containers.contains_key(&container_id);
        if is_fenced && !self.is_broken(Break::AnswersTheFenced) {
            // It ended, or its worker was given up: whatever it ran was decided then, or runs elsewhere.
            self.refuse(reply, Refusal::UnknownContainer, turn);
            return;
        }
        self.adopted_reports(container_id, &outputs);
        for report in outputs {
            if let Some(container) = self.containers.get_mut(&container_id)
                && let Some(running) = container.running.get(&report.input_id)
                && running.attempt == report.attempt
            {
                container.running.remove(&report.input_id);
                container.note_idle(now);
                container.has_served = true;
                self.dirty.insert(container.function_id);
                self.start_was_worth_it(container_id);
            }
            let Some(input) = self.inputs.get(&report.input_id) else {
                // Finished already, or never ours.
                continue;
            };
            let is_live = match input.state {
                InputState::Running { container_id: holder } => {
                    holder == container_id && input.attempt == report.attempt
                }
                // Superseded: the input waits or runs again elsewhere.
                InputState::Queued | InputState::Delayed { .. } => false,
            };
            if !is_live && !self.is_broken(Break::TakesSupersededReport) {
                continue;
            }
            if report.outcome.status == OutcomeStatus::Terminated {
                // Whoever cancels an input decides it here first, so nobody cancelled this one. Its runtime
                // was told to end (an asynchronous input reports that, a synchronous one does not), or was
                // told late to let go of the attempt before.
                self.attempt_lost(now, report.input_id, "its container cancelled it", turn);
            } else {
                let started_at = report.started_at;
                self.attempt_ended(
                    now,
                    report.input_id,
                    Some(container_id),
                    started_at,
                    report.outcome,
                    turn,
                );
            }
        }
        self.end_if_drained(now, container_id, turn);
        turn.replies.push(Reply::Accepted(reply));
    }

    /// Retries an input by its function's policy, or records its outcome.
    pub(crate) fn attempt_ended(
        &mut self,
        now: Timestamp,
        input_id: InputId,
        container_id: Option<ContainerId>,
        started_at: Option<Timestamp>,
        outcome: Outcome,
        turn: &mut Turn,
    ) {
        let Some(input) = self.inputs.get(&input_id) else {
            return;
        };
        let retry = self
            .pools
            .get(&input.function_id)
            .filter(|pool| pool.active)
            .map(|pool| pool.settings.retry);
        let retryable = match outcome.status {
            OutcomeStatus::Failure | OutcomeStatus::Timeout | OutcomeStatus::InternalFailure => true,
            // A success needs none, a cancelled input wants none, and a function that cannot be set up
            // would fail the same way again.
            OutcomeStatus::Success
            | OutcomeStatus::Terminated
            | OutcomeStatus::InitFailure
            | OutcomeStatus::IdleTimeout => false,
        };
        match retry {
            Some(policy) if retryable && input.retries_used < policy.max_retries => {
                let used = input.retries_used + 1;
                self.requeue(now, input_id, policy.delay(used), used, turn);
            }
            Some(_) | None => self.finish_input(now, input_id, container_id, started_at, outcome, turn),
        }
    }

    /// An attempt was lost through no fault of the user's: it is tried again for free.
    pub(crate) fn attempt_lost(&mut self, now: Timestamp, input_id: InputId, sentence: &str, turn: &mut Turn) {
        let Some(input) = self.inputs.get(&input_id) else {
            return;
        };
        let (lost, used) = (input.lost_attempts() + 1, input.retries_used);
        if lost >= MAX_LOST_ATTEMPTS {
            let outcome = Outcome::decided(
                OutcomeStatus::InternalFailure,
                format!("the input was given up after {lost} containers were lost under it; the last one: {sentence}"),
            );
            self.finish_input(now, input_id, None, None, outcome, turn);
        } else {
            self.requeue(now, input_id, Duration::ZERO, used, turn);
        }
    }

    /// Puts an input that ran back to wait, with the next attempt number. It keeps its place: it has
    /// waited longest already.
    fn requeue(&mut self, now: Timestamp, input_id: InputId, delay: Duration, retries_used: u32, turn: &mut Turn) {
        let input = self.inputs.get_mut(&input_id).expect("the caller looked the input up");
        let pool = self
            .pools
            .get_mut(&input.function_id)
            .expect("an unfinished input's pool exists");
        let not_before = now + delay;
        input.attempt = input.attempt.next();
        input.retries_used = retries_used;
        input.waiting_since = not_before;
        if delay.is_zero() {
            input.state = InputState::Queued;
            pool.queue.insert(input.arrival, input_id);
        } else {
            input.state = InputState::Delayed { until: not_before };
            pool.delayed.insert((not_before, input_id));
        }
        let attempt = input.attempt;
        self.dirty.insert(input.function_id);
        if !self.is_broken(Break::RequeuesUnrecorded) {
            turn.writes.push(Write::InputRequeued {
                input_id,
                attempt,
                not_before,
                retries_used,
            });
        }
    }

    /// The attempt was decided, but its container still runs it: it has a moment to let go of it, and is
    /// killed if it does not. Until then the slot stays taken. True where the container is to be told.
    pub(crate) fn abandon(&mut self, now: Timestamp, container_id: ContainerId, input_id: InputId) -> bool {
        let until = now + self.config.cancel_grace;
        let Some(container) = self.containers.get_mut(&container_id) else {
            return false;
        };
        self.dirty.insert(container.function_id);
        // Only a live attempt is decided, so none is abandoned twice.
        let Some(running) = container.running.get_mut(&input_id) else {
            return false;
        };
        running.abandoned_until = Some(until);
        true
    }

    /// Ends attempts of a pool that overran their time.
    pub(crate) fn expire_attempts(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) {
        if self.is_broken(Break::IgnoresTimeouts) {
            return;
        }
        let Some(pool) = self.pools.get(&function_id) else {
            return;
        };
        let timeout = pool.settings.timeout.as_secs_f64();
        let mut overdue = Vec::new();
        let mut stuck = Vec::new();
        for (container_id, container) in self.containers_in(pool) {
            for (input_id, running) in &container.running {
                match running.abandoned_until {
                    None if running.deadline <= now => overdue.push((container_id, *input_id)),
                    Some(until) if until <= now => stuck.push(container_id),
                    None | Some(_) => {}
                }
            }
        }
        for (container_id, input_id) in overdue {
            if self.abandon(now, container_id, input_id) {
                turn.commands.push(Command::CancelInputs {
                    container_id,
                    input_ids: vec![input_id],
                });
            }
            let is_held = |state| state == InputState::Running { container_id };
            if self.inputs.get(&input_id).is_some_and(|input| is_held(input.state)) {
                let sentence = format!("Task's current input hit its timeout of {timeout}s");
                let outcome = Outcome::decided(OutcomeStatus::Timeout, sentence);
                self.attempt_ended(now, input_id, Some(container_id), None, outcome, turn);
            }
        }
        stuck.dedup();
        for container_id in stuck {
            self.stop_now(now, container_id, StopReason::TimedOut, turn);
        }
    }
}
