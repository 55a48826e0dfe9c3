//! Control's assembly: its parts, its tasks, its recovery.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ionian_blobs::{BlobStore, ContentStore};
use ionian_domain::app::AppState;
use ionian_domain::environment::Environment;
use ionian_domain::function::Autoscaler;
use ionian_domain::web::PoolEvent;
use ionian_domain::worker::{DesiredSet, WorkerReport};
use ionian_domain::{EnvironmentId, FunctionId, Timestamp, WorkerId};
use ionian_scheduler::{Event, Scheduler};
use ionian_store::Store;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::adoption::{self, WebNote};
use crate::app::builds::Builds;
use crate::app::calls::{Calls, Consumed};
use crate::app::images::{Images, PresentFn};
use crate::app::payloads::Payloads;
use crate::app::streams::GeneratorStreams;
use crate::app::targets::CallTargets;
use crate::app::{
    apps::Apps, container_calls::ContainerCalls, environments::Environments, functions::Functions, mounts::Mounts,
    secrets::Secrets, tasks::Tasks, tokens::Tokens,
};
use crate::containers::Containers;
use crate::data_channel::DataChannels;
use crate::dispatch::{ArgumentsFn, ArgumentsRequest};
use crate::effects::{ContainersSnapshot, Effects, OutputsHub};
use crate::error::Error;
use crate::journal::{Journal, JournalError};
use crate::logs::{LogError, Logs};
use crate::seal::Sealer;
use crate::sessions::Heartbeats;
use crate::trouble::Trouble;
use crate::turn_loop::{self, TurnHandle, TurnLoop};
use crate::web::{DemandReport, DemandSender, RequestLog, RouteTable, WebLink};
use crate::workers::{WorkerLinks, Workers};
use crate::{BuildFn, ControlConfig, dispatch, notices, sweep};

/// Events for the ingress; it drains them at once, and control waits where it does not.
const POOL_EVENTS: usize = 1024;
const DEMAND_REPORTS: usize = 1024;
const WORKER_REPORTS: usize = 1024;
const NOTICES: usize = 256;
/// Announcements of web containers that wait to be noted. Each is a start of a container, of which a host
/// makes some dozens per second at most.
const WEB_NOTES: usize = 1024;

/// What control is made of.
pub struct Parts {
    pub config: ControlConfig,
    pub store: Store,
    pub content: ContentStore,
    pub blobs: BlobStore,
    /// Seals secrets. Kept apart from the database.
    pub secret_key: Zeroizing<[u8; 32]>,
    /// Signs container credentials.
    pub container_key: [u8; 32],
    pub build: BuildFn,
    pub layers_present: PresentFn,
    pub encode_arguments: ArgumentsFn,
    pub cancel: CancellationToken,
}

/// What the other parts of the process get.
pub struct Started {
    pub control: Control,
    pub web: WebLink,
    /// For the worker: what should be.
    pub desired: watch::Receiver<DesiredSet>,
    /// From the worker: what was seen.
    pub reports: mpsc::Sender<WorkerReport>,
    /// Tasks without which nothing goes on. When one ends before the process is told to, it crashed,
    /// and the process must end too: a restart recovers from what is recorded.
    pub essential: JoinSet<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot read the recorded state")]
    Store(#[from] ionian_store::StoreError),
    #[error("cannot open the logs")]
    Logs(#[from] LogError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot restore the recorded state")]
    Recovery(#[from] Error),
}

struct Inner {
    config: ControlConfig,
    store: Store,
    content: ContentStore,
    blobs: BlobStore,
    sealer: Sealer,
    turn: TurnHandle,
    outputs: OutputsHub,
    payloads: Payloads,
    streams: GeneratorStreams,
    consumed: Consumed,
    call_targets: CallTargets,
    containers: Containers,
    data_channels: DataChannels,
    snapshot: watch::Receiver<ContainersSnapshot>,
    web_notes: mpsc::Sender<WebNote>,
    worker_links: WorkerLinks,
    logs: Logs,
    builds: Builds,
    /// These three are held while the database is read and written, and for nothing that takes longer.
    images_turn: tokio::sync::Mutex<()>,
    apps_turn: tokio::sync::Mutex<()>,
    routes: watch::Sender<Arc<RouteTable>>,
    routes_turn: tokio::sync::Mutex<()>,
    heartbeats: Heartbeats,
    /// Settings that were changed since their functions were published.
    autoscaler_overrides: Mutex<HashMap<FunctionId, Autoscaler>>,
    build: BuildFn,
    layers_present: PresentFn,
    encode_arguments: ArgumentsFn,
    cancel: CancellationToken,
}

/// The application's handle. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Recovers the recorded state and starts the tasks. They end with `parts.cancel`.
    pub async fn start(parts: Parts) -> Result<Started, StartError> {
        let trouble = Trouble::new(&parts.config.data_dir);
        let (turn, messages) = TurnHandle::channel(trouble.clone());
        let (pool_events, pool) = mpsc::channel::<PoolEvent>(POOL_EVENTS);
        let (demand_sender, demand) = mpsc::channel::<DemandReport>(DEMAND_REPORTS);
        let (entries_sender, entries) = watch::channel(Vec::new());
        let (desired_sender, desired) = watch::channel(DesiredSet::default());
        let (snapshot_sender, snapshot) = watch::channel(ContainersSnapshot::default());
        let (reports, incoming_reports) = mpsc::channel(WORKER_REPORTS);
        let (notices, incoming_notices) = mpsc::channel(NOTICES);
        let (web_notes, incoming_web_notes) = mpsc::channel(WEB_NOTES);
        let (requests, served) = RequestLog::channel();
        let (routes, routes_receiver) = watch::channel(Arc::new(RouteTable::default()));
        let logs = Logs::open(parts.config.data_dir.join("logs"))?;
        let containers = Containers::new(parts.container_key);
        let data_channels = DataChannels::new(containers.clone());
        let build_logs = parts.config.data_dir.join("build-logs");
        let outputs = OutputsHub::default();
        let effects = Effects {
            outputs: outputs.clone(),
            containers: containers.clone(),
            data_channels: data_channels.clone(),
            pool_events,
            desired: entries_sender,
            snapshot: snapshot_sender,
            notices,
        };
        let journal = match &parts.config.journal {
            Some(path) => Journal::open(path, &parts.config.scheduler)?,
            None => Journal::default(),
        };
        let scheduler = Scheduler::new(parts.config.scheduler.clone());
        let control = Self {
            inner: Arc::new(Inner {
                sealer: Sealer::new(&parts.secret_key),
                config: parts.config,
                store: parts.store.clone(),
                content: parts.content,
                blobs: parts.blobs,
                turn,
                outputs,
                payloads: Payloads::default(),
                streams: GeneratorStreams::default(),
                consumed: Consumed::default(),
                call_targets: CallTargets::default(),
                containers,
                data_channels: data_channels.clone(),
                snapshot,
                web_notes,
                worker_links: WorkerLinks::new(entries.clone(), reports.clone()),
                logs,
                builds: Builds::new(build_logs),
                images_turn: tokio::sync::Mutex::default(),
                apps_turn: tokio::sync::Mutex::default(),
                routes,
                routes_turn: tokio::sync::Mutex::default(),
                heartbeats: Heartbeats::default(),
                autoscaler_overrides: Mutex::default(),
                build: parts.build,
                layers_present: parts.layers_present,
                encode_arguments: parts.encode_arguments,
                cancel: parts.cancel.clone(),
            }),
        };
        let worker_id = control.embedded_worker().await?;
        let mut essential = JoinSet::new();
        essential.spawn(turn_loop::run(
            TurnLoop {
                scheduler,
                store: parts.store,
                effects,
                trouble,
                journal,
                embedded_worker: control.config().capacity.map(|_| worker_id),
            },
            messages,
            parts.cancel.clone(),
        ));
        essential.spawn(dispatch::run(
            control.clone(),
            worker_id,
            entries,
            desired_sender,
            parts.cancel.clone(),
        ));
        essential.spawn(dispatch::observe(control.clone(), incoming_reports));
        essential.spawn(notices::write(control.clone(), incoming_notices));
        essential.spawn(adoption::write_web_notes(control.clone(), incoming_web_notes));
        essential.spawn(pass_demand_on(control.clone(), demand));
        essential.spawn(notices::write_requests(control.clone(), served));
        control.ensure_default_environment().await?;
        control.recover(worker_id).await?;
        essential.spawn(sweep::run_short(control.clone(), parts.cancel.clone()));
        essential.spawn(sweep::run_long(control.clone(), parts.cancel));
        let web = WebLink {
            routes: routes_receiver,
            pool,
            demand: DemandSender(demand_sender),
            data_channels,
            requests,
        };
        Ok(Started {
            control,
            web,
            desired,
            reports,
            essential,
        })
    }

    async fn ensure_default_environment(&self) -> Result<(), Error> {
        if self.store().environments().find_default().await?.is_none() {
            let environment = Environment {
                id: EnvironmentId::generate(),
                name: crate::app::environments::DEFAULT_NAME.to_owned(),
                web_suffix: String::new(),
                is_default: true,
                created_at: Timestamp::now(),
            };
            self.store().environments().insert(&environment).await?;
        }
        Ok(())
    }

    /// Announces live apps, folds the recorded calls, inputs and containers, and then says that the worker is
    /// there: the first desired set comes after that.
    async fn recover(&self, worker_id: WorkerId) -> Result<(), Error> {
        for app in self.store().apps().list_all_live().await? {
            match app.state {
                AppState::Initializing | AppState::Ephemeral => self.heartbeats().touch(app.id),
                AppState::Detached | AppState::Deployed | AppState::Stopping | AppState::Stopped => {}
            }
            if app.version > 0 {
                self.activate(&app).await?;
            }
        }
        let mut recovered = self.store().calls().load_pending().await?;
        let interrupted = self.restore_containers(&mut recovered).await?;
        let (calls, inputs, containers) = (
            recovered.calls.len(),
            recovered.inputs.len(),
            recovered.containers.len(),
        );
        self.turn().tell(Event::Recovered(recovered)).await?;
        self.begin_anew(interrupted).await?;
        if let Some(capacity) = self.config().capacity {
            self.turn().tell(Event::WorkerConnected { worker_id, capacity }).await?;
        }
        self.republish_routes().await?;
        tracing::info!(calls, inputs, containers, worker = %worker_id, "recorded state restored");
        Ok(())
    }

    /// Ends every container; returns when they are gone or `limit` is over.
    pub async fn shut_down(&self, limit: Duration) {
        if self.turn().tell(Event::ShuttingDown).await.is_err() {
            return;
        }
        let mut snapshot = self.inner.snapshot.clone();
        let empty = async {
            // The first look may be older than the event; the turn that handles it publishes anew.
            if self
                .turn()
                .inspect(|scheduler| scheduler.containers().is_empty())
                .await
                .unwrap_or(true)
            {
                return;
            }
            while snapshot.changed().await.is_ok() {
                if snapshot.borrow_and_update().is_empty() {
                    return;
                }
            }
        };
        if tokio::time::timeout(limit, empty).await.is_err() {
            tracing::warn!("containers were still running when the server ended");
        }
    }

    pub fn config(&self) -> &ControlConfig {
        &self.inner.config
    }

    pub fn apps(&self) -> Apps<'_> {
        Apps(self)
    }

    pub fn calls(&self) -> Calls<'_> {
        Calls(self)
    }

    pub fn container_calls(&self) -> ContainerCalls<'_> {
        ContainerCalls(self)
    }

    pub fn environments(&self) -> Environments<'_> {
        Environments(self)
    }

    pub fn functions(&self) -> Functions<'_> {
        Functions(self)
    }

    pub fn images(&self) -> Images<'_> {
        Images(self)
    }

    pub fn mounts(&self) -> Mounts<'_> {
        Mounts(self)
    }

    pub fn secrets(&self) -> Secrets<'_> {
        Secrets(self)
    }

    pub fn tasks(&self) -> Tasks<'_> {
        Tasks(self)
    }

    pub fn workers(&self) -> Workers<'_> {
        Workers(self)
    }

    pub fn tokens(&self) -> Tokens<'_> {
        Tokens(self)
    }

    pub fn content(&self) -> &ContentStore {
        &self.inner.content
    }

    pub fn blobs(&self) -> &BlobStore {
        &self.inner.blobs
    }

    pub fn containers(&self) -> &Containers {
        &self.inner.containers
    }

    pub fn data_channels(&self) -> &DataChannels {
        &self.inner.data_channels
    }

    pub fn streams(&self) -> &GeneratorStreams {
        &self.inner.streams
    }

    pub fn logs(&self) -> &Logs {
        &self.inner.logs
    }

    /// The live containers, after every turn that changed them.
    pub fn snapshot(&self) -> watch::Receiver<ContainersSnapshot> {
        self.inner.snapshot.clone()
    }

    pub(crate) fn store(&self) -> &Store {
        &self.inner.store
    }

    pub(crate) fn web_notes(&self) -> &mpsc::Sender<WebNote> {
        &self.inner.web_notes
    }

    pub(crate) fn worker_links(&self) -> &WorkerLinks {
        &self.inner.worker_links
    }

    pub(crate) fn turn(&self) -> &TurnHandle {
        &self.inner.turn
    }

    pub(crate) fn sealer(&self) -> &Sealer {
        &self.inner.sealer
    }

    pub(crate) fn payloads(&self) -> &Payloads {
        &self.inner.payloads
    }

    pub(crate) fn call_targets(&self) -> &CallTargets {
        &self.inner.call_targets
    }

    pub(crate) fn consumed(&self) -> &Consumed {
        &self.inner.consumed
    }

    pub(crate) fn outputs_hub(&self) -> &OutputsHub {
        &self.inner.outputs
    }

    pub(crate) fn builds(&self) -> &Builds {
        &self.inner.builds
    }

    pub(crate) fn images_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.inner.images_turn
    }

    pub(crate) fn apps_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.inner.apps_turn
    }

    pub(crate) fn routes(&self) -> &watch::Sender<Arc<RouteTable>> {
        &self.inner.routes
    }

    pub(crate) fn routes_turn(&self) -> &tokio::sync::Mutex<()> {
        &self.inner.routes_turn
    }

    pub(crate) fn autoscaler_overrides(&self) -> &Mutex<HashMap<FunctionId, Autoscaler>> {
        &self.inner.autoscaler_overrides
    }

    pub(crate) fn heartbeats(&self) -> &Heartbeats {
        &self.inner.heartbeats
    }

    pub(crate) fn build_fn(&self) -> &BuildFn {
        &self.inner.build
    }

    pub(crate) fn layers_present(&self) -> &PresentFn {
        &self.inner.layers_present
    }

    pub(crate) fn cancel_token(&self) -> &CancellationToken {
        &self.inner.cancel
    }

    pub(crate) fn encode_arguments(&self, request: &ArgumentsRequest<'_>) -> bytes::Bytes {
        (self.inner.encode_arguments)(self, request)
    }

    /// Where the data lies, for messages.
    pub fn data_dir(&self) -> &Path {
        &self.inner.config.data_dir
    }
}

async fn pass_demand_on(control: Control, mut reports: mpsc::Receiver<DemandReport>) {
    while let Some(report) = reports.recv().await {
        let event = Event::WebDemand {
            function_id: report.function_id,
            queued: report.queued,
            containers: report
                .containers
                .into_iter()
                .map(|used| ionian_scheduler::WebUse {
                    container_id: used.container_id,
                    in_flight: used.in_flight,
                    last_active: used.last_active,
                })
                .collect(),
        };
        if control.turn().tell(event).await.is_err() {
            return;
        }
    }
}
