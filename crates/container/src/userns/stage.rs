//! Where a container is put together before it runs.
//!
//! `runc` makes a container's mounts as the container's own root, who is nobody on this host: it cannot enter the
//! platform's directories, may not mount `/sys`, and sees nothing of files with the host's owners. So all that it
//! needs is in one place, which belongs to that root and which nobody else can enter:
//!
//! | below the stage | |
//! |---|---|
//! | `root` | the container's root |
//! | `sys` | `/sys` of its network namespace |
//! | `bind-0`, ... | sources of binds, their owners moved |
//! | `hosts`, `hostname`, `resolv.conf` | the container's own files |
//! | `layers-0`, ... | layers, on kernels before 6.15 |
//!
//! The stage is a file system in memory, so removing its mount removes them all.
//!
//! **The network namespace belongs to the host's user namespace**, and so root in a container has no power over it:
//! what the kernel offers there to whoever owns it (filters, routes, tunnels) is where most of the ways out of user
//! namespaces were. Its `/sys` must be mounted by who does own it, which is done here.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, mount_change,
};

use super::idmap::{BindAttributes, IdMap, Layers, MappedPaths, attach, clone_bind};
use crate::overlay::{MountGuard, OverlayError, WritableLayer, mount_overlay};
use crate::runtime::Bind;

/// Three small files are on it that the container may write to; more than this is "no space left".
const STAGE_BYTES: usize = 1 << 20;

/// A mounted stage. Unmounted by the guard that comes with it.
pub(crate) struct Stage {
    directory: PathBuf,
    map: Arc<IdMap>,
}

impl Stage {
    /// Mounts an empty one on an existing directory. Blocks, as everything here.
    pub(crate) fn mount(directory: &Path, map: &Arc<IdMap>) -> io::Result<(Self, MountGuard)> {
        let owner = map.range.first().to_string();
        let size = STAGE_BYTES.to_string();
        let options = [("mode", "0700"), ("uid", &owner), ("gid", &owner), ("size", &size)];
        let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let memory = file_system("tmpfs", &options, flags)?;
        attach(memory.as_fd(), directory)?;
        let guard = MountGuard::taken_over(directory.to_owned());
        // What is mounted on it concerns no other mount namespace.
        mount_change(directory, MountPropagationFlags::PRIVATE)?;
        let stage = Self {
            directory: directory.to_owned(),
            map: Arc::clone(map),
        };
        Ok((stage, guard))
    }

    /// The container's root.
    pub(crate) fn mount_root(
        &self,
        lower_dirs: &[PathBuf],
        writable: WritableLayer<'_>,
        layers: Layers,
    ) -> Result<MountGuard, OverlayError> {
        let target = self.directory.join("root");
        let map_error = |source| OverlayError::Map {
            target: target.clone(),
            source,
        };
        fs::create_dir_all(&target).map_err(|source| OverlayError::Layer {
            path: target.clone(),
            source,
        })?;
        let mut paths: Vec<&Path> = lower_dirs.iter().map(PathBuf::as_path).collect();
        // On one mount, as overlayfs wants them, since they are in one group.
        paths.extend([writable.upper_dir, writable.work_dir]);
        let mapped = MappedPaths::of(&paths, &self.map, layers, &self.directory).map_err(map_error)?;
        let seen = |path: &Path| mapped.seen(path).map_err(map_error);
        let lower_dirs = lower_dirs
            .iter()
            .map(|path| seen(path))
            .collect::<Result<Vec<_>, _>>()?;
        let (upper_dir, work_dir) = (seen(writable.upper_dir)?, seen(writable.work_dir)?);
        let writable = WritableLayer {
            upper_dir: &upper_dir,
            work_dir: &work_dir,
            ..writable
        };
        mount_overlay(&lower_dirs, Some(writable), &target)
    }

    /// `/sys` of a network namespace: that of the given path, else a new one with nothing but loopback. Returns the
    /// namespace.
    pub(crate) fn mount_sys(&self, namespace: Option<&Path>) -> io::Result<OwnedFd> {
        let namespace = namespace.map(File::open).transpose()?;
        // A thread of its own, since it enters the namespace and ends in it.
        let entered = std::thread::Builder::new()
            .name("ionian-sysfs".to_owned())
            .spawn(move || {
                let namespace = match namespace {
                    Some(namespace) => {
                        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                        namespace
                    }
                    None => {
                        unshare(CloneFlags::CLONE_NEWNET)?;
                        bring_loopback_up()?;
                        File::open("/proc/thread-self/ns/net")?
                    }
                };
                let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
                    | MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                Ok::<_, io::Error>((OwnedFd::from(namespace), file_system("sysfs", &[], flags)?))
            })?
            .join();
        let (namespace, mounted) = entered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let target = self.sys();
        fs::create_dir(&target)?;
        attach(mounted.as_fd(), &target)?;
        Ok(namespace)
    }

    pub(crate) fn sys(&self) -> PathBuf {
        self.directory.join("sys")
    }

    /// Where `runc` finds the source of a bind.
    pub(crate) fn mount_bind(&self, number: usize, wanted: &Bind) -> io::Result<PathBuf> {
        let attributes = BindAttributes {
            read_only: wanted.read_only,
            // "Read-only" would not hold for a mount inside the source.
            recursive: !wanted.read_only,
        };
        let is_directory = fs::metadata(&wanted.source)?.is_dir();
        let tree = clone_bind(&wanted.source, &self.map, attributes)?;
        let target = self.directory.join(format!("bind-{number}"));
        if is_directory {
            fs::create_dir(&target)?;
        } else {
            File::create_new(&target)?;
        }
        attach(tree.as_fd(), &target)?;
        Ok(target)
    }

    /// Whether owners of files in memory can be moved, which secrets of a build need.
    pub(crate) fn try_bind(&self) -> io::Result<()> {
        let (source, target) = (self.directory.join("source"), self.directory.join("bind"));
        fs::create_dir(&source)?;
        fs::create_dir(&target)?;
        let attributes = BindAttributes {
            read_only: false,
            recursive: false,
        };
        attach(clone_bind(&source, &self.map, attributes)?.as_fd(), &target)
    }
}

/// A new file system that is mounted nowhere yet.
fn file_system(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)?;
    }
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// In the network namespace of the calling thread.
fn bring_loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let name = CString::from(c"lo");
    // SAFETY: zero is a valid value of every field of this plain structure.
    #[expect(
        unsafe_code,
        reason = "a structure of the kernel that has no other way of being made"
    )]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the socket is open, and the request is what this number of ioctl reads.
    #[expect(unsafe_code, reason = "there is no wrapper for it")]
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::userns::ranges::IdRange;

    fn can_map() -> Option<Arc<IdMap>> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        match IdMap::create(IdRange::TRIAL) {
            Ok(map) => Some(Arc::new(map)),
            Err(error) => {
                println!("skipped: no user namespaces here: {error}");
                None
            }
        }
    }

    fn directory(root: &Path, name: &str) -> PathBuf {
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// The second way is for kernels before 6.15, and works on later ones too.
    #[test]
    fn a_root_is_stacked_of_mapped_layers_in_both_ways() {
        let Some(map) = can_map() else { return };
        let first = IdRange::TRIAL.first();
        let data = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = directory(memory.path(), "stage");
        let lower_dirs: Vec<PathBuf> = (0..40)
            .map(|index| directory(data.path(), &format!("layers/{index}/fs")))
            // On another mount, and with a path that the kernel would not take as it is.
            .chain([directory(memory.path(), &format!("a:b,c/{}", "x".repeat(250)))])
            .collect();
        for (index, layer) in lower_dirs.iter().enumerate() {
            fs::write(layer.join("shared"), index.to_string()).unwrap();
        }
        std::os::unix::fs::chown(lower_dirs[3].join("shared"), Some(1000), Some(29)).unwrap();
        fs::rename(lower_dirs[3].join("shared"), lower_dirs[3].join("webs")).unwrap();
        for (number, layers) in [Layers::Detached, Layers::Attached].into_iter().enumerate() {
            let upper_dir = directory(data.path(), &format!("upper-{number}"));
            let work_dir = directory(data.path(), &format!("work-{number}"));
            let writable = WritableLayer {
                upper_dir: &upper_dir,
                work_dir: &work_dir,
                volatile: false,
            };
            let (stage, guard) = Stage::mount(&place, &map).unwrap();
            let root = match stage.mount_root(&lower_dirs, writable, layers) {
                Ok(root) => root,
                Err(error) if layers == Layers::Detached => {
                    println!(
                        "skipped: this kernel takes no detached layers: {}",
                        crate::chain(&error)
                    );
                    continue;
                }
                Err(error) => panic!("{}", crate::chain(&error)),
            };
            assert_eq!(fs::metadata(&place).unwrap().uid(), first);
            assert_eq!(fs::metadata(&place).unwrap().mode() & 0o7777, 0o700);
            assert_eq!(fs::read_to_string(root.path().join("shared")).unwrap(), "40");
            let webs = fs::metadata(root.path().join("webs")).unwrap();
            assert_eq!((webs.uid(), webs.gid()), (first + 1000, first + 29));
            // What the container does, of which the host sees the image's ids.
            std::os::unix::fs::chown(root.path().join("webs"), Some(first + 7), Some(first)).unwrap();
            let written = fs::metadata(upper_dir.join("webs")).unwrap();
            assert_eq!((written.uid(), written.gid()), (7, 0));
            root.unmount().unwrap();
            guard.unmount().unwrap();
            assert_eq!(crate::mounts::below(memory.path()).unwrap(), Vec::<PathBuf>::new());
        }
    }

    /// As the views of other stages are that a build step binds.
    #[test]
    fn what_has_no_owners_to_move_is_bound_for_reading_and_refused_for_writing() {
        let Some(map) = can_map() else { return };
        let data = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = directory(memory.path(), "stage");
        let lower_dirs = [directory(data.path(), "one"), directory(data.path(), "other")];
        fs::write(lower_dirs[0].join("file"), "seen").unwrap();
        let view = directory(data.path(), "view");
        let _view = mount_overlay(&lower_dirs, None, &view).unwrap();
        let (stage, _guard) = Stage::mount(&place, &map).unwrap();
        let bind = |read_only| Bind {
            source: view.clone(),
            target: "/view".to_owned(),
            read_only,
        };
        let bound = stage.mount_bind(0, &bind(true)).unwrap();
        assert_eq!(fs::read_to_string(bound.join("file")).unwrap(), "seen");
        let error = stage.mount_bind(1, &bind(false)).unwrap_err();
        assert!(error.to_string().contains("cannot map owners"), "{error}");
    }
}
