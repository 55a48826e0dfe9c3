//! The worker's end of the protocol between it and a control process elsewhere: `ionian.worker.v1`.
//!
//! To the [`Worker`](crate::Worker) it is what the embedded control process is: desired sets in, reports out. It
//! connects, and connects again for as long as it takes; what the worker runs goes on meanwhile. It owns what has
//! to survive a broken stream: log batches that were not confirmed, and which containers to report again as
//! started. It decides nothing about containers.

mod outbox;
mod session;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use ionian_domain::container::ContainerStarted;
use ionian_domain::image::BuiltImage;
use ionian_domain::worker::{DesiredSet, Generation, WorkerCapacity, WorkerReport};
use ionian_domain::{ContainerId, WorkerId};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use self::outbox::LogOutbox;
use self::session::SessionEnd;
use crate::builds::{BuildFailure, BuildLine, BuildOrder};
use crate::logs::LogSink;

/// Where content is fetched from, below the server's URL; the digest follows.
pub const CONTENT_PATH: &str = "/_ionian/worker/v1/content/";
/// A spec holds a function's serialized code and the names of all its files.
const MAX_MESSAGE_BYTES: usize = 128 * 1024 * 1024;
/// Reports between the worker's loop and the connection. The loop keeps what does not fit.
const REPORTS: usize = 64;
/// Pauses between attempts to connect. A server that restarts is back within a second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A server on a reachable host answers a connection at once or is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Finds out that the server's host is gone although no connection was closed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Who this worker is and where it belongs.
#[derive(Clone)]
pub struct LinkConfig {
    /// `http://host:port`
    pub server: String,
    pub join_token: String,
    pub worker_id: WorkerId,
    pub version: String,
    pub capacity: WorkerCapacity,
    /// Keys of layers that are on this host's disk at the start.
    pub layers: Vec<String>,
    /// How containers here reach the platform: the URL of this worker's forwarder.
    pub containers_url: String,
}

/// Builds an image and sends its lines.
pub type BuildFn = Arc<
    dyn Fn(
            BuildOrder,
            mpsc::Sender<BuildLine>,
            CancellationToken,
        ) -> BoxFuture<'static, Result<BuiltImage, BuildFailure>>
        + Send
        + Sync,
>;

/// What a worker is run with.
pub struct LinkEnds {
    pub desired: watch::Receiver<DesiredSet>,
    pub reports: mpsc::Sender<WorkerReport>,
    pub logs: LogSink,
    /// Where the server listens for containers, once it has said so.
    pub containers_address: watch::Receiver<Option<String>>,
}

/// Why the link gave up.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("{server} is not the URL of a server, as in http://127.0.0.1:8800")]
    Url { server: String },
    #[error("the server refused this worker: {message}")]
    Refused { message: String },
    #[error(
        "another process has connected as this worker ({worker_id}); a data directory belongs to one worker, so give \
         the copy a new one"
    )]
    Superseded { worker_id: WorkerId },
}

pub struct Link {
    config: LinkConfig,
    endpoint: Endpoint,
    /// Drawn per process.
    run_id: String,
    state: LinkState,
}

/// What outlives a session.
struct LinkState {
    desired: watch::Sender<DesiredSet>,
    containers_address: watch::Sender<Option<String>>,
    reports: mpsc::Receiver<WorkerReport>,
    logs: LogOutbox,
    /// Counts the sets of all sessions, whose own generations begin anew.
    generation: Generation,
    /// Told again at the beginning of a session.
    started: BTreeMap<ContainerId, ContainerStarted>,
    /// Not adopted or ended yet.
    found: Vec<ContainerId>,
    was_welcome: bool,
}

impl Link {
    pub fn new(config: LinkConfig) -> Result<(Self, LinkEnds), LinkError> {
        let url = || LinkError::Url {
            server: config.server.clone(),
        };
        if !config.server.starts_with("http://") {
            return Err(url());
        }
        let endpoint = Endpoint::from_shared(config.server.clone())
            .map_err(|_| url())?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let (desired_sender, desired) = watch::channel(DesiredSet::default());
        let (address_sender, containers_address) = watch::channel(None);
        let (report_sender, reports) = mpsc::channel(REPORTS);
        let logs = LogOutbox::new();
        let ends = LinkEnds {
            desired,
            reports: report_sender,
            logs: logs.sink(),
            containers_address,
        };
        let link = Self {
            config,
            endpoint,
            run_id: hex::encode(rand::random::<[u8; 16]>()),
            state: LinkState {
                desired: desired_sender,
                containers_address: address_sender,
                reports,
                logs,
                generation: Generation::default(),
                started: BTreeMap::new(),
                found: Vec::new(),
                was_welcome: false,
            },
        };
        Ok((link, ends))
    }

    /// Stays connected until cancelled. `found` are the containers of an earlier process of this worker, of which the
    /// server is told. An error means that trying again would not help.
    pub async fn run(
        mut self,
        found: Vec<ContainerId>,
        build: BuildFn,
        cancel: CancellationToken,
    ) -> Result<(), LinkError> {
        self.state.found = found;
        let mut pause = FIRST_PAUSE;
        loop {
            let was_welcome = self.state.was_welcome;
            self.state.was_welcome = false;
            let end = tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                end = session::run(&self.config, &self.endpoint, &self.run_id, &mut self.state, &build) => end,
            };
            if self.state.was_welcome {
                pause = FIRST_PAUSE;
            }
            let once = was_welcome || self.state.was_welcome;
            self.state.was_welcome = once;
            match end {
                SessionEnd::Refused(status) if status.code() == Code::Aborted => {
                    let worker_id = self.config.worker_id;
                    return Err(LinkError::Superseded { worker_id });
                }
                // A server that once took this worker in is not given up for one refusal: it may be mended.
                SessionEnd::Refused(status) if is_final(&status) && !once => {
                    let message = status.message().to_owned();
                    return Err(LinkError::Refused { message });
                }
                SessionEnd::Refused(status) => {
                    tracing::warn!(code = ?status.code(), reason = status.message(), "the server ended the connection");
                }
                SessionEnd::Closed => tracing::info!("the server closed the connection"),
                SessionEnd::Unreachable(error) => {
                    tracing::info!(error = crate::chain(&error), "the server cannot be reached");
                }
                SessionEnd::Malformed(error) => tracing::error!(%error, "the connection was given up"),
            }
            // Not all workers of a server that restarts come at the same moment.
            let jitter = pause.mul_f64(rand::random::<f64>() / 2.0);
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause + jitter) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument | Code::Unimplemented
    )
}
