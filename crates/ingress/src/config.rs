//! What the ingress can be told, and every limit it keeps, each with its reason.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

/// Decides whether a proxy token (`Modal-Key`, `Modal-Secret`) opens endpoints that require one.
///
/// Called once per request of such an endpoint, before any container starts, so it must not block:
/// it looks at a table in memory.
pub type ProxyAuth = Arc<dyn Fn(&str, &str) -> bool + Send + Sync>;

#[derive(Debug, Clone)]
pub struct IngressConfig {
    /// Domains under which web endpoints live, without a leading dot: `<workspace>--<label>.<base domain>`.
    pub base_domains: Vec<String>,
    /// Begins the host of every endpoint; named to whoever asks for a host that is not there.
    pub workspace: String,
    /// Peers whose `X-Forwarded-*` headers are believed. Everyone else's are dropped.
    pub trusted_proxies: Vec<IpNet>,
    pub limits: Limits,
}

impl Default for IngressConfig {
    fn default() -> Self {
        Self {
            base_domains: vec!["localhost".to_owned()],
            workspace: "main".to_owned(),
            trusted_proxies: Vec::new(),
            limits: Limits::default(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections on all listeners of one `serve` together. Beyond it, new ones wait in the kernel's queue.
    pub max_connections: usize,
    /// For the first byte of a connection, for each request's head, and between two requests of one
    /// HTTP/1.1 connection.
    pub header_read_timeout: Duration,
    /// The head of one request, all names and values together.
    pub max_header_bytes: usize,
    /// Requests of one function that may wait for a container.
    pub max_waiting_per_function: usize,
    /// For a TCP connection to an app that said it was ready.
    pub connect_timeout: Duration,
    /// Connections to an app that were idle for longer are not used again.
    pub upstream_idle_timeout: Duration,
    /// An upgraded connection (websocket) over which nothing passed for so long is closed.
    pub tunnel_idle_timeout: Duration,
    /// One websocket message, where the ingress has to see messages (data channel).
    pub max_websocket_message_bytes: usize,
    /// For requests in flight at shutdown.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Two descriptors per request (client and app) stay below the usual hard limit of 1,048,576,
            // and the buffers of this many idle connections below some hundred MiB.
            max_connections: 20_000,
            // Slow enough for a bad mobile link and an idle browser tab, short enough that connections
            // which never ask for anything do not pile up.
            header_read_timeout: Duration::from_mins(1),
            // Four times what common servers take: cookies and tokens of real apps fit.
            max_header_bytes: 64 * 1024,
            // At some KiB per waiting request this is tens of MiB; a longer queue would time out anyway.
            max_waiting_per_function: 10_000,
            // The app is on this host or one bridge away: a connect that takes longer has failed.
            connect_timeout: Duration::from_secs(5),
            // Below the 5 s after which uvicorn, the most common server behind us, closes idle
            // connections: a request written into a closing connection is lost.
            upstream_idle_timeout: Duration::from_secs(4),
            // Websocket libraries ping every 20 to 60 s; an hour without a byte is a dead peer.
            tunnel_idle_timeout: Duration::from_hours(1),
            // Far above the 2 MiB of the hosted product; it bounds memory per websocket.
            max_websocket_message_bytes: 64 * 1024 * 1024,
            // Deploys and restarts should not take longer than people wait for them.
            shutdown_grace: Duration::from_secs(10),
        }
    }
}
