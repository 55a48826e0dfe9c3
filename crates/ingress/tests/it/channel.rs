//! The data channel: the test plays the container's runtime.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::Request;
use http_body_util::{BodyExt, Full};
use ionian_control::data_channel::{DataChannels, FromApp, ToApp, WebInput};
use ionian_domain::ContainerId;
use ionian_domain::outcome::{Outcome, OutcomeStatus};
use ionian_domain::web::WebTarget;
use ionian_ingress::{IngressConfig, Limits};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::support::{HOST, PATIENCE, Platform, request, within};

/// One call as the runtime sees it.
struct Call {
    channels: DataChannels,
    container_id: ContainerId,
    input: WebInput,
    received: u64,
    sent: u64,
}

async fn next_call(platform: &Platform, container_id: ContainerId) -> Call {
    let channels = platform.data_channels.clone();
    let input = channels
        .next_input(container_id, PATIENCE)
        .await
        .expect("a call arrives");
    Call {
        channels,
        container_id,
        input,
        received: 0,
        sent: 0,
    }
}

impl Call {
    async fn receive(&mut self) -> Option<ToApp> {
        let inbound = self.channels.inbound(self.container_id, self.input.call_id)?;
        let (index, event) = within(inbound.next(self.received)).await?;
        self.received = index;
        Some(event)
    }

    async fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        loop {
            match self.receive().await {
                Some(ToApp::Body { bytes, more }) => {
                    body.extend_from_slice(&bytes);
                    if !more {
                        return body;
                    }
                }
                other => panic!("not a body: {other:?}"),
            }
        }
    }

    async fn send(&mut self, event: FromApp) {
        self.sent += 1;
        assert!(
            self.channels
                .push(self.container_id, self.input.call_id, self.sent, event)
                .await
        );
    }

    async fn start(&mut self, status: u16, headers: &[(&'static str, &'static str)], trailers: bool) {
        let headers = pairs(headers);
        self.send(FromApp::ResponseStart {
            status,
            headers,
            trailers,
        })
        .await;
    }

    async fn chunk(&mut self, bytes: impl Into<Bytes>, more: bool) {
        self.send(FromApp::Body {
            bytes: bytes.into(),
            more,
        })
        .await;
    }

    fn finish(&self, status: OutcomeStatus, sentence: &str) {
        assert!(self.channels.finish(
            self.container_id,
            self.input.input_id,
            Outcome::decided(status, sentence)
        ));
    }

    fn done(&self) {
        self.finish(OutcomeStatus::Success, "");
    }
}

fn pairs(headers: &[(&'static str, &'static str)]) -> Vec<(Bytes, Bytes)> {
    headers
        .iter()
        .map(|(name, value)| {
            (
                Bytes::from_static(name.as_bytes()),
                Bytes::from_static(value.as_bytes()),
            )
        })
        .collect()
}

#[tokio::test]
async fn a_get_has_its_scope_and_its_empty_body_at_once() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let (answer, ()) = tokio::join!(platform.get("/caf%C3%A9?q=a%20b"), async {
        let mut call = next_call(&platform, container).await;
        let scope = Arc::clone(&call.input.scope);
        assert!(!scope.websocket);
        assert_eq!(
            (
                scope.method.as_str(),
                scope.scheme.as_str(),
                scope.http_version.as_str()
            ),
            ("GET", "http", "1.1")
        );
        assert_eq!(
            (scope.path.as_str(), &scope.query_string[..]),
            ("/café", &b"q=a%20b"[..])
        );
        assert_eq!(scope.client.as_ref().unwrap().0, "127.0.0.1");
        assert!(
            scope
                .headers
                .contains(&(Bytes::from_static(b"host"), Bytes::from_static(HOST.as_bytes())))
        );
        assert_eq!(
            call.receive().await,
            Some(ToApp::Body {
                bytes: Bytes::new(),
                more: false
            })
        );
        call.start(
            201,
            &[
                ("content-type", "text/plain"),
                ("set-cookie", "a=1"),
                ("set-cookie", "b=2"),
            ],
            false,
        )
        .await;
        call.chunk("hello", false).await;
        call.done();
    });
    assert_eq!((answer.status(), answer.text()), (201, "hello"));
    assert_eq!(answer.head.headers.get_all("set-cookie").iter().count(), 2);
    assert!(answer.header("x-request-id").is_some());
}

#[tokio::test]
async fn a_post_body_arrives_in_chunks() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let sent = vec![5_u8; 5 * 1024 * 1024];
    let post = Request::post("/")
        .header("host", HOST)
        .body(Full::new(Bytes::from(sent.clone())))
        .unwrap();
    let (answer, ()) = tokio::join!(platform.send(post), async {
        let mut call = next_call(&platform, container).await;
        assert_eq!(call.body().await, sent);
        call.start(200, &[], false).await;
        call.chunk("got it", false).await;
        call.done();
    });
    assert_eq!(answer.text(), "got it");
}

#[tokio::test]
async fn a_slow_upload_still_begins_in_time() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<http_body::Frame<Bytes>, std::convert::Infallible>>(1);
    let body = http_body_util::StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver)).boxed_unsync();
    let post = Request::post("/").header("host", HOST).body(body).unwrap();
    let (answer, ()) = tokio::join!(platform.send(post), async {
        let mut call = next_call(&platform, container).await;
        let first = tokio::time::timeout(Duration::from_secs(5), call.receive())
            .await
            .unwrap();
        assert_eq!(
            first,
            Some(ToApp::Body {
                bytes: Bytes::new(),
                more: true
            })
        );
        sender
            .send(Ok(http_body::Frame::data(Bytes::from_static(b"late"))))
            .await
            .unwrap();
        drop(sender);
        assert_eq!(call.body().await, b"late");
        call.start(200, &[], false).await;
        call.chunk("", false).await;
        call.done();
    });
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn responses_stream_with_trailers_and_the_slot_is_held_until_the_call_returns() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let mut get = request("GET", "/");
    get.headers_mut()
        .insert("te", http::HeaderValue::from_static("trailers"));
    let (response, mut call) = tokio::join!(platform.open(get), async {
        let mut call = next_call(&platform, container).await;
        call.start(200, &[("trailer", "x-sum")], true).await;
        call.chunk("one", true).await;
        call
    });
    let mut body = response.into_body();
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "one");
    call.chunk("two", false).await;
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "two");
    call.send(FromApp::Trailers {
        headers: pairs(&[("x-sum", "42")]),
        more: false,
    })
    .await;
    assert_eq!(
        within(body.frame()).await.unwrap().unwrap().into_trailers().unwrap()["x-sum"],
        "42"
    );
    assert!(within(body.frame()).await.is_none());
    // The app's background work goes on: the container takes no other request yet.
    let next = platform.open(request("GET", "/next"));
    let mut next = std::pin::pin!(next);
    tokio::select! {
        _ = &mut next => panic!("answered on a slot that is taken"),
        report = platform.demand_where(|report| report.queued == 1) => assert_eq!(report.containers[0].in_flight, 1),
    }
    call.done();
    let ((), response) = tokio::join!(
        async {
            let mut call = next_call(&platform, container).await;
            call.start(204, &[], false).await;
            call.chunk("", false).await;
            call.done();
        },
        next
    );
    assert_eq!(response.status(), 204);
}

#[tokio::test]
async fn a_failed_call_is_a_500_with_an_id_and_no_internals() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        next_call(&platform, container)
            .await
            .finish(OutcomeStatus::Failure, "ValueError: secret detail");
    });
    assert_eq!((answer.status(), answer.error_code().as_str()), (500, "app_error"));
    assert!(!answer.text().contains("secret detail"));
    // A container that dies ends its calls.
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        let _call = next_call(&platform, container).await;
        platform
            .data_channels
            .detach(container, &Outcome::decided(OutcomeStatus::InternalFailure, "lost"));
    });
    assert_eq!(
        (answer.status(), answer.error_code().as_str()),
        (502, "app_unreachable")
    );
}

#[tokio::test]
async fn a_response_that_breaks_off_does_not_look_complete() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let (response, call) = tokio::join!(platform.open(request("GET", "/")), async {
        let mut call = next_call(&platform, container).await;
        call.start(200, &[], false).await;
        call.chunk("half", true).await;
        call
    });
    call.finish(OutcomeStatus::Failure, "broken");
    assert!(within(response.into_body().collect()).await.is_err());
}

#[tokio::test]
async fn a_client_who_leaves_is_told_to_the_app() {
    let platform = Arc::new(Platform::start().await);
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let asking = {
        let platform = Arc::clone(&platform);
        tokio::spawn(async move { platform.raw_get().await })
    };
    let mut call = next_call(&platform, container).await;
    assert_eq!(
        call.receive().await,
        Some(ToApp::Body {
            bytes: Bytes::new(),
            more: false
        })
    );
    asking.abort();
    assert_eq!(call.receive().await, Some(ToApp::Disconnect));
    // Still in the app, so still in its slot.
    platform
        .demand_where(|report| report.containers[0].in_flight == 1)
        .await;
    call.done();
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}

#[tokio::test]
async fn websockets_speak_asgi() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let mut request = format!("ws://{HOST}/ws").into_client_request().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", http::HeaderValue::from_static("chat, other"));
    let (connected, mut call) = tokio::join!(within(tokio_tungstenite::client_async(request, stream)), async {
        let mut call = next_call(&platform, container).await;
        assert!(call.input.scope.websocket);
        assert_eq!(
            (
                call.input.scope.scheme.as_str(),
                call.input.scope.subprotocols.as_slice()
            ),
            ("ws", &["chat".to_owned(), "other".to_owned()][..])
        );
        assert_eq!(call.receive().await, Some(ToApp::WebsocketConnect));
        call.send(FromApp::WebsocketAccept {
            subprotocol: Some("chat".to_owned()),
            headers: pairs(&[("x-app", "1")]),
        })
        .await;
        call
    });
    let (mut socket, response) = connected.unwrap();
    assert_eq!(
        (
            &response.headers()["sec-websocket-protocol"],
            &response.headers()["x-app"]
        ),
        (
            &http::HeaderValue::from_static("chat"),
            &http::HeaderValue::from_static("1")
        )
    );

    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(call.receive().await, Some(ToApp::WebsocketText("hello".to_owned())));
    socket.send(Message::binary(vec![1, 2])).await.unwrap();
    assert_eq!(
        call.receive().await,
        Some(ToApp::WebsocketBinary(Bytes::from_static(&[1, 2])))
    );
    call.send(FromApp::WebsocketText("back".to_owned())).await;
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text("back"));
    let large = Bytes::from(vec![3; 3 * 1024 * 1024]);
    call.send(FromApp::WebsocketBinary(large.clone())).await;
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::Binary(large));

    socket
        .close(Some(CloseFrame {
            code: CloseCode::from(4002),
            reason: "done".into(),
        }))
        .await
        .unwrap();
    let (received, _) = tokio::join!(call.receive(), within(socket.next()));
    assert_eq!(received, Some(ToApp::WebsocketDisconnect { code: 4002 }));
    call.done();
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}

#[tokio::test]
async fn the_apps_close_code_reaches_the_client_and_a_refusal_is_a_403() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let open = || async {
        let stream = TcpStream::connect(platform.address).await.unwrap();
        within(tokio_tungstenite::client_async(format!("ws://{HOST}/ws"), stream)).await
    };
    let (connected, mut call) = tokio::join!(open(), async {
        let mut call = next_call(&platform, container).await;
        call.send(FromApp::WebsocketAccept {
            subprotocol: None,
            headers: Vec::new(),
        })
        .await;
        call
    });
    let mut socket = connected.unwrap().0;
    call.send(FromApp::WebsocketClose {
        code: 4003,
        reason: "enough".to_owned(),
    })
    .await;
    let Message::Close(Some(frame)) = within(socket.next()).await.unwrap().unwrap() else {
        panic!("no close")
    };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (4003, "enough"));
    call.done();
    drop(socket);

    let (refused, ()) = tokio::join!(open(), async {
        let mut call = next_call(&platform, container).await;
        call.send(FromApp::WebsocketClose {
            code: 1000,
            reason: String::new(),
        })
        .await;
        call.done();
    });
    let Err(tokio_tungstenite::tungstenite::Error::Http(response)) = refused else {
        panic!("accepted")
    };
    assert_eq!(response.status(), 403);
}

#[tokio::test]
async fn a_broken_websocket_handshake_is_refused() {
    let platform = Platform::start().await;
    platform.ready(1, WebTarget::DataChannel).await;
    let mut upgrade = request("GET", "/");
    upgrade
        .headers_mut()
        .insert("connection", http::HeaderValue::from_static("Upgrade"));
    upgrade
        .headers_mut()
        .insert("upgrade", http::HeaderValue::from_static("websocket"));
    let answer = platform.send(upgrade).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (400, "bad_request"));
}

/// A container may send as many as it likes, and a header map panics at 24,577.
#[tokio::test]
async fn a_response_with_too_many_headers_is_an_error_of_the_app() {
    let platform = Platform::start().await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        let mut call = next_call(&platform, container).await;
        call.body().await;
        let headers = vec![(Bytes::from_static(b"x-one"), Bytes::from_static(b"more")); 30_000];
        call.send(FromApp::ResponseStart {
            status: 200,
            headers,
            trailers: false,
        })
        .await;
        call.done();
    });
    assert_eq!((answer.status(), answer.error_code()), (500, "app_error".to_owned()));
}

#[tokio::test]
async fn a_websocket_message_that_is_too_large_closes_the_websocket() {
    let limits = Limits {
        max_websocket_message_bytes: 1024,
        ..Limits::default()
    };
    let config = IngressConfig {
        limits,
        ..IngressConfig::default()
    };
    let platform = Platform::start_with(config, |_| {}).await;
    let container = platform.ready(1, WebTarget::DataChannel).await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let request = format!("ws://{HOST}/ws").into_client_request().unwrap();
    let (connected, mut call) = tokio::join!(within(tokio_tungstenite::client_async(request, stream)), async {
        let mut call = next_call(&platform, container).await;
        assert_eq!(call.receive().await, Some(ToApp::WebsocketConnect));
        call.send(FromApp::WebsocketAccept {
            subprotocol: None,
            headers: Vec::new(),
        })
        .await;
        call
    });
    let (mut socket, _) = connected.unwrap();
    socket.send(Message::binary(vec![0; 1025])).await.unwrap();
    let (received, closed) = tokio::join!(call.receive(), within(socket.next()));
    assert_eq!(received, Some(ToApp::WebsocketDisconnect { code: 1009 }));
    match closed {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(frame.code, CloseCode::Size),
        other => panic!("not a close: {other:?}"),
    }
    call.done();
}
