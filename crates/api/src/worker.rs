//! The control process's end of the worker protocol (`ionian.worker.v1`), and the content that workers fetch.
//!
//! A connection becomes what the embedded worker has: a desired set to follow, reports, log entries, builds. What
//! should run, and who is silent, is decided elsewhere. It owns sessions: who may connect, that a worker has one
//! connection, that a spec travels once in it, and that nothing a worker sends grows memory here.

mod builds;
mod join;
mod session;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{AUTHORIZATION, CONTENT_LENGTH};
use http::{HeaderMap, StatusCode};
use ionian_blobs::{ContentHash, ContentStore};
use ionian_control::{Control, Error};
use ionian_domain::WorkerId;
use ionian_domain::log::LogEntry;
use ionian_domain::worker::{DesiredSet, WorkerCapacity, WorkerReport};
use ionian_proto::worker as pb;
use parking_lot::Mutex;
use pb::workers_server::{Workers, WorkersServer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response as GrpcResponse, Status, Streaming};
use tower::Service;

pub use self::builds::RemoteBuilds;
pub use self::join::JoinTokens;

pub(crate) const SERVICE_PREFIX: &str = "/ionian.worker.v1.Workers/";
/// A batch of output is half a megabyte, a list of layers some hundred kilobytes.
const MAX_RECEIVED_BYTES: usize = 16 * 1024 * 1024;
/// A spec holds a function's serialized code and the names of all its files.
const MAX_SENT_BYTES: usize = 128 * 1024 * 1024;

/// What the rest of the application is to a connected worker.
#[tonic::async_trait]
pub trait WorkerHost: Send + Sync + 'static {
    /// A worker is there; returns what it should run.
    async fn connect(
        &self,
        worker_id: WorkerId,
        capacity: WorkerCapacity,
    ) -> Result<watch::Receiver<DesiredSet>, Error>;
    /// A sign of life.
    async fn heard(&self, worker_id: WorkerId);
    async fn report(&self, worker_id: WorkerId, report: WorkerReport);
    /// Resolves when the entries are written.
    async fn log(&self, entries: Vec<LogEntry>);
}

#[tonic::async_trait]
impl WorkerHost for Control {
    async fn connect(
        &self,
        worker_id: WorkerId,
        capacity: WorkerCapacity,
    ) -> Result<watch::Receiver<DesiredSet>, Error> {
        self.workers().connect(worker_id, capacity).await
    }

    async fn heard(&self, worker_id: WorkerId) {
        if let Err(error) = self.workers().heard(worker_id).await {
            tracing::debug!(%error, "a worker was heard at the end");
        }
    }

    async fn report(&self, worker_id: WorkerId, report: WorkerReport) {
        if let Err(error) = self.workers().report(worker_id, report).await {
            tracing::debug!(%error, "a worker reported at the end");
        }
    }

    async fn log(&self, entries: Vec<LogEntry>) {
        self.logs().append(entries).await;
    }
}

/// How patient both sides are. The figures of a platform are the default; tests are in a hurry.
#[derive(Debug, Clone, Copy)]
pub struct WorkerTimes {
    /// How often a worker says that it is there.
    pub heartbeat: Duration,
    /// A connection on which nothing was heard for this long is given up.
    pub silence: Duration,
}

impl Default for WorkerTimes {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(5),
            // Before the scheduler gives the worker itself up, after 30 s: it has a chance to connect again.
            silence: Duration::from_secs(20),
        }
    }
}

/// Takes workers in. Cheap to clone.
#[derive(Clone)]
pub struct WorkerGateway {
    inner: Arc<Inner>,
}

struct Inner {
    host: Arc<dyn WorkerHost>,
    tokens: JoinTokens,
    builds: RemoteBuilds,
    content: ContentStore,
    /// Where containers' connections are to be carried.
    containers_address: String,
    times: WorkerTimes,
    next_session: AtomicU64,
    sessions: Mutex<HashMap<WorkerId, Connected>>,
    /// A batch of output that comes again because its confirmation was lost is not written twice.
    logs_taken: Mutex<HashMap<WorkerId, Arc<tokio::sync::Mutex<LogsTaken>>>>,
}

/// The last batch of a worker's output that was written.
#[derive(Default)]
struct LogsTaken {
    /// Within which of the worker's runs.
    run_id: String,
    sequence: u64,
}

struct Connected {
    session: u64,
    superseded: CancellationToken,
}

impl std::fmt::Debug for WorkerGateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerGateway").finish_non_exhaustive()
    }
}

impl WorkerGateway {
    pub fn new(
        host: Arc<dyn WorkerHost>,
        tokens: JoinTokens,
        builds: RemoteBuilds,
        content: ContentStore,
        containers_address: String,
        times: WorkerTimes,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                tokens,
                builds,
                content,
                containers_address,
                times,
                next_session: AtomicU64::new(1),
                sessions: Mutex::default(),
                logs_taken: Mutex::default(),
            }),
        }
    }

    /// The gRPC service.
    pub fn service(&self) -> WorkersServer<Self> {
        WorkersServer::new(self.clone())
            .max_decoding_message_size(MAX_RECEIVED_BYTES)
            .max_encoding_message_size(MAX_SENT_BYTES)
    }

    /// Answers one gRPC request to the service.
    pub(crate) async fn call<B>(&self, request: http::Request<B>) -> http::Response<tonic::body::Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        match self.service().call(request).await {
            Ok(response) => response,
            Err(infallible) => match infallible {},
        }
    }

    /// `GET /_ionian/worker/v1/content/<sha256>`: a file of a mount or of a build context.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/_ionian/worker/v1/content/{digest}", get(content))
            .with_state(self.clone())
    }

    fn is_worker(&self, authorization: Option<&str>) -> bool {
        authorization
            .and_then(|value| value.strip_prefix("Bearer "))
            .is_some_and(|token| self.inner.tokens.is_valid(token))
    }

    fn authenticate(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let authorization = metadata.get("authorization").and_then(|value| value.to_str().ok());
        if self.is_worker(authorization) {
            return Ok(());
        }
        Err(Status::unauthenticated(
            "the join token is not valid on this server: make one with `ionian token new --worker`",
        ))
    }

    /// Makes this the worker's connection; an earlier one ends.
    fn enter(&self, worker_id: WorkerId) -> Connected {
        let connected = Connected {
            session: self.inner.next_session.fetch_add(1, Ordering::Relaxed),
            superseded: CancellationToken::new(),
        };
        let kept = Connected {
            session: connected.session,
            superseded: connected.superseded.clone(),
        };
        if let Some(earlier) = self.inner.sessions.lock().insert(worker_id, kept) {
            tracing::info!(worker = %worker_id, "the worker connected again; its earlier connection ends");
            earlier.superseded.cancel();
        }
        connected
    }

    fn leave(&self, worker_id: WorkerId, session: u64) {
        let mut sessions = self.inner.sessions.lock();
        if sessions
            .get(&worker_id)
            .is_some_and(|connected| connected.session == session)
        {
            sessions.remove(&worker_id);
        }
        drop(sessions);
        self.inner.builds.disconnected(worker_id, session);
    }
}

#[tonic::async_trait]
impl Workers for WorkerGateway {
    async fn connect(
        &self,
        request: Request<Streaming<pb::FromWorker>>,
    ) -> Result<GrpcResponse<BoxStream<pb::ToWorker>>, Status> {
        self.authenticate(request.metadata())?;
        session::open(self, request.into_inner()).await.map(GrpcResponse::new)
    }
}

async fn content(State(gateway): State<WorkerGateway>, Path(digest): Path<String>, headers: HeaderMap) -> Response {
    let authorization = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if !gateway.is_worker(authorization) {
        return (
            StatusCode::UNAUTHORIZED,
            "this is for workers, which send their join token\n",
        )
            .into_response();
    }
    let Ok(hash) = digest.parse::<ContentHash>() else {
        return (StatusCode::BAD_REQUEST, "this is not a digest\n").into_response();
    };
    match gateway.inner.content.open(hash).await {
        Ok((length, chunks)) => ([(CONTENT_LENGTH, length)], Body::from_stream(chunks)).into_response(),
        Err(ionian_blobs::ContentError::NotFound { .. }) => {
            (StatusCode::NOT_FOUND, "this content is not here\n").into_response()
        }
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "content could not be read");
            (StatusCode::INTERNAL_SERVER_ERROR, "the content could not be read\n").into_response()
        }
    }
}
