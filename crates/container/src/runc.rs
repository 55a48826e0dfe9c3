//! The isolated runtime: `runc` as a foreground process per container, under a keeper.
//!
//! `runc run` stays for the container's life and relays its output; in return its exit is the container's,
//! without polling. It is the child of a [`keeper`](crate::keeper), so that it and the container live on when
//! this process does not. `runc create` followed by `runc start` took 25 to 30 ms where `runc run` took 20,
//! and then nobody would learn the exit status.
//!
//! The steps of a start: a network namespace is taken from the pool, the root is mounted (with user namespaces, on
//! a [`stage`](crate::userns::stage)), the bundle is written, runc runs until it has written the first process's number. Whatever fails, `Leftovers` removes
//! what there is by then.

mod adoption;
mod leftovers;
mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use ionian_domain::container::RuntimeKind;
use nix::fcntl::{Flock, FlockArg};

use self::adoption::Adoptable;
use self::leftovers::{Keep, Leftovers, reap, remove_stage};
use self::start::start;
use crate::cgroup::Hierarchies;
use crate::config::ContainerConfig;
use crate::keeper::{self, record};
use crate::network::{Network, Slot, Survivor};
use crate::oci::OciProgram;
use crate::running::Remains;
use crate::runtime::{
    Capabilities, DisposeError, Launch, NetworkMode, OpenError, ReapError, ReapReport, RunningContainer, Runtime,
    StartError,
};
use crate::userns::{Mapping, UserNamespaces, ranges};

pub struct RuncRuntime {
    inner: Arc<Inner>,
    program: Arc<OciProgram>,
}

struct Inner {
    config: ContainerConfig,
    cgroups: Hierarchies,
    network: Network,
    /// Names this run of the machine.
    boot_id: String,
    /// Descriptors that keepers must not have.
    inherited: Vec<RawFd>,
    live: Mutex<Live>,
    /// `None` where containers of runc have the host's ids.
    mapping: Option<Mapping>,
    /// Keeps other processes from using the same directory.
    _lock: Flock<File>,
}

#[derive(Default)]
struct Live {
    names: BTreeSet<String>,
    /// Of an earlier process, until they are adopted or discarded.
    adoptable: BTreeMap<String, Adoptable>,
    /// Keep addresses taken whose containers have been let go of.
    released: Vec<Slot>,
    shut_down: bool,
}

impl RuncRuntime {
    /// Checks the host, finds what may be adopted, removes what else an earlier run left behind and sets up
    /// the network, or takes it over with its containers.
    pub async fn open(config: ContainerConfig) -> Result<Self, OpenError> {
        let runc = match &config.runc_path {
            Some(path) => path.clone(),
            None => find_program("runc").ok_or(OpenError::ProgramMissing {
                program: "runc",
                package: "runc",
            })?,
        };
        Self::open_with(config, OciProgram::runc(runc)).await
    }

    /// The same for another program.
    pub(crate) async fn open_with(config: ContainerConfig, program: OciProgram) -> Result<Self, OpenError> {
        let runtime = program.kind();
        if !nix::unistd::geteuid().is_root() {
            return Err(OpenError::NeedsRoot { runtime });
        }
        find_program("nft").ok_or(OpenError::ProgramMissing {
            program: "nft",
            package: "nftables",
        })?;
        let cgroups = Hierarchies::detect().map_err(|reason| OpenError::Cgroups { reason })?;
        let lock = prepare_state_dir(&config)?;

        let failed = |path: &str| {
            let path = PathBuf::from(path);
            move |source| OpenError::StateDir { path, source }
        };
        let mapping = if program.sandboxing.is_none() {
            let config = config.clone();
            run_blocking(move || open_mapping(&config)).await?
        } else {
            None
        };
        let boot_id = record::boot_id().map_err(failed("/proc/sys/kernel/random/boot_id"))?;
        let inherited = keeper::inherited_descriptors().map_err(failed("/proc/self/fd"))?;

        let (found, survivor) = find_survivors(&config, &boot_id).await?;
        let report = {
            let (config, cgroups, boot_id) = (config.clone(), cgroups.clone(), boot_id.clone());
            let names: BTreeSet<_> = found.keys().cloned().collect();
            let links: BTreeSet<_> = found.values().filter_map(adoption::Found::host_link).collect();
            run_blocking(move || {
                let keep = Keep {
                    container: &|name| names.contains(name),
                    links: &|| links.clone(),
                };
                reap(&config, &cgroups, &boot_id, &keep)
            })
            .await
        }
        .map_err(OpenError::Reap)?;
        if !report.is_empty() {
            tracing::warn!(?report, "removed what an earlier run left behind");
        }
        let policies: Vec<_> = found.values().filter_map(adoption::Found::policy).collect();
        let network = Network::open(&config, survivor, &policies)
            .await
            .map_err(OpenError::Network)?;
        let adoptable = adoption::take_over(found, &network);
        network.fill_pool();
        tracing::info!(program = %program.path.display(), cgroups = if cgroups.is_v2() { 2 } else { 1 }, adoptable = adoptable.len(), user_namespaces = mapping.is_some(), "the {runtime} runtime is ready");
        let live = Mutex::new(Live {
            adoptable,
            ..Live::default()
        });
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                cgroups,
                network,
                boot_id,
                inherited,
                live,
                mapping,
                _lock: lock,
            }),
            program: Arc::new(program),
        })
    }

    /// Another program for containers of the same instance.
    pub(crate) fn beside(&self, program: OciProgram) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            program: Arc::new(program),
        }
    }

    pub(crate) fn config(&self) -> &ContainerConfig {
        &self.inner.config
    }

    /// The same as [`Runtime::network`], which is always there for this runtime.
    pub fn bridge_network(&self) -> &Network {
        &self.inner.network
    }
}

#[async_trait]
impl Runtime for RuncRuntime {
    fn kind(&self) -> RuntimeKind {
        self.program.kind()
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
                runtime: self.kind(),
                what,
            });
        }
        if launch.rootfs.lower_dirs.is_empty() {
            let what = "way to run on the host's own file system (the root has no layers)".to_owned();
            return Err(StartError::Unsupported {
                runtime: self.kind(),
                what,
            });
        }
        let mut leftovers = Leftovers::claim(&self.inner, &self.program, &launch.name)?;
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
            // Their addresses with them.
            inner.live().adoptable.clear();
            let keep = Keep {
                container: &|name| inner.live().names.contains(name),
                links: &|| inner.network.links(),
            };
            reap(&inner.config, &inner.cgroups, &inner.boot_id, &keep)
        })
        .await
    }

    async fn remove_all(&self) -> Result<(), ReapError> {
        let inner = Arc::clone(&self.inner);
        {
            let mut live = inner.live();
            live.shut_down = true;
            live.adoptable.clear();
            live.released.clear();
        }
        inner.network.remove().await.map_err(ReapError::Network)?;
        run_blocking(move || {
            let nothing = Keep {
                container: &|_| false,
                links: &BTreeSet::new,
            };
            reap(&inner.config, &inner.cgroups, &inner.boot_id, &nothing)?;
            inner
                .cgroups
                .remove(&inner.config.cgroup_path())
                .map_err(ReapError::from)?;
            ranges::remove_directory_if_empty();
            let stages = inner.config.stages_dir();
            // Not with what is in them: they are empty, or users' directories are still mounted there.
            remove_stage(&stages).map_err(|source| ReapError::Remove { path: stages, source })?;
            let volatile = &inner.config.volatile_dir;
            match std::fs::remove_dir_all(volatile) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(ReapError::Remove {
                    path: volatile.clone(),
                    source,
                }),
                Ok(()) | Err(_) => Ok(()),
            }
        })
        .await
    }

    fn adoptable(&self) -> Vec<String> {
        let live = self.inner.live();
        let own = live
            .adoptable
            .iter()
            .filter(|(_, adoptable)| adoptable.is_of(&self.program));
        own.map(|(name, _)| name.clone()).collect()
    }

    async fn adopt(&self, name: &str) -> Option<RunningContainer> {
        adoption::adopt(&self.inner, &self.program, name)
    }

    async fn discard_unadopted(&self) -> Result<(), DisposeError> {
        let (inner, program) = (Arc::clone(&self.inner), Arc::clone(&self.program));
        run_blocking(move || adoption::discard(&inner, &program)).await
    }

    async fn detach(&self) -> Result<(), ReapError> {
        self.inner.live().shut_down = true;
        self.inner.network.close().await.map_err(ReapError::Network)
    }
}

/// What may be adopted, and the network that it needs.
async fn find_survivors(
    config: &ContainerConfig,
    boot_id: &str,
) -> Result<(BTreeMap<String, adoption::Found>, Option<Survivor>), OpenError> {
    let mut found = {
        let (config, boot_id) = (config.clone(), boot_id.to_owned());
        run_blocking(move || adoption::find(&config, &boot_id)).await
    }
    .map_err(OpenError::Reap)?;
    if !found.values().any(|found| found.host_link().is_some()) {
        return Ok((found, None));
    }
    let survivor = Survivor::find(config).await.map_err(OpenError::Network)?;
    let before = found.len();
    found.retain(|_, found| found.is_reachable_in(survivor.as_ref()));
    if found.len() < before {
        tracing::warn!(
            containers = before - found.len(),
            "the network of containers that still ran cannot be taken over; they are killed"
        );
    }
    Ok((found, survivor))
}

impl Inner {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cgroup_of(&self, name: &str) -> String {
        cgroup_of(&self.config, name)
    }
}

/// Also opens the directory where containers are put together to their users.
fn open_mapping(config: &ContainerConfig) -> Result<Option<Mapping>, OpenError> {
    let mode = config.user_namespaces;
    if mode == UserNamespaces::Off {
        tracing::warn!(
            "user namespaces are off: root in a container is root's id on this host, kept in by everything else"
        );
        return Ok(None);
    }
    let mapping = match Mapping::open(config) {
        Ok(mapping) => mapping,
        Err(reason) if mode == UserNamespaces::Require => return Err(OpenError::UserNamespaces { reason }),
        Err(reason) => {
            tracing::warn!(
                reason,
                "containers have no user namespaces: root in one is root's id on this host, kept in by everything else"
            );
            return Ok(None);
        }
    };
    let stages = config.stages_dir();
    for directory in [&config.volatile_dir, &stages] {
        fs::DirBuilder::new()
            .recursive(true)
            .create(directory)
            .and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(0o711)))
            .map_err(|source| OpenError::StateDir {
                path: directory.clone(),
                source,
            })?;
    }
    Ok(Some(mapping))
}

fn cgroup_of(config: &ContainerConfig, name: &str) -> String {
    format!("{}/{name}", config.cgroup_path())
}

fn prepare_state_dir(config: &ContainerConfig) -> Result<Flock<File>, OpenError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::StateDir { path, source }
    };
    let directories = [
        config.state_dir.clone(),
        config.containers_dir(),
        config.volatile_dir.clone(),
        config.runc_root(),
        config.specifications_dir(),
    ];
    for directory in directories {
        // Specifications hold secrets.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed(&directory))?;
    }
    let kind = nix::sys::statfs::statfs(&config.volatile_dir)
        .map_err(|error| failed(&config.volatile_dir)(error.into()))?
        .filesystem_type();
    if kind != nix::sys::statfs::TMPFS_MAGIC {
        // Said, and not refused: what is written here is removed with its container.
        tracing::warn!(directory = %config.volatile_dir.display(), "not in memory: secrets of running containers touch the disk");
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
