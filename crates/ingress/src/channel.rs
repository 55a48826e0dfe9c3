//! Requests through the official runtime's own data channel, where an app has no socket.
//!
//! A task per request (the *relay*) owns the exchange and the slot from the start until the app's call
//! has returned: the client may leave, and the response may end, earlier than that. It hands the head
//! and the frames of the response to the request over channels, and learns there that the client left.

use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ionian_control::data_channel::{EventSender, FromApp, ToApp, WebExchange, WebScope};
use ionian_domain::Outcome;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::web::Route;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::body::{BoxError, RequestBody, ResponseBody};
use crate::proxy::{AttemptError, Exchanging, Outgoing, not_reached};
use crate::respond::{self, Failure, RequestId};
use crate::slots::SlotLease;
use crate::stream::Cut;
use crate::{channel_socket, forward};

/// One chunk to the app. The runtime decodes whole chunks in Python, so smaller ones keep it responsive.
const CHUNK: usize = 1024 * 1024;

/// The runtime answers 408 when its first message does not come within 5 s: a client that is slower gets
/// an empty chunk sent in its name.
const FIRST_CHUNK_WITHIN: Duration = Duration::from_secs(2);

/// Frames between relay and client. The exchange itself buffers more.
const FRAME_BUFFER: usize = 2;

/// Headers and trailers of one response, each: as for apps with a socket (`upstream`). A header map panics when it is
/// given more than 24,576, and what comes over the data channel is as long as its container likes.
const MAX_HEADERS: usize = 100;
const MAX_HEADERS_BYTES: usize = 128 * 1024;

/// What ends or cuts a relay, and what its log lines say.
pub(crate) struct Relay {
    pub(crate) exchange: WebExchange,
    #[expect(dead_code, reason = "held for its Drop, which frees the slot")]
    pub(crate) lease: SlotLease,
    pub(crate) deadline: Instant,
    pub(crate) route: Arc<Route>,
    pub(crate) request_id: RequestId,
}

/// The beginning of an app's answer.
pub(crate) enum Answer {
    Http(Response<ResponseBody>),
    /// The app accepted the websocket.
    Upgrade(Response<ResponseBody>),
}

pub(crate) type AnswerSender = oneshot::Sender<Result<Answer, Failure>>;

pub(crate) async fn open(
    exchanging: &Exchanging<'_>,
    lease: SlotLease,
    outgoing: &mut Outgoing,
    deadline: Instant,
) -> Result<Response<ResponseBody>, AttemptError> {
    let websocket = if forward::is_websocket(exchanging.upgrade.as_ref()) {
        outgoing.client_upgrade.take()
    } else {
        None
    };
    let request = outgoing.take(false);
    let handshake = match &websocket {
        Some(_) => Some(channel_socket::Handshake::of(request.headers())?),
        None => None,
    };
    let scope = scope(exchanging, &request, websocket.is_some());
    let is_head = request.method() == Method::HEAD;
    let opened = exchanging
        .ingress
        .data_channels
        .open(lease.container().id, exchanging.route.method.clone(), scope);
    let exchange = match opened {
        Ok(exchange) => exchange,
        Err(error) => {
            outgoing.put_back(request);
            outgoing.client_upgrade = websocket;
            return Err(not_reached(error));
        }
    };
    let relay = Relay {
        exchange,
        lease,
        deadline,
        route: Arc::clone(exchanging.route),
        request_id: exchanging.request_id.clone(),
    };
    let (sender, answer) = oneshot::channel();
    // Kind: per request (all three). Bounded by the request's timeout.
    if let (Some(client), Some(handshake)) = (websocket, handshake) {
        first_message(&relay.exchange, ToApp::WebsocketConnect)?;
        let limit = exchanging.ingress.config.limits.max_websocket_message_bytes;
        let shutdown = exchanging.ingress.shutdown.clone();
        exchanging
            .ingress
            .tunnels
            .spawn(channel_socket::run(relay, sender, client, handshake, limit, shutdown));
    } else {
        let upload = match request.into_body() {
            RequestBody::Empty => {
                first_message(
                    &relay.exchange,
                    ToApp::Body {
                        bytes: Bytes::new(),
                        more: false,
                    },
                )?;
                None
            }
            RequestBody::Client { body, .. } => {
                Some(tokio::spawn(upload(body, relay.exchange.to_app.clone())).abort_handle())
            }
        };
        tokio::spawn(async move {
            relay.run(sender, is_head).await;
            // An upload that the app did not want ends with its call.
            if let Some(upload) = upload {
                upload.abort();
            }
        });
    }
    match answer.await {
        Ok(Ok(Answer::Http(response) | Answer::Upgrade(response))) => Ok(response),
        Ok(Err(failure)) => Err(failure.into()),
        Err(_closed) => Err(Failure::ContainerGone.into()),
    }
}

/// The buffer of a new exchange has room for its first message.
fn first_message(exchange: &WebExchange, message: ToApp) -> Result<(), Failure> {
    exchange
        .to_app
        .try_send(message)
        .map_err(|_closed| Failure::ContainerGone)
}

fn scope(exchanging: &Exchanging<'_>, request: &Request<RequestBody>, websocket: bool) -> WebScope {
    let scheme = match (websocket, exchanging.facts.is_https) {
        (false, false) => "http",
        (false, true) => "https",
        (true, false) => "ws",
        (true, true) => "wss",
    };
    let subprotocols = request
        .headers()
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty() && websocket)
        .collect();
    WebScope {
        websocket,
        http_version: exchanging.http_version.to_owned(),
        method: request.method().as_str().to_owned(),
        scheme: scheme.to_owned(),
        path: percent_encoding::percent_decode_str(request.uri().path())
            .decode_utf8_lossy()
            .into_owned(),
        query_string: Bytes::copy_from_slice(request.uri().query().unwrap_or("").as_bytes()),
        headers: request
            .headers()
            .iter()
            .map(|(name, value)| {
                (
                    Bytes::copy_from_slice(name.as_ref()),
                    Bytes::copy_from_slice(value.as_bytes()),
                )
            })
            .collect(),
        client: Some((exchanging.facts.ip.to_string(), exchanging.facts.port)),
        subprotocols,
    }
}

/// Carries the client's body to the app, at the app's pace.
async fn upload(mut body: Incoming, to_app: EventSender<ToApp>) {
    let mut next = tokio::time::timeout(FIRST_CHUNK_WITHIN, body.frame()).await;
    if next.is_err() {
        if to_app
            .send(ToApp::Body {
                bytes: Bytes::new(),
                more: true,
            })
            .await
            .is_err()
        {
            return;
        }
        next = Ok(body.frame().await);
    }
    let mut frame = next.ok().flatten();
    loop {
        let message = match frame {
            None => ToApp::Body {
                bytes: Bytes::new(),
                more: false,
            },
            // The client left in the middle of its upload.
            Some(Err(_broken)) => ToApp::Disconnect,
            Some(Ok(part)) => {
                let Ok(mut bytes) = part.into_data() else {
                    // Trailers of requests have no place in ASGI.
                    frame = body.frame().await;
                    continue;
                };
                while bytes.len() > CHUNK {
                    let chunk = bytes.split_to(CHUNK);
                    if to_app
                        .send(ToApp::Body {
                            bytes: chunk,
                            more: true,
                        })
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                let more = !http_body::Body::is_end_stream(&body);
                if to_app.send(ToApp::Body { bytes, more }).await.is_err() || !more {
                    return;
                }
                frame = body.frame().await;
                continue;
            }
        };
        // A receiver that is gone is an app whose call has returned.
        let _returned = to_app.send(message).await;
        return;
    }
}

impl Relay {
    async fn run(mut self, mut answer: AnswerSender, is_head: bool) {
        let first = tokio::select! {
            biased;
            event = self.exchange.from_app.recv() => event,
            () = answer.closed() => return self.abandon().await,
            () = tokio::time::sleep_until(self.deadline) => {
                let _left = answer.send(Err(Failure::Timeout(self.route.timeout)));
                return;
            }
        };
        match first {
            Some(FromApp::ResponseStart {
                status,
                headers,
                trailers,
            }) => {
                self.respond(answer, status, &headers, trailers, is_head).await;
            }
            Some(FromApp::Finished(outcome)) => {
                let _left = answer.send(Err(self.failure_of(&outcome)));
            }
            Some(
                FromApp::Body { .. }
                | FromApp::Trailers { .. }
                | FromApp::WebsocketAccept { .. }
                | FromApp::WebsocketText(_)
                | FromApp::WebsocketBinary(_)
                | FromApp::WebsocketClose { .. },
            ) => {
                let failure = Failure::AppFailed("the app's first message is not the start of a response".into());
                let _left = answer.send(Err(failure));
                self.abandon().await;
            }
            None => {
                let _left = answer.send(Err(Failure::ContainerGone));
            }
        }
    }

    /// Sends the response on, then waits until the app's call has returned.
    pub(crate) async fn respond(
        mut self,
        answer: AnswerSender,
        status: u16,
        headers: &[(Bytes, Bytes)],
        trailers: bool,
        is_head: bool,
    ) {
        let headers = match header_map(headers) {
            Ok(headers) => headers,
            Err(failure) => {
                let _left = answer.send(Err(failure));
                return self.abandon().await;
            }
        };
        let (frames, receiver) = mpsc::channel(FRAME_BUFFER);
        let cut = Arc::new(OnceLock::new());
        let body = if is_head {
            ResponseBody::empty()
        } else {
            ResponseBody::Channel(ChannelBody {
                frames: receiver,
                cut: Arc::clone(&cut),
                is_done: false,
                route: Arc::clone(&self.route),
                request_id: self.request_id.clone(),
            })
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        *response.headers_mut() = headers;
        let (mut head, body) = response.into_parts();
        forward::prepare_response(&mut head);
        if answer.send(Ok(Answer::Http(Response::from_parts(head, body)))).is_err() {
            return self.abandon().await;
        }
        if !is_head {
            match self.send_frames(&frames, trailers).await {
                End::Complete => {
                    let _left = frames.send(Piece::End).await;
                }
                End::ClientLeft => return self.abandon().await,
                End::Cut(reason) => {
                    // The body finds it when its channel closes.
                    let _first = cut.set(reason);
                    return;
                }
            }
        }
        drop(frames);
        self.until_returned().await;
    }

    async fn send_frames(&mut self, frames: &mpsc::Sender<Piece>, trailers: bool) -> End {
        let mut all_trailers = Vec::new();
        loop {
            let event = tokio::select! {
                event = self.exchange.from_app.recv() => event,
                () = frames.closed() => return End::ClientLeft,
                () = tokio::time::sleep_until(self.deadline) => return End::Cut(Cut::Timeout),
            };
            let (frame, is_last) = match event {
                Some(FromApp::Body { bytes, more }) => (Frame::data(bytes), !more && !trailers),
                Some(FromApp::Trailers { headers, more }) => {
                    all_trailers.extend(headers);
                    match header_map(&all_trailers) {
                        Ok(_) if more => continue,
                        Ok(trailers) => (Frame::trailers(trailers), true),
                        Err(failure) => {
                            tracing::debug!(reason = respond::chain(&failure), "an app's trailers were refused");
                            return End::Cut(Cut::Broken);
                        }
                    }
                }
                Some(FromApp::Finished(outcome)) => {
                    tracing::debug!(
                        reason = outcome.exception,
                        "an app's call ended before its response did"
                    );
                    return End::Cut(Cut::Broken);
                }
                // No meaning in a response; the runtime checks what apps send.
                Some(
                    FromApp::ResponseStart { .. }
                    | FromApp::WebsocketAccept { .. }
                    | FromApp::WebsocketText(_)
                    | FromApp::WebsocketBinary(_)
                    | FromApp::WebsocketClose { .. },
                ) => continue,
                None => return End::Cut(Cut::ContainerGone),
            };
            if frame.data_ref().is_none_or(|bytes| !bytes.is_empty()) {
                let sent = tokio::select! {
                    sent = frames.send(Piece::Frame(frame)) => sent,
                    () = tokio::time::sleep_until(self.deadline) => return End::Cut(Cut::Timeout),
                };
                if sent.is_err() {
                    // A client may have all it wants before the last, empty event.
                    return if is_last { End::Complete } else { End::ClientLeft };
                }
            }
            if is_last {
                return End::Complete;
            }
        }
    }

    /// The client is gone: tells the app, and keeps the slot until its call returns.
    pub(crate) async fn abandon(mut self) {
        // A full buffer means that the app is not listening; dropping the exchange tells it as well.
        let _full = self.exchange.to_app.try_send(ToApp::Disconnect);
        self.until_returned().await;
    }

    /// Reads on until the app's call has returned, or its time is up.
    pub(crate) async fn until_returned(&mut self) {
        let returned = async {
            while let Some(event) = self.exchange.from_app.recv().await {
                if matches!(event, FromApp::Finished(_)) {
                    return;
                }
            }
        };
        let _late = tokio::time::timeout_at(self.deadline, returned).await;
    }

    /// Why a call ended without an answer.
    pub(crate) fn failure_of(&self, outcome: &Outcome) -> Failure {
        match outcome.status {
            OutcomeStatus::Timeout => Failure::Timeout(self.route.timeout),
            OutcomeStatus::InternalFailure | OutcomeStatus::Terminated | OutcomeStatus::IdleTimeout => {
                Failure::ContainerGone
            }
            OutcomeStatus::Success => Failure::AppFailed("the app returned without a response".into()),
            OutcomeStatus::Failure | OutcomeStatus::InitFailure => Failure::AppFailed(outcome.exception.clone().into()),
        }
    }
}

enum End {
    Complete,
    ClientLeft,
    Cut(Cut),
}

/// An app's headers, if they are not too many.
pub(crate) fn header_map(headers: &[(Bytes, Bytes)]) -> Result<HeaderMap, Failure> {
    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if headers.len() > MAX_HEADERS || bytes > MAX_HEADERS_BYTES {
        let sentence = format!(
            "the app's response has {} headers of {bytes} bytes; at most {MAX_HEADERS} of {MAX_HEADERS_BYTES} bytes are sent on",
            headers.len()
        );
        return Err(Failure::AppFailed(sentence.into()));
    }
    let mut map = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        // What is no header name or value cannot be sent; the rest of the response still can.
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    Ok(map)
}

enum Piece {
    Frame(Frame<Bytes>),
    End,
}

/// The client's end of a relayed response.
pub(crate) struct ChannelBody {
    frames: mpsc::Receiver<Piece>,
    cut: Arc<OnceLock<Cut>>,
    is_done: bool,
    route: Arc<Route>,
    request_id: RequestId,
}

impl ChannelBody {
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.is_done {
            return Poll::Ready(None);
        }
        self.frames.poll_recv(cx).map(|piece| match piece {
            Some(Piece::Frame(frame)) => Some(Ok(frame)),
            Some(Piece::End) => {
                self.is_done = true;
                None
            }
            None => {
                self.is_done = true;
                let cut = self.cut.get().copied().unwrap_or(Cut::Broken);
                respond::log_cut_body(&self.request_id, &self.route, &cut);
                Some(Err(cut.into()))
            }
        })
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.is_done
    }
}
