//! The steps of one start, each timed, from a mounted root to a running first process.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use ionian_domain::container::StartTimings;
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::leftovers::Leftovers;
use super::{Inner, run_blocking};
use crate::bundle::{self, BundleFacts, BundleNetwork, BundlePaths, BundleUserNamespace};
use crate::descriptor;
use crate::gvisor::{SignalRelay, StateFile};
use crate::keeper::record::{ProcessIdentity, Record, StartedRecord};
use crate::keeper::{self, Keeper, Kept, Readers};
use crate::network::Slot;
use crate::oci::{OciProgram, RunPlan};
use crate::overlay::{MountGuard, WritableLayer, mount_overlay};
use crate::passwd::{self, Identity};
use crate::running::{ContainerHandle, MainProcess, OutputStream, Remains, Started};
use crate::runtime::{Launch, NetworkMode, StartError, Upper};
use crate::userns::Mapping;
use crate::userns::ranges::{Claim, IDS_PER_CONTAINER, IdRange};
use crate::userns::stage::Stage;

/// runc takes tens of milliseconds; minutes of swapping or a throttled CPU are not worth waiting for.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// What runc says about a failure fits; the rest of its log is not read.
const MAX_LOG_BYTES: usize = 64 << 10;

/// A started container before its leftovers are tied to it.
pub(super) struct Running {
    name: String,
    pid: i32,
    address: Option<IpAddr>,
    stdout: OutputStream,
    stderr: OutputStream,
    timings: StartTimings,
    handle: ContainerHandle,
    kept: Kept,
}

impl Running {
    pub(super) fn with_remains(self, remains: Box<dyn Remains>) -> Started {
        let Self {
            name,
            pid,
            address,
            stdout,
            stderr,
            timings,
            handle,
            kept,
        } = self;
        Started {
            name,
            pid,
            address,
            stdout,
            stderr,
            timings,
            handle,
            main: MainProcess::Kept(kept),
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

pub(super) async fn start(
    inner: &Arc<Inner>,
    launch: Launch,
    leftovers: &mut Leftovers,
) -> Result<Running, StartError> {
    let name = launch.name.clone();
    let mut stopwatch = Stopwatch::start();
    let paths = leftovers.paths.clone();

    let slot = match launch.network {
        NetworkMode::Bridge => {
            let failed = |source| StartError::Network {
                name: name.clone(),
                source,
            };
            let mut slot = inner.network.take_slot().await.map_err(failed)?;
            inner
                .network
                .limit_egress(&mut slot, &launch.egress)
                .await
                .map_err(failed)?;
            Some(slot)
        }
        NetworkMode::None | NetworkMode::Host => None,
    };
    let address = slot.as_ref().map(Slot::address);
    let network_record = slot.as_ref().map(Slot::record);
    let network = slot.as_ref().and_then(|slot| {
        Some(BundleNetwork {
            namespace: slot.namespace_path()?,
            address: slot.address(),
            resolv_conf: inner.network.resolv_conf(),
        })
    });
    leftovers.slot = slot;
    stopwatch.step("network");

    let cgroup = inner.cgroup_of(&name);
    let outlives_us = launch.outlives_us;
    let network_mode = launch.network;
    let range = leftovers.ids.as_ref().map(|claim| claim.range);
    let prepared = {
        let (paths, inner) = (paths.clone(), Arc::clone(inner));
        let program = Arc::clone(&leftovers.program);
        let mounts = leftovers.expect_mounts();
        let mut launch = launch;
        run_blocking(move || {
            let mounted = match (&inner.mapping, range) {
                (Some(mapping), Some(range)) => {
                    let namespace = network.as_ref().map(|network| network.namespace.as_path());
                    Some(mount_stage(mapping, range, &mut launch, &paths, namespace, &mounts)?)
                }
                _ => {
                    // Not returned: whoever waits for the return may have stopped waiting.
                    let _ = mounts.send(mount_root(&launch, &paths)?);
                    None
                }
            };
            stopwatch.step("mount");
            let (user_namespace, held) = mounted.unzip();
            let result = write_bundle(&launch, &paths, &program, &cgroup, network, user_namespace).and_then(|()| {
                program
                    .create_cgroup(&inner.cgroups, &cgroup, launch.limits)
                    .map_err(|source| StartError::Prepare {
                        name: launch.name.clone(),
                        path: PathBuf::from(&cgroup),
                        source,
                    })
            });
            stopwatch.step("bundle");
            Ok((result, held, stopwatch))
        })
        .await
    };
    // Until the first process is in it.
    let (written, _network_namespace, mut stopwatch) = prepared?;
    let join = written?;

    let prepare = |source| StartError::Prepare {
        name: name.clone(),
        path: paths.directory.clone(),
        source,
    };
    let program = Arc::clone(&leftovers.program);
    let state_root = inner.config.runc_root();
    let instance = inner.config.short_id();
    let start_file = StartFile::watch(&program, &state_root, &paths, &name).map_err(prepare)?;
    keeper::create_fifos(&paths.specification, range.map(IdRange::first)).map_err(prepare)?;
    // Open before the keeper looks for a reader, and for as long as the container is ours.
    let (stdout, stderr, readers) = Readers::open(&paths.specification).map_err(prepare)?;
    let (command, arguments) = program.run_command(&RunPlan {
        state_root: &state_root,
        paths: &paths,
        name: &name,
        instance: &instance,
        network: network_mode,
        join: &join,
    });
    let command: Vec<OsString> = std::iter::once(command.into()).chain(arguments).collect();
    let keeper =
        Keeper::spawn(&command, &paths.specification, &inner.inherited).map_err(|source| StartError::Spawn {
            name: name.clone(),
            program: program.path.clone(),
            source,
        })?;
    // From here on the leftovers kill it.
    let keeper = Arc::new(keeper);
    leftovers.keeper = Some(Arc::clone(&keeper));
    // Written before anything else of it, so that after a crash it is found and killed.
    let identity = ProcessIdentity::of(keeper.pid()).map_err(prepare)?;
    let mut record = Record::new(&inner.boot_id, identity);
    record.write(&paths.specification).map_err(prepare)?;
    let kept = Kept { keeper, readers };

    let pid = match tokio::time::timeout(START_TIMEOUT, first_process(&kept.keeper, &start_file, &paths)).await {
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
    // The first process, or the sandbox around it, is the program's child until that has seen its end, and then the
    // number may be another's. The program is the keeper's child, which is ours and not reaped yet.
    let keeper_pid = kept.keeper.pid();
    let mut first_process = ProcessIdentity::ended(pid);
    let handle = ContainerHandle::open(&name, pid, || {
        let identity = ProcessIdentity::of(pid);
        // Asked last: what has this parent now is what had the number before.
        let belongs = parent_of(pid).and_then(parent_of) == Some(keeper_pid);
        if let (true, Ok(identity)) = (belongs, identity) {
            first_process = identity;
        }
        belongs
    })
    .map_err(prepare)?;
    if program.sandboxing.is_some() {
        handle.relay_signals(SignalRelay::new(&program.path, &state_root, &instance, &name));
    }
    if outlives_us {
        leftovers.may_be_adopted = true;
        record.started = Some(StartedRecord {
            outlives_us,
            runtime: program.kind(),
            first_process,
            network: network_record,
            id_range: leftovers.ids.as_ref().map(Claim::number),
        });
        record.write(&paths.specification).map_err(prepare)?;
    }
    stopwatch.step("runc");
    Ok(Running {
        name,
        pid,
        address,
        stdout,
        stderr,
        timings: stopwatch.timings,
        handle,
        kept,
    })
}

/// Puts the container together where its own root can reach it: its root, `/sys` and the sources of its binds, to
/// which the launch is changed. Returns what the bundle needs of it, and what holds the network namespace.
fn mount_stage(
    mapping: &Mapping,
    range: IdRange,
    launch: &mut Launch,
    paths: &BundlePaths,
    network_namespace: Option<&Path>,
    mounts: &Sender<MountGuard>,
) -> Result<(BundleUserNamespace, OwnedFd), StartError> {
    let name = launch.name.clone();
    let failed = |path: &Path| {
        let (name, path) = (name.clone(), path.to_owned());
        move |source| StartError::Prepare { name, path, source }
    };
    let map = mapping.map(range).map_err(failed(&paths.seen))?;
    let (stage, guard) = Stage::mount(&paths.seen, &map).map_err(failed(&paths.seen))?;
    let _ = mounts.send(guard);
    let (upper_dir, work_dir, volatile) = upper(launch, paths)?;
    let writable = WritableLayer {
        upper_dir: &upper_dir,
        work_dir: &work_dir,
        volatile,
    };
    let root = stage
        .mount_root(&launch.rootfs.lower_dirs, writable, mapping.layers())
        .map_err(|source| StartError::Mount {
            name: name.clone(),
            source,
        })?;
    let _ = mounts.send(root);
    let held = stage.mount_sys(network_namespace).map_err(failed(&stage.sys()))?;
    for (number, wanted) in launch.binds.iter_mut().enumerate() {
        let source = stage.mount_bind(number, wanted).map_err(failed(&wanted.source))?;
        wanted.source = source;
    }
    let user_namespace = BundleUserNamespace {
        range,
        sys: stage.sys(),
        network_namespace: PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd())),
    };
    Ok((user_namespace, held))
}

fn create_directory(name: &str, path: PathBuf) -> Result<PathBuf, StartError> {
    match fs::DirBuilder::new().mode(0o755).create(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(StartError::Prepare {
            name: name.to_owned(),
            path,
            source,
        }),
    }
}

/// Upper and work directory, and whether what is written goes away with the container.
fn upper(launch: &Launch, paths: &BundlePaths) -> Result<(PathBuf, PathBuf, bool), StartError> {
    Ok(match &launch.rootfs.upper {
        Upper::Scratch => (
            create_directory(&launch.name, paths.upper())?,
            create_directory(&launch.name, paths.work())?,
            true,
        ),
        Upper::Keep { upper_dir, work_dir } => (upper_dir.clone(), work_dir.clone(), false),
    })
}

fn mount_root(launch: &Launch, paths: &BundlePaths) -> Result<MountGuard, StartError> {
    let name = &launch.name;
    let root = create_directory(name, paths.root())?;
    let (upper_dir, work_dir, volatile) = upper(launch, paths)?;
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
    program: &OciProgram,
    cgroup: &str,
    network: Option<BundleNetwork>,
    user_namespace: Option<BundleUserNamespace>,
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
    if user_namespace.is_some() {
        let ids = [identity.uid, identity.gid]
            .into_iter()
            .chain(identity.additional_gids.iter().copied());
        if let Some(id) = ids.into_iter().find(|id| !IdRange::has(*id)) {
            return Err(StartError::User {
                name: name.clone(),
                user: launch.user.clone().unwrap_or_default(),
                reason: format!(
                    "the id {id} is above {}, the last that a user namespace has here; use a lower one in the image, or set runtime.user_namespaces to \"off\"",
                    IDS_PER_CONTAINER - 1
                ),
            });
        }
    }
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
            user_namespace,
            program,
        },
    )
    .map_err(|source| StartError::Prepare {
        name: name.clone(),
        path: paths.directory.clone(),
        source,
    })
}

/// Where the program says that the first process runs.
enum StartFile {
    Pid(PidFile),
    State(StateFile),
}

impl StartFile {
    fn watch(program: &OciProgram, state_root: &Path, paths: &BundlePaths, name: &str) -> io::Result<Self> {
        match program.sandboxing {
            Some(_) => StateFile::watch(state_root, name).map(Self::State),
            None => PidFile::watch(paths).map(Self::Pid),
        }
    }

    async fn number(&self) -> io::Result<i32> {
        match self {
            Self::Pid(file) => file.number().await,
            Self::State(file) => file.running().await,
        }
    }
}

/// Tells when runc has put the number of the first process into its file, which it renames into place.
struct PidFile {
    path: PathBuf,
    events: AsyncFd<OwnedFd>,
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
            path: paths.pid_file(),
            events: descriptor::watch(events)?,
        })
    }

    /// Nothing else is renamed into the directory, so the event itself need not be looked at.
    async fn number(&self) -> io::Result<i32> {
        let _ = self.events.readable().await?;
        self.read()?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn read(&self) -> io::Result<Option<i32>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => text.trim().parse().map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The first process's number; `None` if the program ended without having started one.
async fn first_process(keeper: &Keeper, start_file: &StartFile, paths: &BundlePaths) -> io::Result<Option<i32>> {
    tokio::select! {
        number = start_file.number() => number.map(Some),
        ended = keeper.ended() => {
            ended?;
            match start_file {
                StartFile::Pid(file) => file.read(),
                // runsc takes its state with it. A container that has ended has no use for a number: the keeper's
                // stands for it, and belongs to no container.
                StartFile::State(_) => Ok(Some(keeper.pid()).filter(|_| last_error(paths).is_none())),
            }
        }
    }
}

fn parent_of(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))?
        .trim()
        .parse()
        .ok()
}

fn refusal(paths: &BundlePaths) -> String {
    last_error(paths).unwrap_or_else(|| "runc failed without saying why".to_owned())
}

/// The last error in the program's log.
fn last_error(paths: &BundlePaths) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut log = fs::read_to_string(paths.log()).ok()?;
    if log.len() > MAX_LOG_BYTES {
        let start = log.ceil_char_boundary(log.len() - MAX_LOG_BYTES);
        log.drain(..start);
    }
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| line.level == "error")
        .map(|line| OciProgram::plain_refusal(&line.msg))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runcs_last_error_is_the_refusal() {
        let directory = tempfile::tempdir().unwrap();
        let paths = BundlePaths {
            directory: directory.path().to_owned(),
            specification: directory.path().join("spec"),
            seen: directory.path().to_owned(),
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
