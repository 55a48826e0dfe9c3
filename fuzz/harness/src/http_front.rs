//! Raw bytes to the listener of the ingress: HTTP/1.1, HTTP/2 and websockets, to the platform, to an app with a socket,
//! to an app that answers what the fuzzer says, and to one behind the data channel.
//!
//! An input: a byte of flags, what the hostile app answers (long), what the app behind the data channel says (long),
//! and then the bytes of the connection. A connection whose sender is done ends within a limit, and the listener and
//! the well-behaved app answer a good request afterwards.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ionian_control::data_channel::DataChannels;
use ionian_control::web::{DemandReport, DemandSender, RequestLog, RouteTable, WebLink};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::web::{PoolEvent, Route, WebKind, WebTarget};
use ionian_domain::{AppId, ContainerId, FunctionId, Outcome};
use ionian_ingress::{Ingress, IngressConfig, Limits, Services};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::bytes_in::BytesIn;
use crate::logs;
use crate::messages::from_app;

/// For what must happen, however loaded the machine is.
const PATIENCE: Duration = Duration::from_secs(20);
/// Everything that the ingress waits for ends after this, so that no input takes long.
const SHORT: Duration = Duration::from_millis(150);
/// A sender that stays looks so long for an answer.
const MOMENT: Duration = Duration::from_millis(5);
const MAX_EVENTS: usize = 64;
const GOOD: &str = "GET /ok HTTP/1.1\r\nhost: main--plain.localhost\r\nconnection: close\r\n\r\n";

#[derive(Default)]
struct Script {
    answer: Vec<u8>,
    events: Vec<u8>,
}

struct Front {
    address: SocketAddr,
    script: Arc<Mutex<Script>>,
    /// Kept open: the other ends of everything.
    _control: (
        watch::Sender<Arc<RouteTable>>,
        mpsc::Sender<PoolEvent>,
        CancellationToken,
    ),
}

pub fn run(data: &[u8]) {
    static STATE: OnceLock<Mutex<(Runtime, Front)>> = OnceLock::new();
    logs::forbid_errors();
    let state = STATE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let front = runtime.block_on(Front::start());
        Mutex::new((runtime, front))
    });
    let state = state.lock();
    let (runtime, front) = &*state;
    let mut input = BytesIn(data);
    let flags = input.byte();
    *front.script.lock() = Script {
        answer: input.long().to_vec(),
        events: input.long().to_vec(),
    };
    runtime.block_on(async {
        connection(front.address, flags, input.0).await;
        let good = tokio::time::timeout(PATIENCE, async {
            // On a busy machine even the good app can overrun the short time that it has here.
            while !is_answered(front.address).await {}
        });
        good.await.expect("the listener answers no more");
    });
}

async fn is_answered(address: SocketAddr) -> bool {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(GOOD.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let text = String::from_utf8_lossy(&answer);
    text.starts_with("HTTP/1.1 200 ") && text.ends_with("GET /ok")
}

async fn connection(address: SocketAddr, flags: u8, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let pieces = usize::from(flags >> 6) + 1;
    for piece in bytes.chunks(bytes.len().div_ceil(pieces).max(1)) {
        // It may have been closed before it has read everything.
        if stream.write_all(piece).await.is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let mut answer = Vec::new();
    if flags & 1 == 0 {
        let _closed = stream.shutdown().await;
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "the connection does not end");
    } else {
        // Such as a client that reads a while, and goes.
        let _quiet = tokio::time::timeout(MOMENT, stream.read_to_end(&mut answer)).await;
    }
}

impl Front {
    async fn start() -> Self {
        let script = Arc::<Mutex<Script>>::default();
        let data_channels = DataChannels::default();
        let channel_container = ContainerId::generate();
        data_channels.attach(channel_container);
        tokio::spawn(behind_channel(
            data_channels.clone(),
            channel_container,
            Arc::clone(&script),
        ));
        let apps = [
            ("plain", WebTarget::Direct(plain_app().await)),
            ("hostile", WebTarget::Direct(hostile_app(Arc::clone(&script)).await)),
            ("channel", WebTarget::DataChannel),
        ];
        let mut table = RouteTable::default();
        let (pool, pool_receiver) = mpsc::channel(1_000);
        for (name, target) in apps {
            let route = route(name);
            let event = PoolEvent::Ready {
                function_id: route.function_id,
                container_id: if name == "channel" {
                    channel_container
                } else {
                    ContainerId::generate()
                },
                slots: route.slots_per_container,
                targets: vec![(None, target)],
            };
            table.by_host_label.insert(route.host_label.clone(), Arc::new(route));
            pool.send(event).await.unwrap();
        }
        let (routes, routes_receiver) = watch::channel(Arc::new(table));
        let (demand_sender, demand) = mpsc::channel(1_000);
        tokio::spawn(forget(demand));
        let link = WebLink {
            routes: routes_receiver,
            pool: pool_receiver,
            demand: DemandSender(demand_sender),
            data_channels,
            requests: RequestLog::channel().0,
        };
        let config = IngressConfig {
            limits: Limits {
                header_read_timeout: SHORT,
                connect_timeout: SHORT,
                tunnel_idle_timeout: SHORT,
                max_websocket_message_bytes: 64 * 1024,
                ..Limits::default()
            },
            ..IngressConfig::default()
        };
        let shutdown = CancellationToken::new();
        let proxy_auth = Arc::new(|key: &str, secret: &str| key == "wk-good" && secret == "ws-good");
        let ingress = Ingress::start(link, config, proxy_auth, shutdown.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let platform = tower::service_fn(|request: Request<Incoming>| async move {
            let body = request
                .into_body()
                .collect()
                .await
                .map(http_body_util::Collected::to_bytes);
            Ok::<_, Infallible>(Response::new(Full::new(body.unwrap_or_default())))
        });
        let services = Services {
            platform: ionian_ingress::platform_service(platform),
            ingress,
        };
        tokio::spawn(ionian_ingress::serve(vec![listener], services, shutdown.clone()));
        Self {
            address,
            script,
            _control: (routes, pool, shutdown),
        }
    }
}

fn route(name: &str) -> Route {
    Route {
        host_label: format!("main--{name}"),
        app_id: AppId::generate(),
        app_name: "fuzz".to_owned(),
        function_id: FunctionId::generate(),
        function_name: name.to_owned(),
        method: None,
        kind: WebKind::AsgiApp,
        // Few: a slot that is not given back is soon missed.
        slots_per_container: 8,
        timeout: SHORT,
        startup_timeout: PATIENCE,
        requires_proxy_auth: false,
    }
}

async fn forget(mut demand: mpsc::Receiver<DemandReport>) {
    while demand.recv().await.is_some() {}
}

/// Says what it was asked, and speaks raw bytes after an upgrade.
async fn plain_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(|mut request: Request<Incoming>| async move {
                if let Some(protocol) = request.headers().get("upgrade").cloned() {
                    let upgrade = hyper::upgrade::on(&mut request);
                    tokio::spawn(async move {
                        let Ok(upgraded) = upgrade.await else { return };
                        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                        let _closed = tokio::io::copy(&mut read, &mut write).await;
                    });
                    let answer = Response::builder()
                        .status(101)
                        .header("upgrade", protocol)
                        .header("connection", "upgrade");
                    return Ok::<_, Infallible>(answer.body(Full::default()).unwrap());
                }
                let text = format!("{} {}", request.method(), request.uri().path());
                let _body = request.into_body().collect().await;
                Ok(Response::new(Full::new(Bytes::from(text))))
            });
            let serving = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            tokio::spawn(serving);
        }
    });
    address
}

/// Answers with bytes of the fuzzer, whatever it is asked.
async fn hostile_app(script: Arc<Mutex<Script>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let script = Arc::clone(&script);
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let _read = stream.read(&mut head).await;
                let answer = script.lock().answer.clone();
                let _gone = stream.write_all(&answer).await;
            });
        }
    });
    address
}

/// An app whose events the fuzzer chooses.
async fn behind_channel(channels: DataChannels, container: ContainerId, script: Arc<Mutex<Script>>) {
    loop {
        let Some(input) = channels.next_input(container, PATIENCE).await else {
            continue;
        };
        let (channels, events) = (channels.clone(), script.lock().events.clone());
        tokio::spawn(async move {
            let mut events = BytesIn(&events);
            let mut index = 0;
            while !events.is_empty() && index < MAX_EVENTS as u64 {
                index += 1;
                channels
                    .push(container, input.call_id, index, from_app(&mut events))
                    .await;
            }
            let outcome = Outcome::decided(OutcomeStatus::Success, "");
            channels.finish(container, input.input_id, outcome);
        });
    }
}
