//! What running generators yielded, on its way to their callers.
//!
//! In memory: a generator whose server restarts begins anew with its next attempt. A caller that falls
//! behind holds its generator up: the container's request waits for room, and is then told to come back.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::call::Payload;
use ionian_domain::{CallId, ErrorKind};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::error::{Error, Result};

/// Yielded values that may wait for one caller. The container sends 16 MiB at a time.
const MAX_STREAM_BYTES: usize = 64 * 1024 * 1024;
/// The same for all callers together, so that many slow ones do not fill the memory.
const MAX_TOTAL_BYTES: usize = 512 * 1024 * 1024;
/// Values that were sent and are kept for a reader whose connection broke before they arrived.
const REPLAY_BYTES: usize = 16 * 1024 * 1024;
/// What a value costs beside its bytes, which may be none or lie in a blob.
const CHUNK_BYTES: usize = 128;
/// How long a container's request waits for room before it is sent away to try again.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);
/// How long values are kept for a reader that comes back.
const RETENTION: Duration = Duration::from_mins(10);

/// One value that a generator yielded, as the wire carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Counted from 1 by the container.
    pub index: u64,
    pub data_format: i32,
    pub payload: Payload,
}

impl Chunk {
    fn weight(&self) -> usize {
        self.payload.inline_len() + CHUNK_BYTES
    }
}

#[derive(Debug)]
struct Stream {
    chunks: BTreeMap<u64, Chunk>,
    bytes: usize,
    /// Up to here, values were sent.
    sent: u64,
    /// Bytes of what was sent and is kept.
    sent_bytes: usize,
    /// Up to here, values are kept no more.
    dropped: u64,
    changed: watch::Sender<u64>,
    last_used: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    streams: HashMap<CallId, Stream>,
    bytes: usize,
}

/// All streams. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct GeneratorStreams {
    inner: Arc<Mutex<Inner>>,
    /// Notified when values were read or forgotten.
    room: Arc<Notify>,
}

impl GeneratorStreams {
    /// Takes chunks from the container that runs the call. Repeated ones replace themselves.
    pub async fn push(&self, call_id: CallId, chunks: Vec<Chunk>) -> Result<()> {
        let deadline = Instant::now() + ROOM_PATIENCE;
        loop {
            let mut room = std::pin::pin!(self.room.notified());
            // From here on, room that is made is noticed.
            room.as_mut().enable();
            if self.inner.lock().has_room(call_id) {
                break;
            }
            if tokio::time::timeout_at(deadline, room).await.is_err() {
                return Err(Error::new(
                    ErrorKind::Exhausted,
                    "the caller of this generator is too far behind; trying again",
                ));
            }
        }
        self.inner.lock().add(call_id, chunks);
        Ok(())
    }

    /// Chunks after an index, and a way to wait for more. What lies before was sent, and makes room.
    pub fn read(&self, call_id: CallId, after: u64) -> Result<(Vec<Chunk>, watch::Receiver<u64>)> {
        let page = self.inner.lock().read(call_id, after);
        self.room.notify_waiters();
        page
    }

    /// Forgets streams that nobody touched for long.
    pub(crate) fn sweep(&self) {
        let mut inner = self.inner.lock();
        let mut freed = 0;
        inner.streams.retain(|_, stream| {
            let keep = stream.last_used.elapsed() < RETENTION;
            if !keep {
                freed += stream.bytes;
            }
            keep
        });
        inner.bytes -= freed;
        drop(inner);
        self.room.notify_waiters();
    }
}

impl Inner {
    fn stream(&mut self, call_id: CallId) -> &mut Stream {
        let now = Instant::now();
        let stream = self.streams.entry(call_id).or_insert_with(|| Stream {
            chunks: BTreeMap::new(),
            bytes: 0,
            sent: 0,
            sent_bytes: 0,
            dropped: 0,
            changed: watch::channel(0).0,
            last_used: now,
        });
        stream.last_used = now;
        stream
    }

    fn has_room(&self, call_id: CallId) -> bool {
        let own = self
            .streams
            .get(&call_id)
            .map_or(0, |stream| stream.bytes - stream.sent_bytes);
        // An empty stream takes what comes, so that others who are behind do not stop everybody.
        own == 0 || (own < MAX_STREAM_BYTES && self.bytes < MAX_TOTAL_BYTES)
    }

    fn add(&mut self, call_id: CallId, chunks: Vec<Chunk>) {
        let stream = self.stream(call_id);
        let before = stream.bytes;
        for chunk in chunks {
            // What was sent already is repeated by the container, or comes from its next attempt.
            if chunk.index <= stream.sent {
                continue;
            }
            stream.bytes += chunk.weight();
            let newest = chunk.index;
            if let Some(old) = stream.chunks.insert(chunk.index, chunk) {
                stream.bytes -= old.weight();
            }
            stream.changed.send_modify(|current| *current = newest.max(*current));
        }
        let after = stream.bytes;
        self.bytes = self.bytes - before + after;
    }

    fn read(&mut self, call_id: CallId, after: u64) -> Result<(Vec<Chunk>, watch::Receiver<u64>)> {
        let stream = self.stream(call_id);
        if after < stream.dropped {
            return Err(Error::precondition(format!(
                "values of function call {call_id} were lost: its reader was away for too long; call it again"
            )));
        }
        let before = stream.bytes;
        let mut receiver = stream.changed.subscribe();
        receiver.mark_unchanged();
        let chunks = stream
            .chunks
            .range(after.saturating_add(1)..)
            .map(|(_, chunk)| chunk.clone())
            .collect();
        stream.note_sent(after);
        let kept = stream.bytes;
        self.bytes = self.bytes - before + kept;
        Ok((chunks, receiver))
    }
}

impl Stream {
    fn note_sent(&mut self, up_to: u64) {
        if up_to <= self.sent {
            return;
        }
        self.sent_bytes += self
            .chunks
            .range(self.sent + 1..=up_to)
            .map(|(_, chunk)| chunk.weight())
            .sum::<usize>();
        self.sent = up_to;
        while self.sent_bytes > REPLAY_BYTES
            && let Some((index, oldest)) = self.chunks.pop_first()
        {
            self.sent_bytes -= oldest.weight();
            self.bytes -= oldest.weight();
            self.dropped = index;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn chunk(index: u64, length: usize) -> Chunk {
        Chunk {
            index,
            data_format: 1,
            payload: Payload::Inline(Bytes::from(vec![0; length])),
        }
    }

    fn read(streams: &GeneratorStreams, call_id: CallId, after: u64) -> Vec<u64> {
        indices(&streams.read(call_id, after).unwrap().0)
    }

    fn indices(chunks: &[Chunk]) -> Vec<u64> {
        chunks.iter().map(|chunk| chunk.index).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn values_are_read_from_where_the_reader_is_and_repeated_ones_once() {
        let streams = GeneratorStreams::default();
        let call = CallId::generate();
        streams.push(call, vec![chunk(1, 1), chunk(2, 1)]).await.unwrap();
        streams.push(call, vec![chunk(2, 1), chunk(3, 1)]).await.unwrap();
        assert_eq!(read(&streams, call, 0), [1, 2, 3]);
        let (later, mut news) = streams.read(call, 2).unwrap();
        assert_eq!(indices(&later), [3]);
        streams.push(call, vec![chunk(4, 1)]).await.unwrap();
        news.changed().await.unwrap();
        assert_eq!(read(&streams, call, 3), [4]);
        // Its connection broke before some of that arrived.
        assert_eq!(read(&streams, call, 1), [2, 3, 4]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_was_away_for_too_long_is_told_so() {
        let streams = GeneratorStreams::default();
        let call = CallId::generate();
        for index in 1..=4 {
            streams.push(call, vec![chunk(index, REPLAY_BYTES / 2)]).await.unwrap();
            assert_eq!(read(&streams, call, index - 1), [index]);
        }
        assert_eq!(read(&streams, call, 4), [0_u64; 0]);
        assert_eq!(read(&streams, call, 3), [4]);
        assert_eq!(streams.read(call, 1).unwrap_err().kind(), ErrorKind::PreconditionFailed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_generator_waits_for_its_reader_and_is_then_told_to_come_back() {
        let streams = GeneratorStreams::default();
        let call = CallId::generate();
        streams.push(call, vec![chunk(1, MAX_STREAM_BYTES)]).await.unwrap();
        let refused = streams.push(call, vec![chunk(2, 1)]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Exhausted);
        let waiting = tokio::spawn({
            let streams = streams.clone();
            async move { streams.push(call, vec![chunk(2, 1)]).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        streams.read(call, 1).unwrap();
        waiting.await.unwrap().unwrap();
        assert_eq!(read(&streams, call, 1), [2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nobody_touches_is_forgotten() {
        let streams = GeneratorStreams::default();
        let call = CallId::generate();
        streams.push(call, vec![chunk(1, 10)]).await.unwrap();
        tokio::time::sleep(RETENTION).await;
        streams.sweep();
        assert!(streams.inner.lock().streams.is_empty());
        assert_eq!(streams.inner.lock().bytes, 0);
    }
}
