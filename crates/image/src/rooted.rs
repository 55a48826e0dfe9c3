//! A directory that stands for `/`: paths are resolved in it as a container would resolve them.
//!
//! Images are made by strangers, and their symbolic links may point anywhere: `/data -> /etc` means the
//! image's own `/etc`. Every path here is resolved by the kernel (`openat2` with `RESOLVE_IN_ROOT`), so
//! that nothing outside is ever read or written. Nobody else changes the tree meanwhile: it is the mount
//! of one build step, and no process of the step is running.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Stat, Timestamps, Uid};
use rustix::io::Errno;

/// The kernel asks for another try when something was renamed during a resolution.
const RESOLVE_ATTEMPTS: usize = 16;

/// The mode of directories that nobody described.
const PARENT_MODE: RawMode = 0o755;

pub(crate) struct Rooted {
    fd: OwnedFd,
}

/// What a new file or directory is to look like.
#[derive(Debug, Clone)]
pub(crate) struct Attributes {
    /// Permission bits, setuid and its like among them.
    pub(crate) mode: RawMode,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// `None` for now.
    pub(crate) times: Option<Timestamps>,
    pub(crate) xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Attributes {
    pub(crate) fn new(mode: RawMode, uid: u32, gid: u32) -> Self {
        Self {
            mode,
            uid,
            gid,
            times: None,
            xattrs: Vec::new(),
        }
    }
}

/// A directory inside, and the last component of a path in it.
struct Place {
    dir: OwnedFd,
    name: OsString,
}

impl Rooted {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::openat(
            CWD,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { fd })
    }

    /// Opens a file, or a directory for listing, following links inside the root.
    pub(crate) fn open_read(&self, path: &Path) -> io::Result<OwnedFd> {
        // Not blocking: a FIFO in an image must not hold up the build.
        Ok(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK)?)
    }

    /// What stands at a path, following links; `None` where nothing does.
    pub(crate) fn find(&self, path: &Path) -> io::Result<Option<Stat>> {
        match self.resolve(path, OFlags::PATH) {
            Ok(fd) => Ok(Some(rustix::fs::fstat(&fd)?)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn is_dir(&self, path: &Path) -> io::Result<bool> {
        Ok(self
            .find(path)?
            .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory))
    }

    /// A regular file's content, if it is not longer than `limit`. `None` where there is none.
    pub(crate) fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let fd = match self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let mut content = Vec::new();
        let read = File::from(fd).take(limit + 1).read_to_end(&mut content)?;
        Ok((read as u64 <= limit).then_some(content))
    }

    /// Names in a directory, sorted. Empty where it does not exist.
    pub(crate) fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        match self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(fd) => list_fd(&fd),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Where a path leads on this host, all links resolved. Only for handing it to a bind mount.
    pub(crate) fn host_path(&self, path: &Path) -> io::Result<PathBuf> {
        let fd = self.resolve(path, OFlags::PATH)?;
        std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
    }

    /// Makes a directory and its missing parents. One that exists stays as it is.
    pub(crate) fn ensure_dir(&self, path: &Path, attributes: &Attributes) -> io::Result<()> {
        let Some(place) = self.place(path, attributes)? else {
            return Ok(());
        };
        match self.resolve(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR) => return Err(in_the_way(path, "is a file, and a directory is to go there")),
            Err(error) => return Err(error.into()),
        }
        match rustix::fs::mkdirat(&place.dir, &place.name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(in_the_way(path, "is a symbolic link that leads nowhere")),
            Err(error) => return Err(error.into()),
        }
        let fd = open_at(&place, OFlags::RDONLY | OFlags::DIRECTORY)?;
        apply(&fd, attributes)
    }

    /// Writes a regular file in place of whatever file or link stands there.
    pub(crate) fn write_file(&self, path: &Path, content: &mut dyn Read, attributes: &Attributes) -> io::Result<u64> {
        let place = self.cleared_place(path, attributes)?;
        let fd = rustix::fs::openat(
            &place.dir,
            &place.name,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )?;
        let mut file = File::from(fd);
        let written = io::copy(content, &mut file)?;
        apply(file.as_fd(), attributes)?;
        Ok(written)
    }

    /// As [`Rooted::write_file`], from a file: the kernel copies, or shares blocks where it can.
    pub(crate) fn copy_file(&self, path: &Path, mut content: &File, attributes: &Attributes) -> io::Result<u64> {
        let place = self.cleared_place(path, attributes)?;
        let fd = rustix::fs::openat(
            &place.dir,
            &place.name,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )?;
        let mut file = File::from(fd);
        let written = io::copy(&mut content, &mut file)?;
        apply(file.as_fd(), attributes)?;
        Ok(written)
    }

    pub(crate) fn write_link(&self, path: &Path, target: &OsStr, attributes: &Attributes) -> io::Result<()> {
        let place = self.cleared_place(path, attributes)?;
        rustix::fs::symlinkat(target, &place.dir, &place.name)?;
        chown_at(&place, attributes)?;
        if let Some(times) = &attributes.times {
            rustix::fs::utimensat(&place.dir, &place.name, times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Makes `path` another name of `existing`; both are inside.
    pub(crate) fn write_hard_link(&self, path: &Path, existing: &Path, attributes: &Attributes) -> io::Result<()> {
        let from = self
            .place(existing, attributes)?
            .ok_or_else(|| in_the_way(existing, "is the root directory"))?;
        let place = self.cleared_place(path, attributes)?;
        Ok(rustix::fs::linkat(
            &from.dir,
            &from.name,
            &place.dir,
            &place.name,
            AtFlags::empty(),
        )?)
    }

    pub(crate) fn write_fifo(&self, path: &Path, attributes: &Attributes) -> io::Result<()> {
        let place = self.cleared_place(path, attributes)?;
        rustix::fs::mknodat(
            &place.dir,
            &place.name,
            FileType::Fifo,
            Mode::from_raw_mode(attributes.mode),
            0,
        )?;
        chown_at(&place, attributes)?;
        // The umask took its part of the mode.
        Ok(rustix::fs::chmodat(
            &place.dir,
            &place.name,
            Mode::from_raw_mode(attributes.mode),
            AtFlags::empty(),
        )?)
    }

    /// A place where nothing is: a file or link is removed, a directory is in the way.
    fn cleared_place(&self, path: &Path, attributes: &Attributes) -> io::Result<Place> {
        let place = self
            .place(path, attributes)?
            .ok_or_else(|| in_the_way(path, "is the root directory"))?;
        match rustix::fs::unlinkat(&place.dir, &place.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(place),
            Err(Errno::ISDIR) => Err(in_the_way(path, "is a directory, and a file is to go there")),
            Err(error) => Err(error.into()),
        }
    }

    /// The parent directory of a path, made where it is missing. `None` for the root itself.
    fn place(&self, path: &Path, attributes: &Attributes) -> io::Result<Option<Place>> {
        let path = inside(path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return Ok(None);
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let dir = match self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => {
                self.ensure_dir(parent, &Attributes::new(PARENT_MODE, attributes.uid, attributes.gid))?;
                self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY)?
            }
            Err(Errno::NOTDIR) => return Err(in_the_way(parent, "is a file, and a directory is needed there")),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(Place { dir, name }))
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = inside(path).map_err(|_| Errno::INVAL)?;
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path.as_path()
        };
        let mut result = Err(Errno::AGAIN);
        for _ in 0..RESOLVE_ATTEMPTS {
            result = rustix::fs::openat2(
                &self.fd,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            );
            if !matches!(result, Err(Errno::AGAIN)) {
                break;
            }
        }
        result
    }
}

/// A path relative to the root; `..` is refused before the kernel sees it.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(in_the_way(path, "has '..' in it, which is not allowed"));
            }
        }
    }
    Ok(out)
}

fn in_the_way(path: &Path, why: &str) -> io::Error {
    io::Error::other(format!(
        "'/{}' {why}",
        path.display().to_string().trim_start_matches('/')
    ))
}

fn open_at(place: &Place, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        &place.dir,
        &place.name,
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

fn chown_at(place: &Place, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    Ok(rustix::fs::chownat(
        &place.dir,
        &place.name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// The owner first: changing it clears setuid and file capabilities.
fn apply(fd: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(attributes.mode & 0o7777))?;
    for (name, value) in &attributes.xattrs {
        rustix::fs::fsetxattr(&fd, name.as_os_str(), value, rustix::fs::XattrFlags::empty())?;
    }
    if let Some(times) = &attributes.times {
        rustix::fs::futimens(&fd, times)?;
    }
    Ok(())
}

pub(crate) fn list_fd(fd: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn setup() -> (tempfile::TempDir, Rooted, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(dir.path().join("host")).unwrap();
        std::fs::write(dir.path().join("host/secret"), "of the host").unwrap();
        let rooted = Rooted::open(&root).unwrap();
        (dir, rooted, root)
    }

    fn mine(mode: RawMode) -> Attributes {
        // Tests may run without root: only the own ids can be set then.
        Attributes::new(
            mode,
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        )
    }

    #[test]
    fn links_lead_no_further_than_the_root() {
        let (dir, rooted, root) = setup();
        let host = dir.path().join("host");
        symlink(&host, root.join("absolute")).unwrap();
        symlink(
            "../../../../../../../..".to_owned() + host.to_str().unwrap(),
            root.join("climbing"),
        )
        .unwrap();
        symlink(host.join("secret"), root.join("file")).unwrap();
        for path in ["absolute/secret", "climbing/secret", "file"] {
            assert_eq!(rooted.read(Path::new(path), 100).unwrap(), None, "{path}");
        }
        // Writing through them ends inside or fails.
        for path in ["absolute/new", "climbing/new"] {
            let error = rooted
                .write_file(Path::new(path), &mut &b"x"[..], &mine(0o644))
                .unwrap_err();
            assert!(error.to_string().contains("leads nowhere"), "{error}");
        }
        rooted
            .write_file(Path::new("file"), &mut &b"x"[..], &mine(0o644))
            .unwrap();
        assert_eq!(std::fs::read(root.join("file")).unwrap(), b"x");
        assert!(!root.join("file").is_symlink());
        assert_eq!(std::fs::read(host.join("secret")).unwrap(), b"of the host");
        assert_eq!(std::fs::read_dir(&host).unwrap().count(), 1);
    }

    #[test]
    fn links_inside_are_followed_to_directories() {
        let (_dir, rooted, root) = setup();
        std::fs::create_dir_all(root.join("usr/lib")).unwrap();
        symlink("/usr/lib", root.join("lib")).unwrap();
        rooted
            .write_file(Path::new("/lib/new/file"), &mut &b"x"[..], &mine(0o4755))
            .unwrap();
        let metadata = std::fs::metadata(root.join("usr/lib/new/file")).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&metadata) & 0o7777, 0o4755);
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let (_dir, rooted, root) = setup();
        std::fs::create_dir(root.join("dir")).unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        let error = rooted
            .write_file(Path::new("dir"), &mut &b"x"[..], &mine(0o644))
            .unwrap_err();
        assert!(error.to_string().contains("'/dir' is a directory"), "{error}");
        let error = rooted.ensure_dir(Path::new("file"), &mine(0o755)).unwrap_err();
        assert!(error.to_string().contains("'/file' is a file"), "{error}");
        let error = rooted
            .write_file(Path::new("../x"), &mut &b"x"[..], &mine(0o644))
            .unwrap_err();
        assert!(error.to_string().contains("'..'"), "{error}");
        rooted
            .write_hard_link(Path::new("b/hard"), Path::new("file"), &mine(0o644))
            .unwrap();
        assert!(
            rooted
                .write_hard_link(Path::new("c"), Path::new("dir"), &mine(0o644))
                .is_err()
        );
    }
}
