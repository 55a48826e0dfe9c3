//! The bodies of gRPC requests, bounded in memory and in time.
//!
//! One message is bounded by [`crate::MAX_MESSAGE_BYTES`], but a connection carries thousands of requests at once, and
//! each message is whole in memory before it is read. What all of them hold together is counted here. Containers
//! have an account of their own: what one of them fills, developers do not miss.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use ionian_control::Caller;
use tokio::time::Sleep;
use tonic::Status;

/// What requests of developers may hold together: eight of the largest messages. Beyond it, large requests are told
/// to come back, which the client does by itself.
const MAX_CLIENT_BYTES: usize = 1024 * 1024 * 1024;

/// The same for all containers together. The official runtime sends 16 MiB at a time.
const MAX_CONTAINER_BYTES: usize = 512 * 1024 * 1024;

/// Requests up to this size always pass, so that large ones do not stop heartbeats and polls.
const SMALL_REQUEST_BYTES: usize = 64 * 1024;

/// A sender that is silent for so long in the middle of a message is cut off.
const BODY_IDLE_LIMIT: Duration = Duration::from_secs(30);

/// Bytes that requests of one kind of sender hold now.
#[derive(Debug)]
pub(crate) struct Budget {
    held: AtomicUsize,
    limit: usize,
}

impl Budget {
    const fn new(limit: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            limit,
        }
    }
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct MemoryBudgets {
    clients: Arc<Budget>,
    containers: Arc<Budget>,
}

impl Default for MemoryBudgets {
    fn default() -> Self {
        Self {
            clients: Arc::new(Budget::new(MAX_CLIENT_BYTES)),
            containers: Arc::new(Budget::new(MAX_CONTAINER_BYTES)),
        }
    }
}

impl MemoryBudgets {
    pub(crate) fn of(&self, caller: &Caller) -> &Arc<Budget> {
        match caller {
            Caller::Client { .. } => &self.clients,
            Caller::Container { .. } => &self.containers,
        }
    }
}

/// What one request holds; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    budget: Arc<Budget>,
    bytes: AtomicUsize,
}

impl Held {
    pub(crate) fn new(budget: &Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            budget: Arc::clone(budget),
            bytes: AtomicUsize::new(0),
        })
    }

    fn add(&self, bytes: usize) -> Result<(), Status> {
        let own = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let all = self.budget.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if own > SMALL_REQUEST_BYTES && all > self.budget.limit {
            return Err(Status::unavailable(
                "the server holds too many large requests at this moment; try again in some seconds",
            ));
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        self.budget.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A request's body that counts, and that cannot stall for ever.
pub(crate) struct BoundedBody<B> {
    inner: B,
    held: Arc<Held>,
    /// Runs while the sender is silent.
    silence: Option<Pin<Box<Sleep>>>,
}

impl<B> BoundedBody<B> {
    pub(crate) fn new(inner: B, held: Arc<Held>) -> Self {
        Self {
            inner,
            held,
            silence: None,
        }
    }
}

impl<B> Body for BoundedBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.silence = None;
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                Poll::Ready(Some(self.held.add(bytes).map(|()| frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Status::from_error(error.into())))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let silence = self
                    .silence
                    .get_or_insert_with(|| Box::pin(tokio::time::sleep(BODY_IDLE_LIMIT)));
                silence.as_mut().poll(cx).map(|()| {
                    let sentence = format!(
                        "the request broke off: nothing came for {} s",
                        BODY_IDLE_LIMIT.as_secs()
                    );
                    Some(Err(Status::deadline_exceeded(sentence)))
                })
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http_body_util::{BodyExt, Full, StreamBody};
    use tonic::Code;

    use super::*;

    async fn read(budget: &Arc<Budget>, bytes: usize) -> Result<Arc<Held>, Status> {
        let held = Held::new(budget);
        let body = BoundedBody::new(Full::new(Bytes::from(vec![0; bytes])), Arc::clone(&held));
        body.collect().await.map(|_| held)
    }

    #[tokio::test]
    async fn large_requests_beyond_the_memory_come_back_later_and_small_ones_pass() {
        let budget = Arc::new(Budget::new(4 * SMALL_REQUEST_BYTES));
        let first = read(&budget, 3 * SMALL_REQUEST_BYTES).await.unwrap();
        let refused = read(&budget, 2 * SMALL_REQUEST_BYTES).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        let small = read(&budget, SMALL_REQUEST_BYTES).await.unwrap();
        drop((first, small));
        assert_eq!(budget.held.load(Ordering::Relaxed), 0);
        read(&budget, 2 * SMALL_REQUEST_BYTES).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_stops_in_its_middle_is_cut_off() {
        let budget = Arc::new(Budget::new(SMALL_REQUEST_BYTES));
        let first = stream::iter([Ok::<_, Status>(Frame::data(Bytes::from_static(b"half")))]);
        let body = StreamBody::new(Box::pin(futures_util::StreamExt::chain(first, stream::pending())));
        let cut = BoundedBody::new(body, Held::new(&budget)).collect().await.unwrap_err();
        assert_eq!(cut.code(), Code::DeadlineExceeded);
    }
}
