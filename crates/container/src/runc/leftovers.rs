//! What containers have on the host, and its removal: of one that ended, and of all that a crash left.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use ionian_domain::container::ContainerExit;

use super::{Inner, cgroup_of};
use crate::bundle::BundlePaths;
use crate::cgroup::{CgroupError, Hierarchies};
use crate::config::ContainerConfig;
use crate::mounts;
use crate::network::{self, Names, Slot};
use crate::oci::OciProgram;
use crate::overlay::{MountGuard, unmount_or_detach};
use crate::running::{KILL_TIMEOUT, Remains};
use crate::runtime::{DisposeError, ReapError, ReapReport, StartError};

/// Everything that a container has on the host, from the moment its name is taken. Dropped without
/// [`Remains::remove`], it is removed by a thread in the background.
pub(super) struct Leftovers {
    inner: Arc<Inner>,
    pub(super) program: Arc<OciProgram>,
    pub(super) name: String,
    pub(super) paths: BundlePaths,
    /// The root. Its sender goes when nothing more is made for the container.
    mount: Option<Receiver<MountGuard>>,
    pub(super) slot: Option<Slot>,
    removed: bool,
}

impl Leftovers {
    pub(super) fn claim(inner: &Arc<Inner>, program: &Arc<OciProgram>, name: &str) -> Result<Self, StartError> {
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
            specification: inner.config.specifications_dir().join(name),
        };
        let leftovers = Self {
            inner: Arc::clone(inner),
            program: Arc::clone(program),
            name: name.to_owned(),
            paths: paths.clone(),
            mount: None,
            slot: None,
            removed: false,
        };
        for directory in [paths.directory, paths.specification] {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&directory)
                .map_err(|source| StartError::Prepare {
                    name: name.to_owned(),
                    path: directory,
                    source,
                })?;
        }
        Ok(leftovers)
    }

    /// Where the job that prepares the container puts its root. A start can be abandoned while that job runs, and
    /// nothing is removed before it has ended.
    pub(super) fn expect_mount(&mut self) -> Sender<MountGuard> {
        let (sender, receiver) = channel();
        self.mount = Some(receiver);
        sender
    }

    /// Goes on after a failure, so that one stuck part does not keep the others; returns the first.
    fn remove_everything(&mut self) -> Result<(), DisposeError> {
        self.removed = true;
        // All that the job sent, once it has ended.
        let mounts: Vec<_> = self.mount.take().into_iter().flatten().collect();
        let name = self.name.clone();
        let cgroup = self.inner.cgroup_of(&name);
        let failed = |error| cgroup_failure(&name, error);
        let mut results = vec![
            self.inner.cgroups.kill_all(&cgroup).map(|_| ()).map_err(failed),
            self.inner.cgroups.remove(&cgroup).map(|_| ()).map_err(failed),
        ];
        for mount in mounts {
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
pub(super) fn reap(
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
    for parent in [containers.clone(), config.specifications_dir(), config.runc_root()] {
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
