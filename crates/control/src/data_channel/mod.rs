//! HTTP and websocket requests through the official runtime's own data channel.
//!
//! This is the fallback for containers to which the web hook could not attach. One request is one
//! *exchange*: an input that the container polls for, a stream of events to the app and a stream of
//! events back. Exchanges live in memory only: a request whose server dies is an error to its caller,
//! as with any HTTP server.
//!
//! Ingress opens an exchange ([`DataChannels::open`]) and holds its [`WebExchange`]; the container takes
//! it up with its next poll. It is over when the container reports the input's outcome, or ends itself.
//! An exchange that its ingress drops before that is withdrawn: from the queue where no poll has taken it
//! yet, else by cancelling the input over the container's heartbeat.

mod events;
mod inbound;
mod queue;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::{CallId, ContainerId, InputId, Outcome};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

pub use events::{FromApp, ToApp, WebScope};
pub use inbound::Inbound;
pub use queue::{EventReceiver, EventSender, Gone, NotSent};

use self::queue::queue;
use crate::containers::Containers;

/// The ingress' end of an exchange. Dropping it tells the app that its client is gone.
#[derive(Debug)]
pub struct WebExchange {
    pub call_id: CallId,
    pub input_id: InputId,
    pub to_app: EventSender<ToApp>,
    pub from_app: EventReceiver<FromApp>,
    /// Withdraws the request where nobody waits for its answer any more.
    _guard: ExchangeGuard,
}

#[derive(Debug)]
struct ExchangeGuard {
    channels: DataChannels,
    call_id: CallId,
}

impl Drop for ExchangeGuard {
    fn drop(&mut self) {
        self.channels.withdraw(self.call_id);
    }
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
    /// Taken by the container's `FunctionCallGetDataIn`, which may reconnect.
    inbound: Arc<Inbound>,
    from_app: EventSender<FromApp>,
    /// The highest index of `FunctionCallPutDataOut` that went through; retries repeat chunks.
    last_out_index: u64,
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
#[derive(Clone)]
pub struct DataChannels {
    state: Arc<Mutex<State>>,
    /// Changes when a container becomes known.
    attached: Arc<watch::Sender<()>>,
    /// By whose heartbeats inputs are cancelled; `None` in tests of the ingress alone.
    containers: Option<Containers>,
}

impl Default for DataChannels {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            attached: Arc::new(watch::channel(()).0),
            containers: None,
        }
    }
}

impl std::fmt::Debug for DataChannels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataChannels").finish_non_exhaustive()
    }
}

impl DataChannels {
    pub(crate) fn new(containers: Containers) -> Self {
        Self {
            containers: Some(containers),
            ..Self::default()
        }
    }

    /// Makes a container known, so that exchanges can be opened on it. Called by control.
    pub fn attach(&self, container_id: ContainerId) {
        self.state.lock().containers.entry(container_id).or_default();
        self.attached.send_replace(());
    }

    /// Forgets a container and ends its exchanges with `outcome`. Called by control.
    pub fn detach(&self, container_id: ContainerId, outcome: &Outcome) {
        let mut state = self.state.lock();
        if let Some(queue) = state.containers.remove(&container_id) {
            queue.arrived.notify_one();
        }
        let ended: Vec<CallId> = state
            .exchanges
            .iter()
            .filter(|(_, exchange)| exchange.container_id == container_id)
            .map(|(id, _)| *id)
            .collect();
        for call_id in ended {
            state.end(call_id, outcome.clone());
        }
    }

    /// Hands a request to a container, on which the caller holds a slot.
    pub fn open(
        &self,
        container_id: ContainerId,
        method: Option<String>,
        scope: WebScope,
    ) -> Result<WebExchange, OpenError> {
        let (to_app, receiver) = queue();
        let (from_app_sender, from_app) = queue();
        let call_id = CallId::generate();
        let input_id = InputId::generate();
        let mut state = self.state.lock();
        let Some(container) = state.containers.get_mut(&container_id) else {
            return Err(OpenError::ContainerGone(container_id));
        };
        let inbound = Arc::new(Inbound::new(receiver, scope.websocket));
        container.waiting.push_back(WebInput {
            call_id,
            input_id,
            method,
            scope: Arc::new(scope),
        });
        container.arrived.notify_one();
        state.by_input.insert(input_id, call_id);
        state.exchanges.insert(
            call_id,
            Exchange {
                container_id,
                input_id,
                inbound,
                from_app: from_app_sender,
                last_out_index: 0,
            },
        );
        let guard = ExchangeGuard {
            channels: self.clone(),
            call_id,
        };
        Ok(WebExchange {
            call_id,
            input_id,
            to_app,
            from_app,
            _guard: guard,
        })
    }

    /// The container's poll: the next request, or `None` after `hold`. A container becomes known only
    /// after its first poll has made it ready, so an unknown one waits as well.
    pub async fn next_input(&self, container_id: ContainerId, hold: Duration) -> Option<WebInput> {
        let deadline = tokio::time::Instant::now() + hold;
        let mut attached = self.attached.subscribe();
        loop {
            attached.mark_unchanged();
            let arrived = {
                let mut state = self.state.lock();
                match state.containers.get_mut(&container_id) {
                    Some(queue) => match queue.waiting.pop_front() {
                        Some(input) => return Some(input),
                        None => Some(Arc::clone(&queue.arrived)),
                    },
                    None => None,
                }
            };
            let news = async {
                match arrived {
                    // `notify_one` stores a permit, so an input that arrives before this line is not missed.
                    Some(arrived) => arrived.notified().await,
                    None => {
                        // The sender lives as long as `self`.
                        let _attached = attached.changed().await;
                    }
                }
            };
            tokio::time::timeout_at(deadline, news).await.ok()?;
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
        let is_ours = |exchange: &&mut Exchange| exchange.container_id == container_id;
        let sender = {
            let mut state = self.state.lock();
            let Some(exchange) = state.exchanges.get_mut(&call_id).filter(is_ours) else {
                return false;
            };
            if index <= exchange.last_out_index {
                return true;
            }
            exchange.from_app.clone()
        };
        // First room, then the index: a request that is cut off while it waits is repeated, and what it
        // did not send must not count as sent.
        let Ok(room) = sender.reserve(&event).await else {
            // The client went away: the app's output has no reader.
            return true;
        };
        let mut state = self.state.lock();
        let Some(exchange) = state.exchanges.get_mut(&call_id).filter(is_ours) else {
            return false;
        };
        if index > exchange.last_out_index {
            exchange.last_out_index = index;
            room.send(event);
        }
        true
    }

    /// Ends an exchange with the outcome of its input. Returns whether the input belonged to one.
    pub fn finish(&self, container_id: ContainerId, input_id: InputId, outcome: Outcome) -> bool {
        let mut state = self.state.lock();
        let Some(call_id) = state.by_input.get(&input_id).copied() else {
            return false;
        };
        if state
            .exchanges
            .get(&call_id)
            .is_none_or(|exchange| exchange.container_id != container_id)
        {
            return false;
        }
        state.end(call_id, outcome);
        true
    }

    /// Nobody waits for the answer any more.
    fn withdraw(&self, call_id: CallId) {
        let delivered = {
            let mut state = self.state.lock();
            let Some(exchange) = state.exchanges.get(&call_id) else {
                return;
            };
            let (container_id, input_id) = (exchange.container_id, exchange.input_id);
            let waits = state.containers.get_mut(&container_id).is_some_and(|queue| {
                let before = queue.waiting.len();
                queue.waiting.retain(|input| input.call_id != call_id);
                queue.waiting.len() < before
            });
            if waits {
                state.forget(call_id);
                None
            } else {
                // The exchange stays until the container has let go of the input.
                Some((container_id, input_id))
            }
        };
        if let (Some((container_id, input_id)), Some(containers)) = (delivered, &self.containers) {
            containers.cancel(container_id, vec![input_id]);
        }
    }
}

impl State {
    fn forget(&mut self, call_id: CallId) -> Option<Exchange> {
        let exchange = self.exchanges.remove(&call_id)?;
        self.by_input.remove(&exchange.input_id);
        exchange.inbound.ended.cancel();
        Some(exchange)
    }

    fn end(&mut self, call_id: CallId, outcome: Outcome) {
        if let Some(exchange) = self.forget(call_id) {
            finish(exchange.from_app, outcome);
        }
    }
}

/// Sends the last event without blocking the caller: where the buffer is full, a task waits for room.
/// The task ends with the receiver, which the request's own deadline bounds.
fn finish(sender: EventSender<FromApp>, outcome: Outcome) {
    if let Err(NotSent::Full(event)) = sender.try_send(FromApp::Finished(outcome)) {
        tokio::spawn(async move {
            let _gone = sender.send(event).await;
        });
    }
}

#[cfg(test)]
mod tests;
