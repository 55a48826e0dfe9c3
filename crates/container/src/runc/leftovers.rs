//! What containers have on the host, and its removal: of one that ended, and of all that a crash left.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use ionian_domain::container::ContainerExit;

use super::{Inner, cgroup_of};
use crate::bundle::BundlePaths;
use crate::cgroup::{CgroupError, Hierarchies};
use crate::config::ContainerConfig;
use crate::keeper::record::Record;
use crate::keeper::{self, Keeper};
use crate::mounts;
use crate::network::{self, Names, Slot};
use crate::oci::OciProgram;
use crate::overlay::{MountGuard, unmount_or_detach};
use crate::running::{KILL_TIMEOUT, Remains};
use crate::runtime::{DisposeError, ReapError, ReapReport, StartError};
use crate::userns::ranges::{self, Claim};

/// Everything that a container has on the host, from the moment its name is taken. Dropped without
/// [`Remains::remove`], it is removed by a thread in the background.
pub(super) struct Leftovers {
    inner: Arc<Inner>,
    pub(super) program: Arc<OciProgram>,
    pub(super) name: String,
    pub(super) paths: BundlePaths,
    /// The stage, if there is one, and the root. Their sender goes when nothing more is made for the container.
    mounts: Option<Receiver<MountGuard>>,
    /// Its range of ids, with a user namespace.
    pub(super) ids: Option<Claim>,
    pub(super) slot: Option<Slot>,
    pub(super) keeper: Option<Arc<Keeper>>,
    pub(super) may_be_adopted: bool,
    removed: bool,
}

impl Leftovers {
    pub(super) fn claim(inner: &Arc<Inner>, program: &Arc<OciProgram>, name: &str) -> Result<Self, StartError> {
        {
            let mut live = inner.live();
            if live.shut_down {
                return Err(StartError::ShutDown);
            }
            if live.adoptable.contains_key(name) || !live.names.insert(name.to_owned()) {
                return Err(StartError::NameTaken { name: name.to_owned() });
            }
        }
        let mut paths = paths_of(&inner.config, name);
        // A sandbox has a user namespace of its own making.
        let mapping = inner.mapping.as_ref().filter(|_| program.sandboxing.is_none());
        if mapping.is_some() {
            paths.seen = stage_of(&inner.config, name);
        }
        let mut leftovers = Self {
            inner: Arc::clone(inner),
            program: Arc::clone(program),
            name: name.to_owned(),
            paths: paths.clone(),
            mounts: None,
            ids: None,
            slot: None,
            keeper: None,
            may_be_adopted: false,
            removed: false,
        };
        let failed = |path: PathBuf| {
            let name = name.to_owned();
            move |source| StartError::Prepare { name, path, source }
        };
        for directory in [paths.directory, paths.specification] {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&directory)
                .map_err(failed(directory))?;
        }
        if let Some(mapping) = mapping {
            let claim = mapping.claim(name).map_err(failed(paths.seen.clone()))?;
            leftovers.ids = Some(claim);
            // What is mounted there says who may enter.
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&paths.seen)
                .map_err(failed(paths.seen))?;
        }
        Ok(leftovers)
    }

    /// Of a container of an earlier process, whose name has been moved to the live ones.
    pub(super) fn taken_over(
        inner: &Arc<Inner>,
        program: &Arc<OciProgram>,
        name: &str,
        slot: Option<Slot>,
        id_range: Option<u32>,
    ) -> Self {
        let mut paths = paths_of(&inner.config, name);
        let (sender, mounts) = channel();
        if id_range.is_some() {
            paths.seen = stage_of(&inner.config, name);
            // The receiver is here; and the sender goes at the end of this.
            let _ = sender.send(MountGuard::taken_over(paths.seen.clone()));
        }
        let _ = sender.send(MountGuard::taken_over(paths.root()));
        Self {
            inner: Arc::clone(inner),
            program: Arc::clone(program),
            name: name.to_owned(),
            mounts: Some(mounts),
            ids: id_range.map(Claim::taken_over),
            paths,
            slot,
            keeper: None,
            may_be_adopted: true,
            removed: false,
        }
    }

    /// Where the job that prepares the container puts what it has mounted, each after what it is mounted on. A start can be abandoned while that job runs, and
    /// nothing is removed before it has ended.
    pub(super) fn expect_mounts(&mut self) -> Sender<MountGuard> {
        let (sender, receiver) = channel();
        self.mounts = Some(receiver);
        sender
    }

    /// Goes on after a failure, so that one stuck part does not keep the others; returns the first.
    fn remove_everything(&mut self) -> Result<(), DisposeError> {
        self.removed = true;
        // All that the job sent, once it has ended.
        let mounts: Vec<_> = self.mounts.take().into_iter().flatten().collect();
        let name = self.name.clone();
        let cgroup = self.inner.cgroup_of(&name);
        let failed = |error| cgroup_failure(&name, error);
        let mut results = Vec::new();
        // Before the groups, so that it starts nothing in them any more.
        if let Some(keeper) = self.keeper.take()
            && !keeper.kill_and_wait(KILL_TIMEOUT)
        {
            results.push(Err(DisposeError::StillRunning {
                name: name.clone(),
                seconds: KILL_TIMEOUT.as_secs(),
            }));
        }
        results.extend([
            self.inner.cgroups.kill_all(&cgroup).map(|_| ()).map_err(failed),
            self.inner.cgroups.remove(&cgroup).map(|_| ()).map_err(failed),
        ]);
        for mount in mounts.into_iter().rev() {
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
        let directories = [
            self.paths.directory.clone(),
            self.paths.specification.clone(),
            self.inner.config.runc_root().join(&name),
        ];
        let _reader = keeper::let_end(&self.paths.specification);
        for directory in directories {
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
        let stage = stage_of(&self.inner.config, &name);
        results.push(remove_stage(&stage).map(|_| ()).map_err(|source| DisposeError::Remove {
            name: name.clone(),
            path: stage,
            source,
        }));
        // Last: nothing with these ids is left.
        if let Some(claim) = self.ids.take() {
            let path = PathBuf::from(format!("the claim of ids {}", claim.number()));
            results.push(claim.release().map_err(|source| DisposeError::Remove {
                name: name.clone(),
                path,
                source,
            }));
        }
        self.inner.live().names.remove(&name);
        results.into_iter().collect()
    }
}

impl Remains for Leftovers {
    fn exit_of(&self, status: ExitStatus) -> ContainerExit {
        let oom_kills = || self.inner.cgroups.oom_kills(&self.inner.cgroup_of(&self.name));
        self.program.exit_of(status, oom_kills)
    }

    fn remove(mut self: Box<Self>) -> Result<(), DisposeError> {
        self.remove_everything()
    }

    fn may_be_adopted(&self) -> bool {
        self.may_be_adopted
    }

    fn leave(mut self: Box<Self>) {
        self.removed = true;
        for mount in self.mounts.take().into_iter().flatten() {
            mount.leave();
        }
        // The name and the address stay taken.
        if let Some(slot) = self.slot.take() {
            self.inner.live().released.push(slot);
        }
        // It is our child, and this process may go on.
        if let Some(keeper) = self.keeper.take() {
            tokio::spawn(async move { keeper.reap_when_ended().await });
        }
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
            program: Arc::clone(&self.program),
            name: self.name.clone(),
            paths: self.paths.clone(),
            mounts: self.mounts.take(),
            ids: self.ids.take(),
            slot: self.slot.take(),
            keeper: self.keeper.take(),
            may_be_adopted: false,
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

pub(super) fn paths_of(config: &ContainerConfig, name: &str) -> BundlePaths {
    BundlePaths {
        directory: config.containers_dir().join(name),
        specification: config.specifications_dir().join(name),
        seen: config.containers_dir().join(name),
    }
}

fn stage_of(config: &ContainerConfig, name: &str) -> PathBuf {
    config.stages_dir().join(name)
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

/// What a [`reap`] leaves alone. Asked after each list has been read: who began in between is known by then.
pub(super) struct Keep<'a> {
    pub container: &'a dyn Fn(&str) -> bool,
    pub links: &'a dyn Fn() -> BTreeSet<String>,
}

/// Removes everything of this instance but what it is told to keep: first the processes, then what they used.
/// Blocks.
pub(super) fn reap(
    config: &ContainerConfig,
    cgroups: &Hierarchies,
    boot_id: &str,
    keep: &Keep<'_>,
) -> Result<ReapReport, ReapError> {
    let mut report = ReapReport::default();
    let containers = config.containers_dir();
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| ReapError::Read { path, source }
    };
    let specifications = config.specifications_dir();
    for name in names_in(&specifications).map_err(read(&specifications))? {
        if !(keep.container)(&name)
            && let Some(record) = Record::read(&specifications.join(&name), boot_id)
        {
            kill_keeper(&name, &record)?;
        }
    }
    for name in cgroups.children(&config.cgroup_path())? {
        if (keep.container)(&name) {
            continue;
        }
        let cgroup = cgroup_of(config, &name);
        report.killed_processes += cgroups.kill_all(&cgroup)?;
        report.cgroups += cgroups.remove(&cgroup)?;
    }
    let stages = config.stages_dir();
    let is_live = |path: &Path| {
        path.strip_prefix(&containers)
            .or_else(|_| path.strip_prefix(&stages))
            .ok()
            .and_then(|path| path.iter().next())
            .is_some_and(|name| (keep.container)(name.to_string_lossy().as_ref()))
    };
    let mounted = mounts::below_any(&[&containers, &stages]).map_err(read(Path::new("/proc/self/mountinfo")))?;
    for target in mounted {
        if !is_live(&target) {
            unmount_or_detach(&target).map_err(|source| ReapError::Unmount { path: target, source })?;
            report.mounts += 1;
        }
    }
    report.interfaces = network::reap_links(&Names::of(config), keep.links).map_err(ReapError::Network)?;
    for name in stages_in(&stages).map_err(read(&stages))? {
        if (keep.container)(&name) {
            continue;
        }
        let path = stages.join(&name);
        report.directories += usize::from(remove_stage(&path).map_err(|source| ReapError::Remove { path, source })?);
    }
    for parent in [containers.clone(), specifications, config.runc_root()] {
        for name in names_in(&parent).map_err(read(&parent))? {
            if (keep.container)(&name) {
                continue;
            }
            let path = parent.join(&name);
            let _reader = keeper::let_end(&path);
            report.directories += usize::from(remove_directory(&path).map_err(|source| ReapError::Remove {
                path: path.clone(),
                source,
            })?);
        }
    }
    ranges::reap(&config.short_id(), keep.container).map_err(|source| ReapError::Remove {
        path: PathBuf::from("the claims of ids"),
        source,
    })?;
    Ok(report)
}

/// None where there never were user namespaces.
fn stages_in(directory: &Path) -> io::Result<Vec<String>> {
    match names_in(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result,
    }
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn kill_keeper(name: &str, record: &Record) -> Result<(), ReapError> {
    let failed = |source| ReapError::Keeper {
        name: name.to_owned(),
        pid: record.keeper.pid,
        source,
    };
    match keeper::kill_stray(&record.keeper, KILL_TIMEOUT) {
        Ok(true) => Ok(()),
        Ok(false) => Err(failed(io::Error::from(io::ErrorKind::TimedOut))),
        Err(error) => Err(failed(error)),
    }
}

/// Whether there was one. It is empty once its mount is gone, and holds users' directories while it is not: so
/// nothing is removed in it.
pub(super) fn remove_stage(path: &Path) -> io::Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
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
