//! A queue of events that is bounded by their number and by their bytes.
//!
//! One event may be as large as a websocket message, so that a number alone would allow gigabytes. An event
//! that is larger than the room for all of them waits until it has the whole room for itself.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc};

use super::events::{FromApp, ToApp};

/// Events buffered per direction of an exchange.
const EXCHANGE_EVENTS: usize = 16;

/// Room for their contents, in KiB: two chunks of a response, which are at most 2 MiB each.
const EXCHANGE_KIB: u32 = 4 << 10;

/// What an event holds in memory.
pub(super) trait Weight {
    fn bytes(&self) -> usize;
}

impl Weight for ToApp {
    fn bytes(&self) -> usize {
        match self {
            Self::Body { bytes, .. } | Self::WebsocketBinary(bytes) => bytes.len(),
            Self::WebsocketText(text) => text.len(),
            Self::Disconnect | Self::WebsocketConnect | Self::WebsocketDisconnect { .. } => 0,
        }
    }
}

impl Weight for FromApp {
    fn bytes(&self) -> usize {
        let pairs = |headers: &[(bytes::Bytes, bytes::Bytes)]| headers.iter().map(|(k, v)| k.len() + v.len()).sum();
        match self {
            Self::Body { bytes, .. } | Self::WebsocketBinary(bytes) => bytes.len(),
            Self::WebsocketText(text) => text.len(),
            Self::ResponseStart { headers, .. }
            | Self::Trailers { headers, .. }
            | Self::WebsocketAccept { headers, .. } => pairs(headers),
            Self::WebsocketClose { reason, .. } => reason.len(),
            Self::Finished(_) => 0,
        }
    }
}

/// The queue's other end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// Why an event was not sent at once; it comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotSent<T> {
    Full(T),
    Gone(T),
}

#[derive(Debug)]
struct Held<T> {
    event: T,
    _room: OwnedSemaphorePermit,
}

#[derive(Debug)]
pub struct EventSender<T> {
    sender: mpsc::Sender<Held<T>>,
    room: Arc<Semaphore>,
}

impl<T> Clone for EventSender<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            room: Arc::clone(&self.room),
        }
    }
}

#[derive(Debug)]
pub struct EventReceiver<T> {
    receiver: mpsc::Receiver<Held<T>>,
    room: Arc<Semaphore>,
}

/// Room for one event, which is sent without waiting.
pub(super) struct Room<T> {
    place: mpsc::OwnedPermit<Held<T>>,
    room: OwnedSemaphorePermit,
}

/// An empty queue.
pub(super) fn queue<T>() -> (EventSender<T>, EventReceiver<T>) {
    let (sender, receiver) = mpsc::channel(EXCHANGE_EVENTS);
    let room = Arc::new(Semaphore::new(EXCHANGE_KIB as usize));
    let receiver = EventReceiver {
        receiver,
        room: Arc::clone(&room),
    };
    (EventSender { sender, room }, receiver)
}

/// What an event takes of a queue's room.
fn kib<T: Weight>(event: &T) -> u32 {
    u32::try_from(event.bytes().div_ceil(1 << 10)).map_or(EXCHANGE_KIB, |kib| kib.min(EXCHANGE_KIB))
}

impl<T> EventSender<T> {
    /// Waits for room for `event`, which is not sent yet.
    pub(super) async fn reserve(self, event: &T) -> Result<Room<T>, Gone>
    where
        T: Weight,
    {
        let room = self.room.acquire_many_owned(kib(event)).await.map_err(|_| Gone)?;
        let place = self.sender.reserve_owned().await.map_err(|_| Gone)?;
        Ok(Room { place, room })
    }

    /// Sends an event, when there is room for it.
    #[expect(private_bounds, reason = "only the two kinds of events have a weight")]
    pub async fn send(&self, event: T) -> Result<(), Gone>
    where
        T: Weight,
    {
        self.clone().reserve(&event).await?.send(event);
        Ok(())
    }

    /// Sends an event if there is room for it now.
    #[expect(private_bounds, reason = "only the two kinds of events have a weight")]
    pub fn try_send(&self, event: T) -> Result<(), NotSent<T>>
    where
        T: Weight,
    {
        let room = match Arc::clone(&self.room).try_acquire_many_owned(kib(&event)) {
            Ok(room) => room,
            Err(TryAcquireError::NoPermits) => return Err(NotSent::Full(event)),
            Err(TryAcquireError::Closed) => return Err(NotSent::Gone(event)),
        };
        self.sender
            .try_send(Held { event, _room: room })
            .map_err(|refused| match refused {
                mpsc::error::TrySendError::Full(held) => NotSent::Full(held.event),
                mpsc::error::TrySendError::Closed(held) => NotSent::Gone(held.event),
            })
    }
}

impl<T> Room<T> {
    pub(super) fn send(self, event: T) {
        self.place.send(Held {
            event,
            _room: self.room,
        });
    }
}

impl<T> EventReceiver<T> {
    /// The next event; `None` once all senders are gone. Its room is free as soon as it is taken.
    pub async fn recv(&mut self) -> Option<T> {
        self.receiver.recv().await.map(|held| held.event)
    }

    /// Takes no more events, and lets go of senders that wait.
    pub(super) fn close(&mut self) {
        self.room.close();
        self.receiver.close();
    }
}

impl<T> Drop for EventReceiver<T> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn body(mebibytes: usize) -> ToApp {
        ToApp::Body {
            bytes: Bytes::from(vec![0; mebibytes << 20]),
            more: true,
        }
    }

    #[tokio::test]
    async fn a_queue_holds_no_more_bytes_than_it_has_room_for() {
        let (sender, mut receiver) = queue();
        sender.try_send(body(3)).unwrap();
        assert!(matches!(sender.try_send(body(2)), Err(NotSent::Full(_))));
        sender.try_send(body(1)).unwrap();
        assert_eq!(receiver.recv().await, Some(body(3)));
        sender.try_send(body(2)).unwrap();
    }

    #[tokio::test]
    async fn a_queue_holds_no_more_events_than_it_has_places() {
        let (sender, _receiver) = queue();
        for _ in 0..EXCHANGE_EVENTS {
            sender.try_send(body(0)).unwrap();
        }
        assert!(matches!(sender.try_send(ToApp::Disconnect), Err(NotSent::Full(_))));
    }

    #[tokio::test]
    async fn an_event_larger_than_all_room_goes_through_alone() {
        let (sender, mut receiver) = queue();
        sender.send(body(1)).await.unwrap();
        let large = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(body(64)).await }
        });
        assert_eq!(receiver.recv().await, Some(body(1)));
        assert_eq!(receiver.recv().await, Some(body(64)));
        assert_eq!(large.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn who_waits_for_room_learns_that_the_receiver_is_gone() {
        let (sender, receiver) = queue();
        sender.try_send(body(4)).unwrap();
        let waiting = tokio::spawn({
            let sender = sender.clone();
            async move { sender.send(body(4)).await }
        });
        tokio::task::yield_now().await;
        drop(receiver);
        assert_eq!(waiting.await.unwrap(), Err(Gone));
        assert!(matches!(sender.try_send(body(1)), Err(NotSent::Gone(_))));
    }
}
