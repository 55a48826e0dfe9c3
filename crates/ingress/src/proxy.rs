//! One web request, from its route to its response.
//!
//! Authorise, take a slot, forward, and once more on another container where the first could not be
//! reached. Slots are held from here until the app is done: see [`crate::stream`] and [`crate::channel`].

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use ionian_control::web::ServedRequest;
use ionian_domain::web::Route;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Inner;
use crate::body::{BoxError, RequestBody, ResponseBody};
use crate::forward::{self, ClientFacts, ConnectionInfo, MODAL_KEY, MODAL_SECRET};
use crate::respond::{self, Failure, RequestId, X_REQUEST_ID};
use crate::slots::{AcquireError, SlotLease, Target, WaitLimits};
use crate::stream::{Live, StreamBody};
use crate::upstream::{ConnectError, Connection, DirectTarget, Exchange, SendError};
use crate::{channel, tunnel};

/// A body of a declared length up to this is awaited and sent in one piece with its head: many servers
/// write head and body separately, and each piece costs a system call and a wake-up on the way out.
const SMALL_BODY: u64 = 64 * 1024;

/// For so long. An app that trickles a small body is streamed like any other.
const SMALL_BODY_PATIENCE: Duration = Duration::from_millis(5);

/// An app that had closed an idle connection resets it within a round trip of our first byte. When a
/// connection breaks later than this, the app may have been at work on the request.
const STALE_CONNECTION_WINDOW: Duration = Duration::from_millis(100);

/// What every step of one request needs.
pub(crate) struct Exchanging<'a> {
    pub(crate) ingress: &'a Inner,
    pub(crate) route: &'a Arc<Route>,
    pub(crate) request_id: &'a RequestId,
    pub(crate) facts: ClientFacts,
    pub(crate) http_version: &'static str,
    /// What the client wants to upgrade to, and its half of that.
    pub(crate) upgrade: Option<HeaderValue>,
}

/// The request, until it is written to an app.
pub(crate) struct Outgoing {
    request: Option<Request<RequestBody>>,
    pub(crate) client_upgrade: Option<OnUpgrade>,
    /// Set by the body when all of it was read; `None` where there is no body.
    upload_ended: Option<Arc<AtomicBool>>,
}

/// A failed attempt.
pub(crate) enum AttemptError {
    /// The request did not reach the app and is still whole: another container may have it.
    NotReached(Failure),
    Final(Failure),
}

impl From<Failure> for AttemptError {
    fn from(failure: Failure) -> Self {
        Self::Final(failure)
    }
}

pub(crate) async fn handle(
    ingress: &Inner,
    connection: &ConnectionInfo,
    route: Arc<Route>,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    let request_id = RequestId::of(request.headers());
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().clone());
    match forward_request(ingress, connection, &route, &request_id, request).await {
        Ok(mut response) => {
            response.headers_mut().insert(X_REQUEST_ID, request_id.header());
            if let Some(ServedBy(container_id)) = response.extensions_mut().remove() {
                ingress.requests.tell(|left_out| ServedRequest {
                    app_id: route.app_id,
                    function_id: route.function_id,
                    container_id,
                    method: method.to_string(),
                    path: respond::echo(path.path()),
                    status: response.status().as_u16(),
                    duration: began.elapsed(),
                    left_out,
                });
            }
            response
        }
        Err(failure) => respond::failure(&failure, &request_id, Some(&route)),
    }
}

async fn forward_request(
    ingress: &Inner,
    connection: &ConnectionInfo,
    route: &Arc<Route>,
    request_id: &RequestId,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Failure> {
    if route.requires_proxy_auth {
        authorise(ingress, request.headers_mut())?;
    }
    let upgrade = forward::upgrade_of(&request);
    let client_upgrade = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let http_version = if head.version == http::Version::HTTP_2 {
        "2"
    } else {
        "1.1"
    };
    let facts = forward::prepare_request(&mut head, connection, &ingress.config.trusted_proxies, request_id);
    let upload_ended = (!body.is_end_stream()).then(|| Arc::new(AtomicBool::new(false)));
    let body = match &upload_ended {
        None => RequestBody::Empty,
        Some(ended) => RequestBody::Client {
            body,
            ended: Arc::clone(ended),
        },
    };
    let mut outgoing = Outgoing {
        request: Some(Request::from_parts(head, body)),
        client_upgrade,
        upload_ended,
    };
    let exchanging = Exchanging {
        ingress,
        route,
        request_id,
        facts,
        http_version,
        upgrade,
    };

    let lease = acquire(ingress, route, None).await?;
    let first = lease.container().id;
    match attempt(&exchanging, lease, &mut outgoing).await {
        Ok(response) => Ok(response),
        Err(AttemptError::Final(failure)) => Err(failure),
        Err(AttemptError::NotReached(failure)) => {
            let reason = respond::chain(&failure);
            tracing::debug!(container = %first, reason, "trying a request on another container");
            let lease = acquire(ingress, route, Some(first)).await?;
            attempt(&exchanging, lease, &mut outgoing)
                .await
                .map_err(|error| match error {
                    AttemptError::NotReached(failure) | AttemptError::Final(failure) => failure,
                })
        }
    }
}

/// Checks the proxy token, and keeps it from the app.
fn authorise(ingress: &Inner, headers: &mut HeaderMap) -> Result<(), Failure> {
    let key = headers.remove(MODAL_KEY);
    let secret = headers.remove(MODAL_SECRET);
    let text = |value: &Option<HeaderValue>| value.as_ref().and_then(|value| value.to_str().ok().map(str::to_owned));
    match (text(&key), text(&secret)) {
        (Some(key), Some(secret)) if (ingress.proxy_auth)(&key, &secret) => Ok(()),
        _ => Err(Failure::ProxyAuthRequired),
    }
}

async fn acquire(
    ingress: &Inner,
    route: &Route,
    avoid: Option<ionian_domain::ContainerId>,
) -> Result<SlotLease, Failure> {
    let limits = WaitLimits {
        max_waiting: ingress.config.limits.max_waiting_per_function,
        startup_timeout: route.startup_timeout,
        request_timeout: route.timeout,
    };
    loop {
        match ingress.pools.ensure(route.function_id).acquire(limits, avoid).await {
            Ok(lease) => return Ok(lease),
            // Forgotten between finding and using it; the next one is new.
            Err(AcquireError::Retired) => {}
            Err(AcquireError::RoomFull) => return Err(Failure::Overloaded),
            Err(AcquireError::NoContainer(waited)) => return Err(Failure::NoContainer(waited)),
            Err(AcquireError::AllBusy(waited)) => return Err(Failure::AllBusy(waited)),
            Err(AcquireError::StartFailed(message)) => return Err(Failure::AppFailedToStart(message)),
        }
    }
}

async fn attempt(
    exchanging: &Exchanging<'_>,
    lease: SlotLease,
    outgoing: &mut Outgoing,
) -> Result<Response<ResponseBody>, AttemptError> {
    let deadline = Instant::now() + exchanging.route.timeout;
    let container = Arc::clone(lease.container());
    match container.target(exchanging.route.method.as_deref()) {
        None => {
            let method = exchanging.route.method.as_deref().unwrap_or("the function");
            Err(Failure::AppUnreachable(format!("container {} does not serve {method}", container.id).into()).into())
        }
        Some(Target::Direct(target)) if exchanging.upgrade.is_some() => {
            tunnel::open(exchanging, target, lease, outgoing, deadline).await
        }
        Some(Target::Direct(target)) => direct(exchanging, target, lease, outgoing, deadline).await,
        Some(Target::DataChannel) => channel::open(exchanging, lease, outgoing, deadline).await,
    }
    .map(|mut response| {
        response.extensions_mut().insert(ServedBy(container.id));
        response
    })
}

/// Which container answered, for the app's log.
#[derive(Debug, Clone, Copy)]
struct ServedBy(ionian_domain::ContainerId);

/// Forwards over a socket of the app.
async fn direct(
    exchanging: &Exchanging<'_>,
    target: &DirectTarget,
    lease: SlotLease,
    outgoing: &mut Outgoing,
    deadline: Instant,
) -> Result<Response<ResponseBody>, AttemptError> {
    let limits = &exchanging.ingress.config.limits;
    let timeout = exchanging.route.timeout;
    let container = Arc::clone(lease.container());
    let gone = &container.gone;

    let mut connection = connecting(deadline, timeout, gone, target.checkout(limits)).await?;
    let sent_at = Instant::now();
    let request = outgoing.take(connection.is_reused);
    let mut sent = bounded(deadline, timeout, gone, connection.send(request)).await?;
    // A kept connection that the app closed at this moment says nothing about the app: try a new one.
    if connection.is_reused && outgoing.recover(&mut sent, sent_at) {
        connection = connecting(deadline, timeout, gone, target.connect(limits)).await?;
        sent = bounded(deadline, timeout, gone, connection.send(outgoing.take(false))).await?;
    }
    let response = match sent {
        Ok(response) => response,
        Err(SendError::NotSent { request, source }) => {
            outgoing.request = Some(*request);
            return Err(not_reached(source));
        }
        Err(SendError::Broken(error)) if error.is_user() => return Err(Failure::ClientGone(error.into()).into()),
        Err(SendError::Broken(error)) => return Err(Failure::AppDisconnected(error.into()).into()),
    };
    receive(exchanging, response, connection, lease, outgoing, deadline).await
}

/// Turns an app's response into the client's.
async fn receive(
    exchanging: &Exchanging<'_>,
    response: Response<Incoming>,
    connection: Box<Connection>,
    lease: SlotLease,
    outgoing: &Outgoing,
    deadline: Instant,
) -> Result<Response<ResponseBody>, AttemptError> {
    let (mut head, body) = response.into_parts();
    forward::prepare_response(&mut head);
    let exchange = if outgoing.is_upload_done() {
        Exchange::together(body, connection)
    } else {
        let (_sender, task) = connection.spawn();
        Exchange::apart(body, task)
    };
    let container = Arc::clone(lease.container());
    let mut live = Live {
        exchange,
        lease,
        route: Arc::clone(exchanging.route),
    };
    if live.exchange.is_complete() {
        live.finish();
        return Ok(Response::from_parts(head, ResponseBody::empty()));
    }
    let is_small = content_length(&head.headers).is_some_and(|length| length <= SMALL_BODY);
    let beginning = beginning_of(&mut live.exchange, is_small);
    let body = match bounded(deadline, exchanging.route.timeout, &container.gone, beginning).await? {
        Ok(Beginning::Whole(bytes)) => {
            live.finish();
            ResponseBody::whole(bytes)
        }
        Ok(Beginning::Part(frames)) => {
            ResponseBody::Stream(StreamBody::new(frames, live, deadline, exchanging.request_id.clone()))
        }
        Err(error) => return Err(Failure::AppDisconnected(error).into()),
    };
    Ok(Response::from_parts(head, body))
}

enum Beginning {
    Whole(Bytes),
    Part([Option<Frame<Bytes>>; 2]),
}

/// Takes what has come with the head; of a small body, all that comes soon.
async fn beginning_of(exchange: &mut Exchange, is_small: bool) -> Result<Beginning, BoxError> {
    let mut patience = std::pin::pin!(tokio::time::sleep(SMALL_BODY_PATIENCE));
    let mut data = Bytes::new();
    loop {
        let polled = std::future::poll_fn(|cx| match exchange.poll_frame(cx) {
            std::task::Poll::Ready(frame) => std::task::Poll::Ready(Some(frame)),
            std::task::Poll::Pending if is_small => patience.as_mut().poll(cx).map(|()| None),
            std::task::Poll::Pending => std::task::Poll::Ready(None),
        })
        .await;
        let frame = match polled {
            None => return Ok(Beginning::Part([as_frame(data), None])),
            Some(None) => return Ok(Beginning::Whole(data)),
            Some(Some(frame)) => frame?,
        };
        match frame.into_data() {
            Err(trailers) => return Ok(Beginning::Part([as_frame(data), Some(trailers)])),
            Ok(bytes) if data.is_empty() => data = bytes,
            Ok(bytes) if is_small => {
                let mut joined = BytesMut::from(data);
                joined.extend_from_slice(&bytes);
                data = joined.freeze();
            }
            Ok(bytes) => return Ok(Beginning::Part([as_frame(data), as_frame(bytes)])),
        }
        if exchange.is_complete() {
            return Ok(Beginning::Whole(data));
        }
    }
}

fn as_frame(bytes: Bytes) -> Option<Frame<Bytes>> {
    (!bytes.is_empty()).then(|| Frame::data(bytes))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

pub(crate) fn not_reached(error: impl Into<BoxError>) -> AttemptError {
    AttemptError::NotReached(Failure::AppUnreachable(error.into()))
}

/// Awaits a connection, before which nothing of the request has reached the app.
pub(crate) async fn connecting(
    deadline: Instant,
    timeout: Duration,
    gone: &CancellationToken,
    step: impl Future<Output = Result<Box<Connection>, ConnectError>>,
) -> Result<Box<Connection>, AttemptError> {
    match bounded(deadline, timeout, gone, step).await {
        Ok(connected) => connected.map_err(not_reached),
        Err(failure @ Failure::ContainerGone) => Err(AttemptError::NotReached(failure)),
        Err(failure) => Err(AttemptError::Final(failure)),
    }
}

/// Awaits a step of a request while its time lasts and its container lives.
pub(crate) async fn bounded<T>(
    deadline: Instant,
    timeout: Duration,
    gone: &CancellationToken,
    step: impl Future<Output = T>,
) -> Result<T, Failure> {
    tokio::select! {
        biased;
        done = step => Ok(done),
        () = gone.cancelled() => Err(Failure::ContainerGone),
        () = tokio::time::sleep_until(deadline) => Err(Failure::Timeout(timeout)),
    }
}

impl Outgoing {
    /// The request, to be written. A copy stays where it may be wanted again: its connection was kept
    /// and may be stale, and the request may be sent twice.
    pub(crate) fn take(&mut self, may_be_stale: bool) -> Request<RequestBody> {
        let request = self
            .request
            .take()
            .expect("a request is taken once, or after it was put back");
        if may_be_stale && self.upload_ended.is_none() && forward::is_idempotent(request.method()) {
            let mut copy = Request::new(RequestBody::Empty);
            *copy.method_mut() = request.method().clone();
            *copy.uri_mut() = request.uri().clone();
            *copy.headers_mut() = request.headers().clone();
            self.request = Some(copy);
        }
        request
    }

    pub(crate) fn put_back(&mut self, request: Request<RequestBody>) {
        self.request = Some(request);
    }

    /// Whether a failed request can be written again: it was never written, or it died on a stale
    /// connection and may be repeated.
    fn recover(&mut self, sent: &mut Result<Response<Incoming>, SendError>, sent_at: Instant) -> bool {
        match sent {
            Ok(_) => {
                self.request = None;
                false
            }
            Err(SendError::NotSent { request, .. }) => {
                let taken = std::mem::replace(&mut **request, Request::new(RequestBody::Empty));
                self.request = Some(taken);
                true
            }
            Err(SendError::Broken(_)) => self.request.is_some() && sent_at.elapsed() < STALE_CONNECTION_WINDOW,
        }
    }

    fn is_upload_done(&self) -> bool {
        self.upload_ended
            .as_ref()
            .is_none_or(|ended| ended.load(Ordering::Acquire))
    }
}
