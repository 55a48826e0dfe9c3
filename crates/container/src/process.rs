//! The runtime without isolation: plain child processes, for laptops without root and for tests.
//!
//! A "container" here is a process group. It sees and may do what the platform's user may, on the host's file
//! system and network. What it cannot do is refused rather than ignored, so that nobody believes in a limit
//! that is not there. A process that leaves the group (a daemon) outlives it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use ionian_domain::container::{ContainerExit, RuntimeKind, StartTimings};
use tokio::process::Command;

use crate::network::{Egress, Network};
use crate::running::{ContainerHandle, MainProcess, Remains, Started, output_pipe};
use crate::runtime::{
    Capabilities, DisposeError, Feature, Launch, Limits, NetworkMode, ReapError, ReapReport, RunningContainer, Runtime,
    StartError, Upper,
};

/// Those in use.
type Names = Arc<Mutex<BTreeSet<String>>>;

/// A name that is given back when its container has been disposed of.
#[derive(Debug)]
struct Name {
    names: Names,
    name: String,
}

impl Name {
    fn claim(names: &Names, name: &str) -> Result<Self, StartError> {
        if !lock(names).insert(name.to_owned()) {
            return Err(StartError::NameTaken { name: name.to_owned() });
        }
        Ok(Self {
            names: Arc::clone(names),
            name: name.to_owned(),
        })
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        lock(&self.names).remove(&self.name);
    }
}

fn lock(names: &Names) -> MutexGuard<'_, BTreeSet<String>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
pub struct ProcessRuntime {
    names: Names,
    shut_down: AtomicBool,
}

impl ProcessRuntime {
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl Runtime for ProcessRuntime {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Process
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::all_but(&[
            Feature::Isolation,
            Feature::Limits,
            Feature::Layers,
            Feature::Binds,
            Feature::OwnNetwork,
            Feature::Egress,
            Feature::Users,
            Feature::EndsAllProcesses,
            Feature::Adoption,
        ])
    }

    fn network(&self) -> Option<&Network> {
        None
    }

    async fn start(&self, launch: Launch) -> Result<RunningContainer, StartError> {
        launch.validate()?;
        refuse_what_is_missing(&launch)?;
        if self.shut_down.load(Ordering::Acquire) {
            return Err(StartError::ShutDown);
        }
        let claimed = Name::claim(&self.names, &launch.name)?;
        let began = Instant::now();
        let name = launch.name.clone();
        let program = PathBuf::from(&launch.argv[0]);
        let prepare = |source| StartError::Prepare {
            name: name.clone(),
            path: PathBuf::from(&launch.workdir),
            source,
        };
        let (stdout, stdout_writer) = output_pipe().map_err(prepare)?;
        let (stderr, stderr_writer) = output_pipe().map_err(prepare)?;
        let child = Command::new(&launch.argv[0])
            .args(&launch.argv[1..])
            .env_clear()
            .envs(launch.env.iter().map(|(key, value)| (key, value)))
            .current_dir(&launch.workdir)
            .stdin(Stdio::null())
            .stdout(stdout_writer)
            .stderr(stderr_writer)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| StartError::Spawn {
                name: name.clone(),
                program,
                source,
            })?;
        let Some(pid) = child.id().map(u32::cast_signed) else {
            unreachable!("a child has a number until it has been waited for")
        };
        let handle = ContainerHandle::open_group_leader(&name, pid).map_err(prepare)?;
        let timings = StartTimings {
            steps: vec![("spawn".to_owned(), began.elapsed())],
        };
        let address = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let remains = Box::new(OnlyName { _name: claimed });
        Ok(RunningContainer::new(Started {
            name,
            pid,
            address,
            stdout,
            stderr,
            timings,
            handle,
            main: MainProcess::Child(child),
            remains,
        }))
    }

    /// Nothing of a process outlives it but what it wrote, which is the user's.
    async fn reap(&self) -> Result<ReapReport, ReapError> {
        Ok(ReapReport::default())
    }

    async fn remove_all(&self) -> Result<(), ReapError> {
        self.shut_down.store(true, Ordering::Release);
        Ok(())
    }
}

fn refuse_what_is_missing(launch: &Launch) -> Result<(), StartError> {
    let missing = if !launch.rootfs.lower_dirs.is_empty() || launch.rootfs.upper != Upper::Scratch {
        Some("way to run an image (its root is the host's)")
    } else if !launch.binds.is_empty() {
        Some("bind mounts (pass the paths of the host)")
    } else if launch.limits != Limits::default() {
        Some("memory, CPU or process limits")
    } else if launch.egress != Egress::Open {
        Some("way to block or limit the network")
    } else if launch.network != NetworkMode::Host {
        Some("network of its own (ask for the host's)")
    } else if launch.user.is_some() {
        Some("other user than the platform's")
    } else if launch.outlives_us {
        Some("way to outlive the platform's process")
    } else {
        None
    };
    missing.map_or(Ok(()), |what| {
        Err(StartError::Unsupported {
            runtime: RuntimeKind::Process,
            what: what.to_owned(),
        })
    })
}

/// The process group was killed when its leader's end was seen; nothing else is there.
struct OnlyName {
    _name: Name,
}

impl Remains for OnlyName {
    fn exit_of(&self, status: ExitStatus) -> ContainerExit {
        match (status.code(), status.signal()) {
            (Some(code), _) => ContainerExit::Exited { code },
            (None, Some(signal)) => ContainerExit::Signaled { signal },
            (None, None) => ContainerExit::Lost,
        }
    }

    fn remove(self: Box<Self>) -> Result<(), DisposeError> {
        Ok(())
    }
}
