//! User namespaces: root in a container is a user of the host that owns nothing there.
//!
//! Each container has 65,536 ids of the host of its own ([`ranges`]). Files keep the ids that they have on disk:
//! every layer and every bind is mounted with its owners moved into the container's range ([`idmap`]), so an
//! image is stored once, and a layer that a container wrote belongs to root again. What the container's own user
//! must reach before it has a root is put together on a [`stage`].
//!
//! Whether this host can do so is tried when the runtime is opened, and never found out by a container: without
//! it, [`UserNamespaces::Auto`] says so once in the log, and [`UserNamespaces::Require`] refuses to open.
//! The sandboxes of `runsc` have a namespace of their own making, and nothing of this.

pub(crate) mod idmap;
pub(crate) mod ranges;
pub(crate) mod stage;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use self::idmap::{IdMap, Layers};
use self::ranges::{Claim, IdRange, IdRanges};
use self::stage::Stage;
use crate::config::ContainerConfig;
use crate::overlay::WritableLayer;

/// Maps that are kept for the next container with the same range; each is one descriptor. Ranges are taken from
/// the lowest free one upwards, so these are those that come back.
const MAX_KEPT_MAPS: usize = 64;

/// Whether containers of `runc` get user namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UserNamespaces {
    /// Where the kernel has what it takes.
    #[default]
    Auto,
    /// The runtime does not open without.
    Require,
    /// Root in a container is root's id on the host.
    Off,
}

impl fmt::Display for UserNamespaces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Require => "require",
            Self::Off => "off",
        })
    }
}

impl FromStr for UserNamespaces {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Auto, Self::Require, Self::Off]
            .into_iter()
            .find(|mode| mode.to_string() == text)
            .ok_or_else(|| format!("'{text}' is none of auto, require and off"))
    }
}

/// What the containers of one instance get their ids from.
pub(crate) struct Mapping {
    ranges: IdRanges,
    layers: Layers,
    kept: Mutex<BTreeMap<IdRange, Arc<IdMap>>>,
}

impl Mapping {
    /// Tries everything that a container needs. The error is a reason for people. Blocks.
    pub(crate) fn open(config: &ContainerConfig) -> Result<Self, String> {
        let ranges = IdRanges::open(&config.short_id()).map_err(|error| crate::chain(&error))?;
        let layers = trial(&config.state_dir, &config.volatile_dir)?;
        Ok(Self {
            ranges,
            layers,
            kept: Mutex::default(),
        })
    }

    /// For the container of this name, until the claim is released.
    pub(crate) fn claim(&self, name: &str) -> io::Result<Claim> {
        self.ranges.claim(name)
    }

    pub(crate) fn layers(&self) -> Layers {
        self.layers
    }

    pub(crate) fn map(&self, range: IdRange) -> io::Result<Arc<IdMap>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = kept().get(&range) {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(IdMap::create(range)?);
        let mut kept = kept();
        if kept.len() < MAX_KEPT_MAPS {
            kept.insert(range, Arc::clone(&map));
        }
        Ok(map)
    }
}

/// Does once what every start does: a map, an overlay in `state_dir` with moved owners, a file system in memory with
/// moved owners below `volatile_dir`, and `/proc` in a user namespace. Returns how layers are handed over here.
/// Leaves nothing. The error is a reason for people.
pub(crate) fn trial(state_dir: &Path, volatile_dir: &Path) -> Result<Layers, String> {
    closed_to_others(volatile_dir)?;
    let map = IdMap::create(IdRange::TRIAL)
        .map_err(|error| format!("a user namespace cannot be made ({error}); see user.max_user_namespaces"))?;
    idmap::try_proc()
        .map_err(|error| format!("/proc cannot be mounted in a user namespace ({error}), as in some containers"))?;
    let map = Arc::new(map);
    let parts = tempfile::Builder::new()
        .prefix(".ionian-trial")
        .tempdir_in(state_dir)
        .map_err(|error| format!("{}: {error}", state_dir.display()))?;
    let place = tempfile::Builder::new()
        .prefix(".ionian-trial")
        .tempdir_in(volatile_dir)
        .map_err(|error| format!("{}: {error}", volatile_dir.display()))?;
    let part = |name: &str| {
        let path = parts.path().join(name);
        fs::create_dir(&path)
            .map(|()| path.clone())
            .map_err(|error| format!("{}: {error}", path.display()))
    };
    let (lower, upper_dir, work_dir) = (part("lower")?, part("upper")?, part("work")?);
    let writable = WritableLayer {
        upper_dir: &upper_dir,
        work_dir: &work_dir,
        volatile: true,
    };
    let mut reason = String::new();
    for layers in [Layers::Detached, Layers::Attached] {
        let attempt = || -> Result<(), String> {
            let (stage, guard) = Stage::mount(place.path(), &map).map_err(|error| error.to_string())?;
            let root = stage
                .mount_root(std::slice::from_ref(&lower), writable, layers)
                .map_err(|error| crate::chain(&error))?;
            let written = fs::write(root.path().join("file"), "x").map_err(|error| error.to_string());
            root.unmount().map_err(|error| crate::chain(&error))?;
            let bound = stage.try_bind().map_err(|error| error.to_string());
            guard.unmount().map_err(|error| crate::chain(&error))?;
            written.and(bound)
        };
        match attempt() {
            Ok(()) => return Ok(layers),
            Err(error) => reason = error,
        }
    }
    Err(format!(
        "this kernel or the file system of {} cannot map owners ({reason}); it takes Linux 6.3 and ext4, xfs or btrfs",
        state_dir.display()
    ))
}

/// The stage of a container is reached by its own user, who is nobody on this host.
fn closed_to_others(directory: &Path) -> Result<(), String> {
    const SEARCH_FOR_OTHERS: u32 = 0o001;
    // The directory itself is the platform's, which opens it.
    for above in directory.ancestors().skip(1) {
        match fs::metadata(above) {
            Ok(metadata) if metadata.permissions().mode() & SEARCH_FOR_OTHERS == 0 => {
                return Err(format!("{} cannot be entered by other users", above.display()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{}: {error}", above.display())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_have_one_text_form() {
        for mode in [UserNamespaces::Auto, UserNamespaces::Require, UserNamespaces::Off] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert!("on".parse::<UserNamespaces>().is_err());
    }

    #[test]
    fn a_directory_that_others_cannot_enter_is_no_place_for_stages() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        let chmod = |mode| fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        chmod(0o711);
        assert_eq!(closed_to_others(&inner), Ok(()));
        chmod(0o700);
        assert!(
            closed_to_others(&inner)
                .unwrap_err()
                .contains("cannot be entered by other users")
        );
    }

    #[test]
    fn a_trial_leaves_nothing() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let state = tempfile::tempdir().unwrap();
        let volatile = tempfile::tempdir_in("/dev/shm").unwrap();
        println!("{:?}", trial(state.path(), volatile.path()));
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(volatile.path()).unwrap().count(), 0);
        assert_eq!(
            crate::mounts::below(volatile.path()).unwrap(),
            Vec::<std::path::PathBuf>::new()
        );
    }
}
