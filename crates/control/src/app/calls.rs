//! Calls as their callers see them: start, feed, await, cancel.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ionian_domain::call::{Call, CallKind, InputPayload, Invocation, Payload};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{NewInput, OutputRecord};
use ionian_domain::{CallId, ErrorKind, FunctionId, InputId, Outcome, Timestamp};
use ionian_scheduler::Event;
use ionian_store::calls::CallSummary;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::apps::digest;
use super::functions::Functions;
use crate::error::{Error, Result};
use crate::Control;

/// Outputs in one answer: a map's reader comes back for more at once.
const OUTPUTS_PER_READ: u32 = 100;
/// The longest hold of a reader; the client asks for 55 s.
const MAX_HOLD: Duration = Duration::from_mins(1);
/// Inputs in one request; the client sends 49.
const MAX_INPUTS_PER_PUT: usize = 1_000;
/// Inputs read back to see which of a repeated request were recorded.
const MAX_KNOWN_INPUTS: u32 = 10_000;
/// Yielded values that may wait for a generator's caller. Beyond it the generator is told to wait.
const MAX_STREAM_BYTES: usize = 64 * 1024 * 1024;
/// How long the yielded values of a finished call are kept for a reader that comes back.
const STREAM_RETENTION: Duration = Duration::from_mins(10);

pub struct Calls<'a>(pub(crate) &'a Control);

/// What starts a call.
#[derive(Debug)]
pub struct StartCall {
    pub function_id: FunctionId,
    pub kind: CallKind,
    pub invocation: Invocation,
    pub parent_input_id: Option<InputId>,
    pub inputs: Vec<(u32, InputPayload)>,
    /// Names the request: repeated requests get the call that the first one made.
    pub dedupe: Option<String>,
    pub is_retry: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartedCall {
    pub call_id: CallId,
    pub inputs: Vec<(u32, InputId)>,
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
}

impl Calls<'_> {
    pub async fn start(&self, request: StartCall) -> Result<StartedCall> {
        let function = self.0.functions().get_running(request.function_id).await?;
        for (_, input) in &request.inputs {
            Functions::check_method(&function, input.method_name.as_deref())?;
        }
        let key = request.dedupe.as_deref();
        let call_id = key.map_or_else(CallId::generate, |key| CallId::from_digest(&digest("call", key)));
        let inputs = name_inputs(key, request.inputs);
        let started = StartedCall { call_id, inputs: inputs.iter().map(|input| (input.index, input.id)).collect() };
        if request.is_retry && self.0.store().calls().call_summary(call_id).await?.is_some() {
            return Ok(started);
        }
        let call = Call {
            id: call_id,
            app_id: function.app_id,
            function_id: function.id,
            kind: request.kind,
            invocation: request.invocation,
            parent_input_id: request.parent_input_id,
            created_at: Timestamp::now(),
            finished_inputs: None,
        };
        self.0.payloads().remember(&inputs);
        self.0.turn().ask(|reply| Event::CallStarted { call, inputs, reply }).await?;
        Ok(started)
    }

    pub async fn put_inputs(
        &self,
        call_id: CallId,
        function_id: FunctionId,
        inputs: Vec<(u32, InputPayload)>,
        dedupe: Option<String>,
        is_retry: bool,
    ) -> Result<Vec<(u32, InputId)>> {
        if inputs.len() > MAX_INPUTS_PER_PUT {
            return Err(Error::invalid(format!("{} inputs in one request; at most {MAX_INPUTS_PER_PUT}", inputs.len())));
        }
        let function = self.0.functions().get_running(function_id).await?;
        for (_, input) in &inputs {
            Functions::check_method(&function, input.method_name.as_deref())?;
        }
        let mut inputs = name_inputs(dedupe.as_deref(), inputs);
        let named: Vec<(u32, InputId)> = inputs.iter().map(|input| (input.index, input.id)).collect();
        if is_retry {
            let from = named.iter().map(|(index, _)| *index).min().unwrap_or(0);
            let known = self.0.store().calls().inputs(call_id, from, MAX_KNOWN_INPUTS).await?;
            inputs.retain(|input| !known.iter().any(|existing| existing.id == input.id));
            if inputs.is_empty() {
                return Ok(named);
            }
        }
        self.0.payloads().remember(&inputs);
        self.0.turn().ask(|reply| Event::InputsPut { call_id, inputs, reply }).await?;
        Ok(named)
    }

    pub async fn finish_inputs(&self, call_id: CallId, count: u32) -> Result<()> {
        self.0.turn().ask(|reply| Event::CallInputsFinished { call_id, count, reply }).await
    }

    pub async fn summary(&self, call_id: CallId) -> Result<CallSummary> {
        let found = self.0.store().calls().call_summary(call_id).await?;
        found.ok_or_else(|| Error::not_found(format!("function call {call_id} does not exist or has expired")))
    }

    /// Outputs after a sequence number; waits until there are some or the hold is over. A read never
    /// enters the turn.
    pub async fn outputs(&self, read: ReadOutputs) -> Result<Outputs> {
        let deadline = tokio::time::Instant::now() + read.hold.min(MAX_HOLD);
        // Subscribed before the first look, so that no output falls between look and wait.
        let mut news = self.0.outputs_hub().subscribe(read.call_id);
        loop {
            news.mark_unchanged();
            let limit = read.limit.unwrap_or(OUTPUTS_PER_READ).clamp(1, OUTPUTS_PER_READ);
            let outputs = self.0.store().calls().outputs(read.call_id, read.after, limit, read.range).await?;
            let waited = tokio::time::Instant::now() >= deadline;
            if !outputs.is_empty() || waited {
                let summary = self.summary(read.call_id).await?;
                return Ok(Outputs {
                    last_sequence: outputs.last().map_or(read.after, |output| output.sequence),
                    unfinished: summary.input_count.saturating_sub(summary.finished_count),
                    outputs,
                });
            }
            let summary = self.summary(read.call_id).await?;
            let unary_is_over = summary.call.kind == CallKind::Unary
                && summary.input_count > 0
                && summary.input_count == summary.finished_count;
            if unary_is_over {
                // Finished, and all of it was read before: there is nothing to wait for.
                return Ok(Outputs { outputs, last_sequence: read.after, unfinished: 0 });
            }
            tokio::select! {
                _ = news.changed() => {}
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }

    /// The reader of a synchronous call is done with it.
    pub async fn consume(&self, call_id: CallId) -> Result<()> {
        self.0.turn().tell(Event::CallConsumed { call_id }).await
    }

    pub async fn cancel(&self, call_id: CallId, terminate_containers: bool) -> Result<()> {
        self.summary(call_id).await?;
        let outcome = Outcome::decided(OutcomeStatus::Terminated, "Input was cancelled by user");
        self.0.turn().ask(|reply| Event::CallCancelled { call_id, outcome, terminate_containers, reply }).await
    }
}

/// Names for a request's inputs: random, or the same for every repetition of the request.
fn name_inputs(dedupe: Option<&str>, inputs: Vec<(u32, InputPayload)>) -> Vec<NewInput> {
    inputs
        .into_iter()
        .map(|(index, payload)| NewInput {
            id: dedupe.map_or_else(InputId::generate, |key| {
                InputId::from_digest(&digest("input", &format!("{key}\0{index}")))
            }),
            index,
            payload,
        })
        .collect()
}

/// Arguments of recent inputs, so that delivering them to a waiting container needs no read.
pub struct Payloads {
    recent: Mutex<(lru::LruCache<InputId, InputPayload>, usize)>,
}

/// Bytes of arguments kept in memory; older ones are read back from the store.
const PAYLOAD_CACHE_BYTES: usize = 16 * 1024 * 1024;

impl Default for Payloads {
    fn default() -> Self {
        Self { recent: Mutex::new((lru::LruCache::unbounded(), 0)) }
    }
}

impl Payloads {
    fn remember(&self, inputs: &[NewInput]) {
        let mut guard = self.recent.lock();
        let (cache, size) = &mut *guard;
        for input in inputs {
            *size += input.payload.payload.inline_len();
            if let Some(old) = cache.put(input.id, input.payload.clone()) {
                *size -= old.payload.inline_len();
            }
        }
        while *size > PAYLOAD_CACHE_BYTES {
            let Some((_, evicted)) = cache.pop_lru() else { break };
            *size -= evicted.payload.inline_len();
        }
    }

    /// Takes what is known of these inputs; a retried input is read from the store.
    pub(crate) fn take(&self, ids: &[InputId]) -> HashMap<InputId, InputPayload> {
        let mut guard = self.recent.lock();
        let (cache, size) = &mut *guard;
        let mut found = HashMap::new();
        for id in ids {
            if let Some(payload) = cache.pop(id) {
                *size -= payload.payload.inline_len();
                found.insert(*id, payload);
            }
        }
        found
    }
}

/// One value that a generator yielded, as the wire carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub index: u64,
    pub data_format: i32,
    pub payload: Payload,
}

#[derive(Debug)]
struct Stream {
    chunks: BTreeMap<u64, Chunk>,
    bytes: usize,
    changed: watch::Sender<u64>,
    last_used: tokio::time::Instant,
}

/// What running generators yielded, on its way to their callers. In memory: a generator whose server
/// restarts begins anew with its next attempt.
#[derive(Debug, Clone, Default)]
pub struct GeneratorStreams {
    streams: Arc<Mutex<HashMap<CallId, Stream>>>,
}

impl GeneratorStreams {
    fn with<T>(&self, call_id: CallId, act: impl FnOnce(&mut Stream) -> T) -> T {
        let mut streams = self.streams.lock();
        let now = tokio::time::Instant::now();
        let stream = streams.entry(call_id).or_insert_with(|| Stream {
            chunks: BTreeMap::new(),
            bytes: 0,
            changed: watch::channel(0).0,
            last_used: now,
        });
        stream.last_used = now;
        act(stream)
    }

    /// Takes chunks from a container. Repeated ones replace themselves. Refuses when the caller is too
    /// far behind; the container's client then waits and repeats.
    pub fn push(&self, call_id: CallId, chunks: Vec<Chunk>) -> Result<()> {
        self.with(call_id, |stream| {
            if stream.bytes > MAX_STREAM_BYTES {
                return Err(Error::new(
                    ErrorKind::Exhausted,
                    "the caller of this generator is too far behind; trying again",
                ));
            }
            for chunk in chunks {
                stream.bytes += chunk.payload.inline_len();
                let newest = chunk.index;
                if let Some(old) = stream.chunks.insert(chunk.index, chunk) {
                    stream.bytes -= old.payload.inline_len();
                }
                stream.changed.send_if_modified(|current| {
                    *current = newest.max(*current);
                    true
                });
            }
            Ok(())
        })
    }

    /// Chunks after an index, and a way to wait for more. What lies before was received: it is freed.
    pub fn read(&self, call_id: CallId, after: u64) -> (Vec<Chunk>, watch::Receiver<u64>) {
        self.with(call_id, |stream| {
            let mut receiver = stream.changed.subscribe();
            receiver.mark_unchanged();
            let later = stream.chunks.split_off(&(after + 1));
            stream.bytes = later.values().map(|chunk| chunk.payload.inline_len()).sum();
            stream.chunks = later;
            (stream.chunks.values().cloned().collect(), receiver)
        })
    }

    /// Forgets streams that nobody touched for long.
    pub(crate) fn sweep(&self) {
        self.streams.lock().retain(|_, stream| stream.last_used.elapsed() < STREAM_RETENTION);
    }

    /// A stream's reader: whether a chunk may still come is told by the call, not here.
    pub fn data(bytes: Bytes, data_format: i32, index: u64) -> Chunk {
        Chunk { index, data_format, payload: Payload::Inline(bytes) }
    }
}
