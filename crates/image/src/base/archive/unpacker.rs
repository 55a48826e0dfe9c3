//! Puts entries of an archive into a directory, by system calls that cannot leave it.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use super::entry::{EntryInfo, relative};
use super::{COPY_BUFFER_BYTES, UnpackError};

/// As the kernel does when it follows links.
const MAX_LINK_HOPS: u32 = 40;

/// Remembered at once; a full Anaconda has 20,000. The cache begins anew beyond it.
const MAX_KNOWN_DIRS: usize = 50_000;

/// Names of directories whose time is still to be set. A full Anaconda has 2 MB of them; an archive of nothing but
/// long names could hold as many gigabytes.
const MAX_DIR_TIME_BYTES: usize = 256 << 20;

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
pub(super) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// What stands at a path of one layer.
enum Node {
    Missing,
    /// A whiteout, or a file where a directory is needed: what lower layers have there is hidden.
    Hidden,
    Directory(rustix::fs::Stat),
    Link(OsString),
    Other(OwnedFd, rustix::fs::Stat),
}

pub(super) struct Unpacker {
    root: OwnedFd,
    /// The layers below, topmost first.
    lowers: Vec<OwnedFd>,
    /// Parent directories as archives name them, and where they are once links are followed.
    known_dirs: HashMap<PathBuf, PathBuf>,
    /// Times of directories are set last, since making their children changes them.
    dir_times: Vec<(PathBuf, i64)>,
    dir_time_bytes: usize,
    /// The directory that the previous entry went into; archives list directories in order.
    last_parent: Option<(PathBuf, OwnedFd)>,
}

impl Unpacker {
    pub(super) fn open(target: &Path, lowers: &[PathBuf]) -> Result<Self, UnpackError> {
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(
                |source| UnpackError::Io {
                    action: "open the directory",
                    entry: path.display().to_string(),
                    source: source.into(),
                },
            )
        };
        Ok(Self {
            root: open(target)?,
            lowers: lowers.iter().rev().map(|path| open(path)).collect::<Result<_, _>>()?,
            known_dirs: HashMap::new(),
            dir_times: Vec::new(),
            dir_time_bytes: 0,
            last_parent: None,
        })
    }

    pub(super) fn unpack(&mut self, entry: &EntryInfo, content: &mut impl Read) -> Result<(), UnpackError> {
        let Some(name) = entry.path.file_name().map(OsStr::to_owned) else {
            return self.unpack_root(entry);
        };
        let parent_path = entry.path.parent().unwrap_or(Path::new(""));
        let parent_path = self.resolve_dir(parent_path, true, entry)?;
        if name.as_bytes() == OPAQUE_MARKER {
            return self.mark_opaque(&parent_path, entry);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT_PREFIX) {
            if hidden.starts_with(WHITEOUT_PREFIX) {
                // Bookkeeping of aufs, which older tools left in layers.
                return Ok(());
            }
            return self.whiteout(&parent_path, OsStr::from_bytes(hidden), entry);
        }
        match entry.kind {
            EntryType::Directory => self.directory(&parent_path, &name, entry),
            EntryType::Regular | EntryType::Continuous => self.regular(&parent_path, &name, entry, content),
            EntryType::Symlink => self.symlink(&parent_path, &name, entry),
            EntryType::Link => self.hard_link(&parent_path, &name, entry),
            EntryType::Fifo => self.fifo(&parent_path, &name, entry),
            EntryType::Char if entry.device == (0, 0) => self.whiteout(&parent_path, &name, entry),
            // Containers get a `/dev` of their own, so what an image has there never matters.
            EntryType::Char | EntryType::Block if parent_path.starts_with("dev") => Ok(()),
            EntryType::Char | EntryType::Block => Err(entry.refused("it is a device node")),
            _ => Err(entry.refused("its type is not supported")),
        }
    }

    fn unpack_root(&mut self, entry: &EntryInfo) -> Result<(), UnpackError> {
        if entry.kind != EntryType::Directory {
            return Err(entry.refused("the root of an image is a directory"));
        }
        let root = self.open_dir(Path::new(""), entry)?;
        set_owner_and_mode(root.as_fd(), entry)?;
        self.time_later(PathBuf::new(), entry.mtime_secs)?;
        Ok(())
    }

    fn directory(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let path = parent_path.join(name);
        let opaque = match Self::look(self.root.as_fd(), &path, entry)? {
            Node::Directory(_) => false,
            Node::Missing => {
                self.make_dir(parent_path, name, entry)?;
                false
            }
            // A whiteout followed by a new directory: the old content stays hidden.
            Node::Hidden => {
                self.remove(parent_path, name, entry)?;
                self.make_dir(parent_path, name, entry)?;
                true
            }
            Node::Link(_) | Node::Other(..) => {
                self.remove(parent_path, name, entry)?;
                self.make_dir(parent_path, name, entry)?;
                false
            }
        };
        let dir = self.open_dir(&path, entry)?;
        set_owner_and_mode(dir.as_fd(), entry)?;
        set_xattrs(dir.as_fd(), entry)?;
        if opaque {
            set_opaque(dir.as_fd(), entry)?;
        }
        self.time_later(path, entry.mtime_secs)?;
        Ok(())
    }

    fn regular(
        &mut self,
        parent_path: &Path,
        name: &OsStr,
        entry: &EntryInfo,
        content: &mut impl Read,
    ) -> Result<(), UnpackError> {
        self.remove(parent_path, name, entry)?;
        let file = self.create_file(parent_path, name, entry)?;
        let mut file = File::from(file);
        let written = copy_bounded(content, &mut file, entry)?;
        if written != entry.size {
            return Err(UnpackError::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        // In this order: a change of owner clears setuid bits and capabilities.
        set_owner_and_mode(file.as_fd(), entry)?;
        set_xattrs(file.as_fd(), entry)?;
        rustix::fs::futimens(&file, &times(entry.mtime_secs)).map_err(entry.io("set the time of"))
    }

    fn symlink(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let Some(link) = entry.link.as_deref().filter(|link| !link.is_empty()) else {
            return Err(entry.refused("it is a link to nowhere"));
        };
        self.remove(parent_path, name, entry)?;
        // Kept as it is, also when absolute: inside a container it starts at the container's root, and
        // nothing on the host follows it.
        let parent = self.parent(parent_path, entry)?;
        rustix::fs::symlinkat(OsStr::from_bytes(link), &parent, name).map_err(entry.io("make the link"))?;
        self.finish_special(parent_path, name, entry)
    }

    fn fifo(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        self.remove(parent_path, name, entry)?;
        let parent = self.parent(parent_path, entry)?;
        rustix::fs::mknodat(&parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .map_err(entry.io("make the pipe"))?;
        // No link can stand there: this process made it, in a directory that only root enters.
        rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
            .map_err(entry.io("set the mode of"))?;
        self.finish_special(parent_path, name, entry)
    }

    fn finish_special(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let parent = self.parent(parent_path, entry)?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(entry.io("set the owner of"))?;
        rustix::fs::utimensat(&parent, name, &times(entry.mtime_secs), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(entry.io("set the time of"))
    }

    fn hard_link(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let link = entry
            .link
            .as_deref()
            .ok_or_else(|| entry.refused("it is a link to nowhere"))?;
        let target = relative(link).map_err(|_| entry.refused("it is a hard link that leaves the image with '..'"))?;
        let Some(target_name) = target.file_name().map(OsStr::to_owned) else {
            return Err(entry.refused("it is a hard link to a directory"));
        };
        let target_parent = self.resolve_dir(target.parent().unwrap_or(Path::new("")), true, entry)?;
        let target = target_parent.join(&target_name);
        if target == parent_path.join(name) {
            return Err(entry.refused("it is a hard link to itself"));
        }
        match Self::look(self.root.as_fd(), &target, entry)? {
            Node::Other(..) | Node::Link(_) => {}
            Node::Missing => self.copy_up(&target_parent, &target_name, entry)?,
            Node::Directory(_) => return Err(entry.refused("it is a hard link to a directory")),
            Node::Hidden => return Err(entry.refused("it is a hard link to a deleted file")),
        }
        self.remove(parent_path, name, entry)?;
        let from = self.open_dir(&target_parent, entry)?;
        let to = self.parent(parent_path, entry)?;
        rustix::fs::linkat(&from, &target_name, &to, name, AtFlags::empty()).map_err(entry.io("make the link"))
    }

    /// Brings a file of a lower layer into this one, so that another name can be given to it.
    fn copy_up(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let path = parent_path.join(name);
        let Node::Other(found, stat) = self.look_below(&path, entry)? else {
            return Err(entry.refused("it is a hard link to a file that does not exist"));
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(entry.refused("it is a hard link to a special file of another layer"));
        }
        let source = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(|source| UnpackError::Io {
            action: "read",
            entry: entry.shown.clone(),
            source,
        })?;
        let mut copy = File::from(self.create_file(parent_path, name, entry)?);
        copy_bounded(&mut source.take(stat.st_size as u64), &mut copy, entry)?;
        rustix::fs::fchown(
            &copy,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
        )
        .map_err(entry.io("set the owner of"))?;
        rustix::fs::fchmod(&copy, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(entry.io("set the mode of"))?;
        rustix::fs::futimens(&copy, &times(stat.st_mtime)).map_err(entry.io("set the time of"))
    }

    /// Hides what lower layers have at this path.
    fn whiteout(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        if matches!(name.as_bytes(), b"" | b"." | b"..") {
            return Err(entry.refused("it deletes nothing that has a name"));
        }
        let path = parent_path.join(name);
        match Self::look(self.root.as_fd(), &path, entry)? {
            Node::Missing => {}
            // Already new in this layer: only what is below it goes.
            Node::Directory(_) => return set_opaque(self.open_dir(&path, entry)?.as_fd(), entry),
            Node::Hidden | Node::Link(_) | Node::Other(..) => return Ok(()),
        }
        let parent = self.parent(parent_path, entry)?;
        rustix::fs::mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), 0)
            .map_err(entry.io("delete a file by the marker"))
    }

    fn mark_opaque(&mut self, parent_path: &Path, entry: &EntryInfo) -> Result<(), UnpackError> {
        if parent_path.as_os_str().is_empty() {
            return Err(entry.refused("it hides the whole image below"));
        }
        set_opaque(self.open_dir(parent_path, entry)?.as_fd(), entry)
    }

    /// Follows links of the merged view to a directory, which is made in this layer where it must be.
    fn resolve_dir(&mut self, path: &Path, create: bool, entry: &EntryInfo) -> Result<PathBuf, UnpackError> {
        if let Some(known) = self.known_dirs.get(path) {
            return Ok(known.clone());
        }
        let mut resolved = PathBuf::new();
        let mut pending: VecDeque<OsString> = path.iter().map(OsStr::to_owned).collect();
        let mut hops = 0;
        while let Some(name) = pending.pop_front() {
            if name == ".." {
                resolved.pop();
                continue;
            }
            let candidate = resolved.join(&name);
            let link = match Self::look(self.root.as_fd(), &candidate, entry)? {
                Node::Directory(_) => None,
                Node::Link(link) => Some(link),
                Node::Other(..) => return Err(entry.refused("a file stands where its directory should be")),
                Node::Hidden => {
                    self.remove(&resolved, &name, entry)?;
                    self.make_dir(&resolved, &name, entry)?;
                    set_opaque(self.open_dir(&candidate, entry)?.as_fd(), entry)?;
                    None
                }
                Node::Missing => match self.look_below(&candidate, entry)? {
                    Node::Link(link) => Some(link),
                    Node::Directory(stat) if create => {
                        self.make_dir(&resolved, &name, entry)?;
                        let dir = self.open_dir(&candidate, entry)?;
                        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
                        chown_path(dir.as_fd(), uid, gid, entry)?;
                        chmod_path(dir.as_fd(), stat.st_mode & 0o7777, entry)?;
                        self.time_later(candidate.clone(), stat.st_mtime)?;
                        None
                    }
                    Node::Directory(_) | Node::Missing | Node::Hidden | Node::Other(..) => {
                        self.make_dir(&resolved, &name, entry)?;
                        None
                    }
                },
            };
            match link {
                None => resolved = candidate,
                Some(link) => {
                    hops += 1;
                    if hops > MAX_LINK_HOPS {
                        return Err(entry.refused("its directory is behind too many links"));
                    }
                    let link = Path::new(&link);
                    if link.is_absolute() {
                        resolved.clear();
                    }
                    for component in link.components().rev() {
                        match component {
                            Component::Normal(name) => pending.push_front(name.to_owned()),
                            Component::ParentDir => pending.push_front(OsString::from("..")),
                            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
                        }
                    }
                }
            }
        }
        if self.known_dirs.len() >= MAX_KNOWN_DIRS {
            self.known_dirs.clear();
        }
        self.known_dirs.insert(path.to_owned(), resolved.clone());
        Ok(resolved)
    }

    fn time_later(&mut self, path: PathBuf, mtime_secs: i64) -> Result<(), UnpackError> {
        self.dir_time_bytes += path.as_os_str().len() + size_of::<(PathBuf, i64)>();
        if self.dir_time_bytes > MAX_DIR_TIME_BYTES {
            return Err(UnpackError::TooLarge {
                limit: MAX_DIR_TIME_BYTES as u64,
                what: "bytes of names of directories",
            });
        }
        self.dir_times.push((path, mtime_secs));
        Ok(())
    }

    /// What the layers below have at a path. A directory that a layer in between hid as a whole is seen
    /// all the same; only modes of implied directories depend on it.
    fn look_below(&self, path: &Path, entry: &EntryInfo) -> Result<Node, UnpackError> {
        for lower in &self.lowers {
            match Self::look(lower.as_fd(), path, entry)? {
                Node::Missing => {}
                found => return Ok(found),
            }
        }
        Ok(Node::Missing)
    }

    fn look(layer: BorrowedFd<'_>, path: &Path, entry: &EntryInfo) -> Result<Node, UnpackError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let node = match rustix::fs::openat2(layer, path, flags, Mode::empty(), resolve) {
            Ok(node) => node,
            Err(Errno::NOENT) => return Ok(Node::Missing),
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Node::Hidden),
            Err(source) => return Err(entry.io("look up")(source)),
        };
        let stat = rustix::fs::fstat(&node).map_err(entry.io("inspect"))?;
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Node::Directory(stat),
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(&node, "", Vec::new()).map_err(entry.io("read the link"))?;
                Node::Link(OsString::from_vec(link.into_bytes()))
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => Node::Hidden,
            _ => Node::Other(node, stat),
        })
    }

    fn make_dir(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let parent = self.parent(parent_path, entry)?;
        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)).map_err(entry.io("make the directory of"))?;
        // The umask of the server does not belong in an image.
        rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())
            .map_err(entry.io("set the mode of"))
    }

    fn create_file(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<OwnedFd, UnpackError> {
        let parent = self.parent(parent_path, entry)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).map_err(entry.io("create"))
    }

    /// Removes what an earlier entry of the same archive put here.
    fn remove(&mut self, parent_path: &Path, name: &OsStr, entry: &EntryInfo) -> Result<(), UnpackError> {
        let parent = self.parent(parent_path, entry)?;
        match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => {
                let gone = parent_path.join(name);
                self.known_dirs.retain(|_, dir| !dir.starts_with(&gone));
                self.dir_times.retain(|(dir, _)| !dir.starts_with(&gone));
                self.last_parent = None;
                // The handle's own path, so that no link can lead elsewhere; the standard library
                // removes trees without following links.
                let path = Path::new("/proc/self/fd")
                    .join(parent.as_raw_fd().to_string())
                    .join(name);
                std::fs::remove_dir_all(path).map_err(|source| UnpackError::Io {
                    action: "replace the directory",
                    entry: entry.shown.clone(),
                    source,
                })
            }
            Err(source) => Err(entry.io("replace")(source)),
        }
    }

    fn parent(&mut self, path: &Path, entry: &EntryInfo) -> Result<OwnedFd, UnpackError> {
        let cached = self
            .last_parent
            .as_ref()
            .filter(|(last, _)| last == path)
            .map(|(_, fd)| fd.try_clone());
        if let Some(clone) = cached {
            return clone.map_err(|source| UnpackError::Io {
                action: "open the directory of",
                entry: entry.shown.clone(),
                source,
            });
        }
        let opened = self.open_dir(path, entry)?;
        if let Ok(clone) = opened.try_clone() {
            self.last_parent = Some((path.to_owned(), clone));
        }
        Ok(opened)
    }

    fn open_dir(&self, path: &Path, entry: &EntryInfo) -> Result<OwnedFd, UnpackError> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve).map_err(entry.io("open the directory of"))
    }

    pub(super) fn finish(self) -> Result<(), UnpackError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        for (path, mtime_secs) in self.dir_times.iter().rev() {
            let shown = || path.display().to_string();
            let at = if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path.as_path()
            };
            let dir = rustix::fs::openat2(&self.root, at, flags, Mode::empty(), resolve).map_err(|source| {
                UnpackError::Io {
                    action: "open the directory",
                    entry: shown(),
                    source: source.into(),
                }
            })?;
            rustix::fs::utimensat(
                rustix::fs::CWD,
                proc_path(dir.as_fd()),
                &times(*mtime_secs),
                AtFlags::empty(),
            )
            .map_err(|source| UnpackError::Io {
                action: "set the time of",
                entry: shown(),
                source: source.into(),
            })?;
        }
        Ok(())
    }
}

/// A path of the kernel's to an open file: system calls that take no `O_PATH` handle take this.
fn proc_path(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn times(secs: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: secs,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn set_owner_and_mode(file: BorrowedFd<'_>, entry: &EntryInfo) -> Result<(), UnpackError> {
    chown_path(file, Uid::from_raw(entry.uid), Gid::from_raw(entry.gid), entry)?;
    chmod_path(file, entry.mode, entry)
}

fn chown_path(file: BorrowedFd<'_>, uid: Uid, gid: Gid, entry: &EntryInfo) -> Result<(), UnpackError> {
    rustix::fs::chownat(rustix::fs::CWD, proc_path(file), Some(uid), Some(gid), AtFlags::empty())
        .map_err(entry.io("set the owner of"))
}

fn chmod_path(file: BorrowedFd<'_>, mode: u32, entry: &EntryInfo) -> Result<(), UnpackError> {
    rustix::fs::chmod(proc_path(file), Mode::from_raw_mode(mode)).map_err(entry.io("set the mode of"))
}

/// Sets the attributes that programs in a container can see: capabilities and the user's own.
///
/// Labels of the build machine (`security.selinux` and the like) mean nothing here and are left out. Attributes
/// that overlayfs obeys would let an archive rearrange the stack it is put on.
fn set_xattrs(file: BorrowedFd<'_>, entry: &EntryInfo) -> Result<(), UnpackError> {
    for (name, value) in &entry.xattrs {
        if name.starts_with("trusted.") || name.starts_with("user.overlay.") {
            return Err(entry.refused("it has an attribute that overlayfs would obey"));
        }
        if name == "security.capability" || name.starts_with("user.") {
            rustix::fs::setxattr(proc_path(file), name.as_str(), value, XattrFlags::empty())
                .map_err(entry.io("set an attribute of"))?;
        }
    }
    Ok(())
}

fn set_opaque(dir: BorrowedFd<'_>, entry: &EntryInfo) -> Result<(), UnpackError> {
    rustix::fs::setxattr(proc_path(dir), OPAQUE_XATTR, b"y", XattrFlags::empty())
        .map_err(entry.io("hide the files below"))
}

fn copy_bounded(content: &mut impl Read, file: &mut File, entry: &EntryInfo) -> Result<u64, UnpackError> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES.min(usize::try_from(entry.size).unwrap_or(usize::MAX).max(1))];
    let mut written = 0;
    loop {
        let count = content.read(&mut buffer).map_err(UnpackError::Read)?;
        if count == 0 {
            return Ok(written);
        }
        file.write_all(&buffer[..count]).map_err(|source| UnpackError::Io {
            action: "write",
            entry: entry.shown.clone(),
            source,
        })?;
        written += count as u64;
    }
}
