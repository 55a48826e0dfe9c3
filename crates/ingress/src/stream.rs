//! Response bodies that come from an app's socket while the client reads them.
//!
//! A body holds its slot, and a client that stops reading stops the polls of the body. So the deadline
//! and the container's end are watched by a task beside it, which takes exchange and slot away.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::Frame;
use ionian_domain::web::Route;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::body::BoxError;
use crate::respond::{self, RequestId};
use crate::slots::{SlotLease, Target};
use crate::upstream::Exchange;

/// Why a body ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Cut {
    #[error("the request's timeout passed")]
    Timeout,
    #[error("the app's container is gone")]
    ContainerGone,
    #[error("the app's connection broke")]
    Broken,
}

/// The response's owner and its watchdog share this.
struct Shared {
    state: Mutex<State>,
}

struct State {
    live: Option<Live>,
    cut: Option<Cut>,
    /// Of the task that waits for the next frame.
    waker: Option<Waker>,
}

/// An exchange and the slot it occupies.
pub(crate) struct Live {
    pub(crate) exchange: Exchange,
    pub(crate) lease: SlotLease,
    /// The web method, which finds the connection's pool again.
    pub(crate) route: Arc<Route>,
}

impl Live {
    /// Ends a complete exchange: the connection is kept, then the slot is free.
    pub(crate) fn finish(self) {
        if let Some(Target::Direct(target)) = self.lease.container().target(self.route.method.as_deref()) {
            self.exchange.finish(target);
        }
        drop(self.lease);
    }
}

pub(crate) struct StreamBody {
    /// Frames that came with the head, in order.
    first: [Option<Frame<Bytes>>; 2],
    shared: Arc<Shared>,
    watchdog: tokio::task::AbortHandle,
    route: Arc<Route>,
    request_id: RequestId,
    is_done: bool,
}

impl StreamBody {
    pub(crate) fn new(first: [Option<Frame<Bytes>>; 2], live: Live, deadline: Instant, request_id: RequestId) -> Self {
        let route = Arc::clone(&live.route);
        let gone = live.lease.container().gone.clone();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                live: Some(live),
                cut: None,
                waker: None,
            }),
        });
        let watched = Arc::clone(&shared);
        // Kind: per request. Ends at the deadline at the latest; aborted with the body.
        let watchdog = tokio::spawn(async move {
            let cut = tokio::select! {
                () = tokio::time::sleep_until(deadline) => Cut::Timeout,
                () = gone.cancelled() => Cut::ContainerGone,
            };
            watched.cut(cut);
        });
        Self {
            first,
            shared,
            watchdog: watchdog.abort_handle(),
            route,
            request_id,
            is_done: false,
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(frame) = self.first.iter_mut().find_map(Option::take) {
            return Poll::Ready(Some(Ok(frame)));
        }
        if self.is_done {
            return Poll::Ready(None);
        }
        let mut state = self.shared.state.lock();
        let Some(live) = &mut state.live else {
            let cut = state.cut.unwrap_or(Cut::Broken);
            drop(state);
            self.is_done = true;
            respond::log_cut_body(&self.request_id, &self.route, &cut);
            return Poll::Ready(Some(Err(cut.into())));
        };
        match live.exchange.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if live.exchange.is_complete() {
                    let live = state.live.take();
                    drop(state);
                    self.finish(live);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                let live = state.live.take();
                drop(state);
                self.finish(live);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                let live = state.live.take();
                drop(state);
                drop(live);
                self.is_done = true;
                self.watchdog.abort();
                respond::log_cut_body(&self.request_id, &self.route, &*error);
                Poll::Ready(Some(Err(error)))
            }
            Poll::Pending => {
                if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    state.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.is_done && self.first.iter().all(Option::is_none)
    }

    fn finish(&mut self, live: Option<Live>) {
        self.is_done = true;
        self.watchdog.abort();
        if let Some(live) = live {
            live.finish();
        }
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        self.watchdog.abort();
        // Now, not when the aborted watchdog lets go of its share: the client left, and the app is to
        // see it at once.
        let live = self.shared.state.lock().live.take();
        drop(live);
    }
}

impl Shared {
    fn cut(&self, cut: Cut) {
        let (live, waker) = {
            let mut state = self.state.lock();
            let live = state.live.take();
            if live.is_some() {
                state.cut = Some(cut);
            }
            (live, state.waker.take())
        };
        // Outside the lock: closes the connection and frees the slot.
        drop(live);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
