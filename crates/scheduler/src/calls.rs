//! Calls: how inputs come in, and how a call ends.

use std::collections::BTreeSet;
use std::time::Duration;

use ionian_domain::call::{AttemptNumber, Call};
use ionian_domain::record::{NewInput, Write};
use ionian_domain::{CallId, FunctionId, InputId, Outcome, Timestamp};

use crate::event::{Refusal, ReplyId};
use crate::state::{CallState, Input, InputState, State};
use crate::turn::{Command, Reply, Turn};

/// A finished call stays in memory this long, so that a map's late inputs and acks find it. Its
/// results are in the store for much longer.
const FINISHED_CALL_MEMORY: Duration = Duration::from_secs(3600);

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
        if self.calls.contains_key(&call_id) {
            // The same request again, whose first answer was lost on its way.
            turn.replies.push(Reply::Accepted(reply));
            return;
        }
        if let Some(refusal) = self.refuse_inputs(call.function_id, inputs.len()) {
            turn.replies.push(Reply::Refused { reply, refusal });
            return;
        }
        turn.writes.push(Write::CallCreated { call: call.clone() });
        self.calls.insert(
            call_id,
            CallState {
                call,
                inputs: BTreeSet::new(),
                input_count: 0,
                finished_count: 0,
                last_sequence: 0,
                last_active: now,
            },
        );
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
            turn.replies.push(Reply::Refused { reply, refusal: Refusal::UnknownCall });
            return;
        };
        if let Some(refusal) = self.refuse_inputs(call.call.function_id, inputs.len()) {
            turn.replies.push(Reply::Refused { reply, refusal });
            return;
        }
        self.enqueue(now, call_id, inputs, turn);
        turn.replies.push(Reply::Accepted(reply));
    }

    fn refuse_inputs(&self, function_id: FunctionId, count: usize) -> Option<Refusal> {
        match self.pools.get(&function_id) {
            None => Some(Refusal::UnknownFunction),
            Some(pool) if !pool.active => Some(Refusal::UnknownFunction),
            Some(pool) if pool.queue.len() + count > self.config.max_queued_inputs => Some(Refusal::QueueFull),
            Some(_) => None,
        }
    }

    fn enqueue(&mut self, now: Timestamp, call_id: CallId, mut inputs: Vec<NewInput>, turn: &mut Turn) {
        // A repeated request names inputs that wait or run already.
        inputs.retain(|input| !self.inputs.contains_key(&input.id));
        if inputs.is_empty() {
            return;
        }
        let call = self.calls.get_mut(&call_id).expect("the caller looked the call up");
        let function_id = call.call.function_id;
        let pool = self.pools.get_mut(&function_id).expect("refuse_inputs looked the pool up");
        call.last_active = now;
        for input in &inputs {
            call.inputs.insert(input.id);
            call.input_count += 1;
            pool.queue.push_back(input.id);
            self.inputs.insert(
                input.id,
                Input {
                    call_id,
                    function_id,
                    index: input.index,
                    attempt: AttemptNumber(0),
                    retries_used: 0,
                    lost_attempts: 0,
                    state: InputState::Queued,
                    created_at: now,
                },
            );
        }
        pool.batch_opened.get_or_insert(now);
        self.dirty.insert(function_id);
        turn.writes.push(Write::InputsCreated { call_id, function_id, inputs, at: now });
    }

    pub(crate) fn call_inputs_finished(
        &mut self,
        now: Timestamp,
        call_id: CallId,
        count: u32,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        let Some(call) = self.calls.get_mut(&call_id) else {
            turn.replies.push(Reply::Refused { reply, refusal: Refusal::UnknownCall });
            return;
        };
        call.call.finished_inputs = Some(count);
        call.last_active = now;
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
        // A call that is not in memory has finished: cancelling it changes nothing.
        let inputs: Vec<InputId> =
            self.calls.get(&call_id).map(|call| call.inputs.iter().copied().collect()).unwrap_or_default();
        for input_id in inputs {
            if let Some(InputState::Running { container_id }) = self.inputs.get(&input_id).map(|input| input.state) {
                self.abandon(now, container_id, input_id, turn);
                if terminate_containers {
                    self.stop_now(container_id, ionian_domain::container::StopReason::Requested, turn);
                }
            }
            self.finish_input(now, input_id, None, None, outcome.clone(), turn);
        }
        turn.replies.push(Reply::Accepted(reply));
    }

    pub(crate) fn call_consumed(&mut self, call_id: CallId, turn: &mut Turn) {
        if self.calls.get(&call_id).is_some_and(|call| call.inputs.is_empty()) {
            self.calls.remove(&call_id);
            turn.writes.push(Write::CallConsumed { call_id });
        }
    }

    /// Records the one outcome of an input and removes it from wherever it waited.
    pub(crate) fn finish_input(
        &mut self,
        now: Timestamp,
        input_id: InputId,
        container_id: Option<ionian_domain::ContainerId>,
        started_at: Option<Timestamp>,
        outcome: Outcome,
        turn: &mut Turn,
    ) {
        let Some(input) = self.inputs.remove(&input_id) else { return };
        match input.state {
            InputState::Queued => {
                if let Some(pool) = self.pools.get_mut(&input.function_id) {
                    pool.queue.retain(|queued| *queued != input_id);
                }
            }
            InputState::Delayed { until } => {
                if let Some(pool) = self.pools.get_mut(&input.function_id) {
                    pool.delayed.remove(&(until, input_id));
                }
            }
            InputState::Running { .. } => {}
        }
        self.dirty.insert(input.function_id);
        let call = self.calls.get_mut(&input.call_id).expect("an unfinished input keeps its call in memory");
        call.inputs.remove(&input_id);
        call.finished_count += 1;
        call.last_sequence += 1;
        call.last_active = now;
        turn.writes.push(Write::InputFinished {
            input_id,
            call_id: input.call_id,
            sequence: call.last_sequence,
            attempt: input.attempt,
            container_id,
            outcome,
            started_at,
            at: now,
        });
        turn.commands.push(Command::OutputsReady { call_id: input.call_id, last_sequence: call.last_sequence });
    }

    /// Forgets calls that finished long ago.
    pub(crate) fn forget_finished_calls(&mut self, now: Timestamp) {
        self.calls.retain(|_, call| !call.inputs.is_empty() || now.since(call.last_active) < FINISHED_CALL_MEMORY);
    }
}
