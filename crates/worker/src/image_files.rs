//! Looking into an image without mounting it: paths are resolved through its layers as overlayfs would show them.
//!
//! Needed before a container exists: to find its Python, and to lay files over directories without changing
//! what those directories are. Symbolic links lead inside the image only; nothing of the host is ever reached.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;
/// A directory that hides what lower layers have at its place.
const OPAQUE_ATTRIBUTE: &str = "trusted.overlay.opaque";

/// The files of an image. Layers do not change while it is used.
#[derive(Debug)]
pub(crate) struct ImageFiles {
    /// Topmost first.
    layers: Vec<PathBuf>,
}

/// A directory of the image, merged from the layers that have it.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    /// Relative to the image's root, without links.
    pub(crate) path: PathBuf,
    /// Topmost first; never empty, except for the root of an image without layers.
    layers: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectoryAttributes {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Where a path leads.
#[derive(Debug)]
pub(crate) enum Place {
    /// The directory, and before it all directories above, from the root on.
    Directory {
        trail: Vec<Directory>,
    },
    File(Metadata),
    /// The existing directories above, and the names that do not exist below the last of them.
    Missing {
        trail: Vec<Directory>,
        names: Vec<OsString>,
    },
}

#[derive(Debug)]
pub(crate) enum Entry {
    Absent,
    Directory(Directory),
    Link(PathBuf),
    File(Metadata),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("failed to look at {path} in a layer of the image")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} in the image passes through more than {MAX_LINKS} symbolic links")]
    TooManyLinks { path: PathBuf },
    #[error("{path} cannot exist: {file} is a file in the image")]
    NotADirectory { path: PathBuf, file: PathBuf },
}

impl ImageFiles {
    /// `layers` base first, as everywhere.
    pub(crate) fn new(layers: &[PathBuf]) -> Self {
        Self {
            layers: layers.iter().rev().cloned().collect(),
        }
    }

    /// An executable in one of the directories of a `PATH`, as its entry names it (a link stays a link, which is
    /// how a virtual environment's Python knows where it is).
    pub(crate) fn find_executable(&self, name: &str, search_path: &str) -> Result<Option<PathBuf>, ResolveError> {
        for directory in search_path.split(':').filter(|directory| directory.starts_with('/')) {
            let path = Path::new(directory).join(name);
            match self.resolve(&path) {
                Ok(Place::File(metadata)) if metadata.is_file() && metadata.mode() & 0o111 != 0 => {
                    return Ok(Some(path));
                }
                Ok(Place::File(_) | Place::Directory { .. } | Place::Missing { .. })
                // A broken entry is not what the search is about.
                | Err(ResolveError::NotADirectory { .. } | ResolveError::TooManyLinks { .. }) => {}
                Err(error @ ResolveError::Io { .. }) => return Err(error),
            }
        }
        Ok(None)
    }

    pub(crate) fn resolve(&self, path: &Path) -> Result<Place, ResolveError> {
        let mut left: VecDeque<OsString> = components(path).collect();
        let root = Directory {
            path: PathBuf::new(),
            layers: (0..self.layers.len()).collect(),
        };
        let mut trail = vec![root];
        let mut missing: Vec<OsString> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            if name == ".." {
                if missing.pop().is_none() && trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let (Some(directory), true) = (trail.last(), missing.is_empty()) else {
                missing.push(name);
                continue;
            };
            match self.entry(directory, &name)? {
                Entry::Absent => missing.push(name),
                Entry::Directory(found) => trail.push(found),
                Entry::File(metadata) if left.is_empty() => return Ok(Place::File(metadata)),
                Entry::File(_) => {
                    let file = Path::new("/").join(&directory.path).join(name);
                    return Err(ResolveError::NotADirectory {
                        path: path.to_owned(),
                        file,
                    });
                }
                Entry::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(ResolveError::TooManyLinks { path: path.to_owned() });
                    }
                    if target.is_absolute() {
                        trail.truncate(1);
                    }
                    for component in components(&target).collect::<Vec<_>>().into_iter().rev() {
                        left.push_front(component);
                    }
                }
            }
        }
        if missing.is_empty() {
            Ok(Place::Directory { trail })
        } else {
            Ok(Place::Missing { trail, names: missing })
        }
    }

    /// What a merged directory has under a name.
    pub(crate) fn entry(&self, directory: &Directory, name: &OsStr) -> Result<Entry, ResolveError> {
        let path = directory.path.join(name);
        let mut layers = Vec::new();
        for &layer in &directory.layers {
            // Every directory on the way is a real one in this layer, so no link is followed here.
            let place = self.layers[layer].join(&path);
            let failed = |source| ResolveError::Io {
                path: place.clone(),
                source,
            };
            let metadata = match place.symlink_metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            if metadata.is_dir() {
                layers.push(layer);
                if is_opaque(&place).map_err(failed)? {
                    break;
                }
            } else if !layers.is_empty() {
                // Hidden by the directory above it.
                break;
            } else if is_whiteout(&metadata) {
                return Ok(Entry::Absent);
            } else if metadata.is_symlink() {
                return place.read_link().map(Entry::Link).map_err(failed);
            } else {
                return Ok(Entry::File(metadata));
            }
        }
        if layers.is_empty() {
            Ok(Entry::Absent)
        } else {
            Ok(Entry::Directory(Directory { path, layers }))
        }
    }

    /// What the container sees of the directory itself: the topmost layer decides.
    pub(crate) fn attributes(&self, directory: &Directory) -> Result<DirectoryAttributes, ResolveError> {
        let Some(&layer) = directory.layers.first() else {
            return Ok(DirectoryAttributes::PLAIN);
        };
        let path = self.layers[layer].join(&directory.path);
        let metadata = path
            .symlink_metadata()
            .map_err(|source| ResolveError::Io { path, source })?;
        Ok(DirectoryAttributes {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }
}

impl DirectoryAttributes {
    pub(crate) const PLAIN: Self = Self {
        mode: 0o755,
        uid: 0,
        gid: 0,
    };
}

fn components(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Overlayfs marks a removed entry by a character device 0:0.
fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(path: &Path) -> io::Result<bool> {
    match xattr::get(path, OPAQUE_ATTRIBUTE) {
        Ok(value) => Ok(value.as_deref() == Some(b"y")),
        // A file system without attributes has no opaque directories either.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Two layers; `files` end in `/` for directories, `x` is executable.
    fn image(root: &Path, layers: &[&[&str]]) -> ImageFiles {
        let mut paths = Vec::new();
        for (index, files) in layers.iter().enumerate() {
            let layer = root.join(index.to_string());
            fs::create_dir_all(&layer).unwrap();
            for file in *files {
                if let Some((link, target)) = file.split_once(" -> ") {
                    fs::create_dir_all(layer.join(link).parent().unwrap()).unwrap();
                    symlink(target, layer.join(link)).unwrap();
                } else if file.ends_with('/') {
                    fs::create_dir_all(layer.join(file)).unwrap();
                } else {
                    fs::create_dir_all(layer.join(file).parent().unwrap()).unwrap();
                    fs::write(layer.join(file), "").unwrap();
                    fs::set_permissions(layer.join(file), fs::Permissions::from_mode(0o755)).unwrap();
                }
            }
            paths.push(layer);
        }
        ImageFiles::new(&paths)
    }

    fn show(image: &ImageFiles, path: &str) -> String {
        match image.resolve(Path::new(path)) {
            Ok(Place::Directory { trail }) => format!("/{}", trail.last().unwrap().path.display()),
            Ok(Place::File(_)) => "file".to_owned(),
            Ok(Place::Missing { trail, names }) => {
                let names: Vec<_> = names.iter().map(|name| name.to_string_lossy()).collect();
                format!("/{} + {}", trail.last().unwrap().path.display(), names.join("/"))
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn links_lead_inside_the_image() {
        let root = tempfile::tempdir().unwrap();
        let image = image(
            root.path(),
            &[
                &["usr/lib/a", "lib -> usr/lib", "etc/passwd"],
                &[
                    "data -> ../../../../etc",
                    "abs -> /usr/lib",
                    "loop -> loop",
                    "usr/up -> ../etc",
                    "gone -> /no/where",
                ],
            ],
        );
        assert_eq!(show(&image, "/lib"), "/usr/lib");
        assert_eq!(show(&image, "/lib/a"), "file");
        assert_eq!(show(&image, "/lib/b/c"), "/usr/lib + b/c");
        assert_eq!(show(&image, "/data"), "/etc");
        assert_eq!(show(&image, "/abs/a"), "file");
        assert_eq!(show(&image, "/usr/up/new"), "/etc + new");
        assert_eq!(show(&image, "/gone/x"), "/ + no/where/x");
        assert_eq!(show(&image, "/etc/../lib/./a"), "file");
        assert!(show(&image, "/loop").contains("symbolic links"));
        assert!(show(&image, "/etc/passwd/x").contains("/etc/passwd is a file"));
    }

    #[test]
    fn upper_layers_hide_lower_ones() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: making whiteouts needs root");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let image = image(
            root.path(),
            &[
                &["app/old", "kept/old", "file/below", "removed"],
                &["app/new", "kept/new", "file"],
            ],
        );
        let upper = root.path().join("1");
        xattr::set(upper.join("app"), OPAQUE_ATTRIBUTE, b"y").unwrap();
        let device = nix::sys::stat::makedev(0, 0);
        nix::sys::stat::mknod(
            &upper.join("removed"),
            nix::sys::stat::SFlag::S_IFCHR,
            nix::sys::stat::Mode::empty(),
            device,
        )
        .unwrap();
        assert_eq!(show(&image, "/app/old"), "/app + old");
        assert_eq!(show(&image, "/app/new"), "file");
        assert_eq!(show(&image, "/kept/old"), "file");
        assert_eq!(show(&image, "/file"), "file");
        assert_eq!(show(&image, "/removed"), "/ + removed");
    }

    #[test]
    fn an_executable_is_found_as_the_path_names_it() {
        let root = tempfile::tempdir().unwrap();
        let image = image(
            root.path(),
            &[
                &[
                    "usr/local/bin/python3.11",
                    "usr/local/bin/python -> python3.11",
                    "usr/bin/",
                    "opt/python -> /nowhere",
                ],
                &["venv/bin/python -> /usr/local/bin/python"],
            ],
        );
        let find = |search_path: &str| image.find_executable("python", search_path).unwrap();
        assert_eq!(
            find("relative:/opt:/usr/bin:/usr/local/bin"),
            Some(PathBuf::from("/usr/local/bin/python"))
        );
        assert_eq!(
            find("/venv/bin:/usr/local/bin"),
            Some(PathBuf::from("/venv/bin/python"))
        );
        assert_eq!(find("/usr/bin"), None);
        fs::set_permissions(
            root.path().join("0/usr/local/bin/python3.11"),
            fs::Permissions::from_mode(0o644),
        )
        .unwrap();
        assert_eq!(find("/usr/local/bin"), None);
    }

    #[test]
    fn the_topmost_layer_says_what_a_directory_is() {
        let root = tempfile::tempdir().unwrap();
        let image = image(root.path(), &[&["tmp/", "root/"], &["root/"]]);
        fs::set_permissions(root.path().join("0/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(root.path().join("0/root"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(root.path().join("1/root"), fs::Permissions::from_mode(0o700)).unwrap();
        let mode = |path: &str| {
            let Ok(Place::Directory { trail }) = image.resolve(Path::new(path)) else {
                panic!("{path}")
            };
            image.attributes(trail.last().unwrap()).unwrap().mode
        };
        assert_eq!((mode("/tmp"), mode("/root")), (0o1777, 0o700));
    }
}
