//! What passes between clients and apps with a socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::rt::TokioIo;
use ionian_ingress::IngressConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::{App, AppBody, HOST, Platform, request, text, within};

type Frames = mpsc::Sender<Result<Frame<Bytes>, std::convert::Infallible>>;

/// A body that the test feeds.
fn fed() -> (Frames, AppBody) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, StreamBody::new(ReceiverStream::new(receiver)).boxed_unsync())
}

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

#[expect(clippy::unnecessary_wraps, reason = "the item of a stream of frames")]
fn data(bytes: &'static [u8]) -> Result<Frame<Bytes>, std::convert::Infallible> {
    Ok(Frame::data(Bytes::from_static(bytes)))
}

#[tokio::test]
async fn heads_pass_with_what_the_platform_knows() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move {
        let headers = request.headers();
        let get = |name: &str| {
            headers
                .get(name)
                .map_or("-", |value| value.to_str().unwrap())
                .to_owned()
        };
        assert_eq!(get("x-ionian-client").split(':').next(), Some("127.0.0.1"));
        let seen = [
            "host",
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-ionian-scheme",
            "x-ionian-request-id",
            "te",
        ];
        let mut response = text(seen.map(get).join(" "));
        response.headers_mut().insert("x-app", HeaderValue::from_static("1"));
        response
            .headers_mut()
            .insert("keep-alive", HeaderValue::from_static("timeout=5"));
        response
    })
    .await;
    platform.ready(1, app.target()).await;
    let mut request = request("GET", "/");
    request
        .headers_mut()
        .insert("x-request-id", HeaderValue::from_static("mine-1"));
    request
        .headers_mut()
        .insert("x-ionian-client", HeaderValue::from_static("6.6.6.6:6"));
    let answer = platform.send(request).await;
    assert_eq!(answer.text(), format!("{HOST} 127.0.0.1 http http mine-1 -"));
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    assert_eq!(answer.header("x-app"), Some("1"));
    assert_eq!(answer.header("keep-alive"), None);
    let generated = platform.get("/").await;
    let id = generated.header("x-request-id").unwrap();
    assert!(id.starts_with("rq-") && generated.text().contains(id));
}

#[tokio::test]
async fn the_apps_own_errors_pass_untouched() {
    let platform = Platform::start().await;
    let app = App::start(|_| async {
        let mut response = text("my own words");
        *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
    .await;
    platform.ready(1, app.target()).await;
    let answer = platform.get("/").await;
    assert_eq!((answer.status(), answer.text()), (500, "my own words"));
}

#[tokio::test]
async fn connections_to_the_app_are_kept() {
    let platform = Platform::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::SeqCst);
            let service = hyper::service::service_fn(|_| async { Ok::<_, std::convert::Infallible>(text("x")) });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    platform.ready(1, ionian_domain::web::WebTarget::Direct(address)).await;
    for method in ["GET", "POST", "HEAD", "PUT", "DELETE"].iter().cycle().take(50) {
        assert_eq!(platform.send(request(method, "/")).await.status(), 200);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn responses_stream_as_they_are_made() {
    let platform = Platform::start().await;
    let (frames, body) = fed();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let app = App::start(move |_| {
        let body = body.lock().unwrap().take().unwrap();
        async move { Response::new(body) }
    })
    .await;
    let container = platform.ready(1, app.target()).await;
    let response = platform.open(request("GET", "/"));
    frames.send(data(b"one")).await.unwrap();
    let mut body = response.await.into_body();
    // The first chunk is here while the app still holds the second.
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "one");
    platform
        .demand_where(|r| {
            r.containers
                .iter()
                .any(|c| c.container_id == container && c.in_flight == 1)
        })
        .await;
    frames.send(data(b"two")).await.unwrap();
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "two");
    drop(frames);
    assert!(within(body.frame()).await.is_none());
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}

#[tokio::test]
async fn a_trickled_body_of_known_length_streams_too() {
    let platform = Platform::start().await;
    let (frames, body) = fed();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let app = App::start(move |_| {
        let body = body.lock().unwrap().take().unwrap();
        async move { Response::builder().header("content-length", "6").body(body).unwrap() }
    })
    .await;
    platform.ready(1, app.target()).await;
    frames.send(data(b"one")).await.unwrap();
    let mut body = platform.open(request("GET", "/")).await.into_body();
    assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "one");
    frames.send(data(b"two")).await.unwrap();
    assert_eq!(within(body.collect()).await.unwrap().to_bytes(), "two");
}

#[tokio::test]
async fn uploads_stream_as_they_come() {
    let platform = Platform::start().await;
    let (seen, mut chunks) = mpsc::channel(10);
    let app = App::start(move |request| {
        let seen = seen.clone();
        async move {
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                seen.send(frame.unwrap().into_data().unwrap()).await.unwrap();
            }
            text("received")
        }
    })
    .await;
    platform.ready(1, app.target()).await;
    let (frames, body) = fed();
    let upload = Request::post("/").header("host", HOST).body(body).unwrap();
    let (answer, ()) = tokio::join!(platform.send(upload), async {
        frames.send(data(b"one")).await.unwrap();
        assert_eq!(within(chunks.recv()).await.unwrap(), "one");
        frames.send(data(b"two")).await.unwrap();
        assert_eq!(within(chunks.recv()).await.unwrap(), "two");
        drop(frames);
    });
    assert_eq!(answer.text(), "received");
}

#[tokio::test]
async fn both_directions_run_at_once() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move { Response::new(echo(request.into_body())) }).await;
    platform.ready(1, app.target()).await;
    let (frames, body) = fed();
    let mut response = {
        let open = platform.open(Request::post("/").header("host", HOST).body(body).unwrap());
        frames.send(data(b"begin")).await.unwrap();
        open.await.into_body()
    };
    assert_eq!(
        within(response.frame()).await.unwrap().unwrap().into_data().unwrap(),
        "begin"
    );
    for _ in 0..3 {
        frames.send(data(b"ping")).await.unwrap();
        assert_eq!(
            within(response.frame()).await.unwrap().unwrap().into_data().unwrap(),
            "ping"
        );
    }
    drop(frames);
    assert!(within(response.frame()).await.is_none());
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}

fn echo(body: hyper::body::Incoming) -> AppBody {
    StreamBody::new(body.into_data_stream().map(|chunk| Ok(Frame::data(chunk.unwrap())))).boxed_unsync()
}

/// Peak resident memory of this process, in KiB.
fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn large_bodies_need_constant_memory() {
    const CHUNKS: usize = 4 * 1024; // 256 MiB each way
    let platform = Platform::start().await;
    let app = App::start(|request| async move {
        let mut length = 0;
        let mut body = request.into_body();
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().unwrap().len();
        }
        let chunks = futures_util::stream::iter(0..CHUNKS).map(|_| data(&ZEROES));
        let mut response = Response::new(StreamBody::new(chunks).boxed_unsync());
        response.headers_mut().insert("x-received", HeaderValue::from(length));
        response
    })
    .await;
    platform.ready(1, app.target()).await;
    let before = peak_memory_kib();
    let chunks = futures_util::stream::iter(0..CHUNKS).map(|_| data(&ZEROES));
    let upload = Request::post("/")
        .header("host", HOST)
        .body(StreamBody::new(chunks).boxed_unsync())
        .unwrap();
    let response = platform.open(upload).await;
    assert_eq!(response.headers()["x-received"], (ZEROES.len() * CHUNKS).to_string());
    let mut received = 0;
    let mut body = response.into_body();
    while let Some(frame) = within(body.frame()).await {
        received += frame.unwrap().into_data().unwrap().len();
    }
    assert_eq!(received, ZEROES.len() * CHUNKS);
    let grown = peak_memory_kib() - before;
    assert!(grown < 64 * 1024, "512 MiB of bodies took {grown} KiB");
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move {
        let sent = request.into_body().collect().await.unwrap();
        let sum = sent.trailers().unwrap()["x-sum"].clone();
        let (frames, body) = fed();
        tokio::spawn(async move {
            frames.send(data(b"body")).await.unwrap();
            frames
                .send(Ok(Frame::trailers(HeaderMap::from_iter([(
                    "x-sum".parse().unwrap(),
                    sum,
                )]))))
                .await
                .unwrap();
        });
        Response::builder().header("trailer", "x-sum").body(body).unwrap()
    })
    .await;
    platform.ready(1, app.target()).await;
    let (frames, body) = fed();
    let upload = Request::post("/")
        .header("host", HOST)
        .header("te", "trailers")
        .header("trailer", "x-sum")
        .body(body)
        .unwrap();
    let (answer, ()) = tokio::join!(platform.send(upload), async {
        frames.send(data(b"body")).await.unwrap();
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("42"))]);
        frames.send(Ok(Frame::trailers(trailers))).await.unwrap();
        drop(frames);
    });
    assert_eq!(answer.text(), "body");
    assert_eq!(answer.trailers.unwrap()["x-sum"], "42");
}

#[tokio::test]
async fn a_client_that_expects_100_continue_gets_it() {
    let platform = Platform::start().await;
    let app = App::start(|request| async move {
        assert!(!request.headers().contains_key("expect"));
        text(request.into_body().collect().await.unwrap().to_bytes())
    })
    .await;
    platform.ready(1, app.target()).await;
    let mut stream = TcpStream::connect(platform.address).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nhost: {HOST}\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 1024];
    let length = within(stream.read(&mut buffer)).await.unwrap();
    assert!(buffer[..length].starts_with(b"HTTP/1.1 100"));
    stream.write_all(b"hello").await.unwrap();
    let length = within(stream.read(&mut buffer)).await.unwrap();
    assert!(String::from_utf8_lossy(&buffer[..length]).ends_with("hello"));
}

#[tokio::test]
async fn a_container_that_dies_under_a_request_is_a_502_with_its_id() {
    let platform = Platform::start().await;
    let (arrived, mut arrivals) = mpsc::channel(1);
    let app = App::start(move |_| {
        let arrived = arrived.clone();
        async move {
            arrived.send(()).await.unwrap();
            std::future::pending().await
        }
    })
    .await;
    platform.ready(1, app.target()).await;
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        arrivals.recv().await.unwrap();
        app.kill().await;
    });
    assert_eq!(
        (answer.status(), answer.error_code().as_str()),
        (502, "app_unreachable")
    );
}

#[tokio::test]
async fn a_container_that_is_gone_without_a_word_is_a_502_too() {
    let platform = Platform::start().await;
    let (arrived, mut arrivals) = mpsc::channel(1);
    let app = App::start(move |_| {
        let arrived = arrived.clone();
        async move {
            arrived.send(()).await.unwrap();
            std::future::pending().await
        }
    })
    .await;
    let container = platform.ready(1, app.target()).await;
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        arrivals.recv().await.unwrap();
        // Its network went away with it: no reset ever comes.
        platform.gone(container).await;
    });
    assert_eq!(
        (answer.status(), answer.error_code().as_str()),
        (502, "app_unreachable")
    );
}

#[tokio::test]
async fn a_dead_container_is_passed_over() {
    let platform = Platform::start().await;
    let dead = App::start(|_| async { text("dead") }).await;
    platform.ready(1, dead.target()).await;
    // Its connection is kept, and then the app is gone before control has noticed.
    assert_eq!(platform.get("/").await.text(), "dead");
    dead.kill().await;
    let alive = App::start(|_| async { text("alive") }).await;
    platform.ready(1, alive.target()).await;
    for method in ["GET", "POST"] {
        assert_eq!(platform.send(request(method, "/")).await.text(), "alive");
    }
}

#[tokio::test]
async fn a_stale_connection_is_replaced_and_no_request_lost() {
    // An app that closes each connection on the second request, without a word, as servers do whose
    // keep-alive ends just then.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                assert!(stream.read(&mut buffer).await.unwrap() > 0);
                stream
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .await
                    .unwrap();
                assert!(stream.read(&mut buffer).await.unwrap() > 0);
            });
        }
    });
    let platform = Platform::start().await;
    platform.ready(1, ionian_domain::web::WebTarget::Direct(address)).await;
    for _ in 0..10 {
        assert_eq!(platform.get("/").await.text(), "ok");
    }
    // A POST may have been worked on: it is not repeated.
    assert_eq!(platform.send(request("POST", "/")).await.status(), 502);
}

#[tokio::test]
async fn an_unreachable_app_is_a_502() {
    let platform = Platform::start().await;
    let app = App::start(|_| async { text("") }).await;
    platform.ready(1, app.target()).await;
    app.kill().await;
    let answer = platform.get("/").await;
    assert_eq!(
        (answer.status(), answer.error_code().as_str()),
        (502, "app_unreachable")
    );
    assert!(!answer.text().contains("refused"), "no internals: {}", answer.text());
}

#[tokio::test]
async fn an_app_that_sends_too_many_headers_is_a_502() {
    let platform = Platform::start().await;
    let app = App::start(|_| async {
        let mut response = text("");
        for number in 0..101 {
            let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
            response.headers_mut().insert(name, http::HeaderValue::from_static("1"));
        }
        response
    })
    .await;
    platform.ready(1, app.target()).await;
    assert_eq!(platform.get("/").await.status(), 502);
}

#[tokio::test]
async fn the_timeout_answers_504_and_frees_the_slot() {
    let platform = Platform::start_with(IngressConfig::default(), |route| {
        route.timeout = Duration::from_millis(150);
    })
    .await;
    let app = App::start(|request| async move {
        if request.uri() == "/slow" {
            std::future::pending::<()>().await;
        }
        text("fast")
    })
    .await;
    platform.ready(1, app.target()).await;
    let answer = platform.get("/slow").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (504, "timeout"));
    assert_eq!(platform.get("/").await.text(), "fast");
}

#[tokio::test]
async fn the_timeout_cuts_a_body_that_has_begun_even_for_a_client_that_does_not_read() {
    let platform = Platform::start_with(IngressConfig::default(), |route| {
        route.timeout = Duration::from_millis(300);
    })
    .await;
    let app = App::start(|_| async {
        let endless = futures_util::stream::repeat(()).map(|()| data(&ZEROES));
        Response::new(StreamBody::new(endless).boxed_unsync())
    })
    .await;
    platform.ready(1, app.target()).await;
    let mut response = platform.open(request("GET", "/")).await.into_body();
    // The client reads nothing, buffers fill, and still the slot comes back.
    platform
        .demand_where(|report| report.containers[0].in_flight == 1)
        .await;
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
    let end = within(async {
        loop {
            match response.frame().await {
                Some(Ok(_)) => {}
                end => return end,
            }
        }
    })
    .await;
    assert!(end.unwrap().is_err(), "a cut body must not look complete");
}

#[tokio::test]
async fn a_client_who_leaves_is_noticed_by_the_app() {
    struct Noticed(mpsc::Sender<()>);
    impl Drop for Noticed {
        fn drop(&mut self) {
            self.0.try_send(()).unwrap();
        }
    }
    let platform = Arc::new(Platform::start().await);
    let (noticed, mut leavings) = mpsc::channel(1);
    let app = App::start(move |_| {
        let noticed = Noticed(noticed.clone());
        async move {
            let _noticed = noticed;
            std::future::pending().await
        }
    })
    .await;
    platform.ready(1, app.target()).await;
    let asking = {
        let platform = Arc::clone(&platform);
        tokio::spawn(async move { platform.raw_get().await })
    };
    platform
        .demand_where(|report| report.containers[0].in_flight == 1)
        .await;
    asking.abort();
    within(leavings.recv()).await.unwrap();
    platform
        .demand_where(|report| report.containers[0].in_flight == 0)
        .await;
}
