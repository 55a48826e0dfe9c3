//! Websockets to apps with a socket: bytes pass, slots are held, ends are kept.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use ionian_ingress::IngressConfig;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use crate::support::{App, HOST, Platform, request, text, within};

/// An app that upgrades to a websocket and echoes.
async fn websocket_echo() -> App {
    App::start(|mut request| async move {
        let Some(key) = request.headers().get("sec-websocket-key").cloned() else {
            return text("no websocket");
        };
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let io = TokioIo::new(upgrade.await.unwrap());
            let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
            while let Some(Ok(message)) = socket.next().await {
                match message {
                    Message::Text(text) if text == "bye" => {
                        let frame = CloseFrame {
                            code: CloseCode::from(4001),
                            reason: "as asked".into(),
                        };
                        socket.close(Some(frame)).await.unwrap();
                    }
                    Message::Text(_) | Message::Binary(_) => socket.send(message).await.unwrap(),
                    Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => {}
                }
            }
        });
        Response::builder()
            .status(101)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header(
                "sec-websocket-accept",
                tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes()),
            )
            .body(Full::default().boxed_unsync())
            .unwrap()
    })
    .await
}

#[tokio::test]
async fn websockets_pass_through() {
    let platform = Platform::start().await;
    let app = websocket_echo().await;
    platform.ready(1, app.target()).await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let (mut socket, response) = within(tokio_tungstenite::client_async(format!("ws://{HOST}/ws"), stream))
        .await
        .unwrap();
    assert!(response.headers().contains_key("x-request-id"));
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), Message::text("hello"));
    // Larger than the hosted product's 2 MiB.
    let large = Message::binary(vec![9; 3 * 1024 * 1024]);
    socket.send(large.clone()).await.unwrap();
    assert_eq!(within(socket.next()).await.unwrap().unwrap(), large);
    // The slot is held while it is open, and the close code is the app's.
    platform
        .demand_where(|report| report.containers[0].in_flight == 1)
        .await;
    socket.send(Message::text("bye")).await.unwrap();
    let Message::Close(Some(frame)) = within(socket.next()).await.unwrap().unwrap() else {
        panic!("no close")
    };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (4001, "as asked"));
    drop(socket);
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}

#[tokio::test]
async fn a_websocket_ends_with_its_time_or_its_container() {
    let platform = Platform::start_with(IngressConfig::default(), |route| {
        route.timeout = Duration::from_millis(300);
    })
    .await;
    let app = websocket_echo().await;
    let container = platform.ready(1, app.target()).await;
    let open = || async {
        let stream = TcpStream::connect(platform.address).await.unwrap();
        within(tokio_tungstenite::client_async(format!("ws://{HOST}/ws"), stream))
            .await
            .unwrap()
            .0
    };
    let mut timed_out = open().await;
    assert!(!matches!(
        within(timed_out.next()).await,
        Some(Ok(Message::Text(_) | Message::Binary(_)))
    ));
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
    let mut orphaned = open().await;
    platform.gone(container).await;
    assert!(!matches!(
        within(orphaned.next()).await,
        Some(Ok(Message::Text(_) | Message::Binary(_)))
    ));
}

#[tokio::test]
async fn websockets_close_at_shutdown() {
    let platform = Platform::start().await;
    let app = websocket_echo().await;
    platform.ready(1, app.target()).await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let mut socket = within(tokio_tungstenite::client_async(format!("ws://{HOST}/ws"), stream))
        .await
        .unwrap()
        .0;
    platform.shutdown.cancel();
    within(platform.serving).await.unwrap();
    socket.send(Message::text("still here")).await.unwrap();
    assert_eq!(
        within(socket.next()).await.unwrap().unwrap(),
        Message::text("still here")
    );
    platform.ingress_shutdown.cancel();
    within(platform.ingress.closed()).await;
    assert!(!matches!(within(socket.next()).await, Some(Ok(Message::Text(_)))));
}

#[tokio::test]
async fn an_app_may_decline_an_upgrade() {
    let platform = Platform::start().await;
    let app = App::start(|_| async { text("just http") }).await;
    platform.ready(1, app.target()).await;
    let mut upgrade = request("GET", "/");
    upgrade
        .headers_mut()
        .insert("connection", HeaderValue::from_static("Upgrade"));
    upgrade
        .headers_mut()
        .insert("upgrade", HeaderValue::from_static("websocket"));
    let answer = platform.send(upgrade).await;
    assert_eq!((answer.status(), answer.text()), (200, "just http"));
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}
