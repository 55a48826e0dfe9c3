//! The listener: connections in, requests to [`crate::dispatch`].
//!
//! HTTP/1.1 and HTTP/2 (prior knowledge) share a port. The first bytes are read here and not by
//! hyper-util's automatic builder, because its detection has no time limit: a connection that sends half
//! a preface would be held for ever.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{IngressConfig, Limits};
use crate::dispatch::{self, Mode, PlatformService, Services};
use crate::forward::ConnectionInfo;
use crate::prefixed::{self, Protocol};

/// A client with thousands of parallel calls holds one long poll each on one connection.
const MAX_CONCURRENT_STREAMS: u32 = 10_000;

/// Windows for one stream and for a connection: messages of up to 128 MiB arrive at full speed, and one
/// connection cannot make us hold more than this of what nobody has read yet.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Larger than the default of 16 KiB: a large message is then hundreds of frames, not thousands.
const MAX_FRAME_SIZE: u32 = 1024 * 1024;

/// Clients cancel polls in bulk when they shut down; hyper's 20 would cut their connection for it.
const MAX_PENDING_RESETS: usize = 1024;

/// Pings of our own find peers that disappeared. Their pings are answered by hyper.
const PING_EVERY: Duration = Duration::from_secs(30);
const PONG_WITHIN: Duration = Duration::from_secs(20);

/// TCP's own probes, for HTTP/1.1 connections and websockets.
const KEEPALIVE_AFTER: Duration = Duration::from_mins(1);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);

/// Read buffer of an HTTP/1.1 connection: uploads stream through it. Hyper wants heads to fit as well.
const READ_BUFFER: usize = 128 * 1024;

/// Headers of an HTTP/1.1 request: hyper's own limit, beyond which it answers 431. HTTP/2 counts bytes only, at
/// least 32 for each header.
const MAX_HEADERS: usize = 100;

/// After an accept that failed for want of descriptors or memory, which take a moment to come back.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves platform and web endpoints until `shutdown`, then lets requests in flight finish.
pub async fn serve(listeners: Vec<TcpListener>, services: Services, shutdown: CancellationToken) {
    let config = services.ingress.inner.config.clone();
    let mode = Mode::Public {
        ingress: services.ingress,
    };
    run(listeners, mode, services.platform, &config, shutdown).await;
}

/// Serves the platform alone, whatever host is asked for: for the listener that containers reach.
pub async fn serve_platform_only(
    listeners: Vec<TcpListener>,
    platform: PlatformService,
    config: &IngressConfig,
    shutdown: CancellationToken,
) {
    run(listeners, Mode::PlatformOnly, platform, config, shutdown).await;
}

/// What all connections of one `serve` share.
struct Shared {
    mode: Mode,
    platform: PlatformService,
    config: IngressConfig,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    /// Requests in flight finish from here on.
    shutdown: CancellationToken,
    /// Those that did not are cut.
    cut: CancellationToken,
}

async fn run(
    listeners: Vec<TcpListener>,
    mode: Mode,
    platform: PlatformService,
    config: &IngressConfig,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(config.limits.max_connections));
    let shared = Arc::new(Shared {
        mode,
        platform,
        config: config.clone(),
        http1: http1_builder(&config.limits),
        http2: http2_builder(&config.limits),
        shutdown: shutdown.clone(),
        cut: CancellationToken::new(),
    });
    let connections = TaskTracker::new();
    let accepting = listeners
        .into_iter()
        .map(|listener| accept(listener, Arc::clone(&shared), Arc::clone(&permits), connections.clone()));
    tokio::select! {
        _never = futures_util::future::join_all(accepting) => {}
        () = shutdown.cancelled() => {}
    }
    // The listeners are closed: new connections are refused while the old ones finish.
    connections.close();
    if tokio::time::timeout(config.limits.shutdown_grace, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = connections.len(),
            "cut connections that did not finish in time"
        );
        shared.cut.cancel();
        connections.wait().await;
    }
}

fn http1_builder(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_read_timeout)
        .max_header_size(limits.max_header_bytes)
        .max_headers(MAX_HEADERS)
        .max_buf_size(READ_BUFFER.max(limits.max_header_bytes));
    builder
}

fn http2_builder(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME_SIZE)
        .max_send_buf_size(STREAM_WINDOW as usize)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_WITHIN);
    builder
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, permits: Arc<Semaphore>, connections: TaskTracker) {
    let local = listener.local_addr();
    let mut was_failing = false;
    loop {
        // Beyond the limit, connections wait in the kernel's queue until one ends.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, peer)) => {
                was_failing = false;
                // Kind: per connection. Ends with it, and is cut at the end of the shutdown's grace.
                connections.spawn(connection(stream, peer, Arc::clone(&shared), permit));
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if !was_failing {
                    // Once per series: it repeats twenty times a second.
                    tracing::warn!(listener = ?local, %error, "failed to accept connections");
                    was_failing = true;
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// The peer gave up before it was accepted: nothing is wrong with the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

async fn connection(stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>, permit: OwnedSemaphorePermit) {
    let _permit = permit;
    // Fails only on a socket that is already dead, which the first read tells.
    let _dead = prepare_socket(&stream);
    let Ok(local) = stream.local_addr() else { return };
    let sniffed = tokio::select! {
        sniffed = tokio::time::timeout(shared.config.limits.header_read_timeout, prefixed::sniff(stream)) => sniffed,
        () = shared.shutdown.cancelled() => return,
    };
    // Silence and noise are not worth a line in the log.
    let Ok(Some((protocol, io))) = sniffed else { return };
    let info = Arc::new(ConnectionInfo::new(peer, local, &shared.config.trusted_proxies));
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        let info = Arc::clone(&info);
        async move { Ok::<_, Infallible>(dispatch::answer(&shared.mode, &shared.platform, &info, request).await) }
    });
    let io = TokioIo::new(io);
    match protocol {
        Protocol::Http1 => {
            let connection = pin!(shared.http1.serve_connection(io, service).with_upgrades());
            finish(connection, http1::UpgradeableConnection::graceful_shutdown, &shared).await;
        }
        Protocol::Http2 => {
            let connection = pin!(shared.http2.serve_connection(io, service));
            finish(connection, http2::Connection::graceful_shutdown, &shared).await;
        }
    }
}

/// Runs a connection to its end, and gently to an earlier end at shutdown.
async fn finish<C>(mut connection: Pin<&mut C>, end_gracefully: impl FnOnce(Pin<&mut C>), shared: &Shared)
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shared.shutdown.cancelled() => {
            end_gracefully(connection.as_mut());
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = shared.cut.cancelled() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        // Clients that leave, send garbage or are slow: their business. Requests that failed by it have
        // their own line.
        tracing::debug!(reason = crate::respond::chain(&error), "a connection ended early");
    }
}

fn prepare_socket(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY);
    socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
