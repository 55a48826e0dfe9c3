//! The bodies that pass through the ingress, without a box around the common ones.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

use crate::channel::ChannelBody;
use crate::stream::StreamBody;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of the platform's own answers (gRPC, blobs, pages).
pub type PlatformBody = UnsyncBoxBody<Bytes, BoxError>;

/// What the listener sends to clients.
pub(crate) enum ResponseBody {
    /// All of it is here; empty after it was taken.
    Whole(Option<Bytes>),
    /// Still coming from the app's socket.
    Stream(StreamBody),
    /// Still coming through the data channel.
    Channel(ChannelBody),
    Platform(PlatformBody),
}

impl ResponseBody {
    pub(crate) fn empty() -> Self {
        Self::Whole(None)
    }

    pub(crate) fn whole(bytes: Bytes) -> Self {
        Self::Whole(if bytes.is_empty() { None } else { Some(bytes) })
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream(body) => body.poll_frame(cx),
            Self::Channel(body) => body.poll_frame(cx),
            Self::Platform(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Stream(body) => body.is_end_stream(),
            Self::Channel(body) => body.is_end_stream(),
            Self::Platform(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            // The `content-length` that the app sent goes to the client and frames the body.
            Self::Stream(_) | Self::Channel(_) => SizeHint::default(),
            Self::Platform(body) => body.size_hint(),
        }
    }
}

/// What an app's socket gets.
#[derive(Debug)]
pub(crate) enum RequestBody {
    Empty,
    /// The client's body as it arrives. `ended` tells the response's side that the upload is complete,
    /// so that the connection is free once the response is.
    Client {
        body: Incoming,
        ended: Arc<AtomicBool>,
    },
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Client { body, ended } => {
                let polled = Pin::new(&mut *body).poll_frame(cx);
                if matches!(polled, Poll::Ready(None)) || body.is_end_stream() {
                    ended.store(true, Ordering::Release);
                }
                polled
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Client { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Client { body, .. } => body.size_hint(),
        }
    }
}
