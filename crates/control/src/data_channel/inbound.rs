//! Events on their way to the app.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::events::ToApp;
use super::queue::{EventReceiver, Weight as _};

/// Events kept for a stream that reconnects. It breaks only between two processes on one machine, right
/// after it was written to, so a short tail is enough.
const REPLAY_EVENTS: usize = 8;
/// The same in bytes of their contents; the last event is kept whatever its size.
const REPLAY_BYTES: usize = 4 << 20;
/// What a websocket's app is told about a peer that vanished without a word (RFC 6455).
const ABNORMAL_CLOSURE: u16 = 1006;

/// Events on their way to the app, with the index that the wire gives them (from 1).
///
/// The runtime opens its stream anew whenever one ends, so a stream must not end before its exchange
/// does: the runtime would ask again without a pause.
#[derive(Debug)]
pub struct Inbound {
    receiver: tokio::sync::Mutex<EventReceiver<ToApp>>,
    replay: Mutex<Replay>,
    /// Cancelled when the exchange is over.
    pub(super) ended: CancellationToken,
    is_websocket: bool,
}

#[derive(Debug, Default)]
struct Replay {
    next_index: u64,
    recent: VecDeque<(u64, ToApp)>,
    /// The app was told that its client is gone.
    disconnected: bool,
}

impl Inbound {
    pub(super) fn new(receiver: EventReceiver<ToApp>, is_websocket: bool) -> Self {
        Self {
            receiver: tokio::sync::Mutex::new(receiver),
            replay: Mutex::default(),
            ended: CancellationToken::new(),
            is_websocket,
        }
    }

    /// The next event after `last_index`; `None` when the exchange is over.
    pub async fn next(&self, last_index: u64) -> Option<(u64, ToApp)> {
        // Held while waiting: an older stream of the same exchange is dropped with its connection.
        let mut receiver = self.receiver.lock().await;
        if let Some((index, event)) = self.replay.lock().find(last_index) {
            if index == last_index + 1 {
                return Some((index, event));
            }
            // The stream was away for too long, and a request with a hole is worse than one that was cut.
            receiver.close();
            return Some((index, self.disconnection()));
        }
        let event = tokio::select! {
            biased;
            event = receiver.recv() => event,
            () = self.ended.cancelled() => return None,
        };
        let event = match event {
            Some(event) => event,
            None if self.replay.lock().disconnected => {
                self.ended.cancelled().await;
                return None;
            }
            // The request's sender left without a word: the app hears it from us.
            None => self.disconnection(),
        };
        Some(self.replay.lock().add(event))
    }

    fn disconnection(&self) -> ToApp {
        if self.is_websocket {
            ToApp::WebsocketDisconnect { code: ABNORMAL_CLOSURE }
        } else {
            ToApp::Disconnect
        }
    }
}

impl Replay {
    fn find(&self, last_index: u64) -> Option<(u64, ToApp)> {
        self.recent.iter().find(|(index, _)| *index > last_index).cloned()
    }

    fn add(&mut self, event: ToApp) -> (u64, ToApp) {
        self.disconnected |= match event {
            ToApp::Disconnect | ToApp::WebsocketDisconnect { .. } => true,
            ToApp::Body { .. } | ToApp::WebsocketConnect | ToApp::WebsocketText(_) | ToApp::WebsocketBinary(_) => false,
        };
        self.next_index += 1;
        let entry = (self.next_index, event);
        self.recent.push_back(entry.clone());
        let mut bytes: usize = self.recent.iter().map(|(_, event)| event.bytes()).sum();
        while self.recent.len() > REPLAY_EVENTS || (bytes > REPLAY_BYTES && self.recent.len() > 1) {
            bytes -= self.recent.pop_front().map_or(0, |(_, event)| event.bytes());
        }
        entry
    }
}
