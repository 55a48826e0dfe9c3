//! A started container: its streams, its end, and what it leaves to be removed.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ionian_domain::container::{ContainerExit, StartTimings};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use crate::descriptor;
use crate::gvisor::SignalRelay;
use crate::keeper::Kept;
use crate::runtime::{DisposeError, SignalError};

/// The reading end of a pipe. Whoever takes it must read it: a full pipe stops the container's writes, which
/// is how a container that prints too much slows only itself.
pub type OutputStream = tokio::net::unix::pipe::Receiver;

/// A killed process ends when the kernel has torn down its memory and its namespaces: milliseconds, or
/// seconds for many gigabytes. Uninterruptible waits on a dead network file system are what is beyond it.
pub(crate) const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// One started or adopted container. Dropping it kills it and removes what it had, in the background;
/// [`Self::release`] lets it run on. If this process is killed, it runs on as well.
pub struct RunningContainer {
    pub name: String,
    /// The first process, as the host numbers it.
    pub pid: i32,
    /// Where the host reaches the container's ports; `None` without a network.
    pub address: Option<IpAddr>,
    /// `Some` until taken.
    pub stdout: Option<OutputStream>,
    /// `Some` until taken.
    pub stderr: Option<OutputStream>,
    /// Empty for one that was adopted.
    pub timings: StartTimings,
    handle: ContainerHandle,
    main: MainProcess,
    exit: Option<ContainerExit>,
    /// `None` once disposed of.
    remains: Option<Box<dyn Remains>>,
}

/// The process whose end is the container's end.
pub(crate) enum MainProcess {
    /// Ends with this process: the container's own, without isolation.
    Child(Child),
    Kept(Kept),
}

impl MainProcess {
    /// `None` if nobody could tell how it ended.
    async fn wait(&mut self, first_process: &ContainerHandle) -> io::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => child.wait().await.map(Some),
            Self::Kept(kept) => kept.wait(first_process).await,
        }
    }
}

/// What a container has on the host, and what its runtime knows about its end.
pub(crate) trait Remains: Send {
    fn exit_of(&self, status: ExitStatus) -> ContainerExit;

    /// Ends what still runs and removes everything, blocking. Called once; dropping without it must do the
    /// same in the background.
    fn remove(self: Box<Self>) -> Result<(), DisposeError>;

    /// Whether it was started so that a later process may adopt it.
    fn may_be_adopted(&self) -> bool {
        false
    }

    /// Leaves everything as it is, where that is allowed.
    fn leave(self: Box<Self>) {}
}

pub(crate) struct Started {
    pub name: String,
    pub pid: i32,
    pub address: Option<IpAddr>,
    pub stdout: OutputStream,
    pub stderr: OutputStream,
    pub timings: StartTimings,
    pub handle: ContainerHandle,
    pub main: MainProcess,
    pub remains: Box<dyn Remains>,
}

impl RunningContainer {
    pub(crate) fn new(started: Started) -> Self {
        Self {
            name: started.name,
            pid: started.pid,
            address: started.address,
            stdout: Some(started.stdout),
            stderr: Some(started.stderr),
            timings: started.timings,
            handle: started.handle,
            main: started.main,
            exit: None,
            remains: Some(started.remains),
        }
    }

    /// For signalling from another task than the one that waits.
    pub fn handle(&self) -> ContainerHandle {
        self.handle.clone()
    }

    /// Waits for the end. Safe to cancel and to call again.
    ///
    /// The container's output may still hold what was printed last: read it to its end.
    pub async fn wait(&mut self) -> ContainerExit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        self.handle.before_reaping().await;
        let exit = match (self.main.wait(&self.handle).await, &self.remains) {
            (Ok(Some(status)), Some(remains)) => remains.exit_of(status),
            (Ok(None), Some(_)) => {
                tracing::error!(container = %self.name, "a container's keeper was killed; the container is ended");
                ContainerExit::Lost
            }
            (Ok(_), None) => unreachable!("a disposed container cannot be waited for: dispose takes it"),
            (Err(error), _) => {
                tracing::error!(container = %self.name, %error, "lost track of a container's process");
                ContainerExit::Lost
            }
        };
        let exit = match exit {
            ContainerExit::OutOfMemory if self.handle.was_killed() => ContainerExit::Signaled {
                signal: Signal::SIGKILL as i32,
            },
            exit => exit,
        };
        // Where another process stands for the container and was itself killed, it must not outlive that one.
        self.kill();
        self.exit = Some(exit.clone());
        exit
    }

    /// Signals the first process. A container that has ended already is not an error.
    pub fn signal(&self, signal: Signal) -> Result<(), SignalError> {
        self.handle.signal(signal)
    }

    /// Kills every process at once; the end is seen by [`Self::wait`].
    pub fn kill(&self) {
        self.handle.kill();
    }

    /// Kills what still runs and removes everything that the container had on the host.
    pub async fn dispose(mut self) -> Result<(), DisposeError> {
        self.kill();
        let name = self.name.clone();
        let ended = async {
            if let (MainProcess::Kept(kept), None) = (&self.main, &self.exit) {
                // Nobody wants what it printed last, and it must not wait for a reader.
                if let Err(error) = kept.wait_without_output().await {
                    tracing::error!(container = %name, %error, "lost track of a container's process");
                }
            } else {
                self.wait().await;
            }
        };
        let Ok(()) = tokio::time::timeout(KILL_TIMEOUT, ended).await else {
            return Err(DisposeError::StillRunning {
                name,
                seconds: KILL_TIMEOUT.as_secs(),
            });
        };
        let Some(remains) = self.remains.take() else {
            return Ok(());
        };
        match tokio::task::spawn_blocking(|| remains.remove()).await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Lets go without killing: the container runs on, its output waits, and the next process that opens the
    /// runtime on this state directory may adopt it. One that was not started with
    /// [`outlives_us`](crate::Launch::outlives_us) is killed and removed, as if dropped.
    pub fn release(mut self) {
        if let Some(remains) = self.remains.take_if(|remains| remains.may_be_adopted()) {
            remains.leave();
        }
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        if self.remains.is_some() {
            self.handle.kill();
        }
    }
}

impl fmt::Debug for RunningContainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningContainer")
            .field("name", &self.name)
            .field("pid", &self.pid)
            .field("address", &self.address)
            .field("exit", &self.exit)
            .finish_non_exhaustive()
    }
}

/// Signals one container; cheap to clone. It never reaches another process: it holds the process itself, not
/// its number, which the kernel gives away again.
#[derive(Clone)]
pub struct ContainerHandle {
    inner: Arc<HandleInner>,
}

struct HandleInner {
    name: String,
    /// Tells a kill by the platform from one for lack of memory.
    was_killed: AtomicBool,
    /// `None` when the process had ended before it could be opened.
    pidfd: Option<AsyncFd<OwnedFd>>,
    /// Without a pid namespace, the group that a kill reaches; `None` when its leader has been reaped and its
    /// number may belong to someone else.
    group: Mutex<Option<nix::unistd::Pid>>,
    /// Set where the first process has no number on the host: `pidfd` is then its sandbox's.
    relay: OnceLock<SignalRelay>,
}

impl ContainerHandle {
    /// `belongs` is asked once the process is held: whether it is still the container's and not one that got
    /// its number.
    pub(crate) fn open(name: &str, pid: i32, belongs: impl FnOnce() -> bool) -> io::Result<Self> {
        let pidfd = match open_pidfd(pid)? {
            Some(pidfd) if belongs() => Some(descriptor::watch(pidfd)?),
            _ => None,
        };
        Ok(Self {
            inner: Arc::new(HandleInner {
                name: name.to_owned(),
                was_killed: AtomicBool::new(false),
                pidfd,
                group: Mutex::new(None),
                relay: OnceLock::new(),
            }),
        })
    }

    /// For a process that leads a group of its own and is our child, so that its number cannot be reused yet.
    pub(crate) fn open_group_leader(name: &str, pid: i32) -> io::Result<Self> {
        let pidfd = open_pidfd(pid)?.map(descriptor::watch).transpose()?;
        let group = Mutex::new(Some(nix::unistd::Pid::from_raw(pid)));
        Ok(Self {
            inner: Arc::new(HandleInner {
                name: name.to_owned(),
                was_killed: AtomicBool::new(false),
                pidfd,
                group,
                relay: OnceLock::new(),
            }),
        })
    }

    /// Signals but SIGKILL go this way from now on.
    pub(crate) fn relay_signals(&self, relay: SignalRelay) {
        if self.inner.relay.set(relay).is_err() {
            tracing::error!(container = %self.inner.name, "signals of a container were relayed twice");
        }
    }

    /// Signals the first process. A container that has ended already is not an error.
    pub fn signal(&self, signal: Signal) -> Result<(), SignalError> {
        let Some(pidfd) = &self.inner.pidfd else { return Ok(()) };
        if signal != Signal::SIGKILL
            && let Some(relay) = self.inner.relay.get()
        {
            relay.send(signal);
            return Ok(());
        }
        let failed = |source| SignalError {
            name: self.inner.name.clone(),
            signal,
            source,
        };
        let number = rustix::process::Signal::from_named_raw(signal as i32)
            .ok_or_else(|| failed(io::Error::from(io::ErrorKind::InvalidInput)))?;
        match pidfd_send_signal(pidfd.get_ref().as_fd(), number) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Kills every process at once. The first process of a pid namespace takes the others with it.
    pub fn kill(&self) {
        self.inner.was_killed.store(true, Ordering::Release);
        self.kill_group();
        if let Err(error) = self.signal(Signal::SIGKILL) {
            tracing::error!(container = %self.inner.name, error = %error.source, "failed to kill a container");
        }
    }

    /// Waits for the first process's end, which its parent may not have noticed yet.
    pub(crate) async fn ended(&self) {
        if let Some(pidfd) = &self.inner.pidfd
            && let Err(error) = pidfd.readable().await
        {
            tracing::error!(container = %self.inner.name, %error, "failed to wait for a process");
        }
    }

    fn was_killed(&self) -> bool {
        self.inner.was_killed.load(Ordering::Acquire)
    }

    /// Without a pid namespace, ends the group while its dead leader still keeps the number taken.
    async fn before_reaping(&self) {
        let has_group = self
            .inner
            .group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some();
        if !has_group {
            return;
        }
        self.ended().await;
        self.kill_group();
        *self.inner.group.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn kill_group(&self) {
        // Held while killing, so that the number cannot be given up in between.
        let group = self.inner.group.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = *group {
            match nix::sys::signal::killpg(group, Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => tracing::error!(container = %self.inner.name, %error, "failed to kill a process group"),
            }
        }
    }
}

impl fmt::Debug for ContainerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerHandle")
            .field("name", &self.inner.name)
            .finish_non_exhaustive()
    }
}

/// `None` if there is no such process any more.
pub(crate) fn open_pidfd(pid: i32) -> io::Result<Option<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok(Some(pidfd)),
        // The second, on kernels before 6.9, of a process that has gone and whose number still names its session.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A pipe whose reading end belongs to the platform and whose writing end becomes a container's output.
pub(crate) fn output_pipe() -> io::Result<(OutputStream, OwnedFd)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((OutputStream::from_owned_fd(reader)?, writer))
}
