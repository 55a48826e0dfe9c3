//! Which request goes where, and what never gets in.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use ionian_ingress::{IngressConfig, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::support::{App, HOST, Platform, platform_echo, raw, request, text, within};

#[tokio::test]
async fn a_host_finds_its_app() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move { text(format!("app {}", request.uri())) }).await;
    platform.ready(1, app.target()).await;
    assert_eq!(
        platform.get("/hello?name=Ionian").await.text(),
        "app /hello?name=Ionian"
    );
    let mut shouted = request("GET", "/x");
    shouted
        .headers_mut()
        .insert("host", "MAIN--Hello-Web.LocalHost:8800".parse().unwrap());
    assert_eq!(platform.send(shouted).await.text(), "app /x");
}

#[tokio::test]
async fn an_unknown_host_is_named() {
    let platform = Platform::start().await;
    let mut unknown = request("GET", "/");
    unknown
        .headers_mut()
        .insert("host", "main--nothing-here.localhost:1".parse().unwrap());
    let answer = platform.send(unknown).await;
    assert_eq!(
        (answer.status(), answer.error_code().as_str()),
        (404, "no_such_endpoint")
    );
    assert!(
        answer.text().contains("main--nothing-here.localhost"),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn routes_change_at_once() {
    let platform = Platform::start().await;
    let app = App::start(|_| async { text("app") }).await;
    let container = platform.ready(1, app.target()).await;
    assert_eq!(platform.get("/").await.status(), 200);
    let before = platform.routes.send_replace(Arc::default());
    assert_eq!(platform.get("/").await.status(), 404);
    platform.gone(container).await;
    // And back, for a function that was forgotten meanwhile.
    platform.routes.send_replace(before);
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        platform.demand_where(|report| report.queued == 1).await;
        platform.ready(1, app.target()).await;
    });
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn connect_is_refused() {
    let platform = Platform::start().await;
    let answer = raw(
        platform.address,
        b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(
        answer.starts_with(b"HTTP/1.1 400"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn bare_hosts_are_the_platform() {
    let platform = Platform::start().await;
    let at = |path: &str| {
        let mut request = request("GET", path);
        request.headers_mut().insert("host", "localhost".parse().unwrap());
        platform.send(request)
    };
    assert_eq!(at("/_blobs/x").await.text(), "platform /_blobs/x 127.0.0.1");
    assert_eq!(at("/_ionian/x").await.text(), "platform /_ionian/x 127.0.0.1");
    assert_eq!(at("/healthz").await.text(), "platform /healthz 127.0.0.1");
    assert!(at("/").await.text().contains("Ionian"));
    let missing = at("/nothing").await;
    assert_eq!((missing.status(), missing.error_code().as_str()), (404, "not_found"));
}

#[tokio::test]
async fn paths_of_the_platform_belong_to_the_app_on_its_own_host() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move { text(format!("app {}", request.uri())) }).await;
    platform.ready(1, app.target()).await;
    assert_eq!(platform.get("/_blobs/x").await.text(), "app /_blobs/x");
}

#[tokio::test]
async fn grpc_over_http2_reaches_the_platform() {
    let platform = Platform::start().await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let call = |authority: &str| {
        Request::post(format!("http://{authority}/modal.client.ModalClient/ClientHello"))
            .header("content-type", "application/grpc+proto")
            .body(Full::new(Bytes::from_static(b"\0\0\0\0\0")))
            .unwrap()
    };
    for authority in ["127.0.0.1", HOST] {
        let response = within(sender.send_request(call(authority))).await.unwrap();
        assert_eq!(response.version(), http::Version::HTTP_2);
        let body = within(response.collect()).await.unwrap().to_bytes();
        assert!(
            body.starts_with(b"platform /modal.client.ModalClient/ClientHello"),
            "{body:?}"
        );
    }
}

#[tokio::test]
async fn http2_reaches_apps() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move {
        let host = request.headers()["host"].to_str().unwrap().to_owned();
        let body = request.collect().await.unwrap().to_bytes();
        text(format!("{host} {}", body.len()))
    })
    .await;
    platform.ready(10, app.target()).await;
    let stream = TcpStream::connect(platform.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let post = Request::post(format!("http://{HOST}:8800/"))
        .body(Full::new(Bytes::from(vec![0; 300_000])))
        .unwrap();
    let response = within(sender.send_request(post)).await.unwrap();
    assert_eq!(
        within(response.collect()).await.unwrap().to_bytes(),
        format!("{HOST}:8800 300000")
    );
}

#[tokio::test]
async fn the_platform_listener_knows_no_endpoints() {
    let platform = Platform::start().await;
    let app = App::start(|_| async { text("app") }).await;
    platform.ready(1, app.target()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let config = IngressConfig::default();
    let served = shutdown.clone();
    let serving = tokio::spawn(async move {
        ionian_ingress::serve_platform_only(vec![listener], platform_echo(), &config, served).await;
    });
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n").into_bytes();
    let answer = String::from_utf8(raw(address, &get("/_blobs/x")).await).unwrap();
    assert!(answer.contains("platform /_blobs/x"), "{answer}");
    let answer = String::from_utf8(raw(address, &get("/hello")).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    shutdown.cancel();
    within(serving).await.unwrap();
}

#[tokio::test]
async fn proxy_tokens_are_checked_before_anything_is_started() {
    let platform = Platform::start_with(IngressConfig::default(), |route| route.requires_proxy_auth = true).await;
    let missing = platform.get("/").await;
    assert_eq!(
        (missing.status(), missing.error_code().as_str()),
        (401, "proxy_auth_required")
    );
    let with = |key: &str, secret: &str| {
        let mut request = request("GET", "/");
        request.headers_mut().insert("modal-key", key.parse().unwrap());
        request.headers_mut().insert("modal-secret", secret.parse().unwrap());
        request
    };
    assert_eq!(platform.send(with("wk-good", "ws-bad")).await.status(), 401);
    assert!(
        platform.demand.lock().await.try_recv().is_err(),
        "nobody was to hear of a refused request"
    );
    let app = App::start(|request| async move {
        let leaked = request.headers().contains_key("modal-secret") || request.headers().contains_key("modal-key");
        text(if leaked { "leaked" } else { "in" })
    })
    .await;
    platform.ready(1, app.target()).await;
    assert_eq!(platform.send(with("wk-good", "ws-good")).await.text(), "in");
    platform.demand_where(|report| report.containers.len() == 1).await;
}

#[tokio::test]
async fn garbage_is_closed_at_once() {
    let platform = Platform::start().await;
    // A TLS hello, binary noise, something that begins like a method and is none, and half a preface.
    assert_eq!(
        raw(platform.address, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await,
        b""
    );
    assert_eq!(raw(platform.address, &[0_u8; 4096]).await, b"");
    let answer = raw(platform.address, b"SSH-2.0-OpenSSH_9.2 \x01\x02\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    let answer = raw(platform.address, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 "), "{answer:?}");
    // And the port still serves.
    let mut front = request("GET", "/");
    front.headers_mut().insert("host", "localhost".parse().unwrap());
    assert_eq!(platform.send(front).await.status(), 200);
}

#[tokio::test]
async fn silent_connections_are_closed() {
    let limits = Limits {
        header_read_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    let platform = Platform::start_with(
        IngressConfig {
            limits,
            ..IngressConfig::default()
        },
        |_| {},
    )
    .await;
    assert_eq!(raw(platform.address, b"").await, b"");
    assert_eq!(raw(platform.address, b"PRI * HT").await, b"");
    let answer = raw(platform.address, b"GET / HTTP/1.1\r\nhost: x").await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
}

#[tokio::test]
async fn oversized_headers_are_refused() {
    let platform = Platform::start().await;
    let mut head = b"GET / HTTP/1.1\r\nhost: localhost\r\nx-large: ".to_vec();
    head.extend(std::iter::repeat_n(b'a', 200 * 1024));
    head.extend(b"\r\n\r\n");
    let answer = raw(platform.address, &head).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 431"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn too_many_headers_are_refused() {
    let platform = Platform::start().await;
    let mut head = b"GET / HTTP/1.1\r\nhost: localhost\r\n".to_vec();
    for number in 0..100 {
        head.extend(format!("x-{number}: 1\r\n").into_bytes());
    }
    head.extend(b"\r\n");
    let answer = raw(platform.address, &head).await;
    assert!(
        answer.starts_with(b"HTTP/1.1 431"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_one_to_end() {
    let limits = Limits {
        max_connections: 1,
        ..Limits::default()
    };
    let platform = Platform::start_with(
        IngressConfig {
            limits,
            ..IngressConfig::default()
        },
        |_| {},
    )
    .await;
    let mut first = TcpStream::connect(platform.address).await.unwrap();
    first
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut byte = [0];
    first.read_exact(&mut byte).await.unwrap();
    let close = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let mut second = std::pin::pin!(raw(platform.address, close));
    let early = tokio::time::timeout(Duration::from_millis(200), &mut second).await;
    assert!(early.is_err(), "a second connection was served beside the first");
    drop(first);
    assert!(within(second).await.starts_with(b"HTTP/1.1"));
}

#[tokio::test]
async fn requests_in_flight_finish_at_shutdown() {
    let platform = Platform::start().await;
    let (release, released) = tokio::sync::watch::channel(false);
    let app = App::start(move |_| {
        let mut released = released.clone();
        async move {
            released.wait_for(|released| *released).await.unwrap();
            text("finished")
        }
    })
    .await;
    platform.ready(1, app.target()).await;
    let address = platform.address;
    let mut slow = TcpStream::connect(address).await.unwrap();
    let idle = TcpStream::connect(address).await.unwrap();
    let get = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut slow, get.as_bytes())
        .await
        .unwrap();
    platform
        .demand_where(|report| report.containers.iter().any(|container| container.in_flight == 1))
        .await;
    platform.shutdown.cancel();
    // New connections are refused while the old one goes on.
    within(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(!platform.serving.is_finished());
    release.send(true).unwrap();
    let mut answer = Vec::new();
    within(tokio::io::AsyncReadExt::read_to_end(&mut slow, &mut answer))
        .await
        .unwrap();
    assert!(String::from_utf8_lossy(&answer).ends_with("finished"), "{answer:?}");
    within(platform.serving).await.unwrap();
    drop(idle);
}

#[tokio::test]
async fn an_axum_like_body_fits_the_platform_service() {
    // What the server crate does with tonic's routes: any body whose errors become a box.
    let service = ionian_ingress::platform_service(tower::service_fn(|_: Request<hyper::body::Incoming>| async {
        let body = Full::new(Bytes::from_static(b"x"))
            .map_err(|never| match never {})
            .boxed_unsync();
        let response: Response<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>> = Response::new(body);
        Ok::<_, std::convert::Infallible>(response)
    }));
    drop(service);
}
