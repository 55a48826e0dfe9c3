//! Calls: how inputs come in, and how a call ends.

use std::collections::BTreeMap;
use std::time::Duration;

use ionian_domain::call::{AttemptNumber, Call, CallKind};
use ionian_domain::container::StopReason;
use ionian_domain::record::{NewInput, Write};
use ionian_domain::{CallId, ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::breaks::Break;
use crate::event::{Refusal, ReplyId};
use crate::state::{CallState, Input, InputState, State};
use crate::turn::{Command, Reply, Turn};

/// A call of which nothing was heard for this long, and of which nothing waits or runs, is forgotten.
/// One that its client never closed is closed then: the client of a `.map()` says when all inputs have
/// come and when all results have arrived, unless it is killed before. An hour is longer than any client
/// goes without a word, and shorter than results are kept.
pub(crate) const FINISHED_CALL_MEMORY: Duration = Duration::from_hours(1);

impl State {
    pub(crate) fn call_started(
        &mut self,
        now: Timestamp,
        call: Call,
        inputs: Vec<NewInput>,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        let call_id = call.id;
        if self.calls.contains_key(&call_id) || self.recent_calls.contains(&call_id) {
            // The same request again, whose first answer was lost on its way.
            turn.replies.push(Reply::Accepted(reply));
            return;
        }
        if let Some(refusal) = self.refuse_inputs(call.function_id, inputs.len()) {
            self.refuse(reply, refusal, turn);
            return;
        }
        if !self.is_broken(Break::AcceptsUnrecorded) {
            turn.writes.push(Write::CallCreated { call: call.clone() });
        }
        self.quiet_calls.insert((now, call_id));
        self.calls.insert(call_id, CallState::new(now, call));
        self.enqueue(now, call_id, inputs, turn);
        turn.replies.push(Reply::Accepted(reply));
    }

    pub(crate) fn inputs_put(
        &mut self,
        now: Timestamp,
        call_id: CallId,
        inputs: Vec<NewInput>,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        let Some(call) = self.calls.get(&call_id) else {
            if self.were_known(&inputs) {
                turn.replies.push(Reply::Accepted(reply));
            } else {
                self.refuse(reply, Refusal::UnknownCall, turn);
            }
            return;
        };
        if let Some(refusal) = self.refuse_inputs(call.call.function_id, inputs.len()) {
            self.refuse(reply, refusal, turn);
            return;
        }
        self.enqueue(now, call_id, inputs, turn);
        turn.replies.push(Reply::Accepted(reply));
    }

    /// Whether these inputs came before and finished, all of them a moment ago.
    fn were_known(&self, inputs: &[NewInput]) -> bool {
        !inputs.is_empty() && inputs.iter().all(|input| self.recent_inputs.contains(&input.id))
    }

    fn refuse_inputs(&self, function_id: FunctionId, count: usize) -> Option<Refusal> {
        match self.pools.get(&function_id).filter(|pool| pool.active) {
            None => Some(Refusal::UnknownFunction),
            Some(pool) if pool.queue.len() + pool.delayed.len() + count > self.config.max_queued_inputs => {
                Some(Refusal::QueueFull)
            }
            Some(_) => None,
        }
    }

    pub(crate) fn refuse(&self, reply: ReplyId, refusal: Refusal, turn: &mut Turn) {
        if !self.is_broken(Break::LosesReply) {
            turn.replies.push(Reply::Refused { reply, refusal });
        }
    }

    fn enqueue(&mut self, now: Timestamp, call_id: CallId, mut inputs: Vec<NewInput>, turn: &mut Turn) {
        // A repeated request names inputs that wait or run already, or finished meanwhile.
        inputs.retain(|input| !self.inputs.contains_key(&input.id) && !self.recent_inputs.contains(&input.id));
        if inputs.is_empty() {
            return;
        }
        self.call_heard(now, call_id);
        let call = self.calls.get_mut(&call_id).expect("the caller looked the call up");
        let function_id = call.call.function_id;
        let pool = self
            .pools
            .get_mut(&function_id)
            .expect("refuse_inputs looked the pool up");
        self.quiet_calls.remove(&(now, call_id));
        for input in &inputs {
            let arrival = self.next_arrival;
            self.next_arrival += 1;
            call.inputs.insert(input.id);
            call.input_count += 1;
            pool.queue.insert(arrival, input.id);
            self.inputs.insert(
                input.id,
                Input {
                    call_id,
                    function_id,
                    index: input.index,
                    arrival,
                    attempt: AttemptNumber(0),
                    retries_used: 0,
                    state: InputState::Queued,
                    waiting_since: now,
                },
            );
        }
        self.dirty.insert(function_id);
        let cancelled = call
            .cancelled
            .clone()
            .map(|outcome| (outcome, inputs.iter().map(|i| i.id).collect::<Vec<_>>()));
        turn.writes.push(Write::InputsCreated {
            call_id,
            function_id,
            inputs,
            at: now,
        });
        if let Some((outcome, late)) = cancelled {
            for input_id in late {
                self.finish_input(now, input_id, None, None, outcome.clone(), turn);
            }
        }
    }

    /// A call that is unknown here can be one that finished: its client repeats what it said before a
    /// restart. The store knows which, and ignores what it does not know.
    pub(crate) fn call_inputs_finished(
        &mut self,
        now: Timestamp,
        call_id: CallId,
        count: u32,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        self.call_heard(now, call_id);
        if let Some(call) = self.calls.get_mut(&call_id) {
            call.call.finished_inputs = Some(count);
        }
        turn.writes.push(Write::CallInputsFinished { call_id, count });
        turn.replies.push(Reply::Accepted(reply));
    }

    /// Ends every unfinished input of a call. Running ones get their outcome now, and their containers
    /// are asked to let go of them.
    pub(crate) fn call_cancelled(
        &mut self,
        now: Timestamp,
        call_id: CallId,
        outcome: &Outcome,
        terminate_containers: bool,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        turn.replies.push(Reply::Accepted(reply));
        // A call that is not in memory has finished: cancelling it changes nothing.
        let Some(call) = self.calls.get_mut(&call_id) else {
            return;
        };
        call.cancelled = Some(outcome.clone());
        if call.call.kind == CallKind::Map && call.call.finished_inputs.is_none() {
            // Whoever cancels a map feeds it no more: nobody else would close it.
            call.call.finished_inputs = Some(call.input_count);
            turn.writes.push(Write::CallInputsFinished {
                call_id,
                count: call.input_count,
            });
        }
        let inputs: Vec<InputId> = call.inputs.iter().copied().collect();
        let mut cancels: BTreeMap<ContainerId, Vec<InputId>> = BTreeMap::new();
        for input_id in inputs {
            if let Some(InputState::Running { container_id }) = self.inputs.get(&input_id).map(|input| input.state) {
                if self.abandon(now, container_id, input_id) {
                    cancels.entry(container_id).or_default().push(input_id);
                }
                if terminate_containers {
                    self.stop_now(now, container_id, StopReason::Requested, turn);
                }
            }
            self.finish_input(now, input_id, None, None, outcome.clone(), turn);
        }
        for (container_id, input_ids) in cancels {
            turn.commands.push(Command::CancelInputs {
                container_id,
                input_ids,
            });
        }
    }

    /// Nobody will read this call's results again.
    pub(crate) fn call_consumed(&mut self, call_id: CallId, turn: &mut Turn) {
        match self.calls.get(&call_id) {
            // What still runs will be read, whatever this reader said.
            Some(call) if !call.inputs.is_empty() => return,
            Some(call) => {
                self.quiet_calls.remove(&(call.last_active, call_id));
                self.forget_call(call_id);
            }
            // Forgotten here when it finished; the store keeps its results until it hears this.
            None => {}
        }
        turn.writes.push(Write::CallConsumed { call_id });
    }

    /// Records the one outcome of an input and removes it from wherever it waited.
    pub(crate) fn finish_input(
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
        let (call_id, function_id, attempt) = (input.call_id, input.function_id, input.attempt);
        if let Some(pool) = self.pools.get_mut(&function_id) {
            match input.state {
                InputState::Queued => {
                    pool.queue.remove(&input.arrival);
                }
                InputState::Delayed { until } => {
                    pool.delayed.remove(&(until, input_id));
                }
                // Its container's entry stays until the container lets go of it.
                InputState::Running { .. } => {}
            }
        }
        if !self.is_broken(Break::KeepsFinishedInput) {
            self.inputs.remove(&input_id);
        }
        self.recent_inputs.note(input_id);
        self.dirty.insert(function_id);
        self.call_heard(now, call_id);
        let step = if self.is_broken(Break::SkipsSequence) { 2 } else { 1 };
        let call = self
            .calls
            .get_mut(&call_id)
            .expect("an unfinished input keeps its call in memory");
        call.inputs.remove(&input_id);
        call.finished_count += 1;
        call.last_sequence += step;
        let sequence = call.last_sequence;
        turn.writes.push(Write::InputFinished {
            input_id,
            call_id,
            sequence,
            attempt,
            container_id,
            outcome,
            started_at,
            at: now,
        });
        turn.commands.push(Command::OutputsReady {
            call_id,
            last_sequence: sequence,
        });
        if call.inputs.is_empty() {
            match call.call.kind {
                // It has its one result: nothing more can concern the scheduler.
                CallKind::Unary => {
                    self.forget_call(call_id);
                }
                CallKind::Map => {
                    self.quiet_calls.insert((now, call_id));
                }
            }
        }
    }

    /// Notes that something was heard of a call.
    fn call_heard(&mut self, now: Timestamp, call_id: CallId) {
        let Some(call) = self.calls.get_mut(&call_id) else {
            return;
        };
        let was_quiet = self.quiet_calls.remove(&(call.last_active, call_id));
        call.last_active = now;
        if was_quiet {
            self.quiet_calls.insert((now, call_id));
        }
    }

    fn forget_call(&mut self, call_id: CallId) -> Option<CallState> {
        self.recent_calls.note(call_id);
        self.calls.remove(&call_id)
    }

    /// Forgets calls that were quiet for long, and closes those whose client vanished.
    pub(crate) fn forget_quiet_calls(&mut self, now: Timestamp, turn: &mut Turn) {
        while let Some((heard, call_id)) = self.quiet_calls.first().copied()
            && heard + FINISHED_CALL_MEMORY <= now
        {
            self.quiet_calls.remove(&(heard, call_id));
            let call = self.forget_call(call_id).expect("a quiet call is in memory");
            if !call.is_closed() && !self.is_broken(Break::LeavesCallsOpen) {
                turn.writes.push(Write::CallInputsFinished {
                    call_id,
                    count: call.input_count,
                });
            }
        }
    }
}
