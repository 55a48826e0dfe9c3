//! HTTP/1.1 connections to apps: kept alive, one request at a time, and driven by the request itself.
//!
//! The usual way to use hyper's client is a task per connection. Here the task that serves the client's
//! connection also polls the connection to the app, so that a request costs no hand-over between tasks
//! (and usually cores) on its way there and back. Two consequences:
//!
//! * While nobody polls a connection, nothing reads it. That is the backpressure which streaming needs,
//!   and an idle connection is polled once before it is used again, which finds out if it was closed.
//! * Wake-ups come from the socket alone, through the poll of the connection. Hyper's inner channels are
//!   polled with a waker that does nothing, or every request would wake its task several times more.
//!
//! Where request and response bodies run at the same time, and for upgrades, the connection gets a task
//! of its own after all: there, one direction must go on while the other is stuck.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::body::{BoxError, RequestBody};
use crate::config::Limits;

/// Idle connections kept per app. One request uses one connection, so more than the container's slots
/// never come together; this bounds descriptors where a container has very many slots.
const MAX_IDLE: usize = 512;

/// Read buffer of a connection: responses stream through it, and a response's head must fit.
const READ_BUFFER: usize = 128 * 1024;

/// Headers of an app's response: hyper's own limit, beyond which the caller gets a 502.
const MAX_HEADERS: usize = 100;

type Driver = http1::Connection<TokioIo<TcpStream>, RequestBody>;

/// Where an app listens, and the connections to it that are free.
#[derive(Debug)]
pub(crate) struct DirectTarget {
    pub(crate) address: SocketAddr,
    /// Boxed: a connection is a kilobyte of state that would otherwise be copied from hand to hand.
    #[expect(clippy::vec_box, reason = "see above")]
    idle: Mutex<Vec<Box<Connection>>>,
}

/// A connection that takes one request at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: http1::SendRequest<RequestBody>,
    driver: Driver,
    used_at: Instant,
    /// It has served a request before, so the app may have closed it meanwhile.
    pub(crate) is_reused: bool,
}

/// Why no connection could be made. Nothing of the request was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("failed to connect to the app at {address}")]
    Connect {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("the app at {address} did not accept a connection within {limit:?}")]
    TimedOut { address: SocketAddr, limit: Duration },
    #[error("failed to begin HTTP with the app at {address}")]
    Handshake { address: SocketAddr, source: hyper::Error },
}

impl DirectTarget {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            idle: Mutex::default(),
        }
    }

    /// A free connection, the most recently used first, else a new one.
    pub(crate) async fn checkout(&self, limits: &Limits) -> Result<Box<Connection>, ConnectError> {
        let now = Instant::now();
        loop {
            let connection = self.idle.lock().pop();
            match connection {
                Some(connection) if connection.used_at + limits.upstream_idle_timeout < now => {
                    // The rest was idle for even longer.
                    let stale = std::mem::take(&mut *self.idle.lock());
                    drop(stale);
                }
                Some(mut connection) => {
                    if connection.is_usable() {
                        return Ok(connection);
                    }
                }
                None => return self.connect(limits).await,
            }
        }
    }

    /// A connection for this request alone; it never becomes idle.
    pub(crate) async fn connect(&self, limits: &Limits) -> Result<Box<Connection>, ConnectError> {
        let address = self.address;
        let stream = match tokio::time::timeout(limits.connect_timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => return Err(ConnectError::Connect { address, source }),
            Err(_elapsed) => {
                return Err(ConnectError::TimedOut {
                    address,
                    limit: limits.connect_timeout,
                });
            }
        };
        stream
            .set_nodelay(true)
            .map_err(|source| ConnectError::Connect { address, source })?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(READ_BUFFER)
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| ConnectError::Handshake { address, source })?;
        Ok(Box::new(Connection {
            sender,
            driver,
            used_at: Instant::now(),
            is_reused: false,
        }))
    }

    /// Keeps a connection for the next request, if it is in order and there is room.
    fn checkin(&self, mut connection: Box<Connection>) {
        if !connection.is_usable() {
            return;
        }
        connection.used_at = Instant::now();
        connection.is_reused = true;
        let mut idle = self.idle.lock();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }
}

/// How a request without a response ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// Not a byte of it was written.
    #[error("the connection had closed before the request was written")]
    NotSent {
        request: Box<Request<RequestBody>>,
        source: hyper::Error,
    },
    #[error("the connection broke before the response")]
    Broken(#[source] hyper::Error),
}

impl Connection {
    /// Polls the idle connection once: whether it can take a request now.
    fn is_usable(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut self.driver).poll(&mut cx).is_pending() && self.sender.is_ready()
    }

    /// Sends a request and waits for the head of its response.
    pub(crate) async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, SendError> {
        let mut response = std::pin::pin!(self.sender.try_send_request(request));
        let mut is_driver_done = false;
        let answered = std::future::poll_fn(|cx| {
            if !is_driver_done {
                // An error of the driver also reaches the response, which is where it is handled.
                is_driver_done = Pin::new(&mut self.driver).poll(cx).is_ready();
            }
            if is_driver_done {
                return response.as_mut().poll(cx);
            }
            response.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        })
        .await;
        answered.map_err(|mut error| match error.take_message() {
            Some(request) => SendError::NotSent {
                request: Box::new(request),
                source: error.into_error(),
            },
            None => SendError::Broken(error.into_error()),
        })
    }

    /// Gives the connection a task of its own, with or without the right to be upgraded.
    pub(crate) fn spawn(self: Box<Self>) -> (http1::SendRequest<RequestBody>, DriverTask) {
        let Self { sender, driver, .. } = *self;
        let driver = driver.with_upgrades();
        // Kind: per request. Ends with the connection; aborted when the exchange is dropped.
        let task = tokio::spawn(async move {
            // Its error also reaches the response or its body, where it is handled.
            let _told_elsewhere = driver.await;
        });
        (sender, DriverTask(task.abort_handle()))
    }
}

/// Closes a connection that has a task of its own.
#[derive(Debug)]
pub(crate) struct DriverTask(tokio::task::AbortHandle);

impl Drop for DriverTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A response on its way. Dropping it closes the connection to the app, unless it is complete.
pub(crate) struct Exchange {
    body: Incoming,
    mode: Mode,
}

enum Mode {
    /// Polled with the body.
    Together(Box<Connection>),
    /// In a task, until dropped.
    Apart(#[expect(dead_code, reason = "held for its Drop")] DriverTask),
    /// The app closed its side; what is left of the body is in memory.
    Closed,
}

impl Exchange {
    pub(crate) fn together(body: Incoming, connection: Box<Connection>) -> Self {
        Self {
            body,
            mode: Mode::Together(connection),
        }
    }

    pub(crate) fn apart(body: Incoming, task: DriverTask) -> Self {
        Self {
            body,
            mode: Mode::Apart(task),
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Mode::Together(connection) = &mut self.mode {
            let mut noop = Context::from_waker(Waker::noop());
            if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(&mut noop) {
                return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
            }
            if Pin::new(&mut connection.driver).poll(cx).is_pending() {
                return Pin::new(&mut self.body).poll_frame(&mut noop).map_err(Into::into);
            }
            self.mode = Mode::Closed;
        }
        Pin::new(&mut self.body).poll_frame(cx).map_err(Into::into)
    }

    /// Keeps the connection of a complete response for the next request.
    pub(crate) fn finish(self, target: &DirectTarget) {
        match self.mode {
            Mode::Together(connection) => {
                // The body's end is the connection's permission to read on.
                drop(self.body);
                target.checkin(connection);
            }
            Mode::Apart(_) | Mode::Closed => {}
        }
    }
}
