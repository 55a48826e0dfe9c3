//! The process that stays with a container when the platform's own process ends.
//!
//! A keeper is a POSIX shell in a process group of its own. It runs the runtime's program in the foreground, with
//! its output on two FIFOs, and writes the exit status into a file. So whoever owns the container (the process
//! that started it, or a later one that adopts it) learns its end from the keeper's, by a pidfd, without
//! polling and without being its parent; and reads its output from the FIFOs.
//!
//! | in the container's volatile directory | |
//! |---|---|
//! | `stdout`, `stderr` | FIFOs |
//! | `exit` | the exit status and a newline, once the program has ended |
//! | `container.json` | [`record`]: who the keeper is, written by the owner |
//!
//! **Output is never lost, and never ends with `EPIPE`.** While the program runs, the keeper holds both FIFOs
//! open for reading and writing, so without an owner they fill and the container's writes wait. Afterwards it
//! holds their writing ends, which keeps what is in them, until somebody has opened both for reading: an owner
//! has them open already; without one the keeper waits, in `open`, for an adoption.
//!
//! The module knows nothing of what it runs, and never decides who may be adopted.

pub(crate) mod record;

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;

use self::record::ProcessIdentity;
use crate::descriptor;
use crate::running::{ContainerHandle, OutputStream, open_pidfd};

/// A shell of POSIX; dash starts in half a millisecond.
const SHELL: &str = "/bin/sh";

/// Arguments: the directory, then the program's command line.
///
/// The status is one short line, written at once and into memory, and read only after the keeper's end: a file
/// without the newline counts as none, so no second file and no program that renames it are needed.
/// A FIFO opens for writing when it has a reader: that is what the last two lines wait for.
const SCRIPT: &str = r#"cd / || exit
dir=$1
shift
exec 3<>"$dir/stdout" 4<>"$dir/stderr"
"$@" >"$dir/stdout" 2>"$dir/stderr" 3<&- 4<&-
echo $? >"$dir/exit"
exec >"$dir/stdout" 2>"$dir/stderr" 3<&- 4<&-
: >"$dir/stdout"
: >"$dir/stderr"
"#;

/// With the container dead and its output unread, what is in the pipes is dropped after this long, so that
/// who waits for the end learns it. Readers that are merely slow take well under a second for two pipes.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);

const DISCARD_BUFFER_BYTES: usize = 64 << 10;

/// The keeper's number among the processes, or of one that had ended before it was looked for.
#[derive(Debug)]
pub(crate) struct Keeper {
    pid: Pid,
    /// `None` when it had ended before it was adopted.
    pidfd: Option<AsyncFd<OwnedFd>>,
    directory: PathBuf,
}

impl Keeper {
    /// Runs `command`, whose first word is a path. `inherited` is closed for it; everything that this
    /// process opened itself closes on its own.
    pub(crate) fn spawn(command: &[OsString], directory: &Path, inherited: &[RawFd]) -> io::Result<Self> {
        let mut arguments = Vec::with_capacity(command.len() + 5);
        for word in [SHELL, "-c", SCRIPT, "ionian-keeper"] {
            arguments.push(CString::new(word)?);
        }
        arguments.push(c_string(directory.as_os_str())?);
        for word in command {
            arguments.push(c_string(word)?);
        }
        // Nothing else of the platform's environment: it may hold secrets, and the keeper outlives it.
        let mut path = OsString::from("PATH=");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let environment = [c_string(&path)?];

        let mut actions = PosixSpawnFileActions::init()?;
        for descriptor in inherited {
            actions.add_close(*descriptor)?;
        }
        for descriptor in 0..=2 {
            actions.add_open(descriptor, "/dev/null", OFlag::O_RDWR, Mode::empty())?;
        }
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(
            PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK,
        )?;
        // A terminal's signals (Ctrl-C, hang-up) go to its foreground group and to the session's leader, and so
        // to neither keeper nor runtime. A session of its own would add nothing to that, and on a busy machine it
        // made starts 10 ms slower: the scheduler groups processes by session, and a new group begins at the end
        // of the queue.
        attributes.set_pgroup(Pid::from_raw(0))?;
        // Rust programs ignore SIGPIPE; what they start should not.
        attributes.set_sigdefault(&SigSet::all())?;
        attributes.set_sigmask(&SigSet::empty())?;
        let pid = posix_spawn(SHELL, &actions, &attributes, &arguments, &environment)?;

        match open_pidfd(pid.as_raw()).and_then(|pidfd| pidfd.map(descriptor::watch).transpose()) {
            Ok(Some(pidfd)) => Ok(Self {
                pid,
                pidfd: Some(pidfd),
                directory: directory.to_owned(),
            }),
            result => {
                // Out of descriptors. It is our child that nobody has waited for, so the number is its own.
                let killed = killpg(pid, Signal::SIGKILL);
                let reaped = nix::sys::wait::waitpid(pid, None);
                tracing::warn!(
                    ?killed,
                    ?reaped,
                    "ended a container's keeper, which could not be watched"
                );
                result.and(Err(io::Error::from(io::ErrorKind::NotFound)))
            }
        }
    }

    /// One that an earlier process started, if it still runs; otherwise what it left.
    pub(crate) fn adopt(identity: &ProcessIdentity, directory: &Path) -> io::Result<Self> {
        Ok(Self {
            pid: Pid::from_raw(identity.pid),
            pidfd: identity.open()?.map(descriptor::watch).transpose()?,
            directory: directory.to_owned(),
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits for the keeper's end.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        let Some(pidfd) = &self.pidfd else { return Ok(()) };
        let _ready = pidfd.readable().await?;
        self.reap();
        Ok(())
    }

    /// Reaps it without being asked for the exit, for who lets go of a container and goes on running.
    pub(crate) async fn reap_when_ended(&self) {
        if let Err(error) = self.ended().await {
            tracing::warn!(pid = self.pid(), %error, "failed to wait for a container's keeper");
        }
    }

    /// How the program ended; `None` if the keeper was killed before it could tell.
    pub(crate) fn exit_status(&self) -> Option<ExitStatus> {
        read_exit(&self.directory)
    }

    /// Kills keeper and program, and waits for the keeper's end. Blocks. Whether it ended in time.
    pub(crate) fn kill_and_wait(&self, timeout: Duration) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        kill_group(self.pid, pidfd.get_ref(), timeout) && {
            self.reap();
            true
        }
    }

    /// Leaves no zombie where this process is the parent.
    fn reap(&self) {
        let Some(pidfd) = &self.pidfd else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options) {
            // Another's child, reaped before, or not quite ended.
            Ok(_) | Err(rustix::io::Errno::CHILD | rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::warn!(pid = self.pid(), %error, "failed to reap a container's keeper"),
        }
    }
}

/// Kills a keeper of an earlier process with its program. Whether it ended in time.
pub(crate) fn kill_stray(identity: &ProcessIdentity, timeout: Duration) -> io::Result<bool> {
    Ok(match identity.open()? {
        Some(pidfd) => kill_group(Pid::from_raw(identity.pid), &pidfd, timeout),
        None => true,
    })
}

/// The group is the keeper and the program; the container's processes have sessions of their own. The number
/// is the keeper's, since its pidfd says that it lives.
fn kill_group(pid: Pid, pidfd: &OwnedFd, timeout: Duration) -> bool {
    if has_ended(pidfd, Duration::ZERO) {
        return true;
    }
    match killpg(pid, Signal::SIGKILL) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => has_ended(pidfd, timeout),
        Err(error) => {
            tracing::error!(%pid, %error, "failed to kill a container's keeper");
            false
        }
    }
}

pub(crate) fn has_ended(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return ready > 0,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "failed to wait for a container's keeper");
                return false;
            }
        }
    }
}

/// How a program ended whose keeper was given this directory; `None` if it runs or nobody could tell.
pub(crate) fn read_exit(directory: &Path) -> Option<ExitStatus> {
    let text = fs::read_to_string(directory.join("exit")).ok()?;
    let code: u8 = text.strip_suffix('\n')?.parse().ok()?;
    // As `wait` reports it.
    Some(ExitStatus::from_raw(i32::from(code) << 8))
}

/// Before the keeper is spawned. They belong to `owner`, who may be the container's root: a program that opens
/// `/dev/stdout` asks for them again.
pub(crate) fn create_fifos(directory: &Path, owner: Option<u32>) -> io::Result<()> {
    for name in ["stdout", "stderr"] {
        let path = directory.join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        if owner.is_some() {
            std::os::unix::fs::chown(&path, owner, owner)?;
        }
    }
    Ok(())
}

/// Lets a keeper end that waits for a reader and of which nobody knows more than its directory. Held until the
/// directory has been removed: then it finds a reader, or no FIFO.
pub(crate) fn let_end(directory: &Path) -> Vec<OwnedFd> {
    let open = |name: &str| {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        nix::fcntl::open(&directory.join(name), flags, Mode::empty()).ok()
    };
    ["stdout", "stderr"].into_iter().filter_map(open).collect()
}

/// Descriptors that this process was started with and that would stay open in what it starts.
pub(crate) fn inherited_descriptors() -> io::Result<Vec<RawFd>> {
    let mut inherited = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
            continue;
        };
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        if number > 2 && flags.is_some_and(|flags| flags & nix::libc::O_CLOEXEC == 0) {
            inherited.push(number);
        }
    }
    Ok(inherited)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}

/// The reading ends of both FIFOs. While they live the keeper need not wait for a reader.
#[derive(Debug)]
pub(crate) struct Readers([OwnedFd; 2]);

impl Readers {
    /// Does not wait for a writer.
    pub(crate) fn open(directory: &Path) -> io::Result<(OutputStream, OutputStream, Self)> {
        let open = |name: &str| tokio::net::unix::pipe::OpenOptions::new().open_receiver(directory.join(name));
        let (stdout, stderr) = (open("stdout")?, open("stderr")?);
        let own = [
            stdout.as_fd().try_clone_to_owned()?,
            stderr.as_fd().try_clone_to_owned()?,
        ];
        Ok((stdout, stderr, Self(own)))
    }

    /// Reads and drops what comes, for ever.
    async fn discard(&self) {
        let [stdout, stderr] = &self.0;
        tokio::join!(discard(stdout), discard(stderr));
        std::future::pending::<()>().await;
    }
}

async fn discard(descriptor: &OwnedFd) {
    let stream = descriptor.try_clone().and_then(OutputStream::from_owned_fd);
    let mut buffer = vec![0; DISCARD_BUFFER_BYTES];
    let result = match stream {
        Ok(mut stream) => loop {
            match stream.read(&mut buffer).await {
                Ok(0) => break Ok(()),
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        },
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::warn!(%error, "failed to drop a container's unread output");
    }
}

/// A keeper and the reading ends, as the owner of its container holds them.
#[derive(Debug)]
pub(crate) struct Kept {
    pub keeper: std::sync::Arc<Keeper>,
    pub readers: Readers,
}

impl Kept {
    /// Waits for the end of the program, whose last output must be read for that.
    pub(crate) async fn wait(&self, first_process: &ContainerHandle) -> io::Result<Option<ExitStatus>> {
        let unread = async {
            first_process.ended().await;
            tokio::time::sleep(UNREAD_TIMEOUT).await;
            self.readers.discard().await;
        };
        tokio::select! {
            biased;
            ended = self.keeper.ended() => ended?,
            () = unread => unreachable!("it drops output for ever"),
        }
        Ok(self.keeper.exit_status())
    }

    /// The same for one that has been killed and whose output nobody wants.
    pub(crate) async fn wait_without_output(&self) -> io::Result<Option<ExitStatus>> {
        tokio::select! {
            biased;
            ended = self.keeper.ended() => ended?,
            () = self.readers.discard() => unreachable!("it drops output for ever"),
        }
        Ok(self.keeper.exit_status())
    }
}

#[cfg(test)]
mod tests;
