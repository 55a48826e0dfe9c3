//! HTTP in: one listener for the platform and for all web endpoints.
//!
//! The life of a web request, in order:
//!
//! 1. [`listener`](self::serve): a connection, its protocol, its limits.
//! 2. `dispatch`: gRPC and platform paths go to the platform's service; hosts `<workspace>--<label>` are
//!    looked up in the route table that control publishes.
//! 3. `proxy`: proxy tokens are checked before anything is started; headers are made ready.
//! 4. `slots`: a slot on a running container, or a place in the waiting room; `demand` tells control.
//! 5. `upstream` and `stream` (an app with a socket), `tunnel` (websockets there), or `channel` and
//!    `channel_socket` (the official runtime's data channel).
//! 6. The slot is given back when the app is done; `respond` has answered if it never began.
//!
//! What this crate must never do: write anything down per request, ask control per request, poll for a
//! free slot, or hold a body in memory.

mod body;
mod channel;
mod channel_socket;
mod config;
mod demand;
mod dispatch;
mod forward;
mod host;
mod listener;
mod pool;
mod prefixed;
mod proxy;
mod respond;
mod slots;
mod stream;
mod tunnel;
mod upstream;

use std::sync::Arc;

use ionian_control::data_channel::DataChannels;
use ionian_control::web::{RequestLog, RouteTable, WebLink};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::body::{BoxError, PlatformBody};
pub use crate::config::{IngressConfig, Limits, ProxyAuth};
pub use crate::dispatch::{PlatformService, Services, platform_service};
pub use crate::forward::ConnectionInfo;
pub use crate::listener::{serve, serve_platform_only};

/// The web side of the platform: routes, pools and what is on its way. Cheap to clone.
#[derive(Clone)]
pub struct Ingress {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: IngressConfig,
    pub(crate) proxy_auth: ProxyAuth,
    pub(crate) routes: watch::Receiver<Arc<RouteTable>>,
    pub(crate) pools: Arc<pool::Pools>,
    pub(crate) data_channels: DataChannels,
    pub(crate) requests: RequestLog,
    /// Upgraded connections, which outlive the requests that began them.
    pub(crate) tunnels: TaskTracker,
    pub(crate) shutdown: CancellationToken,
}

impl Ingress {
    /// Starts to follow control. Cancel `shutdown` after [`serve`] has returned: requests in flight need
    /// pool events until their end. It closes websockets.
    pub fn start(link: WebLink, config: IngressConfig, proxy_auth: ProxyAuth, shutdown: CancellationToken) -> Self {
        let WebLink {
            routes,
            pool,
            demand,
            data_channels,
            requests,
        } = link;
        let board = Arc::new(demand::DemandBoard::default());
        let pools = Arc::new(pool::Pools::new(Arc::clone(&board)));
        // Kind of both: essential. They end with control or at shutdown.
        tokio::spawn(pool::run(Arc::clone(&pools), pool, routes.clone(), shutdown.clone()));
        tokio::spawn(demand::run(board, demand, shutdown.clone()));
        let inner = Inner {
            config,
            proxy_auth,
            routes,
            pools,
            data_channels,
            requests,
            tunnels: TaskTracker::new(),
            shutdown,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Waits until all websockets are closed, after `shutdown` was cancelled.
    pub async fn closed(&self) {
        self.inner.tunnels.close();
        self.inner.tunnels.wait().await;
    }
}

impl std::fmt::Debug for Ingress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingress")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}
