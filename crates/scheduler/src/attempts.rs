//! Attempts: how inputs reach containers, and what comes back.

use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::event::{AttemptReport, PollId, ReplyId};
use crate::state::{InputState, Phase, RunningInput, State};
use crate::turn::{Command, Delivery, Reply, Turn};

/// An input whose containers keep being lost through no fault of its own is given up after this many
/// tries, so that it cannot go round for ever.
const MAX_LOST_ATTEMPTS: u32 = 8;

impl State {
    pub(crate) fn poll_started(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        poll: PollId,
        max_inputs: u32,
        turn: &mut Turn,
    ) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            // It was given up while this poll travelled: it must end.
            turn.replies.push(Reply::KillSwitch { poll });
            return;
        };
        if let Some((superseded, _)) = container.poll.replace((poll, max_inputs.max(1))) {
            // A runtime has one poll at a time; the older one is a retry whose answer would be lost.
            turn.replies.push(Reply::Empty { poll: superseded });
        }
        self.container_ready(now, container_id, turn);
        self.send_kill_switch_if_drained(container_id, turn);
        if let Some(container) = self.containers.get(&container_id) {
            self.dirty.insert(container.function_id);
        }
    }

    pub(crate) fn poll_dropped(&mut self, container_id: ContainerId, poll: PollId) {
        if let Some(container) = self.containers.get_mut(&container_id)
            && container.poll.is_some_and(|(current, _)| current == poll)
        {
            container.poll = None;
        }
    }

    /// Takes back inputs that never reached the container they were handed to.
    pub(crate) fn delivery_lost(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        inputs: &[InputId],
        turn: &mut Turn,
    ) {
        for input_id in inputs {
            if let Some(container) = self.containers.get_mut(&container_id) {
                container.running.remove(input_id);
                if container.is_empty() {
                    container.idle_since = Some(now);
                }
            }
            let held = self.inputs.get(input_id).is_some_and(|input| input.state == (InputState::Running { container_id }));
            if held {
                self.attempt_lost(now, *input_id, "its poll was cut off", turn);
            }
        }
        self.send_kill_switch_if_drained(container_id, turn);
    }

    /// Hands waiting inputs of a pool to containers that poll for them, oldest container first.
    pub(crate) fn deliver(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) {
        self.release_delayed(now, function_id);
        loop {
            let Some(pool) = self.pools.get_mut(&function_id) else { return };
            if pool.queue.is_empty() {
                pool.batch_opened = None;
                return;
            }
            let wanted = match pool.settings.batching {
                Some(batching) => {
                    let full = pool.queue.len() >= batching.max_size as usize;
                    let waited = pool.batch_opened.is_none_or(|opened| now.since(opened) >= batching.wait);
                    if !full && !waited {
                        return;
                    }
                    batching.max_size
                }
                None => 1,
            };
            let definition = pool.settings.definition_id;
            let slots = pool.settings.slots.max(wanted);
            let polling = self
                .containers
                .iter()
                .filter(|(_, c)| {
                    c.function_id == function_id
                        && c.definition_id == definition
                        && c.phase == Phase::Ready
                        && c.poll.is_some()
                        && (c.running.len() as u32) < slots
                })
                .min_by_key(|(id, c)| (c.created_at, **id))
                .map(|(id, _)| *id);
            let Some(container_id) = polling else { return };
            self.deliver_to(now, container_id, wanted, turn);
        }
    }

    fn deliver_to(&mut self, now: Timestamp, container_id: ContainerId, wanted: u32, turn: &mut Turn) {
        let container = self.containers.get_mut(&container_id).expect("deliver chose a known container");
        let (poll, max_inputs) = container.poll.take().expect("deliver chose a polling container");
        let pool = self.pools.get_mut(&container.function_id).expect("a container's pool exists");
        let deadline = now + pool.settings.timeout;
        let mut inputs = Vec::new();
        while inputs.len() < wanted.min(max_inputs) as usize {
            let Some(input_id) = pool.queue.pop_front() else { break };
            let input = self.inputs.get_mut(&input_id).expect("a queued input is known");
            let call = self.calls.get(&input.call_id).expect("an unfinished input keeps its call in memory");
            input.state = InputState::Running { container_id };
            container
                .running
                .insert(input_id, RunningInput { attempt: input.attempt, deadline, abandoned_until: None });
            turn.writes.push(Write::InputStarted { input_id, container_id, attempt: input.attempt, at: now });
            inputs.push(Delivery {
                input_id,
                call_id: input.call_id,
                index: input.index,
                attempt: input.attempt,
                invocation: call.call.invocation,
            });
        }
        pool.batch_opened = pool.queue.front().and_then(|id| self.inputs.get(id)).map(|input| input.created_at);
        container.idle_since = None;
        if pool.settings.single_use {
            container.phase = Phase::Draining {
                reason: ionian_domain::container::StopReason::ScaleDown,
                deadline: deadline + self.config.drain_grace,
                kill_switch_sent: true,
            };
        }
        turn.replies.push(Reply::Deliver { poll, inputs });
    }

    fn release_delayed(&mut self, now: Timestamp, function_id: FunctionId) {
        let Some(pool) = self.pools.get_mut(&function_id) else { return };
        while let Some((until, input_id)) = pool.delayed.first().copied().filter(|(until, _)| *until <= now) {
            pool.delayed.remove(&(until, input_id));
            if let Some(input) = self.inputs.get_mut(&input_id) {
                input.state = InputState::Queued;
                pool.queue.push_back(input_id);
                pool.batch_opened.get_or_insert(now);
            }
        }
    }

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
        for report in outputs {
            if let Some(container) = self.containers.get_mut(&container_id)
                && let Some(running) = container.running.get(&report.input_id)
                && running.attempt == report.attempt
            {
                container.running.remove(&report.input_id);
                if container.is_empty() {
                    container.idle_since = Some(now);
                }
                self.dirty.insert(container.function_id);
            }
            let Some(input) = self.inputs.get(&report.input_id) else {
                // Finished already, or never ours.
                continue;
            };
            match input.state {
                InputState::Running { container_id: holder }
                    if holder == container_id && input.attempt == report.attempt =>
                {
                    self.attempt_ended(now, report.input_id, Some(container_id), report.started_at, report.outcome, turn);
                }
                // Superseded: the input waits or runs again elsewhere.
                InputState::Running { .. } | InputState::Queued | InputState::Delayed { .. } => {}
            }
        }
        self.send_kill_switch_if_drained(container_id, turn);
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
        let Some(input) = self.inputs.get(&input_id) else { return };
        let retry = self.pools.get(&input.function_id).filter(|pool| pool.active).map(|pool| pool.settings.retry);
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

    /// Puts an input back to wait, with the next attempt number.
    pub(crate) fn requeue(
        &mut self,
        now: Timestamp,
        input_id: InputId,
        delay: std::time::Duration,
        retries_used: u32,
        turn: &mut Turn,
    ) {
        let input = self.inputs.get_mut(&input_id).expect("the caller looked the input up");
        let pool = self.pools.get_mut(&input.function_id).expect("an unfinished input's pool exists");
        input.attempt = input.attempt.next();
        input.retries_used = retries_used;
        let not_before = now + delay;
        if delay.is_zero() {
            input.state = InputState::Queued;
            // It has waited longest already.
            pool.queue.push_front(input_id);
            pool.batch_opened.get_or_insert(now);
        } else {
            input.state = InputState::Delayed { until: not_before };
            pool.delayed.insert((not_before, input_id));
        }
        self.dirty.insert(input.function_id);
        turn.writes.push(Write::InputRequeued { input_id, attempt: input.attempt, not_before, retries_used });
    }

    /// An attempt was lost through no fault of the user's: it is tried again for free.
    pub(crate) fn attempt_lost(&mut self, now: Timestamp, input_id: InputId, sentence: &str, turn: &mut Turn) {
        let Some(input) = self.inputs.get_mut(&input_id) else { return };
        input.lost_attempts += 1;
        let (lost, used) = (input.lost_attempts, input.retries_used);
        if lost >= MAX_LOST_ATTEMPTS {
            let outcome = Outcome::decided(
                OutcomeStatus::InternalFailure,
                format!("the input was given up after {lost} containers were lost under it; the last one: {sentence}"),
            );
            self.finish_input(now, input_id, None, None, outcome, turn);
        } else {
            self.requeue(now, input_id, std::time::Duration::ZERO, used, turn);
        }
    }

    /// The input has its outcome, but its container still runs it: ask it to stop, and kill it if it
    /// does not. Until then the slot stays taken.
    pub(crate) fn abandon(&mut self, now: Timestamp, container_id: ContainerId, input_id: InputId, turn: &mut Turn) {
        let until = now + self.config.cancel_grace;
        if let Some(container) = self.containers.get_mut(&container_id)
            && let Some(running) = container.running.get_mut(&input_id)
            && running.abandoned_until.is_none()
        {
            running.abandoned_until = Some(until);
            turn.commands.push(Command::CancelInputs { container_id, input_ids: vec![input_id] });
        }
    }

    /// Ends attempts that overran their time.
    pub(crate) fn expire_attempts(&mut self, now: Timestamp, turn: &mut Turn) {
        let mut overdue = Vec::new();
        let mut stuck = Vec::new();
        for (container_id, container) in &self.containers {
            for (input_id, running) in &container.running {
                match running.abandoned_until {
                    None if running.deadline <= now => overdue.push((*container_id, *input_id)),
                    Some(until) if until <= now => stuck.push(*container_id),
                    None | Some(_) => {}
                }
            }
        }
        for (container_id, input_id) in overdue {
            let timeout = self
                .inputs
                .get(&input_id)
                .and_then(|input| self.pools.get(&input.function_id))
                .map_or(0, |pool| pool.settings.timeout.as_secs());
            self.abandon(now, container_id, input_id, turn);
            let outcome =
                Outcome::decided(OutcomeStatus::Timeout, format!("Task's current input hit its timeout of {timeout}s"));
            self.attempt_ended(now, input_id, Some(container_id), None, outcome, turn);
        }
        stuck.dedup();
        for container_id in stuck {
            self.stop_now(container_id, ionian_domain::container::StopReason::TimedOut, turn);
        }
    }
}
