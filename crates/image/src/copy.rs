//! Carries out `COPY` and `ADD`: writes files of the context or of other layers into the merged view of
//! a step. Blocking; the engine calls it on a thread for that.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawMode, Stat, Timespec, Timestamps};

use crate::build::ContextFiles;
use crate::context::{ContextFile, ContextItem};
use crate::extract::{self, ExtractError};
use crate::patterns;
use crate::plan::{CopyAction, CopySource};
use crate::rooted::{Attributes, Rooted, list_fd};

/// The longest `/etc/passwd` or `/etc/group` that names are looked up in.
const MAX_ACCOUNT_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Attributes of files that are copied along: file capabilities and what users set.
const KEPT_XATTRS: [&[u8]; 2] = [b"security.capability", b"user."];

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// The Dockerfile or the image is at fault.
    #[error("{0}")]
    Refused(String),
    #[error("failed to copy {what}")]
    Io { what: String, source: io::Error },
    #[error("failed to read content {sha256_hex} of the build context")]
    Content { sha256_hex: String, source: io::Error },
}

/// Writes what a `COPY` or `ADD` names into `target`; returns what was left out, for the log.
pub(crate) fn copy(
    action: &CopyAction,
    target: &Path,
    layers_view: Option<&Path>,
    files: &ContextFiles,
) -> Result<Vec<String>, CopyError> {
    let root = Rooted::open(target).map_err(|source| io_error("the destination", source))?;
    let owner = action.chown.as_deref().map(|chown| look_up(&root, chown)).transpose()?;
    let destination = PathBuf::from(&action.destination);
    let exists = root
        .is_dir(&destination)
        .map_err(|source| io_error(&action.destination, source))?;
    let into_directory = action.into_directory || exists;
    let mut job = Job {
        action,
        root,
        owner,
        destination,
        into_directory,
        skipped: Vec::new(),
        links: HashMap::new(),
    };
    match (&action.source, layers_view) {
        (CopySource::Context { items, inline }, _) => job.copy_context(items, inline, files)?,
        (CopySource::Layers { patterns, .. }, Some(view)) => job.copy_layers(patterns, view)?,
        (CopySource::Layers { .. }, None) => unreachable!("the engine mounts the layers that a COPY reads"),
    }
    Ok(job.skipped)
}

struct Job<'a> {
    action: &'a CopyAction,
    root: Rooted,
    owner: Option<(u32, u32)>,
    destination: PathBuf,
    into_directory: bool,
    skipped: Vec<String>,
    /// Where a file with several names was copied to first, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Job<'_> {
    fn copy_context(
        &mut self,
        items: &[ContextItem],
        inline: &[(String, String)],
        files: &ContextFiles,
    ) -> Result<(), CopyError> {
        for item in items {
            match item {
                ContextItem::File(file) => {
                    let content = open_content(file, files)?;
                    if self.action.extract
                        && let Some(archive) =
                            extract::detect(&content).map_err(|error| Self::extract_error(file, error))?
                    {
                        extract::extract(archive, &content, &self.root, &self.destination, self.owner)
                            .map_err(|error| Self::extract_error(file, error))?;
                        continue;
                    }
                    let target = self.target_of(OsStr::new(&file.path));
                    self.write_context_file(&target, file, &content)?;
                }
                ContextItem::Directory(inside) => {
                    // A directory without files too becomes one.
                    self.make_dir(&self.destination.clone(), &self.attributes(0o755, 0, 0))?;
                    for file in inside {
                        let target = self.destination.join(&file.path);
                        self.write_context_file(&target, file, &open_content(file, files)?)?;
                    }
                }
            }
        }
        for (name, content) in inline {
            let target = self.target_of(OsStr::new(name));
            let attributes = self.attributes(0o644, 0, 0);
            self.root
                .write_file(&target, &mut content.as_bytes(), &attributes)
                .map_err(|source| refused_or_io(&target, source))?;
        }
        Ok(())
    }

    fn write_context_file(&self, target: &Path, file: &ContextFile, content: &File) -> Result<(), CopyError> {
        // No time is set: content without one must not look older than bytecode compiled from its predecessor.
        let attributes = self.attributes(file.mode, 0, 0);
        self.root
            .copy_file(target, content, &attributes)
            .map_err(|source| refused_or_io(target, source))?;
        Ok(())
    }

    fn copy_layers(&mut self, patterns: &[String], view: &Path) -> Result<(), CopyError> {
        let source_root = Rooted::open(view).map_err(|source| io_error("the source image", source))?;
        let mut found = Vec::new();
        for pattern in patterns {
            let before = found.len();
            matching(&source_root, pattern, &mut found)?;
            if found.len() == before {
                return Err(CopyError::Refused(format!("the source image has no file '/{pattern}'")));
            }
        }
        self.into_directory |= found.len() > 1;
        for path in found {
            let what = || format!("'/{}'", path.display());
            let fd = source_root
                .open_read(&path)
                .map_err(|source| io_error(&what(), source))?;
            let stat = rustix::fs::fstat(&fd).map_err(|source| io_error(&what(), source.into()))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                self.make_dir(&self.destination.clone(), &self.attributes_of(&fd, &stat)?)?;
                self.copy_tree(&fd, &self.destination.clone(), &path)?;
            } else {
                let target = self.target_of(path.file_name().unwrap_or(OsStr::new("file")));
                self.copy_node(fd, &stat, &target, &path)?;
            }
        }
        Ok(())
    }

    /// Copies what is in a directory. With a stack of its own: how deep an image nests is up to a stranger.
    fn copy_tree(&mut self, top: &OwnedFd, target: &Path, shown: &Path) -> Result<(), CopyError> {
        let top = top.try_clone().map_err(|source| io_error("a directory", source))?;
        let mut waiting = vec![(top, target.to_owned(), shown.to_owned())];
        while let Some((dir, target, shown)) = waiting.pop() {
            let names = list_fd(&dir).map_err(|source| io_error(&shown.display().to_string(), source))?;
            for name in names {
                let (target, shown) = (target.join(&name), shown.join(&name));
                let what = || format!("'/{}'", shown.display());
                let stat = rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|source| io_error(&what(), source.into()))?;
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Symlink => {
                        let link = rustix::fs::readlinkat(&dir, &name, Vec::new())
                            .map_err(|source| io_error(&what(), source.into()))?;
                        let mut attributes = self.attributes(0o777, stat.st_uid, stat.st_gid);
                        attributes.times = Some(times(&stat));
                        self.root
                            .write_link(&target, OsStr::from_bytes(link.as_bytes()), &attributes)
                            .map_err(|source| refused_or_io(&target, source))?;
                    }
                    FileType::Directory => {
                        let fd =
                            open_child(&dir, &name, OFlags::DIRECTORY).map_err(|source| io_error(&what(), source))?;
                        self.make_dir(&target, &self.attributes_of(&fd, &stat)?)?;
                        waiting.push((fd, target, shown));
                    }
                    FileType::RegularFile => {
                        let fd =
                            open_child(&dir, &name, OFlags::empty()).map_err(|source| io_error(&what(), source))?;
                        self.copy_node(fd, &stat, &target, &shown)?;
                    }
                    FileType::Fifo => {
                        let mut attributes = self.attributes(stat.st_mode, stat.st_uid, stat.st_gid);
                        attributes.times = None;
                        self.root
                            .write_fifo(&target, &attributes)
                            .map_err(|source| refused_or_io(&target, source))?;
                    }
                    FileType::Socket | FileType::BlockDevice | FileType::CharacterDevice | FileType::Unknown => {
                        self.skipped
                            .push(format!("left out /{}: it is a device or a socket", shown.display()));
                    }
                }
            }
        }
        Ok(())
    }

    fn copy_node(&mut self, fd: OwnedFd, stat: &Stat, target: &Path, shown: &Path) -> Result<(), CopyError> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            self.skipped
                .push(format!("left out /{}: it is no regular file", shown.display()));
            return Ok(());
        }
        let attributes = self.attributes_of(&fd, stat)?;
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                return self
                    .root
                    .write_hard_link(target, first, &attributes)
                    .map_err(|source| refused_or_io(target, source));
            }
            self.links.insert((stat.st_dev, stat.st_ino), target.to_owned());
        }
        let file = File::from(fd);
        self.root
            .copy_file(target, &file, &attributes)
            .map_err(|source| refused_or_io(target, source))?;
        Ok(())
    }

    /// Where a single file goes.
    fn target_of(&self, name: &OsStr) -> PathBuf {
        if self.into_directory {
            self.destination.join(name)
        } else {
            self.destination.clone()
        }
    }

    fn make_dir(&self, path: &Path, attributes: &Attributes) -> Result<(), CopyError> {
        self.root
            .ensure_dir(path, attributes)
            .map_err(|source| refused_or_io(path, source))
    }

    fn attributes(&self, mode: RawMode, uid: u32, gid: u32) -> Attributes {
        let (uid, gid) = self.owner.unwrap_or((uid, gid));
        Attributes::new(self.action.chmod.unwrap_or(mode) & 0o7777, uid, gid)
    }

    fn attributes_of(&self, fd: &OwnedFd, stat: &Stat) -> Result<Attributes, CopyError> {
        let mut attributes = self.attributes(stat.st_mode, stat.st_uid, stat.st_gid);
        attributes.times = Some(times(stat));
        attributes.xattrs = kept_xattrs(fd).map_err(|source| io_error("file attributes", source))?;
        Ok(attributes)
    }

    fn extract_error(file: &ContextFile, error: ExtractError) -> CopyError {
        match error {
            ExtractError::Refused(why) => CopyError::Refused(format!("cannot unpack '{}': {why}", file.path)),
            ExtractError::Io(source) => io_error(&format!("the archive '{}'", file.path), source),
        }
    }
}

fn open_content(file: &ContextFile, files: &ContextFiles) -> Result<File, CopyError> {
    let lost = |source| CopyError::Content {
        sha256_hex: file.sha256_hex.clone(),
        source,
    };
    File::open(files(&file.sha256_hex).map_err(lost)?).map_err(lost)
}

fn open_child(dir: &OwnedFd, name: &OsStr, extra: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | extra;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

fn times(stat: &Stat) -> Timestamps {
    let modified = Timespec {
        tv_sec: stat.st_mtime,
        tv_nsec: stat.st_mtime_nsec as _,
    };
    Timestamps {
        last_access: modified,
        last_modification: modified,
    }
}

fn kept_xattrs(fd: &OwnedFd) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let mut names = vec![0_u8; 0];
    let length = match rustix::fs::flistxattr(fd.as_fd(), &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if length == 0 {
        return Ok(Vec::new());
    }
    names.resize(length, 0);
    let length = rustix::fs::flistxattr(fd.as_fd(), &mut names)?;
    names.truncate(length);
    let mut kept = Vec::new();
    for name in names.split(|byte| *byte == 0) {
        if !KEPT_XATTRS.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let name = OsStr::from_bytes(name);
        let mut value = vec![0_u8; 0];
        let length = rustix::fs::fgetxattr(fd.as_fd(), name, &mut value)?;
        value.resize(length, 0);
        let length = rustix::fs::fgetxattr(fd.as_fd(), name, &mut value)?;
        value.truncate(length);
        kept.push((name.to_owned(), value));
    }
    Ok(kept)
}

/// Paths in an image that a pattern names, component by component.
fn matching(root: &Rooted, pattern: &str, found: &mut Vec<PathBuf>) -> Result<(), CopyError> {
    let mut paths = vec![PathBuf::new()];
    for component in pattern.split('/').filter(|component| !component.is_empty()) {
        let mut next = Vec::new();
        for path in paths {
            if patterns::is_pattern(component) {
                let names = root
                    .list(&path)
                    .map_err(|source| io_error(&path.display().to_string(), source))?;
                let fits = |name: &OsString| name.to_str().is_some_and(|name| patterns::matches(component, name));
                next.extend(names.into_iter().filter(fits).map(|name| path.join(name)));
            } else {
                next.push(path.join(component));
            }
        }
        paths = next;
    }
    for path in paths {
        if root
            .find(&path)
            .map_err(|source| io_error(&path.display().to_string(), source))?
            .is_some()
        {
            found.push(path);
        }
    }
    Ok(())
}

/// `user[:group]` as numbers; names are looked up in the image. Without a group it has the user's number.
fn look_up(root: &Rooted, chown: &str) -> Result<(u32, u32), CopyError> {
    let (user, group) = chown
        .split_once(':')
        .map_or((chown, None), |(user, group)| (user, Some(group)));
    let number = |name: &str, file: &str| -> Result<u32, CopyError> {
        if let Ok(number) = name.parse() {
            return Ok(number);
        }
        let content = root
            .read(Path::new(file), MAX_ACCOUNT_FILE_BYTES)
            .map_err(|source| io_error(file, source))?
            .unwrap_or_default();
        let text = String::from_utf8_lossy(&content);
        text.lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.first() == Some(&name))
            .and_then(|fields| fields.get(2)?.parse().ok())
            .ok_or_else(|| CopyError::Refused(format!("--chown={chown}: {file} of the image does not know '{name}'")))
    };
    let uid = if user.is_empty() {
        0
    } else {
        number(user, "/etc/passwd")?
    };
    let gid = match group {
        Some(group) if !group.is_empty() => number(group, "/etc/group")?,
        Some(_) | None => uid,
    };
    Ok((uid, gid))
}

fn io_error(what: &str, source: io::Error) -> CopyError {
    CopyError::Io {
        what: what.to_owned(),
        source,
    }
}

/// Errors without an errno are those of [`Rooted`] that say what is in the way.
fn refused_or_io(path: &Path, source: io::Error) -> CopyError {
    if source.raw_os_error().is_none() && source.kind() == io::ErrorKind::Other {
        return CopyError::Refused(source.to_string());
    }
    io_error(&format!("to '{}'", path.display()), source)
}
