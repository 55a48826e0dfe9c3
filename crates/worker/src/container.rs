//! The life of one container: prepared and started, or adopted; watched, drained, reported, disposed of.
//!
//! One task per container, with an [`Order`] to follow and [`Sighting`]s to give. Its order of work at the end
//! is a promise: all output has been written when the end is told, and only then is the host cleaned up.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ionian_container::{Launch, RunningContainer, Runtime, Signal, StartError};
use ionian_domain::ContainerId;
use ionian_domain::container::{ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, StartTimings};
use ionian_image::client_bundle::{BundleError, ClientBundle, ClientBundles};
use ionian_image::{BuildLog, HostTrust, LayerStore, LogStream, StepRunner};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::image_files::{ImageFiles, ResolveError};
use crate::launch::{self, DefaultLimits, Prepared, PreparedProcess};
use crate::logs::{LogLimits, LogSink, LogWriter, pump};
use crate::mounts::{MountError, MountLayers};
use crate::worker::FetchContent;

/// How long the end of a container waits for the last of its output. Only a process that outlived its
/// container (which only the runtime without isolation allows) holds a pipe open for longer.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What all containers of a worker share.
pub(crate) struct Shared {
    pub(crate) runtimes: Vec<Arc<dyn Runtime>>,
    pub(crate) layers: LayerStore,
    pub(crate) trust: HostTrust,
    pub(crate) bundles: Arc<ClientBundles>,
    pub(crate) steps: Arc<dyn StepRunner>,
    /// Cancelled when containers are to go on without this process.
    pub(crate) leave: CancellationToken,
    pub(crate) fetch: FetchContent,
    pub(crate) mounts: Arc<MountLayers>,
    pub(crate) hook_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) logs: LogSink,
    pub(crate) log_limits: LogLimits,
    pub(crate) default_limits: DefaultLimits,
    pub(crate) process_python: Option<PathBuf>,
    pub(crate) starts: Arc<Semaphore>,
}

/// What the container should be doing; it only ever rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Order {
    Run,
    Interrupt,
    Kill,
}

#[derive(Debug)]
pub(crate) enum Sighting {
    Started(ContainerStarted),
    Ended { id: ContainerId, exit: ContainerExit },
}

/// Why a container did not start. The message goes to the user.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error("this worker does not have the {0} runtime")]
    NoRuntime(RuntimeKind),
    #[error("the function mounts volumes, which this worker does not have yet")]
    Volumes,
    #[error("the function asks for a GPU, and this worker has none")]
    Gpu,
    #[error("a layer of the image is missing on this worker; deploy the app again to build it")]
    LayerMissing,
    #[error("the image has no python: neither `python` nor `python3` is in its PATH ({search_path})")]
    NoPython { search_path: String },
    #[error("failed to look for python in the image")]
    FindPython(#[source] ResolveError),
    #[error("failed to provide the client")]
    Bundle(#[from] BundleError),
    #[error("failed to provide the function's files")]
    Mount(#[from] MountError),
    #[error("failed to fetch the function's files: {0}")]
    Fetch(String),
    #[error("failed to write {path}")]
    Arguments { path: PathBuf, source: io::Error },
    #[error(
        "the process runtime needs an interpreter of this host that has the client installed; name it as `process_python`"
    )]
    NoProcessPython,
    #[error("the preparation crashed; the server's log has details")]
    Crashed,
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Runs the container from its preparation to its disposal.
pub(crate) async fn live(
    shared: Arc<Shared>,
    id: ContainerId,
    spec: Arc<ContainerSpec>,
    mut orders: watch::Receiver<Order>,
    sightings: mpsc::Sender<Sighting>,
) {
    let writer = LogWriter::new(Arc::clone(&shared.logs), id, Arc::clone(&spec));
    // What is told when nobody listens any more, at shutdown, is lost on purpose.
    let tell = async |sighting| drop(sightings.send(sighting).await);
    let result = tokio::select! {
        biased;
        () = ordered(&mut orders, Order::Interrupt) => None,
        // What has not begun needs nobody to go on with it: the next process starts it.
        () = shared.leave.cancelled() => return,
        result = prepare(&shared, id, &spec, &writer) => Some(result),
    };
    let Some(result) = result else {
        // It was to end before it began.
        return tell(Sighting::Ended { id, exit: killed() }).await;
    };
    let started = match result {
        Ok(preparation) => start(preparation).await,
        Err(error) => Err(error),
    };
    let (container, run_dir, timings) = match started {
        Ok(started) => started,
        Err(error) => {
            let message = chain(&error);
            tracing::warn!(container = %id, function = %spec.function_name, error = message, "a container did not start");
            return tell(Sighting::Ended {
                id,
                exit: ContainerExit::StartFailed { message },
            })
            .await;
        }
    };
    let started = Running {
        id,
        container,
        run_dir,
        timings,
    };
    started.follow(&shared, &writer, orders, sightings).await;
}

/// Takes over a container that an earlier process of this worker started. It may have ended since; then its
/// last output and its end are told like any other's.
pub(crate) async fn adopt(
    shared: Arc<Shared>,
    id: ContainerId,
    spec: Arc<ContainerSpec>,
    container: RunningContainer,
    orders: watch::Receiver<Order>,
    sightings: mpsc::Sender<Sighting>,
) {
    let writer = LogWriter::new(Arc::clone(&shared.logs), id, spec);
    let adopted = Running {
        id,
        container,
        run_dir: RunDir::of(&shared.run_dir, id),
        timings: StartTimings::default(),
    };
    tracing::info!(container = %id, "a container was adopted");
    adopted.follow(&shared, &writer, orders, sightings).await;
}

/// Ends a container that an earlier process of this worker started, and tells `exit`.
pub(crate) async fn discard(
    shared: Arc<Shared>,
    id: ContainerId,
    container: RunningContainer,
    exit: ContainerExit,
    sightings: mpsc::Sender<Sighting>,
) {
    tracing::info!(container = %id, "a container of an earlier run is removed");
    dispose(id, container).await;
    remove(RunDir::of(&shared.run_dir, id)).await;
    // Heard by nobody at shutdown.
    drop(sightings.send(Sighting::Ended { id, exit }).await);
}

/// Ends what an earlier process of this worker started for itself: a step of a build.
pub(crate) async fn remove_stranger(container: RunningContainer) {
    let name = container.name.clone();
    tracing::info!(name, "a build step of an earlier run is removed");
    if let Err(error) = container.dispose().await {
        tracing::error!(
            name,
            error = chain(&error),
            "failed to remove what a build step left on the host"
        );
    }
}

/// A container with everything that it has on this host.
struct Running {
    id: ContainerId,
    container: RunningContainer,
    run_dir: RunDir,
    timings: StartTimings,
}

impl Running {
    async fn follow(
        self,
        shared: &Shared,
        writer: &LogWriter,
        mut orders: watch::Receiver<Order>,
        sightings: mpsc::Sender<Sighting>,
    ) {
        let Self {
            id,
            mut container,
            run_dir,
            timings,
        } = self;
        // What is told when nobody listens any more, at shutdown, is lost on purpose.
        let tell = async |sighting| drop(sightings.send(sighting).await);
        let address = container.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        tell(Sighting::Started(ContainerStarted {
            container_id: id,
            address,
            timings,
        }))
        .await;
        let exit = tokio::select! {
            biased;
            exit = watch_over(&mut container, &mut orders, writer, shared.log_limits) => exit,
            () = shared.leave.cancelled() => {
                // Its output waits in its pipes for the next process of this worker.
                container.release();
                run_dir.leave();
                return;
            }
        };
        tell(Sighting::Ended { id, exit }).await;
        dispose(id, container).await;
        remove(run_dir).await;
    }
}

async fn dispose(id: ContainerId, container: RunningContainer) {
    if let Err(error) = container.dispose().await {
        tracing::error!(container = %id, error = chain(&error), "failed to remove what a container left on the host");
    }
}

pub(crate) fn killed() -> ContainerExit {
    ContainerExit::Signaled {
        signal: Signal::SIGKILL as i32,
    }
}

/// Resolves when at least this has been ordered. Without a giver of orders nobody wants the container.
async fn ordered(orders: &mut watch::Receiver<Order>, wanted: Order) {
    if let Err(_closed) = orders.wait_for(|order| *order >= wanted).await {}
}

/// Everything that is ready before the runtime is asked.
struct Preparation {
    runtime: Arc<dyn Runtime>,
    launch: Launch,
    run_dir: RunDir,
    steps: Vec<(String, Duration)>,
    /// Held until the container runs. Not while the client is fetched, which takes long and no CPU of ours.
    permit: OwnedSemaphorePermit,
}

/// Safe to drop at every point: what it waits for cleans up behind itself.
async fn prepare(
    shared: &Arc<Shared>,
    id: ContainerId,
    spec: &Arc<ContainerSpec>,
    writer: &LogWriter,
) -> Result<Preparation, PrepareError> {
    let mut steps = Stopwatch::start();
    let runtime = shared.runtimes.iter().find(|runtime| runtime.kind() == spec.runtime);
    let runtime = Arc::clone(runtime.ok_or(PrepareError::NoRuntime(spec.runtime))?);
    if !spec.volumes.is_empty() {
        return Err(PrepareError::Volumes);
    }
    if spec.resources.gpu.is_some() {
        return Err(PrepareError::Gpu);
    }
    let bundle = match spec.runtime {
        RuntimeKind::Runc | RuntimeKind::Gvisor => {
            if !spec.image.layers.iter().all(|key| shared.layers.contains(key)) {
                return Err(PrepareError::LayerMissing);
            }
            let bundle = ensure_bundle(shared, spec, writer).await?;
            steps.step("client");
            Some(bundle)
        }
        RuntimeKind::Process => None,
    };
    if !spec.files.is_empty() {
        let digests = spec.files.iter().map(|file| file.sha256_hex.clone()).collect();
        (shared.fetch)(digests).await.map_err(PrepareError::Fetch)?;
    }
    let permit = Arc::clone(&shared.starts)
        .acquire_owned()
        .await
        .map_err(|_closed| StartError::ShutDown)?;
    steps.step("queue");
    let (launch, run_dir) = {
        let (shared, spec) = (Arc::clone(shared), Arc::clone(spec));
        blocking(move || match bundle {
            Some(bundle) => prepare_isolated(&shared, id, &spec, &bundle),
            None => prepare_process(&shared, id, &spec),
        })
        .await?
    };
    steps.step("files");
    Ok(Preparation {
        runtime,
        launch,
        run_dir,
        steps: steps.steps,
        permit,
    })
}

/// Not cancelled half-way: a container that is not wanted any more is killed as soon as it runs.
async fn start(preparation: Preparation) -> Result<(RunningContainer, RunDir, StartTimings), PrepareError> {
    let Preparation {
        runtime,
        launch,
        run_dir,
        steps,
        permit,
    } = preparation;
    let container = runtime.start(launch).await?;
    drop(permit);
    let mut timings = StartTimings { steps };
    timings.steps.extend(container.timings.steps.iter().cloned());
    Ok((container, run_dir, timings))
}

/// The first container of a client version and a kind of Python fetches the client, and says so in its log.
async fn ensure_bundle(shared: &Shared, spec: &ContainerSpec, writer: &LogWriter) -> Result<ClientBundle, BundleError> {
    let (log, mut chunks) = BuildLog::channel();
    let ensure = async {
        // Moved here, so that the log ends with the work.
        let log = log;
        let steps = shared.steps.as_ref();
        shared
            .bundles
            .ensure(&spec.client_version, &spec.image, &shared.layers, steps, &log)
            .await
    };
    let follow = async {
        while let Some(chunk) = chunks.recv().await {
            // The package installer's own output is for the error message, if it comes to that.
            if chunk.stream == LogStream::Builder {
                writer.say(String::from_utf8_lossy(&chunk.bytes).into_owned()).await;
            }
        }
    };
    let (bundle, ()) = tokio::join!(ensure, follow);
    bundle
}

fn prepare_isolated(
    shared: &Shared,
    id: ContainerId,
    spec: &ContainerSpec,
    bundle: &ClientBundle,
) -> Result<(Launch, RunDir), PrepareError> {
    let mut lower_dirs: Vec<PathBuf> = spec.image.layers.iter().map(|key| shared.layers.fs_path(key)).collect();
    let python = find_python(&ImageFiles::new(&lower_dirs), launch::search_path(spec))?;
    let mount_layer = shared.mounts.ensure(&spec.image.layers, &lower_dirs, &spec.files)?;
    let run_dir = RunDir::create(&shared.run_dir, id)?;
    if let Some(mount_layer) = &mount_layer {
        run_dir.note_mount_layer(mount_layer)?;
    }
    lower_dirs.extend(mount_layer);
    let arguments_file = run_dir.write_arguments(&spec.arguments)?;
    let prepared = Prepared {
        lower_dirs,
        python,
        bundle,
        hook_dir: &shared.hook_dir,
        arguments_file: &arguments_file,
        trust: &shared.trust,
        limits: shared.default_limits,
    };
    Ok((launch::isolated(id, spec, prepared), run_dir))
}

fn find_python(image: &ImageFiles, search_path: &str) -> Result<String, PrepareError> {
    for name in ["python", "python3"] {
        let found = image
            .find_executable(name, search_path)
            .map_err(PrepareError::FindPython)?;
        if let Some(path) = found {
            return Ok(path.display().to_string());
        }
    }
    Err(PrepareError::NoPython {
        search_path: search_path.chars().take(512).collect(),
    })
}

fn prepare_process(shared: &Shared, id: ContainerId, spec: &ContainerSpec) -> Result<(Launch, RunDir), PrepareError> {
    let python = shared.process_python.as_deref().ok_or(PrepareError::NoProcessPython)?;
    let run_dir = RunDir::create(&shared.run_dir, id)?;
    let arguments_file = run_dir.write_arguments(&spec.arguments)?;
    let files_dir = run_dir.path.join("files");
    let home = files_dir.join("root");
    fs::create_dir_all(&home).map_err(|source| PrepareError::Arguments {
        path: home.clone(),
        source,
    })?;
    shared.mounts.materialize(&spec.files, &files_dir)?;
    let host_path = std::env::var("PATH").unwrap_or_default();
    let prepared = PreparedProcess {
        python,
        files_dir: &files_dir,
        hook_dir: &shared.hook_dir,
        arguments_file: &arguments_file,
        trust_env: &shared.trust.env,
        host_path: &host_path,
    };
    Ok((launch::process(id, spec, &prepared), run_dir))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PrepareError> + Send + 'static,
) -> Result<T, PrepareError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "preparing a container crashed");
            Err(PrepareError::Crashed)
        }
    }
}

/// Follows orders and passes output on, until the container has ended and its output has been written.
async fn watch_over(
    container: &mut RunningContainer,
    orders: &mut watch::Receiver<Order>,
    writer: &LogWriter,
    log_limits: LogLimits,
) -> ContainerExit {
    let handle = container.handle();
    let (stdout, stderr) = (container.stdout.take(), container.stderr.take());
    let output = async {
        if let (Some(stdout), Some(stderr)) = (stdout, stderr) {
            pump(writer, log_limits, stdout, stderr).await;
        }
    };
    tokio::pin!(output);
    let mut drained = false;
    let mut followed = Order::Run;
    let exit = loop {
        tokio::select! {
            biased;
            // Always pending once the strongest order has been carried out.
            () = ordered(orders, next_after(followed)), if followed < Order::Kill => {
                followed = orders.borrow_and_update().max(next_after(followed));
                // Closed: nobody gives orders any more.
                if orders.has_changed().is_err() {
                    followed = Order::Kill;
                }
                match followed {
                    Order::Run => {}
                    Order::Interrupt => if let Err(error) = handle.signal(Signal::SIGINT) {
                        tracing::error!(error = chain(&error), "failed to interrupt a container; it is killed");
                        handle.kill();
                    },
                    Order::Kill => handle.kill(),
                }
            }
            exit = container.wait() => break exit,
            () = &mut output, if !drained => drained = true,
        }
    };
    if !drained && tokio::time::timeout(DRAIN_TIMEOUT, output).await.is_err() {
        tracing::warn!(
            container = container.name,
            "a container's output was not read to its end in time"
        );
    }
    exit
}

fn next_after(order: Order) -> Order {
    match order {
        Order::Run => Order::Interrupt,
        Order::Interrupt | Order::Kill => Order::Kill,
    }
}

/// What one container has in the worker's own state directory; removed with it, and not before: the container
/// sees files in it.
#[derive(Debug)]
struct RunDir {
    path: PathBuf,
}

/// Says which mount layer the container runs on, for the next process of this worker.
const MOUNT_LAYER_NOTE: &str = "mount-layer";

/// Removes the directories of containers that are gone. Returns the mount layers that the others run on.
pub(crate) fn sweep_run_dirs(run_dir: &Path, living: &BTreeSet<ContainerId>) -> io::Result<BTreeSet<PathBuf>> {
    let mut used = BTreeSet::new();
    for entry in fs::read_dir(run_dir)? {
        let entry = entry?;
        let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if !id.is_some_and(|id| living.contains(&id)) {
            fs::remove_dir_all(entry.path())?;
            continue;
        }
        match fs::read(entry.path().join(MOUNT_LAYER_NOTE)) {
            Ok(path) => drop(used.insert(PathBuf::from(OsString::from_vec(path)))),
            // A function without files has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(used)
}

impl RunDir {
    /// That of a container which an earlier process of this worker started.
    fn of(parent: &Path, id: ContainerId) -> Self {
        Self {
            path: parent.join(id.to_string()),
        }
    }

    /// Lets the directory be, for the next process of this worker.
    fn leave(self) {
        // Nothing but the path is in it, whose memory is given back with the process.
        std::mem::forget(self);
    }

    fn note_mount_layer(&self, layer: &Path) -> Result<(), PrepareError> {
        let path = self.path.join(MOUNT_LAYER_NOTE);
        fs::write(&path, layer.as_os_str().as_bytes()).map_err(|source| PrepareError::Arguments { path, source })
    }

    fn create(parent: &Path, id: ContainerId) -> Result<Self, PrepareError> {
        let path = parent.join(id.to_string());
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self { path }),
            Err(source) => Err(PrepareError::Arguments { path, source }),
        }
    }

    /// Readable by everyone, since the container's user may be anyone; only the file itself is seen inside,
    /// and the directory keeps it from the host's users.
    fn write_arguments(&self, arguments: &[u8]) -> Result<PathBuf, PrepareError> {
        let path = self.path.join("arguments.bin");
        fs::write(&path, arguments)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o444)))
            .map_err(|source| PrepareError::Arguments {
                path: path.clone(),
                source,
            })?;
        Ok(path)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "failed to remove a container's directory");
        }
    }
}

/// Off the runtime's threads: a process may have left many files in its directory.
async fn remove(run_dir: RunDir) {
    if let Err(error) = tokio::task::spawn_blocking(move || drop(run_dir)).await {
        tracing::error!(%error, "removing a container's directory crashed");
    }
}

struct Stopwatch {
    steps: Vec<(String, Duration)>,
    last: Instant,
}

impl Stopwatch {
    fn start() -> Self {
        Self {
            steps: Vec::new(),
            last: Instant::now(),
        }
    }

    fn step(&mut self, name: &str) {
        let now = Instant::now();
        self.steps.push((name.to_owned(), now - self.last));
        self.last = now;
    }
}
