//! An ingress with its control played by the test, apps to stand behind it, and a small client.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ionian_control::data_channel::DataChannels;
use ionian_control::web::{DemandReport, DemandSender, RequestLog, RouteTable, WebLink};
use ionian_domain::web::{PoolEvent, Route, WebKind, WebTarget};
use ionian_domain::{AppId, ContainerId, FunctionId};
use ionian_ingress::{ConnectionInfo, Ingress, IngressConfig, Services};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Nothing in these tests takes longer on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const HOST: &str = "main--hello-web.localhost";

pub(crate) type AppBody = UnsyncBoxBody<Bytes, Infallible>;

pub(crate) struct Platform {
    pub(crate) address: SocketAddr,
    pub(crate) function_id: FunctionId,
    pub(crate) routes: watch::Sender<Arc<RouteTable>>,
    pub(crate) pool: mpsc::Sender<PoolEvent>,
    pub(crate) demand: tokio::sync::Mutex<mpsc::Receiver<DemandReport>>,
    pub(crate) data_channels: DataChannels,
    pub(crate) shutdown: CancellationToken,
    pub(crate) serving: JoinHandle<()>,
    pub(crate) ingress: Ingress,
    pub(crate) ingress_shutdown: CancellationToken,
}

pub(crate) fn route(function_id: FunctionId) -> Route {
    Route {
        host_label: "main--hello-web".to_owned(),
        app_id: AppId::generate(),
        app_name: "hello".to_owned(),
        function_id,
        function_name: "web".to_owned(),
        method: None,
        kind: WebKind::AsgiApp,
        slots_per_container: 10,
        timeout: PATIENCE,
        startup_timeout: PATIENCE,
        requires_proxy_auth: false,
    }
}

impl Platform {
    pub(crate) async fn start() -> Self {
        Self::start_with(IngressConfig::default(), |_| {}).await
    }

    pub(crate) async fn start_with(config: IngressConfig, change_route: impl FnOnce(&mut Route)) -> Self {
        let function_id = FunctionId::generate();
        let mut route = route(function_id);
        change_route(&mut route);
        let table = RouteTable {
            by_host_label: HashMap::from([(route.host_label.clone(), Arc::new(route))]),
        };
        let (routes, routes_receiver) = watch::channel(Arc::new(table));
        let (pool, pool_receiver) = mpsc::channel(1_000);
        let (demand_sender, demand) = mpsc::channel(10_000);
        let data_channels = DataChannels::default();
        let link = WebLink {
            routes: routes_receiver,
            pool: pool_receiver,
            demand: DemandSender(demand_sender),
            data_channels: data_channels.clone(),
            requests: RequestLog::channel().0,
        };
        let proxy_auth = Arc::new(|key: &str, secret: &str| key == "wk-good" && secret == "ws-good");
        let ingress_shutdown = CancellationToken::new();
        let ingress = Ingress::start(link, config, proxy_auth, ingress_shutdown.clone());
        let shutdown = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let services = Services {
            platform: platform_echo(),
            ingress: ingress.clone(),
        };
        let serving = tokio::spawn(ionian_ingress::serve(vec![listener], services, shutdown.clone()));
        let demand = tokio::sync::Mutex::new(demand);
        Self {
            address,
            function_id,
            routes,
            pool,
            demand,
            data_channels,
            shutdown,
            serving,
            ingress,
            ingress_shutdown,
        }
    }

    pub(crate) async fn ready(&self, slots: u32, target: WebTarget) -> ContainerId {
        let container_id = ContainerId::generate();
        self.data_channels.attach(container_id);
        let targets = vec![(None, target)];
        let event = PoolEvent::Ready {
            function_id: self.function_id,
            container_id,
            slots,
            targets,
        };
        self.pool.send(event).await.unwrap();
        container_id
    }

    pub(crate) async fn draining(&self, container_id: ContainerId) {
        self.pool
            .send(PoolEvent::Draining {
                function_id: self.function_id,
                container_id,
            })
            .await
            .unwrap();
    }

    pub(crate) async fn gone(&self, container_id: ContainerId) {
        self.pool
            .send(PoolEvent::Gone {
                function_id: self.function_id,
                container_id,
            })
            .await
            .unwrap();
    }

    pub(crate) async fn start_failed(&self, message: &str) {
        let event = PoolEvent::StartFailed {
            function_id: self.function_id,
            container_id: ContainerId::generate(),
            message: message.to_owned(),
        };
        self.pool.send(event).await.unwrap();
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(request("GET", path)).await
    }

    pub(crate) async fn send<B>(&self, request: Request<B>) -> Answer
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let response = self.open(request).await;
        let (head, body) = response.into_parts();
        let body = within(body.collect()).await.unwrap();
        let trailers = body.trailers().cloned();
        Answer {
            head,
            body: body.to_bytes(),
            trailers,
        }
    }

    /// Sends on a connection of its own and returns when the head of the response is there.
    pub(crate) async fn open<B>(&self, request: Request<B>) -> Response<Incoming>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        within(sender.send_request(request)).await.unwrap()
    }

    /// A request whose connection closes when the future is dropped.
    pub(crate) async fn raw_get(&self) -> Vec<u8> {
        raw(
            self.address,
            format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes(),
        )
        .await
    }

    /// Waits for a report that fits.
    pub(crate) async fn demand_where(&self, fits: impl Fn(&DemandReport) -> bool) -> DemandReport {
        within(async {
            loop {
                let report = self.demand.lock().await.recv().await.unwrap();
                if fits(&report) {
                    return report;
                }
            }
        })
        .await
    }
}

/// Echoes what the platform service saw.
pub(crate) fn platform_echo() -> ionian_ingress::PlatformService {
    ionian_ingress::platform_service(tower::service_fn(|request: Request<Incoming>| async move {
        let peer = request
            .extensions()
            .get::<ConnectionInfo>()
            .map(|info| info.peer.ip().to_string());
        let text = format!("platform {} {}", request.uri().path(), peer.unwrap_or_default());
        let response = Response::builder().header("content-type", "application/grpc");
        Ok::<_, Infallible>(response.body(Full::new(Bytes::from(text))).unwrap())
    }))
}

pub(crate) fn request(method: &str, path: &str) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", HOST)
        .body(Full::default())
        .unwrap()
}

pub(crate) async fn within<T>(step: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, step)
        .await
        .expect("the step takes too long")
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: http::response::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<http::HeaderMap>,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The code of a platform error, after checking its form.
    pub(crate) fn error_code(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/json"));
        let json: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        let error = &json["error"];
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert_eq!(error["request_id"].as_str(), self.header("x-request-id"));
        error["code"].as_str().unwrap().to_owned()
    }
}

/// An app with a socket. Dropping it closes the listener and every connection at once.
pub(crate) struct App {
    pub(crate) address: SocketAddr,
    accepting: AbortOnDropHandle<()>,
}

impl App {
    pub(crate) async fn start<F, R>(handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response<AppBody>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let handler = handler.clone();
                let service = service_fn(move |request| {
                    let answer = handler(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                connections.spawn(async move {
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await
                });
            }
        }));
        Self { address, accepting }
    }

    pub(crate) fn target(&self) -> WebTarget {
        WebTarget::Direct(self.address)
    }

    pub(crate) async fn kill(self) {
        let Self { accepting, .. } = self;
        accepting.abort();
        assert!(accepting.await.is_err());
    }
}

pub(crate) fn text(text: impl Into<Bytes>) -> Response<AppBody> {
    Response::new(Full::new(text.into()).boxed_unsync())
}

/// Writes raw bytes and reads until the other side closes.
pub(crate) async fn raw(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The other side may have closed before it has read everything.
    let _closed = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _reset = within(stream.read_to_end(&mut answer)).await;
    answer
}
