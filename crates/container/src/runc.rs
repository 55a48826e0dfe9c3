//! The isolated runtime: `runc` as a foreground process per container.
//!
//! `runc run` stays for the container's life and relays its output; in return its exit is the container's,
//! without polling and whoever our children are. `runc create` followed by `runc start` took 25 to 30 ms
//! where `runc run` took 20, and then nobody would learn the exit status.
//!
//! The steps of a start: the root is mounted, a network namespace is taken from the pool, the bundle is
//! written, runc runs until it has written the first process's number. Whatever fails, [`Leftovers`] removes
//! what there is by then.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ionian_domain::container::{ContainerExit, RuntimeKind, StartTimings};
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use crate::bundle::{self, BundleFacts, BundleNetwork, BundlePaths};
use crate::cgroup::{CgroupError, Hierarchies};
use crate::config::ContainerConfig;
use crate::descriptor;
use crate::mounts;
use crate::network::{self, Names, Network, Slot};
use crate::overlay::{MountGuard, WritableLayer, mount_overlay, unmount_or_detach};
use crate::passwd::{self, Identity};
use crate::running::{ContainerHandle, KILL_TIMEOUT, Remains, Started, output_pipe};
use crate::runtime::{
    Capabilities, DisposeError, Launch, NetworkMode, OpenError, ReapError, ReapReport, RunningContainer, Runtime,
    StartError, Upper,
};

/// runc takes tens of milliseconds; minutes of swapping or a throttled CPU are not worth waiting for.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// What runc says about a failure fits; the rest of its log is not read.
const MAX_LOG_BYTES: usize = 64 << 10;

/// A shell's way, and runc's, of reporting a signal as an exit code.
const SIGNAL_EXIT_BASE: i32 = 128;
const MAX_SIGNAL: i32 = 64;

pub struct RuncRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    config: ContainerConfig,
    runc: PathBuf,
    cgroups: Hierarchies,
    network: Network,
    live: Mutex<Live>,
    /// Keeps other processes from using the same directory.
    _lock: Flock<File>,
}

#[derive(Default)]
struct Live {
    names: BTreeSet<String>,
    shut_down: bool,
}

impl RuncRuntime {
    /// Checks the host, removes what an earlier run left behind and sets up the network.
    pub async fn open(config: ContainerConfig) -> Result<Self, OpenError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(OpenError::NeedsRoot {
                runtime: RuntimeKind::Runc,
            });
        }
        let runc = match &config.runc_path {
            Some(path) => path.clone(),
            None => find_program("runc").ok_or(OpenError::ProgramMissing {
                program: "runc",
                package: "runc",
            })?,
        };
        find_program("nft").ok_or(OpenError::ProgramMissing {
            program: "nft",
            package: "nftables",
        })?;
        let cgroups = Hierarchies::detect().map_err(|reason| OpenError::Cgroups { reason })?;
        let lock = prepare_state_dir(&config)?;

        let report = {
            let (config, cgroups) = (config.clone(), cgroups.clone());
            run_blocking(move || reap(&config, &cgroups, &BTreeSet::new(), &BTreeSet::new())).await
        }
        .map_err(OpenError::Reap)?;
        if !report.is_empty() {
            tracing::warn!(?report, "removed what an earlier run left behind");
        }
        let network = Network::open(&config).await.map_err(OpenError::Network)?;
        tracing::info!(runc = %runc.display(), cgroups = if cgroups.is_v2() { 2 } else { 1 }, "the runc runtime is ready");
        let live = Mutex::new(Live::default());
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                runc,
                cgroups,
                network,
                live,
                _lock: lock,
            }),
        })
    }

    /// The same as [`Runtime::network`], which is always there for this runtime.
    pub fn bridge_network(&self) -> &Network {
        &self.inner.network
    }
}

#[async_trait]
impl Runtime for RuncRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Runc
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all_but(&[])
    }

    fn network(&self) -> Option<&Network> {
        Some(&self.inner.network)
    }

    async fn start(&self, launch: Launch) -> Result<RunningContainer, StartError> {
        launch.validate()?;
        if launch.network == NetworkMode::Host {
            let what = "access to the host's network".to_owned();
            return Err(StartError::Unsupported {
                runtime: RuntimeKind::Runc,
                what,
            });
        }
        if launch.rootfs.lower_dirs.is_empty() {
            let what = "way to run on the host's own file system (the root has no layers)".to_owned();
            return Err(StartError::Unsupported {
                runtime: RuntimeKind::Runc,
                what,
            });
        }
        let mut leftovers = Leftovers::claim(&self.inner, &launch.name)?;
        match start(&self.inner, launch, &mut leftovers).await {
            Ok(started) => Ok(RunningContainer::new(started.with_remains(Box::new(leftovers)))),
            Err(error) => {
                let name = leftovers.name.clone();
                if let Err(problem) = run_blocking(move || Box::new(leftovers).remove()).await {
                    tracing::error!(container = %name, error = %crate::chain(&problem), "failed to clean up after a failed start");
                }
                Err(error)
            }
        }
    }

    async fn reap(&self) -> Result<ReapReport, ReapError> {
        let inner = Arc::clone(&self.inner);
        run_blocking(move || {
            let live = inner.live().names.clone();
            reap(&inner.config, &inner.cgroups, &live, &inner.network.links())
        })
        .await
    }

    async fn remove_all(&self) -> Result<(), ReapError> {
        let inner = Arc::clone(&self.inner);
        inner.live().shut_down = true;
        inner.network.remove().await.map_err(ReapError::Network)?;
        run_blocking(move || {
            reap(&inner.config, &inner.cgroups, &BTreeSet::new(), &BTreeSet::new())?;
            inner
                .cgroups
                .remove(&inner.config.cgroup_path())
                .map_err(ReapError::from)?;
            Ok(())
        })
        .await
    }
}

impl Inner {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cgroup_of(&self, name: &str) -> String {
        cgroup_of(&self.config, name)
    }
}

fn cgroup_of(config: &ContainerConfig, name: &str) -> String {
    format!("{}/{name}", config.cgroup_path())
}

/// A started container before its leftovers are tied to it.
struct Running {
    name: String,
    pid: i32,
    address: Option<std::net::IpAddr>,
    stdout: crate::running::OutputStream,
    stderr: crate::running::OutputStream,
    timings: StartTimings,
    handle: ContainerHandle,
    child: Child,
}

impl Running {
    fn with_remains(self, remains: Box<dyn Remains>) -> Started {
        let Self {
            name,
            pid,
            address,
            stdout,
            stderr,
            timings,
            handle,
            child,
        } = self;
        Started {
            name,
            pid,
            address,
            stdout,
            stderr,
            timings,
            handle,
            child,
            remains,
        }
    }
}

/// Measures one step after the other.
struct Stopwatch {
    last: Instant,
    timings: StartTimings,
}

impl Stopwatch {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            timings: StartTimings::default(),
        }
    }

    fn step(&mut self, name: &str) {
        let now = Instant::now();
        self.timings.steps.push((name.to_owned(), now - self.last));
        self.last = now;
    }
}

async fn start(inner: &Arc<Inner>, launch: Launch, leftovers: &mut Leftovers) -> Result<Running, StartError> {
    let name = launch.name.clone();
    let mut stopwatch = Stopwatch::start();
    let paths = leftovers.paths.clone();

    let slot = match launch.network {
        NetworkMode::Bridge => {
            let failed = |source| StartError::Network {
                name: name.clone(),
                source,
            };
            Some(inner.network.take_slot().await.map_err(failed)?)
        }
        NetworkMode::None | NetworkMode::Host => None,
    };
    let address = slot.as_ref().map(Slot::address);
    let network = slot.as_ref().map(|slot| BundleNetwork {
        namespace: slot.namespace_path(),
        address: slot.address(),
        resolv_conf: inner.network.resolv_conf(),
    });
    leftovers.slot = slot;
    stopwatch.step("network");

    let cgroup = inner.cgroup_of(&name);
    let prepared = {
        let paths = paths.clone();
        run_blocking(move || {
            let mount = mount_root(&launch, &paths)?;
            stopwatch.step("mount");
            let result = write_bundle(&launch, &paths, &cgroup, network);
            stopwatch.step("bundle");
            Ok((mount, result, stopwatch))
        })
        .await
    };
    let (mount, written, mut stopwatch) = prepared?;
    leftovers.mount = Some(mount);
    written?;

    let prepare = |source| StartError::Prepare {
        name: name.clone(),
        path: paths.directory.clone(),
        source,
    };
    let pid_file = PidFile::watch(&paths).map_err(prepare)?;
    let (stdout, stdout_writer) = output_pipe().map_err(prepare)?;
    let (stderr, stderr_writer) = output_pipe().map_err(prepare)?;
    let mut child = Command::new(&inner.runc)
        .arg("--root")
        .arg(inner.config.runc_root())
        .arg("--log")
        .arg(paths.log())
        .args(["--log-format", "json", "run"])
        // What is known about the end (out of memory) is read before the control group goes.
        .arg("--keep")
        .arg("--bundle")
        .arg(&paths.directory)
        .arg("--pid-file")
        .arg(paths.pid_file())
        .arg(&name)
        .stdin(Stdio::null())
        .stdout(stdout_writer)
        .stderr(stderr_writer)
        // A Ctrl-C at the platform's terminal is not the containers'.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| StartError::Spawn {
            name: name.clone(),
            program: inner.runc.clone(),
            source,
        })?;

    let pid = match tokio::time::timeout(START_TIMEOUT, first_process(&mut child, &pid_file, &paths)).await {
        Ok(Ok(Some(pid))) => pid,
        Ok(Ok(None)) => {
            return Err(StartError::Refused {
                name,
                message: refusal(&paths),
            });
        }
        Ok(Err(source)) => return Err(prepare(source)),
        Err(_) => {
            return Err(StartError::TimedOut {
                name,
                seconds: START_TIMEOUT.as_secs(),
            });
        }
    };
    // The first process is runc's child until runc has seen its end, and then the number may be another's.
    let handle = ContainerHandle::open(&name, pid, || {
        child.id().is_some_and(|runc| parent_of(pid) == Some(runc))
    })
    .map_err(prepare)?;
    stopwatch.step("runc");
    Ok(Running {
        name,
        pid,
        address,
        stdout,
        stderr,
        timings: stopwatch.timings,
        handle,
        child,
    })
}

fn mount_root(launch: &Launch, paths: &BundlePaths) -> Result<MountGuard, StartError> {
    let name = &launch.name;
    let directory = |path: PathBuf| {
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .map(|()| path.clone())
            .map_err(|source| StartError::Prepare {
                name: name.clone(),
                path,
                source,
            })
    };
    let root = directory(paths.root())?;
    let (upper_dir, work_dir, volatile) = match &launch.rootfs.upper {
        Upper::Scratch => (directory(paths.upper())?, directory(paths.work())?, true),
        Upper::Keep { upper_dir, work_dir } => (upper_dir.clone(), work_dir.clone(), false),
    };
    let writable = WritableLayer {
        upper_dir: &upper_dir,
        work_dir: &work_dir,
        volatile,
    };
    mount_overlay(&launch.rootfs.lower_dirs, Some(writable), &root).map_err(|source| StartError::Mount {
        name: name.clone(),
        source,
    })
}

fn write_bundle(
    launch: &Launch,
    paths: &BundlePaths,
    cgroup: &str,
    network: Option<BundleNetwork>,
) -> Result<(), StartError> {
    let name = &launch.name;
    let identity = match &launch.user {
        None => Identity::ROOT,
        Some(user) => passwd::resolve(&paths.root(), user).map_err(|reason| StartError::User {
            name: name.clone(),
            user: user.clone(),
            reason,
        })?,
    };
    for wanted in &launch.binds {
        // runc's own message names neither the container nor the bind.
        fs::metadata(&wanted.source).map_err(|source| StartError::Prepare {
            name: name.clone(),
            path: wanted.source.clone(),
            source,
        })?;
    }
    bundle::write(
        launch,
        &BundleFacts {
            paths,
            identity: &identity,
            cgroup,
            network,
        },
    )
    .map_err(|source| StartError::Prepare {
        name: name.clone(),
        path: paths.directory.clone(),
        source,
    })
}

/// Tells when runc has put the number of the first process into its file, which it renames into place.
struct PidFile {
    events: AsyncFd<std::os::fd::OwnedFd>,
}

impl PidFile {
    fn watch(paths: &BundlePaths) -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(
            &events,
            &paths.directory,
            inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::ONLYDIR,
        )?;
        Ok(Self {
            events: descriptor::watch(events)?,
        })
    }

    /// Nothing else is renamed into the directory, so the event itself need not be looked at.
    async fn written(&self) -> io::Result<()> {
        self.events.readable().await.map(|_| ())
    }
}

/// The first process's number; `None` if runc ended without having started one.
async fn first_process(child: &mut Child, pid_file: &PidFile, paths: &BundlePaths) -> io::Result<Option<i32>> {
    tokio::select! {
        written = pid_file.written() => written?,
        ended = child.wait() => { ended?; }
    }
    match fs::read_to_string(paths.pid_file()) {
        Ok(text) => text.trim().parse().map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parent_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))?
        .trim()
        .parse()
        .ok()
}

/// The last error in runc's log.
fn refusal(paths: &BundlePaths) -> String {
    #[derive(serde::Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let unknown = || "runc failed without saying why".to_owned();
    let Ok(mut log) = fs::read_to_string(paths.log()) else {
        return unknown();
    };
    if log.len() > MAX_LOG_BYTES {
        let start = log.ceil_char_boundary(log.len() - MAX_LOG_BYTES);
        log.drain(..start);
    }
    let last = log
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| line.level == "error");
    last.map_or_else(unknown, |line| {
        line.msg.trim_start_matches("runc run failed: ").to_owned()
    })
}

/// Everything that a container has on the host, from the moment its name is taken. Dropped without
/// [`Remains::remove`], it is removed by a thread in the background.
struct Leftovers {
    inner: Arc<Inner>,
    name: String,
    paths: BundlePaths,
    mount: Option<MountGuard>,
    slot: Option<Slot>,
    removed: bool,
}

impl Leftovers {
    fn claim(inner: &Arc<Inner>, name: &str) -> Result<Self, StartError> {
        {
            let mut live = inner.live();
            if live.shut_down {
                return Err(StartError::ShutDown);
            }
            if !live.names.insert(name.to_owned()) {
                return Err(StartError::NameTaken { name: name.to_owned() });
            }
        }
        let paths = BundlePaths {
            directory: inner.config.containers_dir().join(name),
        };
        let leftovers = Self {
            inner: Arc::clone(inner),
            name: name.to_owned(),
            paths: paths.clone(),
            mount: None,
            slot: None,
            removed: false,
        };
        // Secrets are in the bundle.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&paths.directory)
            .map_err(|source| StartError::Prepare {
                name: name.to_owned(),
                path: paths.directory,
                source,
            })?;
        Ok(leftovers)
    }

    /// Goes on after a failure, so that one stuck part does not keep the others; returns the first.
    fn remove_everything(&mut self) -> Result<(), DisposeError> {
        self.removed = true;
        let name = self.name.clone();
        let cgroup = self.inner.cgroup_of(&name);
        let failed = |error| cgroup_failure(&name, error);
        let mut results = vec![
            self.inner.cgroups.kill_all(&cgroup).map(|_| ()).map_err(failed),
            self.inner.cgroups.remove(&cgroup).map(|_| ()).map_err(failed),
        ];
        if let Some(mount) = self.mount.take() {
            let path = mount.path().to_owned();
            results.push(mount.unmount().map_err(|error| DisposeError::Unmount {
                name: name.clone(),
                path,
                source: io::Error::other(error),
            }));
        }
        if let Some(slot) = self.slot.take() {
            results.push(slot.release().map_err(|source| DisposeError::Network {
                name: name.clone(),
                source,
            }));
        }
        for directory in [self.paths.directory.clone(), self.inner.config.runc_root().join(&name)] {
            results.push(
                remove_directory(&directory)
                    .map(|_| ())
                    .map_err(|source| DisposeError::Remove {
                        name: name.clone(),
                        path: directory,
                        source,
                    }),
            );
        }
        self.inner.live().names.remove(&name);
        results.into_iter().collect()
    }
}

impl Remains for Leftovers {
    fn exit_of(&self, status: ExitStatus) -> ContainerExit {
        let code = match (status.code(), std::os::unix::process::ExitStatusExt::signal(&status)) {
            (Some(code), _) => code,
            // runc itself was killed, from outside.
            (None, Some(signal)) => return ContainerExit::Signaled { signal },
            (None, None) => return ContainerExit::Lost,
        };
        let signal = code - SIGNAL_EXIT_BASE;
        let killed = signal == nix::libc::SIGKILL;
        if killed && self.inner.cgroups.oom_kills(&self.inner.cgroup_of(&self.name)) > 0 {
            return ContainerExit::OutOfMemory;
        }
        if (1..=MAX_SIGNAL).contains(&signal) {
            return ContainerExit::Signaled { signal };
        }
        ContainerExit::Exited { code }
    }

    fn remove(mut self: Box<Self>) -> Result<(), DisposeError> {
        self.remove_everything()
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        if self.removed {
            return;
        }
        self.removed = true;
        let mut rest = Self {
            inner: Arc::clone(&self.inner),
            name: self.name.clone(),
            paths: self.paths.clone(),
            mount: self.mount.take(),
            slot: self.slot.take(),
            removed: true,
        };
        let name = self.name.clone();
        let spawned = std::thread::Builder::new().name("ionian-dispose".to_owned()).spawn(move || {
            if let Err(error) = rest.remove_everything() {
                tracing::error!(container = %rest.name, error = %crate::chain(&error), "failed to dispose of a container");
            }
        });
        if let Err(error) = spawned {
            tracing::error!(container = %name, %error, "failed to start a thread that disposes of a container");
        }
    }
}

fn cgroup_failure(name: &str, error: CgroupError) -> DisposeError {
    match error {
        CgroupError::Read { path, source } | CgroupError::Remove { path, source } => DisposeError::Remove {
            name: name.to_owned(),
            path,
            source,
        },
        CgroupError::StillRunning { .. } => DisposeError::StillRunning {
            name: name.to_owned(),
            seconds: KILL_TIMEOUT.as_secs(),
        },
    }
}

impl From<CgroupError> for ReapError {
    fn from(error: CgroupError) -> Self {
        match error {
            CgroupError::Read { path, source } => Self::Read { path, source },
            CgroupError::Remove { path, source } => Self::Remove { path, source },
            CgroupError::StillRunning { pid, cgroup } => Self::StillRunning {
                pid,
                cgroup,
                seconds: KILL_TIMEOUT.as_secs(),
            },
        }
    }
}

/// Removes everything of this instance but the containers in `live` and the interfaces in `links`: first the
/// processes, then what they used. Blocks.
fn reap(
    config: &ContainerConfig,
    cgroups: &Hierarchies,
    live: &BTreeSet<String>,
    links: &BTreeSet<String>,
) -> Result<ReapReport, ReapError> {
    let mut report = ReapReport::default();
    for name in cgroups.children(&config.cgroup_path())?.difference(live) {
        let cgroup = cgroup_of(config, name);
        report.killed_processes += cgroups.kill_all(&cgroup)?;
        report.cgroups += cgroups.remove(&cgroup)?;
    }
    let containers = config.containers_dir();
    let is_live = |path: &Path| {
        path.strip_prefix(&containers)
            .ok()
            .and_then(|path| path.iter().next())
            .is_some_and(|name| live.contains(name.to_string_lossy().as_ref()))
    };
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| ReapError::Read { path, source }
    };
    for target in mounts::below(&containers).map_err(read(Path::new("/proc/self/mountinfo")))? {
        if !is_live(&target) {
            unmount_or_detach(&target).map_err(|source| ReapError::Unmount { path: target, source })?;
            report.mounts += 1;
        }
    }
    report.interfaces = network::reap_links(&Names::of(config), links).map_err(ReapError::Network)?;
    for parent in [containers.clone(), config.runc_root()] {
        for entry in fs::read_dir(&parent).map_err(read(&parent))? {
            let entry = entry.map_err(read(&parent))?;
            if live.contains(entry.file_name().to_string_lossy().as_ref()) {
                continue;
            }
            let path = entry.path();
            report.directories += usize::from(remove_directory(&path).map_err(|source| ReapError::Remove {
                path: path.clone(),
                source,
            })?);
        }
    }
    Ok(report)
}

/// Whether there was one. Never crosses into what is still mounted below.
fn remove_directory(path: &Path) -> io::Result<bool> {
    if let Some(mounted) = mounts::below(path)?.first() {
        return Err(io::Error::other(format!("{} is still mounted", mounted.display())));
    }
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn prepare_state_dir(config: &ContainerConfig) -> Result<Flock<File>, OpenError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::StateDir { path, source }
    };
    for directory in [config.state_dir.clone(), config.containers_dir(), config.runc_root()] {
        // Bundles hold secrets.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed(&directory))?;
    }
    let path = config.state_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed(&path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::errno::Errno::EWOULDBLOCK => OpenError::StateDirInUse {
            path: config.state_dir.clone(),
        },
        error => OpenError::StateDir {
            path,
            source: error.into(),
        },
    })
}

pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // System programs are not in the PATH of every shell.
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runcs_last_error_is_the_refusal() {
        let directory = tempfile::tempdir().unwrap();
        let paths = BundlePaths {
            directory: directory.path().to_owned(),
        };
        assert_eq!(refusal(&paths), "runc failed without saying why");
        let log = concat!(
            r#"{"level":"warning","msg":"something","time":"t"}"#,
            "\n",
            r#"{"level":"error","msg":"runc run failed: exec: \"x\": not found","time":"t"}"#,
            "\nnot json\n"
        );
        fs::write(paths.log(), log).unwrap();
        assert_eq!(refusal(&paths), "exec: \"x\": not found");
    }
}
