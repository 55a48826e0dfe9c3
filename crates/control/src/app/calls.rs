//! Calls as their callers see them: start, feed, await, cancel.

use std::time::Duration;

use ionian_domain::call::{Call, CallKind, InputPayload, Invocation};
use ionian_domain::function::RetryPolicy;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{NewInput, OutputRecord};
use ionian_domain::{AppId, CallId, FunctionId, InputId, Outcome, Timestamp};
use ionian_scheduler::Event;
use ionian_store::calls::CallSummary;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::apps::digest;
use crate::Control;
use crate::effects::OutputsNews;
use crate::error::{Error, Result};

/// Outputs in one answer: a map's reader comes back for more at once.
const OUTPUTS_PER_READ: u32 = 100;
/// The longest hold of a reader; the client asks for 55 s.
const MAX_HOLD: Duration = Duration::from_mins(1);
/// Inputs in one request; the client sends 49.
const MAX_INPUTS_PER_PUT: usize = 1_000;

/// Characters of a call's id that are drawn; the six behind them, 35 bits, are the mark of the app that made the
/// call. Nobody can try marks, since ids of others' calls are not theirs to choose.
const UNMARKED_CHARACTERS: usize = 16;
const MARK_OF_CALLS: &str = "call";

pub struct Calls<'a>(pub(crate) &'a Control);

/// What starts a call.
#[derive(Debug)]
pub struct StartCall {
    pub function_id: FunctionId,
    pub kind: CallKind,
    pub invocation: Invocation,
    pub parent_input_id: Option<InputId>,
    /// The app whose code in a container makes the call; `None` for people's.
    pub origin: Option<AppId>,
    pub inputs: Vec<(u32, InputPayload)>,
    /// Names the request: repeated requests get the call that the first one made.
    pub dedupe: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StartedCall {
    pub call_id: CallId,
    pub inputs: Vec<(u32, InputId)>,
    /// What the server does with failing inputs, for the client's information.
    pub retry: RetryPolicy,
}

/// A page of outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outputs {
    pub outputs: Vec<OutputRecord>,
    pub last_sequence: u64,
    pub unfinished: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOutputs {
    pub call_id: CallId,
    pub after: u64,
    pub range: Option<(u32, u32)>,
    pub limit: Option<u32>,
    pub hold: Duration,
    /// The reader needs nothing again of what it gets.
    pub clears: bool,
}

impl Calls<'_> {
    pub async fn start(&self, request: StartCall) -> Result<StartedCall> {
        check_count(request.inputs.len())?;
        let key = request.dedupe.as_deref();
        let drawn = key.map_or_else(rand::random, |key| digest("call", key));
        let call_id = match request.origin {
            Some(app_id) => self.marked(drawn, app_id),
            None => CallId::from_digest(&drawn),
        };
        let inputs = name_inputs(call_id, key, request.inputs);
        let target = self.0.call_targets().get(self.0, request.function_id).await?;
        let started = StartedCall {
            call_id,
            inputs: names(&inputs),
            retry: target.retry,
        };
        // Whether or not the client says that it repeats itself: a call must not be recorded twice.
        if key.is_some()
            && let Some(existing) = self.0.store().calls().call_summary(call_id).await?
        {
            return if existing.call.function_id == request.function_id {
                Ok(started)
            } else {
                Err(Error::invalid(
                    "the idempotency key was used for a call of another function",
                ))
            };
        }
        for input in &inputs {
            target.check_method(input.payload.method_name.as_deref())?;
        }
        let call = Call {
            id: call_id,
            app_id: target.app_id,
            function_id: target.function_id,
            kind: request.kind,
            invocation: request.invocation,
            parent_input_id: request.parent_input_id,
            created_at: Timestamp::now(),
            finished_inputs: None,
        };
        self.0.payloads().remember(&inputs);
        self.0
            .turn()
            .ask(|reply| Event::CallStarted { call, inputs, reply })
            .await?;
        Ok(started)
    }

    pub async fn put_inputs(
        &self,
        call_id: CallId,
        function_id: FunctionId,
        inputs: Vec<(u32, InputPayload)>,
        dedupe: Option<String>,
    ) -> Result<Vec<(u32, InputId)>> {
        check_count(inputs.len())?;
        let call = self.summary(call_id).await?.call;
        if call.function_id != function_id {
            return Err(Error::invalid(format!(
                "function call {call_id} is not a call of function {function_id}"
            )));
        }
        let inputs = name_inputs(call_id, dedupe.as_deref(), inputs);
        let named = names(&inputs);
        // The inputs of one request are recorded together: the first one stands for all of them.
        if dedupe.is_some()
            && let Some((_, first)) = named.first()
            && self.0.store().calls().find_call_of_input(*first).await?.is_some()
        {
            return Ok(named);
        }
        let target = self.0.call_targets().get(self.0, function_id).await?;
        for input in &inputs {
            target.check_method(input.payload.method_name.as_deref())?;
        }
        self.0.payloads().remember(&inputs);
        self.0
            .turn()
            .ask(|reply| Event::InputsPut { call_id, inputs, reply })
            .await?;
        Ok(named)
    }

    pub async fn finish_inputs(&self, call_id: CallId, count: u32) -> Result<()> {
        self.summary(call_id).await?;
        self.0
            .turn()
            .ask(|reply| Event::CallInputsFinished { call_id, count, reply })
            .await
    }

    pub async fn summary(&self, call_id: CallId) -> Result<CallSummary> {
        let found = self.0.store().calls().call_summary(call_id).await?;
        found.ok_or_else(|| {
            Error::not_found(format!(
                "function call {call_id} does not exist, or its results have expired"
            ))
        })
    }

    /// An id that says whose code made the call: its end is a signature of its beginning. So the origin survives
    /// restarts and is found without a look into the database.
    fn marked(&self, mut drawn: [u8; 32], origin: AppId) -> CallId {
        let mark = self.0.containers().mark(
            origin,
            MARK_OF_CALLS,
            &CallId::from_digest(&drawn).suffix()[..UNMARKED_CHARACTERS],
        );
        drawn[UNMARKED_CHARACTERS..].copy_from_slice(&mark[UNMARKED_CHARACTERS..]);
        CallId::from_digest(&drawn)
    }

    /// Whether code in this app's containers may follow, feed and cancel the call: it made the call, or is what
    /// is called.
    pub async fn is_open_to(&self, call_id: CallId, app_id: AppId) -> Result<bool> {
        let beginning = &call_id.suffix()[..UNMARKED_CHARACTERS];
        let mark = CallId::from_digest(&self.0.containers().mark(app_id, MARK_OF_CALLS, beginning));
        if mark.suffix()[UNMARKED_CHARACTERS..] == call_id.suffix()[UNMARKED_CHARACTERS..] {
            return Ok(true);
        }
        let found = self.0.store().calls().call_summary(call_id).await?;
        Ok(found.is_some_and(|summary| summary.call.app_id == app_id))
    }

    /// Outputs after a sequence number; waits until there are some or the hold is over. A read never
    /// enters the turn.
    pub async fn outputs(&self, read: ReadOutputs) -> Result<Outputs> {
        let deadline = tokio::time::Instant::now() + read.hold.min(MAX_HOLD);
        let limit = read.limit.unwrap_or(OUTPUTS_PER_READ).clamp(1, OUTPUTS_PER_READ);
        // Subscribed before the first look, so that no output falls between look and wait.
        let mut news = self.0.outputs_hub().subscribe(read.call_id);
        loop {
            news.mark_seen();
            let waited = tokio::time::Instant::now() >= deadline;
            // First how far the call is, then its outputs: all outputs of what was finished by then are seen.
            let summary = self.summary(read.call_id).await?;
            let outputs = self
                .0
                .store()
                .calls()
                .outputs(read.call_id, read.after, limit, read.range)
                .await?;
            let unfinished = summary.input_count.saturating_sub(summary.finished_count);
            // Finished, and all of it was read before: there is nothing to wait for.
            let is_over = summary.call.kind == CallKind::Unary && summary.input_count > 0 && unfinished == 0;
            if !outputs.is_empty() || waited || is_over {
                if read.clears && summary.call.kind == CallKind::Unary && !outputs.is_empty() {
                    self.clear(&summary.call);
                }
                let last_sequence = outputs.last().map_or(read.after, |output| output.sequence);
                return Ok(Outputs {
                    outputs,
                    last_sequence,
                    unfinished,
                });
            }
            tokio::select! {
                () = news.changed() => {}
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }

    /// Wakes when the call gets an output.
    pub fn follow(&self, call_id: CallId) -> OutputsNews {
        let mut news = self.0.outputs_hub().subscribe(call_id);
        news.mark_seen();
        news
    }

    /// The caller of `.remote()` has its result.
    fn clear(&self, call: &Call) {
        match call.invocation {
            Invocation::Sync | Invocation::SyncLegacy => self.0.consumed().note(call.id),
            // Results of `.spawn()` are read as often as wanted.
            Invocation::Async | Invocation::AsyncLegacy => {}
        }
    }

    /// The reader of a map is done with it. Results of an asynchronous one stay.
    pub async fn acknowledge(&self, call_id: CallId) -> Result<CallSummary> {
        let summary = self.summary(call_id).await?;
        match summary.call.invocation {
            Invocation::Sync | Invocation::SyncLegacy => {
                self.0.turn().tell(Event::CallConsumed { call_id }).await?;
            }
            Invocation::Async | Invocation::AsyncLegacy => {}
        }
        Ok(summary)
    }

    pub async fn cancel(&self, call_id: CallId, terminate_containers: bool) -> Result<()> {
        self.summary(call_id).await?;
        let outcome = Outcome::decided(OutcomeStatus::Terminated, "Input was cancelled by user");
        self.0
            .turn()
            .ask(|reply| Event::CallCancelled {
                call_id,
                outcome,
                terminate_containers,
                reply,
            })
            .await
    }
}

fn check_count(count: usize) -> Result<()> {
    if count > MAX_INPUTS_PER_PUT {
        return Err(Error::invalid(format!(
            "{count} inputs in one request; send at most {MAX_INPUTS_PER_PUT} at a time"
        )));
    }
    Ok(())
}

fn names(inputs: &[NewInput]) -> Vec<(u32, InputId)> {
    inputs.iter().map(|input| (input.index, input.id)).collect()
}

/// Names for a request's inputs: random, or the same for every repetition of the request.
///
/// Names are drawn from everything that makes two requests the same, so that equal names mean equal
/// requests, whatever a client does with its keys: a name that is recorded already must not be recorded
/// again with other content.
fn name_inputs(call_id: CallId, dedupe: Option<&str>, inputs: Vec<(u32, InputPayload)>) -> Vec<NewInput> {
    let request = match dedupe {
        Some(key) => {
            let mut hasher = Sha256::new();
            hasher.update(digest("inputs", &format!("{call_id}\0{key}")));
            for (index, _) in &inputs {
                hasher.update(index.to_be_bytes());
            }
            hasher.finalize().into()
        }
        None => rand::random(),
    };
    let name = |position: usize| {
        let position = u16::try_from(position).expect("a request has at most MAX_INPUTS_PER_PUT inputs");
        InputId::of_request(&request, position)
    };
    inputs
        .into_iter()
        .enumerate()
        .map(|(position, (index, payload))| NewInput {
            id: name(position),
            index,
            payload,
        })
        .collect()
}

/// Synchronous calls whose callers have their results: they need not be kept for long. Noted here and
/// recorded together now and then, because a write per call would be paid by every other call. What a
/// crash forgets is kept as long as any other result.
#[derive(Debug, Default)]
pub(crate) struct Consumed {
    calls: Mutex<Vec<CallId>>,
}

impl Consumed {
    /// Beyond this many between two sweeps, the rest is kept as long as any other result.
    const LIMIT: usize = 100_000;

    fn note(&self, call_id: CallId) {
        let mut calls = self.calls.lock();
        if calls.len() < Self::LIMIT {
            calls.push(call_id);
        }
    }

    pub(crate) fn take(&self) -> Vec<CallId> {
        std::mem::take(&mut *self.calls.lock())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ionian_domain::call::Payload;

    use super::*;

    fn ids(call_id: CallId, key: Option<&str>, indices: &[u32]) -> Vec<InputId> {
        let payload = || InputPayload {
            payload: Payload::Inline(Bytes::new()),
            data_format: 1,
            method_name: None,
        };
        let inputs = indices.iter().map(|index| (*index, payload())).collect();
        name_inputs(call_id, key, inputs)
            .into_iter()
            .map(|input| input.id)
            .collect()
    }

    #[test]
    fn a_repeated_request_has_the_same_names_and_every_other_has_others() {
        let call = CallId::generate();
        let first = ids(call, Some("key"), &[3, 4]);
        assert_eq!(first, ids(call, Some("key"), &[3, 4]));
        let others = [
            ids(call, Some("other"), &[3, 4]),
            ids(call, Some("key"), &[4]),
            ids(call, Some("key"), &[3, 4, 5]),
            ids(CallId::generate(), Some("key"), &[3, 4]),
            ids(call, None, &[3, 4]),
        ];
        assert!(others.iter().flatten().all(|other| !first.contains(other)));
        let repeated = ids(call, Some("key"), &[1, 1]);
        assert_ne!(repeated[0], repeated[1]);
    }
}
