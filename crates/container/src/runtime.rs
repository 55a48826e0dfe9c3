//! The [`Runtime`] trait, and one container's life from [`Launch`] to its disposal.
//!
//! ```text
//! Launch --start--> RunningContainer --wait--> ContainerExit --dispose--> nothing left
//! ```
//!
//! `wait` never polls. `dispose` removes everything the container had on the host; dropping a
//! [`RunningContainer`] kills it and does the same in the background, so that an early return leaks nothing.
//!
//! A container with [`Launch::outlives_us`] lives on when this process is killed or lets go of it:
//!
//! ```text
//! kill -9 of the owner, or RunningContainer::release and Runtime::detach
//!   --> the next owner opens the runtime --> adoptable --> adopt --> RunningContainer
//!                                                      \-> discard_unadopted --> nothing left
//! ```

use std::fmt;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use ionian_domain::container::RuntimeKind;

use crate::network::{Egress, MAX_CIDRS, Network, NetworkError};
pub use crate::running::{ContainerHandle, OutputStream, RunningContainer};

/// One way of starting containers on this host.
#[async_trait]
pub trait Runtime: Send + Sync {
    fn kind(&self) -> RuntimeKind;

    /// What this runtime can do; a [`Launch`] that needs more is refused.
    fn capabilities(&self) -> Capabilities;

    /// `None` where containers have no network of their own.
    fn network(&self) -> Option<&Network>;

    /// Returns when the container's first process runs. A failed start leaves nothing behind.
    async fn start(&self, launch: Launch) -> Result<RunningContainer, StartError>;

    /// Removes what a crash or a reboot left behind from this instance: containers, interfaces, mounts,
    /// control groups and directories. What this process started or adopted and has not disposed of is left
    /// alone, and so is everything of other instances. What could still be adopted is not.
    async fn reap(&self) -> Result<ReapReport, ReapError>;

    /// The last step of a clean shutdown: kills what still runs and removes what the instance shares among
    /// its containers (bridge, firewall table, control group). The runtime starts nothing afterwards.
    async fn remove_all(&self) -> Result<(), ReapError>;

    /// Names of containers of an earlier process that nobody has asked for yet. They run, or have ended in
    /// the meantime.
    fn adoptable(&self) -> Vec<String> {
        Vec::new()
    }

    /// A container of an earlier process, as if this one had started it: its end (also one that nobody has
    /// seen), its signals, its address, and its output from where it was last read. `None` if there is no
    /// such container or it has been handed out.
    async fn adopt(&self, name: &str) -> Option<RunningContainer> {
        let _ = name;
        None
    }

    /// Kills and removes the containers of an earlier process that have not been adopted.
    async fn discard_unadopted(&self) -> Result<(), DisposeError> {
        Ok(())
    }

    /// The last step of a shutdown after which another process goes on: starts nothing afterwards, and leaves
    /// bridge, firewall and what was [released](RunningContainer::release) to the next that opens the runtime
    /// on this state directory, once this one has been dropped or its process has ended. Without
    /// [`Feature::Adoption`] this is [`Self::remove_all`].
    async fn detach(&self) -> Result<(), ReapError> {
        self.remove_all().await
    }
}

/// Everything that a container is started with.
#[derive(Clone)]
pub struct Launch {
    /// Unique among the instance's containers, and the host name inside. At most [`Launch::MAX_NAME`]
    /// characters from `a-z`, `A-Z`, `0-9`, `-`, `_`, `.`; the first a letter or a digit.
    pub name: String,
    pub rootfs: Rootfs,
    /// The command; its first word is looked up in the `PATH` of `env`, inside the container. It runs as the
    /// first process of its namespace: SIGTERM, which it may not handle, then does nothing, SIGKILL always does.
    pub argv: Vec<String>,
    /// The whole environment. `HOME` is added from the container's passwd if absent.
    pub env: Vec<(String, String)>,
    /// Absolute, inside the container; created if absent.
    pub workdir: String,
    /// As in a Dockerfile's `USER`: `name`, `uid`, `name:group` or `uid:gid`, looked up in the container's
    /// own passwd and group files. `None` is root.
    pub user: Option<String>,
    pub binds: Vec<Bind>,
    pub limits: Limits,
    pub network: NetworkMode,
    /// Whether it lives on when this process ends without having ended it, and may be adopted by the next.
    /// Others (steps of a build) are killed and removed by the next process that opens the runtime.
    pub outlives_us: bool,
    /// What it may reach outside, with [`NetworkMode::Bridge`].
    pub egress: Egress,
}

impl Launch {
    /// Fits a host name and a control group, with room for an id of the platform.
    pub const MAX_NAME: usize = 40;
    /// Beyond this `execve` fails for some kernels' default stack limit; said before anything is mounted.
    pub const MAX_ARGV_AND_ENV_BYTES: usize = 1_500_000;

    pub fn new(name: impl Into<String>, rootfs: Rootfs, argv: Vec<String>) -> Self {
        Self {
            name: name.into(),
            rootfs,
            argv,
            env: Vec::new(),
            workdir: "/".to_owned(),
            user: None,
            binds: Vec::new(),
            limits: Limits::default(),
            network: NetworkMode::None,
            outlives_us: false,
            egress: Egress::Open,
        }
    }

    /// The checks that do not depend on the runtime.
    pub(crate) fn validate(&self) -> Result<(), StartError> {
        let invalid = |reason: String| {
            Err(StartError::InvalidLaunch {
                name: self.name.clone(),
                reason,
            })
        };
        let name_is_plain = self
            .name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && self.name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if self.name.len() > Self::MAX_NAME || !name_is_plain {
            return invalid(format!(
                "a name has 1 to {} characters of a-z, A-Z, 0-9, -, _ and .",
                Self::MAX_NAME
            ));
        }
        if self.argv.first().is_none_or(String::is_empty) {
            return invalid("there is no command".to_owned());
        }
        if !self.workdir.starts_with('/') {
            return invalid(format!("the working directory {:?} is not absolute", self.workdir));
        }
        let has_nul = |text: &String| text.contains('\0');
        if self.argv.iter().any(has_nul) || self.env.iter().any(|(key, value)| has_nul(key) || has_nul(value)) {
            return invalid("the command or its environment contains a NUL character".to_owned());
        }
        if let Some((key, _)) = self.env.iter().find(|(key, _)| key.is_empty() || key.contains('=')) {
            return invalid(format!("{key:?} cannot be the name of an environment variable"));
        }
        let bytes: usize = self.argv.iter().map(|word| word.len() + 1).sum::<usize>()
            + self
                .env
                .iter()
                .map(|(key, value)| key.len() + value.len() + 2)
                .sum::<usize>();
        if bytes > Self::MAX_ARGV_AND_ENV_BYTES {
            return invalid(format!(
                "command and environment take {bytes} bytes, more than {}",
                Self::MAX_ARGV_AND_ENV_BYTES
            ));
        }
        if let Egress::Allow(ranges) = &self.egress
            && ranges.len() > MAX_CIDRS
        {
            return invalid(format!(
                "{} ranges may be reached outside, more than {MAX_CIDRS}; merge some",
                ranges.len()
            ));
        }
        for bind in &self.binds {
            let leaves = bind.target.split('/').any(|part| part == "..");
            if !bind.target.starts_with('/') || bind.target == "/" || leaves {
                return invalid(format!("{:?} cannot be the target of a bind", bind.target));
            }
        }
        Ok(())
    }
}

/// Values of variables are often secrets, so only their names are shown.
impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch")
            .field("name", &self.name)
            .field("rootfs", &self.rootfs)
            .field("argv", &self.argv)
            .field("env", &self.env.iter().map(|(key, _)| key).collect::<Vec<_>>())
            .field("workdir", &self.workdir)
            .field("user", &self.user)
            .field("binds", &self.binds)
            .field("limits", &self.limits)
            .field("network", &self.network)
            .field("outlives_us", &self.outlives_us)
            .field("egress", &self.egress)
            .finish()
    }
}

/// The file system that the container sees as `/`.
#[derive(Debug, Clone)]
pub struct Rootfs {
    /// Directories of layers, base first. Empty means the host's own file system, which only the
    /// process runtime can give.
    pub lower_dirs: Vec<PathBuf>,
    pub upper: Upper,
}

impl Rootfs {
    /// Layers under a writable directory that goes away with the container.
    pub fn scratch(lower_dirs: Vec<PathBuf>) -> Self {
        Self {
            lower_dirs,
            upper: Upper::Scratch,
        }
    }

    /// The host's file system, for the process runtime.
    pub fn host() -> Self {
        Self {
            lower_dirs: Vec::new(),
            upper: Upper::Scratch,
        }
    }
}

/// Where writes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// Removed with the container.
    Scratch,
    /// Kept: the caller owns both directories (they exist, on one file system) and commits `upper_dir` as
    /// a layer after the container has been disposed of. Mount points that the layers below do not have
    /// (`/proc`, `/etc/resolv.conf`, the targets of binds) are in it as empty files and directories.
    Keep { upper_dir: PathBuf, work_dir: PathBuf },
}

/// A file or directory of the host, seen inside. The target is created if absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    pub target: String,
    pub read_only: bool,
}

/// `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    pub memory_bytes: Option<u64>,
    /// Thousandths of one CPU; more are not given even if the machine is idle, also not for the start itself.
    pub cpu_millis: Option<u32>,
    pub pids: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkMode {
    /// A namespace with `eth0` on the instance's bridge: the outside and the platform's listener, nothing else.
    Bridge,
    /// A namespace with nothing but loopback.
    None,
    /// The host's network. Only the process runtime has it, and it has nothing else.
    Host,
}

/// What a runtime may be unable to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Keeping the container from the host's files, processes and devices.
    Isolation,
    /// Memory, CPU and process limits, and telling a death for lack of memory from others.
    Limits,
    /// A root made of layers.
    Layers,
    Binds,
    /// An address and ports of its own.
    OwnNetwork,
    /// Blocking or limiting what it reaches outside.
    Egress,
    /// Another user than the platform's.
    Users,
    /// Ending every process that the container started, also those that detached themselves.
    EndsAllProcesses,
    /// Containers that outlive the process that started them.
    Adoption,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Isolation => "isolation from the host",
            Self::Limits => "memory, CPU and process limits",
            Self::Layers => "an image as its root",
            Self::Binds => "bind mounts",
            Self::OwnNetwork => "a network of its own",
            Self::Egress => "a blocked or limited network",
            Self::Users => "another user",
            Self::EndsAllProcesses => "ending processes that detached themselves",
            Self::Adoption => "containers that outlive the platform's process",
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    lacks: &'static [Feature],
}

impl Capabilities {
    pub(crate) const fn all_but(lacks: &'static [Feature]) -> Self {
        Self { lacks }
    }

    pub fn has(self, feature: Feature) -> bool {
        !self.lacks.contains(&feature)
    }

    /// For people: what to say when this runtime is chosen.
    pub fn lacking(self) -> &'static [Feature] {
        self.lacks
    }
}

/// What [`Runtime::reap`] found and removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReapReport {
    /// Containers that were still running and have been killed.
    pub killed_processes: usize,
    pub mounts: usize,
    pub cgroups: usize,
    pub interfaces: usize,
    pub directories: usize,
}

impl ReapReport {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a runtime cannot be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{program} cannot be used: {reason}")]
    ProgramUnusable { program: PathBuf, reason: String },
    #[error(
        "the {runtime} runtime needs root; run the platform as root, or choose the process runtime by name if its lack of isolation is acceptable"
    )]
    NeedsRoot { runtime: RuntimeKind },
    #[error("{program} was not found in PATH; install it (Debian: apt-get install {package})")]
    ProgramMissing {
        program: &'static str,
        package: &'static str,
    },
    #[error("failed to prepare {path}")]
    StateDir { path: PathBuf, source: io::Error },
    #[error("the state directory {path} is in use by another process of the platform")]
    StateDirInUse { path: PathBuf },
    #[error("this host cannot limit containers: {reason}")]
    Cgroups { reason: String },
    #[error("failed to remove what an earlier run left behind")]
    Reap(#[source] ReapError),
    #[error("failed to set up the containers' network")]
    Network(#[source] NetworkError),
    #[error(
        "user namespaces are required and cannot be had: {reason}. Mend that, or set runtime.user_namespaces to \"auto\""
    )]
    UserNamespaces { reason: String },
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("container {name:?} cannot be started as asked: {reason}")]
    InvalidLaunch { name: String, reason: String },
    #[error("the {runtime} runtime has no {what}; choose another runtime or leave it out")]
    Unsupported { runtime: RuntimeKind, what: String },
    #[error("a container named {name:?} exists already")]
    NameTaken { name: String },
    #[error("user {user:?} of container {name:?}: {reason}")]
    User { name: String, user: String, reason: String },
    #[error("failed to prepare {path} for container {name:?}")]
    Prepare {
        name: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to mount the root of container {name:?}")]
    Mount {
        name: String,
        source: crate::overlay::OverlayError,
    },
    #[error("failed to give container {name:?} a network")]
    Network { name: String, source: NetworkError },
    /// The runtime program's own words: a missing command, for example.
    #[error("container {name:?} did not start: {message}")]
    Refused { name: String, message: String },
    #[error("container {name:?} did not start within {seconds} s")]
    TimedOut { name: String, seconds: u64 },
    #[error("failed to run {program} for container {name:?}")]
    Spawn {
        name: String,
        program: PathBuf,
        source: io::Error,
    },
    #[error("the runtime has been shut down and starts no containers")]
    ShutDown,
}

#[derive(Debug, thiserror::Error)]
#[error("failed to send {signal} to container {name:?}")]
pub struct SignalError {
    pub name: String,
    pub signal: nix::sys::signal::Signal,
    pub source: io::Error,
}

/// What of a container could not be removed. It is tried again by the next [`Runtime::reap`].
#[derive(Debug, thiserror::Error)]
pub enum DisposeError {
    #[error("the processes of container {name:?} did not end within {seconds} s of being killed")]
    StillRunning { name: String, seconds: u64 },
    #[error("failed to unmount {path} of container {name:?}")]
    Unmount {
        name: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to remove {path} of container {name:?}")]
    Remove {
        name: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to remove the network of container {name:?}")]
    Network { name: String, source: NetworkError },
}

#[derive(Debug, thiserror::Error)]
pub enum ReapError {
    #[error("failed to read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("failed to remove {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("failed to unmount {path}")]
    Unmount { path: PathBuf, source: io::Error },
    #[error("process {pid} of {cgroup} did not end within {seconds} s of being killed")]
    StillRunning { pid: i32, cgroup: String, seconds: u64 },
    #[error("failed to kill process {pid}, which kept container {name:?}")]
    Keeper { name: String, pid: i32, source: io::Error },
    #[error("failed to remove the network of an earlier run")]
    Network(#[source] NetworkError),
}
