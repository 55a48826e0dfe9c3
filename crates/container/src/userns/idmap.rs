//! Mounts whose owners are moved into a container's range.
//!
//! The kernel takes the map from a user namespace, which is made for that alone: a process in one, whose map is
//! written, whose namespace is opened, and which is killed. The container has another one, which `runc` makes, with
//! the same ids but one: **the map of mounts has a second line, and the container's must not.** Overlayfs does some
//! work (whiteouts, its work directory, copies of files) as who mounted it, the host's root, and the files of that
//! need an owner on disk. That is 65,536, an id that no container has: inside, such a file belongs to nobody.

use std::ffi::c_int;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, pthread_sigmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::ranges::{IDS_PER_CONTAINER, IdRange};

/// The helper process makes one system call after another on it.
const HELPER_STACK_BYTES: usize = 64 << 10;

/// The helper ends by itself should this process be killed meanwhile; it is needed for microseconds.
const HELPER_LIMIT: Duration = Duration::from_secs(10);

/// The container's ids, for mounts.
#[derive(Debug)]
pub(crate) struct IdMap {
    pub range: IdRange,
    namespace: OwnedFd,
}

impl IdMap {
    /// Takes a fraction of a millisecond. Blocks.
    pub(crate) fn create(range: IdRange) -> io::Result<Self> {
        let first = range.first();
        let map = format!("0 {first} {IDS_PER_CONTAINER}\n{IDS_PER_CONTAINER} 0 1\n");
        let helper = Helper::spawn(libc::CLONE_NEWUSER, wait_to_be_killed)?;
        let path = |name: &str| format!("/proc/{}/{name}", helper.pid);
        fs::write(path("uid_map"), &map)?;
        fs::write(path("gid_map"), &map)?;
        let namespace = File::open(path("ns/user"))?;
        Ok(Self {
            range,
            namespace: namespace.into(),
        })
    }
}

/// Whether `/proc` can be mounted by root of a user namespace: not where parts of the host's are hidden. Blocks.
pub(crate) fn try_proc() -> io::Result<()> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_VFORK;
    match Helper::spawn(flags, mount_proc)?.wait()? {
        WaitStatus::Exited(_, 0) => Ok(()),
        WaitStatus::Exited(_, code) => Err(io::Error::from_raw_os_error(code)),
        other => Err(io::Error::other(format!("the trial ended with {other:?}"))),
    }
}

/// A process that shares this one's memory and has namespaces of its own. Killed when dropped.
struct Helper {
    pid: Pid,
    is_reaped: bool,
    /// It runs on it until it has been reaped.
    _stack: Vec<u8>,
}

impl Helper {
    fn spawn(namespaces: c_int, entry: extern "C" fn(*mut libc::c_void) -> c_int) -> io::Result<Self> {
        const ALIGNMENT: usize = 16;
        let mut stack = vec![0_u8; HELPER_STACK_BYTES];
        // Shared, and not copied as by `fork`: a copy of the platform's page tables takes a millisecond.
        let flags = namespaces | libc::CLONE_VM | libc::CLONE_FILES;
        // Handlers of this process must not run in the other.
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
        // SAFETY: the end of the stack is within `stack`, aligned as calls want it, and grows down into it; `stack`
        // is neither moved nor freed before the process has been reaped, since moving a `Vec` leaves its memory where
        // it is. `entry` is one of the two functions below, which touch no memory but that stack, call nothing but
        // system calls, block every signal and never return. Both use this thread's `errno` at most while this
        // thread is suspended (`CLONE_VFORK`).
        #[expect(unsafe_code, reason = "no wrapper makes a process that shares memory")]
        let result = unsafe {
            let top = stack.as_mut_ptr().add(stack.len());
            let top = top.sub(top as usize % ALIGNMENT);
            libc::clone(entry, top.cast(), flags, std::ptr::null_mut())
        };
        let result = Errno::result(result);
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        Ok(Self {
            pid: Pid::from_raw(result?),
            is_reaped: false,
            _stack: stack,
        })
    }

    fn wait(mut self) -> io::Result<WaitStatus> {
        self.reap()
    }

    fn reap(&mut self) -> io::Result<WaitStatus> {
        self.is_reaped = true;
        loop {
            // It tells of its end by no signal, and so is only found when asked for in this way.
            match waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
                Err(Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if self.is_reaped {
            return;
        }
        let ended = kill(self.pid, Signal::SIGKILL)
            .map_err(io::Error::from)
            .and_then(|()| self.reap().map(|_| ()));
        if let Err(error) = ended {
            tracing::error!(pid = %self.pid, %error, "failed to end a helper process");
        }
    }
}

/// Ends by itself after [`HELPER_LIMIT`].
extern "C" fn wait_to_be_killed(_: *mut libc::c_void) -> c_int {
    let limit = libc::timespec {
        tv_sec: HELPER_LIMIT.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    // SAFETY: waits for no descriptor, for as long as `limit` says, which is on this stack; then ends this process
    // alone, which is the only thread of its group.
    #[expect(
        unsafe_code,
        reason = "the C library's functions also do other things, which this process must not"
    )]
    unsafe {
        libc::syscall(libc::SYS_ppoll, 0, 0, &raw const limit, 0, 0);
        libc::syscall(libc::SYS_exit_group, 0);
    }
    0
}

/// Ends with the error's number.
extern "C" fn mount_proc(_: *mut libc::c_void) -> c_int {
    // SAFETY: both names are constant and end with a zero; the mount is seen in this process's own namespace alone.
    // `errno` is that of the thread which waits for the end of this process. `exit_group` ends this process alone.
    #[expect(
        unsafe_code,
        reason = "the C library's functions also do other things, which this process must not"
    )]
    unsafe {
        let (kind, target) = (c"proc".as_ptr(), c"/proc".as_ptr());
        let result = libc::syscall(libc::SYS_mount, kind, target, kind, 0, 0);
        let code = if result == 0 { 0 } else { *libc::__errno_location() };
        libc::syscall(libc::SYS_exit_group, code);
    }
    0
}

/// What `mount_setattr` takes; the kernel's `struct mount_attr` in its first version.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const IDMAP: u64 = 0x0010_0000;
const READ_ONLY: u64 = 0x1;
const NO_SETUID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const NO_EXEC: u64 = 0x8;
const ACCESS_TIME: u64 = 0x70;

/// What a bind is mounted with, whatever its source is: `runc` mounts it again with the same, and where it named
/// less the kernel would refuse it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BindAttributes {
    pub read_only: bool,
    /// With what is mounted below.
    pub recursive: bool,
}

/// A file or directory as a mount of its own that is nowhere yet, its owners moved into the range.
pub(crate) fn clone_bind(source: &Path, map: &IdMap, attributes: BindAttributes) -> io::Result<OwnedFd> {
    let tree = clone_tree(source, attributes.recursive)?;
    let read_only = if attributes.read_only { READ_ONLY } else { 0 };
    let plain = MountAttributes {
        set: read_only | NO_SETUID | NO_DEVICES,
        // Access times relative to changes, which is what 0 stands for.
        clear: NO_EXEC | ACCESS_TIME,
        propagation: 0,
        user_namespace: 0,
    };
    set_attributes(&tree, &plain, attributes.recursive)?;
    match set_map(&tree, map, attributes.recursive) {
        // The file system has no owners to move: one of the network, or another overlay. Read-only, it is seen with
        // its files nobody's, so that what all may read is read. For writing that would be an error at every file.
        Err(error) if attributes.read_only && error.raw_os_error() == Some(libc::EINVAL) => {
            tracing::debug!(source = %source.display(), "owners cannot be mapped; a bind shows them as nobody");
            Ok(tree)
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(io::Error::new(
            error.kind(),
            "its file system cannot map owners, and so cannot be written to in a user namespace",
        )),
        result => result.map(|()| tree),
    }
}

fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}

fn set_map(tree: &OwnedFd, map: &IdMap, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set: IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: map.namespace.as_raw_fd() as u64,
    };
    set_attributes(tree, &attributes, recursive)
}

fn set_attributes(tree: &OwnedFd, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open, the path is empty and ends with a zero, and the structure is what the kernel
    // reads, as long as it is said to be.
    #[expect(unsafe_code, reason = "there is no wrapper for mount_setattr")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    Errno::result(result).map(|_| ()).map_err(io::Error::from)
}

/// How an overlay is told of layers whose owners are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layers {
    /// As mounts that are nowhere. Since Linux 6.15.
    Detached,
    /// As mounts beside the overlay, which go with it.
    Attached,
}

/// Directories as an overlay of a container sees them: one mount for all that are on one mount of the host, of the
/// directory that they have in common, so that the number of layers costs nothing.
pub(crate) struct MappedPaths {
    groups: Vec<Group>,
    /// Must stay open until the overlay has been made.
    _detached: Vec<OwnedFd>,
}

struct Group {
    mount: u64,
    common: PathBuf,
    /// Where the common directory is found with its owners moved.
    seen_at: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("failed to find {path}")]
    Find { path: PathBuf, source: io::Error },
    #[error("failed to map the owners below {path}")]
    Map { path: PathBuf, source: io::Error },
}

impl MappedPaths {
    /// Attached ones go below `place`.
    pub(crate) fn of(paths: &[&Path], map: &IdMap, layers: Layers, place: &Path) -> Result<Self, MapError> {
        let mut groups: Vec<Group> = Vec::new();
        for path in paths {
            let (path, mount) = locate(path)?;
            match groups.iter_mut().find(|group| group.mount == mount) {
                Some(group) => group.common = common(&group.common, &path),
                None => groups.push(Group {
                    mount,
                    common: path,
                    seen_at: PathBuf::new(),
                }),
            }
        }
        let mut detached = Vec::new();
        for (index, group) in groups.iter_mut().enumerate() {
            let failed = |source| MapError::Map {
                path: group.common.clone(),
                source,
            };
            let tree = clone_tree(&group.common, false).map_err(failed)?;
            set_map(&tree, map, false).map_err(failed)?;
            match layers {
                Layers::Detached => {
                    group.seen_at = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
                    detached.push(tree);
                }
                Layers::Attached => {
                    let target = place.join(format!("layers-{index}"));
                    fs::create_dir(&target).map_err(failed)?;
                    attach(tree.as_fd(), &target).map_err(failed)?;
                    group.seen_at = target;
                }
            }
        }
        Ok(Self {
            groups,
            _detached: detached,
        })
    }

    /// One of the directories that this was made of.
    pub(crate) fn seen(&self, path: &Path) -> Result<PathBuf, MapError> {
        let (path, mount) = locate(path)?;
        let group = self.groups.iter().find(|group| group.mount == mount);
        let found = group.and_then(|group| Some(group.seen_at.join(path.strip_prefix(&group.common).ok()?)));
        found.ok_or_else(|| MapError::Find {
            path,
            source: io::Error::from(io::ErrorKind::NotFound),
        })
    }
}

/// The path without links, and the mount that it is on.
fn locate(path: &Path) -> Result<(PathBuf, u64), MapError> {
    let find = |source| MapError::Find {
        path: path.to_owned(),
        source,
    };
    let plain = fs::canonicalize(path).map_err(find)?;
    let facts = statx(CWD, &plain, AtFlags::empty(), StatxFlags::MNT_ID).map_err(|error| find(error.into()))?;
    Ok((plain, facts.stx_mnt_id))
}

/// The directory that both are in. It is on the mount that both are on: no path leaves a mount and comes back.
fn common(one: &Path, other: &Path) -> PathBuf {
    let pairs = one.components().zip(other.components());
    pairs
        .take_while(|(one, other)| one == other)
        .map(|(one, _)| one)
        .collect()
}

/// Puts a mount that is nowhere onto an existing file or directory.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    Ok(move_mount(
        tree,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_paths_have_in_common() {
        let common = |one: &str, other: &str| common(Path::new(one), Path::new(other));
        assert_eq!(common("/a/b/c", "/a/b/d/e"), Path::new("/a/b"));
        assert_eq!(common("/a/b", "/a/bc"), Path::new("/a"));
        assert_eq!(common("/a", "/b"), Path::new("/"));
        assert_eq!(common("/a/b", "/a/b"), Path::new("/a/b"));
    }

    #[test]
    fn owners_are_moved_by_a_bind_and_back_by_writing_through_it() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let map = match IdMap::create(IdRange::TRIAL) {
            Ok(map) => map,
            Err(error) => {
                println!("skipped: no user namespaces here: {error}");
                return;
            }
        };
        let first = IdRange::TRIAL.first();
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(source.join("web"), "").unwrap();
        std::os::unix::fs::chown(source.join("web"), Some(1000), Some(29)).unwrap();
        let attributes = BindAttributes {
            read_only: false,
            recursive: true,
        };
        let tree = clone_bind(&source, &map, attributes).unwrap();
        attach(tree.as_fd(), &target).unwrap();
        let seen = fs::metadata(target.join("web")).unwrap();
        let made = fs::write(target.join("made"), "").and_then(|()| fs::metadata(source.join("made")));
        crate::overlay::unmount_or_detach(&target).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (first + 1000, first + 29));
        // What the host's own root writes there has the id that no container has.
        assert_eq!(made.unwrap().uid(), IDS_PER_CONTAINER);
    }
}
