//! Log batches on their way to the control process: few at a time, in order, kept until they were written there.
//!
//! Who prints waits for room here, so a container that floods, or a server that is away, stops the containers'
//! output and grows no memory. A new session sends again what the old one did not confirm.

use std::collections::VecDeque;
use std::sync::Arc;

use ionian_domain::log::LogEntry;
use ionian_proto::worker as pb;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::link::wire;
use crate::logs::LogSink;

/// Batches that were handed over and not confirmed. A batch is half a megabyte at most, and a container has one
/// on its way at a time: this many keep a connection busy, and leave room for others beside a flood.
pub(crate) const MAX_UNCONFIRMED_BATCHES: usize = 32;

#[derive(Clone)]
pub(crate) struct LogOutbox {
    room: Arc<Semaphore>,
    queue: Arc<Mutex<Queue>>,
    news: Arc<Notify>,
}

struct Queue {
    next_sequence: u64,
    batches: VecDeque<Waiting>,
}

struct Waiting {
    batch: pb::LogBatch,
    _room: OwnedSemaphorePermit,
}

impl LogOutbox {
    pub(crate) fn new() -> Self {
        Self {
            room: Arc::new(Semaphore::new(MAX_UNCONFIRMED_BATCHES)),
            queue: Arc::new(Mutex::new(Queue {
                next_sequence: 1,
                batches: VecDeque::new(),
            })),
            news: Arc::default(),
        }
    }

    /// Its future resolves when the entries have a place in the line. What is put there before an exit is
    /// reported is sent before it.
    pub(crate) fn sink(&self) -> LogSink {
        let outbox = self.clone();
        Arc::new(move |entries| {
            let outbox = outbox.clone();
            Box::pin(async move { outbox.put(entries).await })
        })
    }

    async fn put(&self, entries: Vec<LogEntry>) {
        // First come, first served: a container that floods does not overtake the others.
        let Ok(room) = Arc::clone(&self.room).acquire_owned().await else {
            return;
        };
        {
            let mut queue = self.queue.lock();
            let sequence = queue.next_sequence;
            queue.next_sequence += 1;
            queue.batches.push_back(Waiting {
                batch: pb::LogBatch {
                    sequence,
                    entries: entries.into_iter().map(wire::log_entry).collect(),
                },
                _room: room,
            });
        }
        self.news.notify_one();
    }

    /// Resolves when something was put in since the last time. Cancel-safe.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }

    /// The first batch after this sequence.
    pub(crate) fn after(&self, sequence: u64) -> Option<pb::LogBatch> {
        let queue = self.queue.lock();
        let waiting = queue.batches.iter().find(|waiting| waiting.batch.sequence > sequence);
        waiting.map(|waiting| waiting.batch.clone())
    }

    /// Everything up to this sequence has been written.
    pub(crate) fn confirm(&self, sequence: u64) {
        let mut queue = self.queue.lock();
        while queue
            .batches
            .front()
            .is_some_and(|waiting| waiting.batch.sequence <= sequence)
        {
            queue.batches.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use ionian_domain::log::LogStream;
    use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};

    use super::*;

    fn entry(text: &str) -> LogEntry {
        LogEntry {
            at: Timestamp(0),
            app_id: AppId::generate(),
            function_id: FunctionId::generate(),
            container_id: ContainerId::generate(),
            stream: LogStream::Stdout,
            text: text.to_owned(),
        }
    }

    #[tokio::test]
    async fn a_batch_is_kept_until_it_is_confirmed_and_the_next_waits_for_room() {
        let outbox = LogOutbox::new();
        let sink = outbox.sink();
        for number in 0..MAX_UNCONFIRMED_BATCHES {
            sink(vec![entry(&number.to_string())]).await;
        }
        let mut beyond = tokio::spawn(sink(vec![entry("beyond")]));
        assert!(futures_util::poll!(&mut beyond).is_pending());
        assert_eq!(outbox.after(0).unwrap().sequence, 1);
        assert_eq!(outbox.after(5).unwrap().sequence, 6);
        // Nothing is gone before it is confirmed: a new session starts at the front.
        assert_eq!(outbox.after(0).unwrap().entries[0].text, "0");
        outbox.confirm(3);
        beyond.await.unwrap();
        assert_eq!(outbox.after(0).unwrap().sequence, 4);
        let last = MAX_UNCONFIRMED_BATCHES as u64 + 1;
        assert_eq!(outbox.after(last - 1).unwrap().entries[0].text, "beyond");
        assert!(outbox.after(last).is_none());
    }
}
