//! HTTP and websocket requests through the official runtime's own data channel.
//!
//! This is the fallback for containers to which the web hook could not attach. One request is one
//! *exchange*: an input that the container polls for, a stream of events to the app and a stream of
//! events back. Exchanges live in memory only: a request whose server dies is an error to its caller,
//! as with any HTTP server.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ionian_domain::{CallId, ContainerId, InputId, Outcome};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

/// Events buffered per direction; one body chunk is at most 2 MiB, so this bounds an exchange to some
/// tens of MiB however fast the other side is.
const EXCHANGE_BUFFER: usize = 16;

/// The ASGI scope of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebScope {
    pub websocket: bool,
    /// `1.1` or `2`.
    pub http_version: String,
    pub method: String,
    /// `http`, `https`, `ws` or `wss`.
    pub scheme: String,
    /// Percent-decoded path.
    pub path: String,
    pub query_string: Bytes,
    /// Names in lower case, in the order of the request.
    pub headers: Vec<(Bytes, Bytes)>,
    pub client: Option<(String, u16)>,
    pub subprotocols: Vec<String>,
}

/// An event for the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToApp {
    Body { bytes: Bytes, more: bool },
    Disconnect,
    WebsocketConnect,
    WebsocketText(String),
    WebsocketBinary(Bytes),
    WebsocketDisconnect { code: u16 },
}

/// An event from the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromApp {
    ResponseStart { status: u16, headers: Vec<(Bytes, Bytes)>, trailers: bool },
    Body { bytes: Bytes, more: bool },
    Trailers { headers: Vec<(Bytes, Bytes)>, more: bool },
    WebsocketAccept { subprotocol: Option<String>, headers: Vec<(Bytes, Bytes)> },
    WebsocketText(String),
    WebsocketBinary(Bytes),
    WebsocketClose { code: u16, reason: String },
    /// The last event: how the app's call ended. A container that dies ends it as an internal failure.
    Finished(Outcome),
}

/// The ingress' end of an exchange. Dropping it tells the app that its client is gone.
#[derive(Debug)]
pub struct WebExchange {
    pub call_id: CallId,
    pub input_id: InputId,
    pub to_app: mpsc::Sender<ToApp>,
    pub from_app: mpsc::Receiver<FromApp>,
}

/// A new request as a container's poll receives it.
#[derive(Debug, Clone)]
pub struct WebInput {
    pub call_id: CallId,
    pub input_id: InputId,
    pub method: Option<String>,
    pub scope: Arc<WebScope>,
}

/// Why an exchange could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("container {0} is gone")]
    ContainerGone(ContainerId),
}

struct Exchange {
    container_id: ContainerId,
    input_id: InputId,
    /// Taken by the container's `FunctionCallGetDataIn`, which may reconnect: events it has received
    /// are kept until the exchange ends, so that it can resume from an index.
    inbound: Arc<Inbound>,
    from_app: mpsc::Sender<FromApp>,
    /// The highest index of `FunctionCallPutDataOut` seen; retries repeat chunks.
    last_out_index: u64,
}

/// Events on their way to the app, with the index that the wire gives them (from 1).
#[derive(Debug)]
pub struct Inbound {
    receiver: tokio::sync::Mutex<mpsc::Receiver<ToApp>>,
    /// The newest events, for a container that reconnects its stream.
    replay: Mutex<Replay>,
}

#[derive(Debug, Default)]
struct Replay {
    next_index: u64,
    recent: VecDeque<(u64, ToApp)>,
}

/// Events kept for a reconnecting stream. A stream breaks only between two processes on one machine,
/// right after it was written to, so a short tail is enough.
const REPLAY_EVENTS: usize = 8;

impl Inbound {
    /// The next event after `last_index`, or `None` when the request's sender is gone.
    pub async fn next(&self, last_index: u64) -> Option<(u64, ToApp)> {
        let mut receiver = self.receiver.lock().await;
        {
            let replay = self.replay.lock();
            if let Some(found) = replay.recent.iter().find(|(index, _)| *index > last_index) {
                return Some(found.clone());
            }
        }
        let event = receiver.recv().await?;
        let mut replay = self.replay.lock();
        replay.next_index += 1;
        let entry = (replay.next_index, event);
        replay.recent.push_back(entry.clone());
        if replay.recent.len() > REPLAY_EVENTS {
            replay.recent.pop_front();
        }
        Some(entry)
    }
}

#[derive(Default)]
struct ContainerQueue {
    waiting: VecDeque<WebInput>,
    arrived: Arc<Notify>,
}

#[derive(Default)]
struct State {
    containers: HashMap<ContainerId, ContainerQueue>,
    exchanges: HashMap<CallId, Exchange>,
    by_input: HashMap<InputId, CallId>,
}

/// All open exchanges. Cheap to clone.
#[derive(Clone, Default)]
pub struct DataChannels {
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for DataChannels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataChannels").finish_non_exhaustive()
    }
}

impl DataChannels {
    /// Makes a container known, so that exchanges can be opened on it. Called by control.
    pub fn attach(&self, container_id: ContainerId) {
        self.state.lock().containers.entry(container_id).or_default();
    }

    /// Forgets a container and ends its exchanges with `outcome`. Called by control.
    pub fn detach(&self, container_id: ContainerId, outcome: &Outcome) {
        let mut state = self.state.lock();
        if let Some(queue) = state.containers.remove(&container_id) {
            queue.arrived.notify_one();
        }
        let ended: Vec<CallId> =
            state.exchanges.iter().filter(|(_, e)| e.container_id == container_id).map(|(id, _)| *id).collect();
        for call_id in ended {
            if let Some(exchange) = state.exchanges.remove(&call_id) {
                state.by_input.remove(&exchange.input_id);
                finish(exchange.from_app, outcome.clone());
            }
        }
    }

    /// Hands a request to a container, on which the caller holds a slot.
    pub fn open(
        &self,
        container_id: ContainerId,
        method: Option<String>,
        scope: WebScope,
    ) -> Result<WebExchange, OpenError> {
        let (to_app, receiver) = mpsc::channel(EXCHANGE_BUFFER);
        let (from_app_sender, from_app) = mpsc::channel(EXCHANGE_BUFFER);
        let call_id = CallId::generate();
        let input_id = InputId::generate();
        let mut state = self.state.lock();
        let Some(queue) = state.containers.get_mut(&container_id) else {
            return Err(OpenError::ContainerGone(container_id));
        };
        queue.waiting.push_back(WebInput { call_id, input_id, method, scope: Arc::new(scope) });
        queue.arrived.notify_one();
        let inbound =
            Arc::new(Inbound { receiver: tokio::sync::Mutex::new(receiver), replay: Mutex::new(Replay::default()) });
        state.by_input.insert(input_id, call_id);
        state.exchanges.insert(
            call_id,
            Exchange { container_id, input_id, inbound, from_app: from_app_sender, last_out_index: 0 },
        );
        Ok(WebExchange { call_id, input_id, to_app, from_app })
    }

    /// The container's poll: the next request, or `None` after `hold` (it polls again) or when the
    /// container is unknown.
    pub async fn next_input(&self, container_id: ContainerId, hold: Duration) -> Option<WebInput> {
        let deadline = tokio::time::Instant::now() + hold;
        loop {
            let arrived = {
                let mut state = self.state.lock();
                let queue = state.containers.get_mut(&container_id)?;
                if let Some(input) = queue.waiting.pop_front() {
                    return Some(input);
                }
                Arc::clone(&queue.arrived)
            };
            // `notify_one` stores a permit, so an input that arrives before this line is not missed.
            tokio::time::timeout_at(deadline, arrived.notified()).await.ok()?;
        }
    }

    /// The stream of events for a call's app, if the call is an exchange on this container.
    pub fn inbound(&self, container_id: ContainerId, call_id: CallId) -> Option<Arc<Inbound>> {
        let state = self.state.lock();
        let exchange = state.exchanges.get(&call_id)?;
        (exchange.container_id == container_id).then(|| Arc::clone(&exchange.inbound))
    }

    /// Takes an event from the app. `index` counts from 1; repeated chunks are dropped. Waits while the
    /// HTTP client is slow, which slows the app. Returns whether the call is an exchange at all.
    pub async fn push(&self, container_id: ContainerId, call_id: CallId, index: u64, event: FromApp) -> bool {
        let sender = {
            let mut state = self.state.lock();
            let Some(exchange) = state.exchanges.get_mut(&call_id).filter(|e| e.container_id == container_id) else {
                return false;
            };
            if index <= exchange.last_out_index {
                return true;
            }
            exchange.last_out_index = index;
            exchange.from_app.clone()
        };
        // A receiver that is gone is a client that went away: the app's output has no reader.
        let _gone = sender.send(event).await;
        true
    }

    /// Ends an exchange with the outcome of its input. Returns whether the input belonged to one.
    pub fn finish(&self, container_id: ContainerId, input_id: InputId, outcome: Outcome) -> bool {
        let mut state = self.state.lock();
        let Some(call_id) = state.by_input.get(&input_id).copied() else { return false };
        if state.exchanges.get(&call_id).is_none_or(|e| e.container_id != container_id) {
            return false;
        }
        state.by_input.remove(&input_id);
        if let Some(exchange) = state.exchanges.remove(&call_id) {
            finish(exchange.from_app, outcome);
        }
        true
    }

    /// Whether an input is an open exchange.
    pub fn owns_input(&self, input_id: InputId) -> bool {
        self.state.lock().by_input.contains_key(&input_id)
    }
}

/// Sends the last event without blocking the caller: where the buffer is full, a task waits for room.
/// The task ends with the receiver, which the request's own deadline bounds.
fn finish(sender: mpsc::Sender<FromApp>, outcome: Outcome) {
    if let Err(mpsc::error::TrySendError::Full(event)) = sender.try_send(FromApp::Finished(outcome)) {
        tokio::spawn(async move {
            let _gone = sender.send(event).await;
        });
    }
}
