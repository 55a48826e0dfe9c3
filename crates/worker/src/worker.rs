//! The [`Worker`]: desired sets in, reports out, one task per container between them.
//!
//! What to do is decided by `reconcile`; this loop carries it out. It waits for a desired set, a sighting, a
//! deadline or a task's end, and polls nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use ionian_container::{RunningContainer, Runtime};
use ionian_domain::ContainerId;
use ionian_domain::container::{ContainerExit, RuntimeKind};
use ionian_domain::worker::{DesiredSet, WorkerReport};
use ionian_image::client_bundle::ClientBundles;
use ionian_image::{ContextFiles, ImageBuilder, StepRunner};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{Id as TaskId, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::builds::Builder;
use crate::chain;
use crate::container::{self, Order, Shared, Sighting};
use crate::hook;
use crate::launch::DefaultLimits;
use crate::logs::{LogLimits, LogSink};
use crate::mounts::MountLayers;
use crate::reconcile::{Action, Reconciler};

/// Sightings between the containers' tasks and the loop, which does nothing slow.
const SIGHTINGS_QUEUE: usize = 256;
/// How long killed containers have for the last of their output and for being cleaned up.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(20);

/// Makes the content with these digests lie on this host for long enough to be linked from there. The error is
/// for the user.
pub type FetchContent = Arc<dyn Fn(Vec<String>) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What a worker is made of.
pub struct WorkerParts {
    /// One of each kind that this host offers.
    pub runtimes: Vec<Arc<dyn Runtime>>,
    /// Also says where layers are, and what containers take over from the host.
    pub images: ImageBuilder,
    /// The same that `images` was made with.
    pub steps: Arc<dyn StepRunner>,
    pub bundles: Arc<ClientBundles>,
    /// Where the content with a digest lies on this host.
    pub content: ContextFiles,
    /// Brings content to this host, where it is not here anyway.
    pub fetch: FetchContent,
    /// Belongs to the worker alone.
    pub state_dir: PathBuf,
    pub logs: LogSink,
    pub limits: WorkerLimits,
    /// What the runtimes found when they were opened: containers of an earlier process of this worker, living
    /// or ended since. The first desired set decides which are adopted; the others are removed.
    pub found: Vec<FoundContainer>,
    /// For the runtime without isolation: an interpreter of this host with the client installed.
    pub process_python: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Containers that start at the same time. Each start keeps a core busy; more at once make all of them late.
    pub concurrent_starts: usize,
    /// No container gets more memory, whatever it asks for. `None` leaves it to the kernel to choose what to
    /// kill when memory runs out, which may be the platform.
    pub memory_bytes: Option<u64>,
    /// Processes and threads per container.
    pub pids: u32,
    pub logs: LogLimits,
}

impl WorkerLimits {
    /// For two cores and up.
    const DEFAULT_CONCURRENT_STARTS: usize = 4;
    /// Thread pools of numeric libraries times worker processes stay below; a fork bomb does not.
    const DEFAULT_PIDS: u32 = 8192;

    /// A tenth of the host's memory is left to the platform.
    pub fn for_host() -> Self {
        Self {
            concurrent_starts: Self::DEFAULT_CONCURRENT_STARTS,
            memory_bytes: host_memory_bytes().map(|bytes| bytes / 10 * 9),
            pids: Self::DEFAULT_PIDS,
            logs: LogLimits::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("failed to prepare {path}")]
    StateDir { path: PathBuf, source: io::Error },
    #[error("failed to prepare the directory of mounted files: {reason}")]
    Mounts { reason: String },
}

/// Makes this host match its desired set.
pub struct Worker {
    shared: Arc<Shared>,
    builder: Builder,
    found: Found,
}

/// A container of an earlier process of this worker, and what isolates it.
#[derive(Debug)]
pub struct FoundContainer {
    pub runtime: RuntimeKind,
    pub container: RunningContainer,
}

/// Takes over all containers that an earlier process left to these runtimes, living or ended since: for
/// [`WorkerParts::found`]. Whose they are is decided later. What is left to a runtime that is not there any more
/// is removed.
pub async fn find_containers(runtimes: &[Arc<dyn Runtime>]) -> Vec<FoundContainer> {
    let mut found = Vec::new();
    for runtime in runtimes {
        for name in runtime.adoptable() {
            let container = runtime.adopt(&name).await;
            found.extend(container.map(|container| FoundContainer {
                runtime: runtime.kind(),
                container,
            }));
        }
    }
    for runtime in runtimes {
        if let Err(error) = runtime.discard_unadopted().await {
            tracing::error!(
                error = chain(&error),
                "failed to remove a container of a runtime that this worker has no more"
            );
        }
    }
    found
}

/// Containers of an earlier process of this worker.
#[derive(Default)]
struct Found {
    containers: BTreeMap<ContainerId, FoundContainer>,
    /// Not named by an id of ours: nobody asks for them.
    strangers: Vec<RunningContainer>,
}

impl Found {
    fn sort(containers: Vec<FoundContainer>) -> Self {
        let mut found = Self::default();
        for one in containers {
            match one.container.name.parse() {
                Ok(id) => drop(found.containers.insert(id, one)),
                Err(_) => found.strangers.push(one.container),
            }
        }
        found
    }
}

impl Worker {
    /// Opens the state directory and removes what an earlier run left in it, except for what belongs to the
    /// containers that were found. Blocks for as long as that takes.
    pub fn open(parts: WorkerParts) -> Result<Self, OpenError> {
        let WorkerParts {
            runtimes,
            images,
            steps,
            bundles,
            content,
            fetch,
            state_dir,
            logs,
            limits,
            found,
            process_python,
        } = parts;
        let found = Found::sort(found);
        let living: BTreeSet<ContainerId> = found.containers.keys().copied().collect();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::StateDir { path, source }
        };
        fs::create_dir_all(&state_dir).map_err(failed(&state_dir))?;
        // Arguments of functions and the users' files: nobody else's business.
        fs::set_permissions(&state_dir, fs::Permissions::from_mode(0o700)).map_err(failed(&state_dir))?;
        // Absolute, since the runtimes hand paths to other programs.
        let state_dir = state_dir.canonicalize().map_err(failed(&state_dir))?;
        let run_dir = state_dir.join("run");
        fs::create_dir_all(&run_dir).map_err(failed(&run_dir))?;
        let mount_layers = container::sweep_run_dirs(&run_dir, &living).map_err(failed(&run_dir))?;
        let hook_root = state_dir.join("hook");
        let hook_dir = hook::extract(&hook_root, !living.is_empty()).map_err(failed(&hook_root))?;
        let mounts = MountLayers::open(state_dir.join("mounts"), content, &mount_layers)
            .map_err(|error| OpenError::Mounts { reason: chain(&error) })?;
        let builder = Builder::new(images.clone(), Arc::clone(&bundles), Arc::clone(&steps));
        let shared = Shared {
            runtimes,
            layers: images.layers().clone(),
            trust: images.trust().clone(),
            bundles,
            steps,
            leave: CancellationToken::new(),
            fetch,
            mounts: Arc::new(mounts),
            hook_dir,
            run_dir,
            logs,
            log_limits: limits.logs,
            default_limits: DefaultLimits {
                memory_bytes: limits.memory_bytes,
                pids: limits.pids,
            },
            process_python,
            starts: Arc::new(Semaphore::new(limits.concurrent_starts.max(1))),
        };
        Ok(Self {
            shared: Arc::new(shared),
            builder,
            found,
        })
    }

    /// Containers of an earlier process of this worker, which the first desired set adopts or ends.
    pub fn found_containers(&self) -> Vec<ContainerId> {
        self.found.containers.keys().copied().collect()
    }

    /// Cancelled while it runs, it makes [`Self::run`] end without ending the containers: they go on, and another
    /// process of this worker finds them. The runtimes must then be detached, and not torn down.
    pub fn leave_token(&self) -> CancellationToken {
        self.shared.leave.clone()
    }

    /// Builds images with the worker's parts, whether it runs or not.
    pub fn builder(&self) -> Builder {
        self.builder.clone()
    }

    /// Runs until cancelled. Then all containers are killed and cleaned up. The runtimes are the caller's, since
    /// builds use them too: opening one has reaped what a crash left behind (`Runtime::reap` here could take a
    /// build that is just starting for such), and `Runtime::remove_all` comes after this returns.
    pub async fn run(
        self,
        desired: watch::Receiver<DesiredSet>,
        reports: mpsc::Sender<WorkerReport>,
        cancel: CancellationToken,
    ) {
        let (sightings, seen) = mpsc::channel(SIGHTINGS_QUEUE);
        if !self.found.containers.is_empty() {
            tracing::info!(
                containers = self.found.containers.len(),
                "containers of an earlier run were found"
            );
        }
        let mut state = Loop {
            shared: self.shared,
            reconciler: Reconciler::new(self.found.containers.keys().copied()),
            tasks: JoinSet::new(),
            orders: HashMap::new(),
            found: self.found.containers,
            sightings,
            outbox: VecDeque::new(),
        };
        for stranger in self.found.strangers {
            state.tasks.spawn(container::remove_stranger(stranger));
        }
        state.run(desired, seen, reports, cancel).await;
    }
}

/// The state of a running worker.
struct Loop {
    shared: Arc<Shared>,
    reconciler: Reconciler,
    tasks: JoinSet<()>,
    /// For each container that has a task.
    orders: HashMap<ContainerId, (TaskId, watch::Sender<Order>)>,
    /// Neither adopted nor discarded yet.
    found: BTreeMap<ContainerId, FoundContainer>,
    sightings: mpsc::Sender<Sighting>,
    /// Reports that wait for a slow receiver: at most two per container, see [`Self::report`].
    outbox: VecDeque<WorkerReport>,
}

impl Loop {
    async fn run(
        mut self,
        mut desired: watch::Receiver<DesiredSet>,
        mut seen: mpsc::Receiver<Sighting>,
        reports: mpsc::Sender<WorkerReport>,
        cancel: CancellationToken,
    ) {
        // What was wanted before this began counts too.
        desired.mark_changed();
        let (mut wants_news, mut has_listener) = (true, true);
        let leave = self.shared.leave.clone();
        loop {
            let deadline = self.reconciler.next_deadline();
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                () = leave.cancelled() => break,
                // Before the next desired set: an end that is known is not caused a second time.
                Some(sighting) = seen.recv() => {
                    let action = match sighting {
                        Sighting::Started(started) => self.reconciler.observe_started(started),
                        Sighting::Ended { id, exit } => self.reconciler.observe_ended(id, exit),
                    };
                    self.carry_out(action);
                }
                Some(ended) = self.tasks.join_next_with_id() => match ended {
                    Ok((task, ())) => self.forget_task(task, &mut seen),
                    Err(error) => {
                        tracing::error!(%error, "the task of a container crashed");
                        self.forget_task(error.id(), &mut seen);
                    }
                },
                changed = desired.changed(), if wants_news => match changed {
                    Ok(()) => {
                        let set = desired.borrow_and_update().clone();
                        let actions = self.reconciler.observe_desired(&set, Instant::now());
                        self.carry_out(actions);
                    }
                    // The control process is gone; what runs goes on until this worker is cancelled too.
                    Err(_closed) => wants_news = false,
                },
                permit = reports.reserve(), if has_listener && !self.outbox.is_empty() => match permit {
                    Ok(permit) => if let Some(report) = self.outbox.pop_front() {
                        permit.send(report);
                    },
                    Err(_closed) => has_listener = false,
                },
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    let actions = self.reconciler.handle_deadlines(Instant::now());
                    self.carry_out(actions);
                }
            }
        }
        self.shut_down(seen).await;
    }

    fn carry_out(&mut self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Start { id, spec } => {
                    let (order, orders) = watch::channel(Order::Run);
                    let (shared, sightings) = (Arc::clone(&self.shared), self.sightings.clone());
                    let task = self.tasks.spawn(container::live(shared, id, spec, orders, sightings));
                    self.orders.insert(id, (task.id(), order));
                }
                Action::Adopt { id, spec } => {
                    let Some(FoundContainer { runtime, container }) = self.found.remove(&id) else {
                        unreachable!("the reconciler was told of the found containers, and adopts each once")
                    };
                    let (order, orders) = watch::channel(Order::Run);
                    let (shared, sightings) = (Arc::clone(&self.shared), self.sightings.clone());
                    let task = if runtime.is_as_strong_as(spec.runtime) {
                        self.tasks
                            .spawn(container::adopt(shared, id, spec, container, orders, sightings))
                    } else {
                        tracing::warn!(
                            container = %id,
                            %runtime,
                            wanted = %spec.runtime,
                            "a container of an earlier run is isolated less than is wanted now; it is ended"
                        );
                        self.tasks.spawn(container::discard(
                            shared,
                            id,
                            container,
                            ContainerExit::Lost,
                            sightings,
                        ))
                    };
                    self.orders.insert(id, (task.id(), order));
                }
                Action::Discard { id } => {
                    let Some(FoundContainer { container, .. }) = self.found.remove(&id) else {
                        unreachable!("the reconciler was told of the found containers, and discards each once")
                    };
                    let (order, _) = watch::channel(Order::Kill);
                    let (shared, sightings) = (Arc::clone(&self.shared), self.sightings.clone());
                    let discarded = container::discard(shared, id, container, container::killed(), sightings);
                    self.orders.insert(id, (self.tasks.spawn(discarded).id(), order));
                }
                Action::Interrupt { id } => self.order(id, Order::Interrupt),
                Action::Kill { id } => self.order(id, Order::Kill),
                Action::Report(report) => self.report(report),
            }
        }
    }

    fn order(&self, id: ContainerId, order: Order) {
        // Without a task it has ended, and its sighting is on the way.
        if let Some((_, orders)) = self.orders.get(&id) {
            orders.send_if_modified(|current| {
                let rises = order > *current;
                *current = order.max(*current);
                rises
            });
        }
    }

    /// Exits are repeated with every desired set: one of each waits at most.
    fn report(&mut self, report: WorkerReport) {
        let waits = match &report {
            WorkerReport::Started(_) => false,
            WorkerReport::Exited { container_id, .. } => self.outbox.iter().any(
                |waiting| matches!(waiting, WorkerReport::Exited { container_id: other, .. } if other == container_id),
            ),
        };
        if !waits {
            self.outbox.push_back(report);
        }
    }

    fn forget_task(&mut self, task: TaskId, seen: &mut mpsc::Receiver<Sighting>) {
        let Some(id) = self
            .orders
            .iter()
            .find(|(_, (known, _))| *known == task)
            .map(|(id, _)| *id)
        else {
            return;
        };
        self.orders.remove(&id);
        // What the task told before it ended comes first.
        while let Ok(sighting) = seen.try_recv() {
            let action = match sighting {
                Sighting::Started(started) => self.reconciler.observe_started(started),
                Sighting::Ended { id, exit } => self.reconciler.observe_ended(id, exit),
            };
            self.carry_out(action);
        }
        // A task that crashed has told of no end; its container was killed when it was dropped.
        let action = self.reconciler.observe_ended(id, ContainerExit::Lost);
        self.carry_out(action);
    }

    async fn shut_down(mut self, seen: mpsc::Receiver<Sighting>) {
        // Nobody waits for what the tasks tell now.
        drop(seen);
        let leaves = self.shared.leave.is_cancelled();
        if !leaves {
            for id in self.orders.keys().copied().collect::<Vec<_>>() {
                self.order(id, Order::Kill);
            }
        }
        for (id, FoundContainer { container, .. }) in std::mem::take(&mut self.found) {
            if leaves {
                container.release();
                continue;
            }
            // Nobody has said that it is wanted, and an orderly end leaves nothing behind.
            let (shared, sightings) = (Arc::clone(&self.shared), self.sightings.clone());
            let discarded = container::discard(shared, id, container, container::killed(), sightings);
            self.tasks.spawn(discarded);
        }
        let ended = async {
            while let Some(result) = self.tasks.join_next().await {
                if let Err(error) = result {
                    tracing::error!(%error, "the task of a container crashed");
                }
            }
        };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            tracing::error!(
                containers = self.tasks.len(),
                "containers were not cleaned up in time; the next start does it"
            );
        }
    }
}

/// The memory of this machine; `None` where it cannot be found out.
pub(crate) fn host_memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests;
