//! Websockets through the data channel: frames on the client's side, ASGI events on the app's.
//!
//! Here the ingress is the websocket server. It answers pings, joins fragments, bounds messages and
//! keeps the close codes of both sides.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, Response, StatusCode};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use ionian_control::data_channel::{EventReceiver, EventSender, FromApp, ToApp};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};
use tokio_util::sync::CancellationToken;

use crate::body::ResponseBody;
use crate::channel::{Answer, AnswerSender, Relay, header_map};
use crate::respond::Failure;

/// For the client's half of the upgrade, and for its answer to our close.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// The close code of a peer that closed without one, and of one that just disappeared (RFC 6455, 7.4.1).
const NO_CODE: u16 = 1005;
const ABNORMAL: u16 = 1006;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The client's opening handshake, checked.
pub(crate) struct Handshake {
    accept: HeaderValue,
}

impl Handshake {
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, Failure> {
        if headers
            .get(SEC_WEBSOCKET_VERSION)
            .is_none_or(|version| version.as_bytes() != b"13")
        {
            return Err(Failure::BadRequest("a websocket needs 'Sec-WebSocket-Version: 13'"));
        }
        let Some(key) = headers.get(SEC_WEBSOCKET_KEY) else {
            return Err(Failure::BadRequest("a websocket needs a 'Sec-WebSocket-Key'"));
        };
        let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).expect("base64 is a header value");
        Ok(Self { accept })
    }

    fn response(
        &self,
        subprotocol: Option<&str>,
        headers: &[(Bytes, Bytes)],
    ) -> Result<Response<ResponseBody>, Failure> {
        let mut response = Response::new(ResponseBody::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let mut map = header_map(headers)?;
        // No extension was negotiated: the frames are ours, and plain.
        map.remove(SEC_WEBSOCKET_EXTENSIONS);
        map.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        map.insert(UPGRADE, HeaderValue::from_static("websocket"));
        map.insert(SEC_WEBSOCKET_ACCEPT, self.accept.clone());
        if let Some(protocol) = subprotocol.and_then(|protocol| HeaderValue::from_str(protocol).ok()) {
            map.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        *response.headers_mut() = map;
        Ok(response)
    }
}

/// Waits for the app to accept, then carries messages until one side closes.
pub(crate) async fn run(
    mut relay: Relay,
    mut answer: AnswerSender,
    client: OnUpgrade,
    handshake: Handshake,
    max_message_bytes: usize,
    shutdown: CancellationToken,
) {
    let first = tokio::select! {
        biased;
        event = relay.exchange.from_app.recv() => event,
        () = answer.closed() => return disconnect(relay, ABNORMAL).await,
        () = tokio::time::sleep_until(relay.deadline) => {
            let _left = answer.send(Err(Failure::Timeout(relay.route.timeout)));
            return;
        }
    };
    let accepted = match first {
        Some(FromApp::WebsocketAccept { subprotocol, headers }) => {
            match handshake.response(subprotocol.as_deref(), &headers) {
                Ok(response) => response,
                Err(failure) => {
                    let _left = answer.send(Err(failure));
                    return disconnect(relay, ABNORMAL).await;
                }
            }
        }
        // A close before the accept is a refusal, which ASGI makes a 403.
        Some(FromApp::WebsocketClose { .. }) => {
            let mut response = Response::new(ResponseBody::empty());
            *response.status_mut() = StatusCode::FORBIDDEN;
            let _left = answer.send(Ok(Answer::Http(response)));
            return relay.until_returned().await;
        }
        Some(FromApp::ResponseStart {
            status,
            headers,
            trailers,
        }) => {
            return relay.respond(answer, status, &headers, trailers, false).await;
        }
        Some(FromApp::Finished(outcome)) => {
            let _left = answer.send(Err(relay.failure_of(&outcome)));
            return;
        }
        Some(
            FromApp::Body { .. } | FromApp::Trailers { .. } | FromApp::WebsocketText(_) | FromApp::WebsocketBinary(_),
        ) => {
            let failure = Failure::AppFailed("the app's first message does not answer the websocket".into());
            let _left = answer.send(Err(failure));
            return disconnect(relay, ABNORMAL).await;
        }
        None => {
            let _left = answer.send(Err(Failure::ContainerGone));
            return;
        }
    };
    if answer.send(Ok(Answer::Upgrade(accepted))).is_err() {
        return disconnect(relay, ABNORMAL).await;
    }
    let Ok(Ok(upgraded)) = tokio::time::timeout(CLOSE_WITHIN, client).await else {
        return disconnect(relay, ABNORMAL).await;
    };
    let config = WebSocketConfig::default()
        .max_message_size(Some(max_message_bytes))
        .max_frame_size(Some(max_message_bytes));
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
    carry(relay, socket, &shutdown).await;
}

async fn carry(mut relay: Relay, socket: Socket, shutdown: &CancellationToken) {
    let (mut sink, mut stream) = socket.split();
    let to_app = relay.exchange.to_app.clone();
    let ended = {
        let from_client = read(&mut stream, &to_app);
        let from_app = write(&mut sink, &mut relay.exchange.from_app);
        tokio::select! {
            code = from_client => Ended::ByClient(code),
            ended = from_app => ended,
            () = tokio::time::sleep_until(relay.deadline) => Ended::ByPlatform("the websocket's time is up"),
            () = shutdown.cancelled() => Ended::ByPlatform("the server is shutting down"),
        }
    };
    match ended {
        Ended::ByClient(code) => {
            if code == u16::from(CloseCode::Size) {
                let frame = CloseFrame {
                    code: CloseCode::Size,
                    reason: "the message is too large".into(),
                };
                let _gone = tokio::time::timeout(CLOSE_WITHIN, sink.send(Message::Close(Some(frame)))).await;
            }
            // The answer to the client's close was queued when it was read.
            let _gone = tokio::time::timeout(CLOSE_WITHIN, sink.close()).await;
            drop((sink, stream));
            disconnect(relay, code).await;
        }
        Ended::ByApp(frame) => {
            close(&mut sink, &mut stream, frame).await;
            drop((sink, stream));
            relay.until_returned().await;
        }
        Ended::Returned { is_success } => {
            let frame = if is_success {
                CloseFrame {
                    code: CloseCode::Normal,
                    reason: "".into(),
                }
            } else {
                CloseFrame {
                    code: CloseCode::Error,
                    reason: "the app failed".into(),
                }
            };
            close(&mut sink, &mut stream, frame).await;
        }
        Ended::ByPlatform(reason) => {
            close(
                &mut sink,
                &mut stream,
                CloseFrame {
                    code: CloseCode::Away,
                    reason: reason.into(),
                },
            )
            .await;
            let _full = to_app.try_send(ToApp::WebsocketDisconnect {
                code: CloseCode::Away.into(),
            });
        }
    }
}

enum Ended {
    ByClient(u16),
    ByApp(CloseFrame),
    Returned { is_success: bool },
    ByPlatform(&'static str),
}

/// Carries the client's messages to the app. Returns the code with which the client ended.
async fn read(stream: &mut SplitStream<Socket>, to_app: &EventSender<ToApp>) -> u16 {
    while let Some(message) = stream.next().await {
        let event = match message {
            Ok(Message::Text(text)) => ToApp::WebsocketText(text.to_string()),
            Ok(Message::Binary(bytes)) => ToApp::WebsocketBinary(bytes),
            Ok(Message::Close(frame)) => return frame.map_or(NO_CODE, |frame| frame.code.into()),
            // Pings were answered by the library.
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => continue,
            Err(SocketError::Capacity(_)) => return CloseCode::Size.into(),
            Err(_broken) => return ABNORMAL,
        };
        if to_app.send(event).await.is_err() {
            // The app's call has returned; the other direction learns how.
            std::future::pending::<()>().await;
        }
    }
    ABNORMAL
}

/// Carries the app's messages to the client.
async fn write(sink: &mut SplitSink<Socket, Message>, from_app: &mut EventReceiver<FromApp>) -> Ended {
    while let Some(event) = from_app.recv().await {
        let message = match event {
            FromApp::WebsocketText(text) => Message::text(text),
            FromApp::WebsocketBinary(bytes) => Message::Binary(bytes),
            FromApp::WebsocketClose { code, reason } => {
                return Ended::ByApp(CloseFrame {
                    code: code.into(),
                    reason: reason.into(),
                });
            }
            FromApp::Finished(outcome) => {
                return Ended::Returned {
                    is_success: outcome.is_success(),
                };
            }
            // No meaning on an accepted websocket; the runtime checks what apps send.
            FromApp::WebsocketAccept { .. }
            | FromApp::ResponseStart { .. }
            | FromApp::Body { .. }
            | FromApp::Trailers { .. } => continue,
        };
        if sink.send(message).await.is_err() {
            return Ended::ByClient(ABNORMAL);
        }
    }
    Ended::Returned { is_success: false }
}

/// Closes from our side and waits a moment for the client's answer, so that it sees the code and not a reset.
async fn close(sink: &mut SplitSink<Socket, Message>, stream: &mut SplitStream<Socket>, frame: CloseFrame) {
    let closing = async {
        if sink.send(Message::Close(Some(frame))).await.is_ok() {
            while let Some(Ok(_late)) = stream.next().await {}
        }
    };
    let _gone = tokio::time::timeout(CLOSE_WITHIN, closing).await;
}

/// Tells the app that its client is gone, and keeps the slot until its call returns.
async fn disconnect(mut relay: Relay, code: u16) {
    // A full buffer means that the app is not listening; dropping the exchange tells it as well.
    let _full = relay.exchange.to_app.try_send(ToApp::WebsocketDisconnect { code });
    relay.until_returned().await;
}
