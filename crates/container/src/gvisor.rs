//! The runtime with a kernel of its own: gVisor, through `runsc`.
//!
//! A container's system calls are answered by a process of the sandbox, not by the host's kernel. Everything
//! around it (root, network namespace with `eth0`, firewall, control groups, removal) is the same as for runc
//! and is shared with it. What differs:
//!
//! - **Network.** The sandbox uses the sockets of the container's own network namespace (`--network=host` is
//!   gVisor's name for that), so addresses and firewall are the platform's.
//! - **Limits.** runsc does not know nested groups of cgroup version 1, and removes its groups together with the
//!   count of out-of-memory kills. So the platform makes the groups, and every process of the sandbox is born
//!   in them. The memory limit therefore counts the sandbox too (about 20 MiB). A process inside costs the host
//!   several tasks; a container that exceeds its process limit is ended rather than refused a fork.
//! - **Signals.** The first process has no number on the host: `runsc kill` delivers what is not a SIGKILL.
//! - **Platform.** `systrap` where runsc has it, else `ptrace`. `kvm` is never used: it needs nested
//!   virtualisation, and hangs on machines that pretend to have it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use ionian_domain::container::RuntimeKind;
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxBuilder, LinuxNamespace, LinuxNamespaceType, Mount, MountBuilder, Spec};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use crate::command::{self, Input};
use crate::config::ContainerConfig;
use crate::descriptor;
use crate::network::Network;
use crate::oci::{OciProgram, RunPlan};
use crate::runc::{RuncRuntime, find_program};
use crate::runtime::{
    Capabilities, DisposeError, Launch, Limits, NetworkMode, OpenError, ReapError, ReapReport, RunningContainer,
    Runtime, StartError,
};

/// Threads of the sandbox itself: its scheduler's, and those that wait in system calls of the host.
const SANDBOX_TASKS: u32 = 96;
/// Tasks of the host that one process inside may cost; ten were measured with `ptrace`.
const HOST_TASKS_PER_PROCESS: u32 = 12;

/// Joins each group named before `--` and becomes what is named after it. 125 is what `env` and `timeout` use
/// for a failure of their own.
const JOIN_SCRIPT: &str = r#"while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@""#;

/// Mounts that the sandbox makes itself, or does not have.
const OWN_MOUNTS: [&str; 2] = ["cgroup", "mqueue"];

/// A state file holds names, numbers and the specification, environment included.
const MAX_STATE_BYTES: u64 = 16 << 20;

pub struct GvisorRuntime {
    inner: RuncRuntime,
}

impl GvisorRuntime {
    /// Checks the host, removes what an earlier run left behind and sets up the network.
    pub async fn open(config: ContainerConfig) -> Result<Self, OpenError> {
        let program = find(&config).await?;
        Ok(Self {
            inner: RuncRuntime::open_with(config, program).await?,
        })
    }

    /// Starts sandboxes among the containers of `runc`: one network, one directory, one set of names, and
    /// either's `reap` and `remove_all` is for both.
    pub async fn beside(runc: &RuncRuntime) -> Result<Self, OpenError> {
        let program = find(runc.config()).await?;
        Ok(Self {
            inner: runc.beside(program),
        })
    }
}

/// Where gVisor is found and how it would run, for people; or why it cannot be used.
pub async fn probe_gvisor(config: &ContainerConfig) -> Result<String, OpenError> {
    let program = find(config).await?;
    let platform = program.sandboxing.map_or("no", |sandboxing| sandboxing.platform);
    Ok(format!("{} with the {platform} platform", program.path.display()))
}

async fn find(config: &ContainerConfig) -> Result<OciProgram, OpenError> {
    let path = match &config.runsc_path {
        Some(path) => path.clone(),
        None => find_program("runsc").ok_or(OpenError::ProgramMissing {
            program: "runsc",
            package: "runsc",
        })?,
    };
    if !path.is_file() {
        return Err(OpenError::ProgramUnusable {
            program: path,
            reason: "there is no such file".to_owned(),
        });
    }
    // runsc prints them to its standard error.
    let flags = command::run(
        "/bin/sh",
        &["-c", r#"exec "$0" flags 2>&1"#, &path.to_string_lossy()],
        Input::None,
    )
    .await
    .map_err(|error| OpenError::ProgramUnusable {
        program: path.clone(),
        reason: crate::chain(&error),
    })?;
    let sandboxing = Sandboxing::from_flags(&flags).map_err(|reason| OpenError::ProgramUnusable {
        program: path.clone(),
        reason,
    })?;
    tracing::info!(runsc = %path.display(), platform = sandboxing.platform, "the gvisor runtime is ready");
    Ok(OciProgram {
        path,
        sandboxing: Some(sandboxing),
    })
}

#[async_trait]
impl Runtime for GvisorRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Gvisor
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn network(&self) -> Option<&Network> {
        self.inner.network()
    }

    async fn start(&self, launch: Launch) -> Result<RunningContainer, StartError> {
        self.inner.start(launch).await
    }

    async fn reap(&self) -> Result<ReapReport, ReapError> {
        self.inner.reap().await
    }

    async fn remove_all(&self) -> Result<(), ReapError> {
        self.inner.remove_all().await
    }

    fn adoptable(&self) -> Vec<String> {
        self.inner.adoptable()
    }

    async fn adopt(&self, name: &str) -> Option<RunningContainer> {
        self.inner.adopt(name).await
    }

    async fn discard_unadopted(&self) -> Result<(), DisposeError> {
        self.inner.discard_unadopted().await
    }

    async fn detach(&self) -> Result<(), ReapError> {
        self.inner.detach().await
    }
}

/// How this host's runsc is called.
#[derive(Debug, Clone)]
pub(crate) struct Sandboxing {
    platform: &'static str,
    /// Newer versions put an overlay of their own over the root, where writes would be lost to us.
    has_overlay_flag: bool,
}

impl Sandboxing {
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self {
            platform: "ptrace",
            has_overlay_flag: true,
        }
    }

    /// From what `runsc flags` prints: each flag on a line, its description on the next.
    fn from_flags(flags: &str) -> Result<Self, String> {
        let mut lines = flags.lines().map(str::trim);
        let description = lines
            .by_ref()
            .find(|line| line.starts_with("-platform "))
            .and_then(|_| lines.next())
            .unwrap_or_default();
        let platform = ["systrap", "ptrace"]
            .into_iter()
            .find(|platform| description.contains(platform))
            .ok_or_else(|| {
                "it has neither the systrap nor the ptrace platform; install a release from gvisor.dev".to_owned()
            })?;
        Ok(Self {
            platform,
            has_overlay_flag: flags.lines().any(|line| line.trim().starts_with("-overlay2 ")),
        })
    }

    pub(crate) fn run_command(&self, runsc: &Path, plan: &RunPlan<'_>) -> (PathBuf, Vec<OsString>) {
        let network = match plan.network {
            NetworkMode::None => "none",
            NetworkMode::Bridge | NetworkMode::Host => "host",
        };
        let mut arguments: Vec<OsString> = vec!["-c".into(), JOIN_SCRIPT.into(), "sh".into()];
        arguments.extend(plan.join.iter().map(OsString::from));
        arguments.extend([
            "--".into(),
            runsc.into(),
            "--root".into(),
            state_directory(plan.state_root, plan.name).into(),
            "--log".into(),
            plan.paths.log().into(),
            "--log-format=json".into(),
            format!("--platform={}", self.platform).into(),
            format!("--network={network}").into(),
            // The platform makes the groups, and has put this process into them.
            "--ignore-cgroups".into(),
        ]);
        arguments.extend(self.has_overlay_flag.then(|| "--overlay2=none".into()));
        arguments.extend([
            "run".into(),
            "--bundle".into(),
            plan.paths.specification.clone().into(),
            container_id(plan.instance, plan.name).into(),
        ]);
        (PathBuf::from("/bin/sh"), arguments)
    }
}

/// runsc listens on an abstract socket of the host with the container's name, so that must be of this instance.
fn container_id(instance: &str, name: &str) -> String {
    format!("{instance}-{name}")
}

/// One for each container, so that it is removed as a whole.
fn state_directory(state_root: &Path, name: &str) -> PathBuf {
    state_root.join(name)
}

/// What the groups of a sandbox are limited to, so that the container is limited to `limits`.
pub(crate) fn host_limits(limits: Limits) -> Limits {
    Limits {
        pids: limits.pids.map(|pids| {
            pids.saturating_mul(HOST_TASKS_PER_PROCESS)
                .saturating_add(SANDBOX_TASKS)
        }),
        ..limits
    }
}

/// The sandbox has its own `/proc`, system calls and groups: what hides or filters the host's is left out.
/// The root is mounted by now.
pub(crate) fn adapt(mut spec: Spec) -> io::Result<Spec> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.retain(|mount| !mount.typ().as_deref().is_some_and(|kind| OWN_MOUNTS.contains(&kind)));
    let has_tmp = mounts.iter().any(|mount| mount.destination() == Path::new("/tmp"));
    if !has_tmp && let Some(root) = spec.root() {
        // First, since there may be mounts below it.
        mounts.splice(0..0, tmp_of_root(root.path())?);
    }
    spec.set_mounts(Some(mounts));
    let namespaces: Vec<LinuxNamespace> = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().clone())
        .unwrap_or_default()
        .into_iter()
        .filter(|namespace| namespace.typ() != LinuxNamespaceType::Cgroup)
        .collect();
    spec.set_linux(Some(
        LinuxBuilder::default()
            .namespaces(namespaces)
            .masked_paths(Vec::new())
            .readonly_paths(Vec::new())
            .build()
            .map_err(io::Error::other)?,
    ));
    Ok(spec)
}

/// runsc puts a file system in memory over an empty `/tmp`: files would count as memory, and be lost to a build.
/// A mount of the root's own directory keeps it from doing so. `None` for what is not a directory: a symbolic
/// link of the image could lead to the host's files.
fn tmp_of_root(root: &Path) -> io::Result<Option<Mount>> {
    use std::os::unix::fs::PermissionsExt;
    let path = root.join("tmp");
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o1777))?;
        }
        Err(error) => return Err(error),
    }
    let options = ["bind", "rw", "nosuid", "nodev"].map(str::to_owned).to_vec();
    MountBuilder::default()
        .destination("/tmp")
        .typ("bind")
        .source(path)
        .options(options)
        .build()
        .map(Some)
        .map_err(io::Error::other)
}

/// Tells when the first process of a sandbox runs, from runsc's own state file.
pub(crate) struct StateFile {
    directory: PathBuf,
    events: AsyncFd<OwnedFd>,
}

impl StateFile {
    /// Before runsc is started: makes the directory that it writes to.
    pub(crate) fn watch(state_root: &Path, name: &str) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let directory = state_directory(state_root, name);
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&events, &directory, inotify::WatchFlags::CLOSE_WRITE)?;
        Ok(Self {
            directory,
            events: descriptor::watch(events)?,
        })
    }

    /// The number of the sandbox once its first process runs.
    pub(crate) async fn running(&self) -> io::Result<i32> {
        loop {
            let mut ready = self.events.readable().await?;
            let mut buffer = [0; 4096];
            while let Ok(1..) = rustix::io::read(self.events.get_ref(), &mut buffer) {}
            ready.clear_ready();
            if let Some(pid) = self.sandbox()? {
                return Ok(pid);
            }
        }
    }

    fn sandbox(&self) -> io::Result<Option<i32>> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "state") {
                let file = match fs::File::open(&path) {
                    // The container has ended, and its state with it.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    file => file?,
                };
                let mut text = String::new();
                file.take(MAX_STATE_BYTES).read_to_string(&mut text)?;
                return Ok(running_sandbox(&text));
            }
        }
        Ok(None)
    }
}

/// `None` while it is being started, or while the file is being written.
fn running_sandbox(state: &str) -> Option<i32> {
    #[derive(serde::Deserialize)]
    struct State {
        status: String,
        sandbox: SandboxState,
    }
    #[derive(serde::Deserialize)]
    struct SandboxState {
        pid: i32,
    }
    let state: State = serde_json::from_str(state).ok()?;
    (state.status == "running").then_some(state.sandbox.pid)
}

/// Delivers signals to the first process of a sandbox.
#[derive(Debug)]
pub(crate) struct SignalRelay {
    runsc: PathBuf,
    state_directory: PathBuf,
    id: String,
    executor: tokio::runtime::Handle,
}

impl SignalRelay {
    /// Called from a task.
    pub(crate) fn new(runsc: &Path, state_root: &Path, instance: &str, name: &str) -> Self {
        Self {
            runsc: runsc.to_owned(),
            state_directory: state_directory(state_root, name),
            id: container_id(instance, name),
            executor: tokio::runtime::Handle::current(),
        }
    }

    /// Returns at once; the signal arrives some 20 ms later. A container that has ended is not an error.
    pub(crate) fn send(&self, signal: Signal) {
        let runsc = self.runsc.to_string_lossy().into_owned();
        let arguments: Vec<OsString> = vec![
            "--root".into(),
            self.state_directory.clone().into(),
            "kill".into(),
            self.id.clone().into(),
            (signal as i32).to_string().into(),
        ];
        let id = self.id.clone();
        self.executor.spawn(async move {
            if let Err(error) = command::run(&runsc, &arguments, Input::None).await {
                tracing::debug!(container = %id, %signal, error = %crate::chain(&error), "a signal was not delivered");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systrap_is_preferred_and_kvm_is_never_taken() {
        let flags = |platforms: &str| {
            format!(
                "  -overlay2 value\n    \twrap\n  -platform string\n    \tspecifies which platform to use: {platforms}. (default)\n  -platform_device_path string\n"
            )
        };
        assert_eq!(
            Sandboxing::from_flags(&flags("ptrace (default), kvm"))
                .unwrap()
                .platform,
            "ptrace"
        );
        let newer = Sandboxing::from_flags(&flags("systrap (default), ptrace, kvm")).unwrap();
        assert_eq!((newer.platform, newer.has_overlay_flag), ("systrap", true));
        assert!(Sandboxing::from_flags(&flags("kvm")).is_err());
        assert!(Sandboxing::from_flags("").is_err());
    }

    #[test]
    fn a_sandbox_runs_when_its_state_says_so() {
        assert_eq!(
            running_sandbox(r#"{"status":"running","sandbox":{"pid":42}}"#),
            Some(42)
        );
        assert_eq!(running_sandbox(r#"{"status":"created","sandbox":{"pid":42}}"#), None);
        assert_eq!(running_sandbox(r#"{"status":"runn"#), None);
    }

    #[test]
    fn only_a_real_directory_becomes_tmp() {
        let root = tempfile::tempdir().unwrap();
        let tmp = root.path().join("tmp");
        assert!(tmp_of_root(root.path()).unwrap().is_some() && tmp.is_dir());
        fs::remove_dir(&tmp).unwrap();
        std::os::unix::fs::symlink("/etc", &tmp).unwrap();
        assert!(tmp_of_root(root.path()).unwrap().is_none());
    }

    #[test]
    fn the_limit_on_processes_leaves_room_for_the_sandbox() {
        let limits = Limits {
            memory_bytes: Some(1),
            cpu_millis: Some(2),
            pids: Some(64),
        };
        let host = host_limits(limits);
        assert_eq!((host.memory_bytes, host.cpu_millis), (Some(1), Some(2)));
        assert_eq!(host.pids, Some(64 * HOST_TASKS_PER_PROCESS + SANDBOX_TASKS));
        assert_eq!(host_limits(Limits::default()), Limits::default());
    }
}
