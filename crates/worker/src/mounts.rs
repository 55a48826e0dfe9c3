//! A function's files as a directory of their own: one more layer over its image.
//!
//! A layer is built once per set of files and image, by hard links into the content store where modes agree
//! and by copies elsewhere, and committed by a rename. It depends on the image because a directory in an upper
//! layer decides what that directory is: owner and mode must be repeated, and a link in the image (`/lib` to
//! `/usr/lib`) must be followed and not replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, FileTimes};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use ionian_domain::mount::MountFile;
use ionian_image::ContextFiles;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::image_files::{DirectoryAttributes, Entry, ImageFiles, Place, ResolveError};

/// A layer that no container used for this long is removed at the next start of the worker.
const UNUSED_AFTER: Duration = Duration::from_hours(7 * 24);
/// For files whose mode the client did not send.
const DEFAULT_MODE: u32 = 0o644;
/// The kernel's limits on a path and on one name in it.
const MAX_PATH_BYTES: usize = 4095;
const MAX_NAME_BYTES: usize = 255;
/// Part of every key. Raise it when the same files make another layer.
const RECIPE_VERSION: &str = "mount-layer-1";
const BOOT_ID_FILE: &str = "boot_id";
const DRAFT_PREFIX: &str = ".draft-";

/// The directory of mount layers. All methods block.
pub(crate) struct MountLayers {
    dir: PathBuf,
    content: ContextFiles,
    /// One builder per layer at a time; the others wait and find it built.
    gates: Mutex<HashMap<String, Weak<Mutex<()>>>>,
    drafts: AtomicU64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("{path:?} cannot be the path of a mounted file: {reason}")]
    Path { path: String, reason: &'static str },
    #[error("two mounted files are in each other's way: {path} would be both a file and a directory")]
    Conflict { path: PathBuf },
    #[error("a file is to be mounted at {path}, where the image has a directory")]
    OverDirectory { path: PathBuf },
    #[error(transparent)]
    Image(#[from] ResolveError),
    #[error("the content {sha256_hex} of {path} is not in the store; deploy the app again")]
    Content {
        path: PathBuf,
        sha256_hex: String,
        source: io::Error,
    },
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// What is to be made.
#[derive(Debug, Default)]
struct Tree {
    /// From the root down, since a path sorts after what it is below.
    directories: BTreeMap<PathBuf, DirectoryAttributes>,
    files: BTreeMap<PathBuf, (String, u32)>,
}

impl MountLayers {
    /// Opens the directory and removes what is left of earlier runs, but nothing of the layers in `used`, on
    /// which containers run.
    pub(crate) fn open(dir: PathBuf, content: ContextFiles, used: &BTreeSet<PathBuf>) -> Result<Self, MountError> {
        fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let boot_id_path = dir.join(BOOT_ID_FILE);
        let known = fs::read_to_string(&boot_id_path).unwrap_or_default();
        // Layers are not synced to the disk, which would cost each start; a power failure can only have happened
        // between two boots.
        let is_same_boot = !boot_id.is_empty() && boot_id == known;
        for entry in fs::read_dir(&dir).map_err(failed("list", &dir))? {
            let path = entry.map_err(failed("list", &dir))?.path();
            let is_used = used.contains(&path.join("fs"));
            if path != boot_id_path && !is_used && !(is_same_boot && was_used_lately(&path)) {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        fs::write(&boot_id_path, boot_id).map_err(failed("write", &boot_id_path))?;
        Ok(Self {
            dir,
            content,
            gates: Mutex::default(),
            drafts: AtomicU64::new(0),
        })
    }

    /// The layer with these files for an image with these layers (keys, and directories base first).
    pub(crate) fn ensure(
        &self,
        image_keys: &[String],
        image_dirs: &[PathBuf],
        files: &[MountFile],
    ) -> Result<Option<PathBuf>, MountError> {
        if files.is_empty() {
            return Ok(None);
        }
        let key = key_of(image_keys, files);
        let target = self.dir.join(&key);
        let gate = self.gate(&key);
        let _turn = gate.lock();
        if target.is_dir() {
            mark_used(&target)?;
            return Ok(Some(target.join("fs")));
        }
        let tree = Tree::plan(files, Some(&ImageFiles::new(image_dirs)))?;
        let number = self.drafts.fetch_add(1, Ordering::Relaxed);
        let draft = Draft(self.dir.join(format!("{DRAFT_PREFIX}{number}")));
        fs::create_dir(&draft.0).map_err(failed("create", &draft.0))?;
        tree.write(&draft.0.join("fs"), &self.content)?;
        fs::rename(&draft.0, &target).map_err(failed("commit", &target))?;
        Ok(Some(target.join("fs")))
    }

    /// Writes the files below a directory of the caller's, for a container without an image.
    pub(crate) fn materialize(&self, files: &[MountFile], root: &Path) -> Result<(), MountError> {
        Tree::plan(files, None)?.write(root, &self.content)
    }

    fn gate(&self, key: &str) -> Arc<Mutex<()>> {
        let mut gates = self.gates.lock();
        if let Some(gate) = gates.get(key).and_then(Weak::upgrade) {
            return gate;
        }
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(Mutex::new(()));
        gates.insert(key.to_owned(), Arc::downgrade(&gate));
        gate
    }
}

/// Removes a draft that was not committed; after the rename there is nothing to remove.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The next start of the worker removes it.
            Err(error) => tracing::warn!(path = %self.0.display(), %error, "failed to remove a draft"),
        }
    }
}

impl Tree {
    /// Without an image, paths are taken as they are and directories are new.
    fn plan(files: &[MountFile], image: Option<&ImageFiles>) -> Result<Self, MountError> {
        let mut tree = Self::default();
        tree.directories.insert(PathBuf::new(), DirectoryAttributes::PLAIN);
        // Many files share few directories.
        let mut resolved: HashMap<&Path, Parent> = HashMap::new();
        for file in files {
            let (parent, name) = split(&file.path)?;
            let place = match resolved.get(parent) {
                Some(place) => place,
                None => {
                    let place = tree.add_parent(parent, image)?;
                    resolved.entry(parent).or_insert(place)
                }
            };
            let path = place.path.join(name);
            if let (Some(image), Some(directory)) = (image, &place.existing)
                && let Entry::Directory(_) = image.entry(directory, name)?
            {
                return Err(MountError::OverDirectory {
                    path: Path::new("/").join(path),
                });
            }
            let mode = file.mode.map_or(DEFAULT_MODE, |mode| mode & 0o7777);
            // Of several files at one path the last one counts, as if they were copied one after another.
            tree.files.insert(path, (file.sha256_hex.clone(), mode));
        }
        if let Some(path) = tree.files.keys().find(|path| tree.directories.contains_key(*path)) {
            return Err(MountError::Conflict {
                path: Path::new("/").join(path),
            });
        }
        Ok(tree)
    }

    fn add_parent(&mut self, parent: &Path, image: Option<&ImageFiles>) -> Result<Parent, MountError> {
        let (trail, names) = match image.map(|image| image.resolve(parent)).transpose()? {
            None => (
                Vec::new(),
                parent.iter().filter(|name| *name != "/").map(OsStr::to_owned).collect(),
            ),
            Some(Place::Directory { trail }) => (trail, Vec::new()),
            Some(Place::Missing { trail, names }) => (trail, names),
            Some(Place::File(_)) => {
                let (path, file) = (parent.to_owned(), parent.to_owned());
                return Err(ResolveError::NotADirectory { path, file }.into());
            }
        };
        let mut path = PathBuf::new();
        let mut existing = None;
        if let Some(image) = image {
            for directory in trail {
                self.directories
                    .insert(directory.path.clone(), image.attributes(&directory)?);
                path.clone_from(&directory.path);
                existing = Some(directory);
            }
        }
        if !names.is_empty() {
            existing = None;
        }
        for name in names {
            path.push(name);
            self.directories.insert(path.clone(), DirectoryAttributes::PLAIN);
        }
        Ok(Parent { path, existing })
    }

    fn write(&self, root: &Path, content: &ContextFiles) -> Result<(), MountError> {
        for path in self.directories.keys() {
            let path = root.join(path);
            match fs::create_dir(&path) {
                Ok(()) => {}
                // The root may be the caller's.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("create", &path)(error)),
            }
        }
        for (path, (sha256_hex, mode)) in &self.files {
            let source = content(sha256_hex).map_err(|source| MountError::Content {
                path: Path::new("/").join(path),
                sha256_hex: sha256_hex.clone(),
                source,
            })?;
            place_file(&source, &root.join(path), *mode)?;
        }
        // After the files: a directory may be one that its owner cannot write to.
        for (path, attributes) in self.directories.iter().rev() {
            let path = root.join(path);
            set_attributes(&path, *attributes).map_err(failed("set the attributes of", &path))?;
        }
        Ok(())
    }
}

struct Parent {
    path: PathBuf,
    /// The image's directory, if it has one there.
    existing: Option<crate::image_files::Directory>,
}

/// A link where the content store's file has the wanted mode already, else a copy.
fn place_file(source: &Path, target: &Path, mode: u32) -> Result<(), MountError> {
    let metadata = fs::metadata(source).map_err(failed("look at", source))?;
    // Refused across file systems, beyond the limit on links, and for files of somebody else: then it is a copy.
    if metadata.mode() & 0o7777 == mode && fs::hard_link(source, target).is_ok() {
        return Ok(());
    }
    fs::copy(source, target).map_err(failed("copy a file to", target))?;
    fs::set_permissions(target, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", target))
}

fn set_attributes(path: &Path, attributes: DirectoryAttributes) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let is_root = nix::unistd::geteuid().is_root();
    if is_root && (metadata.uid(), metadata.gid()) != (attributes.uid, attributes.gid) {
        std::os::unix::fs::chown(path, Some(attributes.uid), Some(attributes.gid))?;
    }
    // Last: changing the owner clears some bits.
    fs::set_permissions(path, fs::Permissions::from_mode(attributes.mode))
}

/// Parent and name of an absolute path without tricks.
fn split(path: &str) -> Result<(&Path, &OsStr), MountError> {
    let invalid = |reason| MountError::Path {
        path: path.chars().take(256).collect(),
        reason,
    };
    if !path.starts_with('/') {
        return Err(invalid("it is not absolute"));
    }
    if path.len() > MAX_PATH_BYTES || path.split('/').any(|name| name.len() > MAX_NAME_BYTES) {
        return Err(invalid("it is too long"));
    }
    if path.contains('\0') || path.ends_with('/') {
        return Err(invalid("it is not the path of a file"));
    }
    let path = Path::new(path);
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(invalid("it contains `..`"));
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(invalid("it is not the path of a file")),
    }
}

fn key_of(image_keys: &[String], files: &[MountFile]) -> String {
    let mut hasher = Sha256::new();
    let mut part = |text: &str| {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    part(RECIPE_VERSION);
    part(&image_keys.len().to_string());
    for key in image_keys {
        part(key);
    }
    for file in files {
        part(&file.path);
        part(&file.sha256_hex);
        part(&file.mode.unwrap_or(DEFAULT_MODE).to_string());
    }
    // Half of it is enough against accidents and against anybody; mount options are short of space.
    hex::encode(&hasher.finalize()[..16])
}

fn was_used_lately(path: &Path) -> bool {
    let is_draft = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(DRAFT_PREFIX.as_bytes()));
    // A time in the future (the clock was set back) counts as lately.
    let age = fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .map(|used| used.elapsed().unwrap_or_default());
    !is_draft && age.is_ok_and(|age| age < UNUSED_AFTER)
}

/// The directory's own time says when it was used last.
fn mark_used(path: &Path) -> Result<(), MountError> {
    let now = SystemTime::now();
    fs::File::open(path)
        .and_then(|directory| directory.set_times(FileTimes::new().set_modified(now)))
        .map_err(failed("mark as used", path))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> MountError + 'a {
    move |source| MountError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A content store, layers of an image, and mount layers over it.
    struct World {
        root: tempfile::TempDir,
        layers: MountLayers,
    }

    fn file(path: &str, content: &str, mode: Option<u32>) -> MountFile {
        MountFile {
            path: path.to_owned(),
            sha256_hex: content.to_owned(),
            mode,
        }
    }

    impl World {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let store = root.path().join("store");
            for path in [
                &store,
                &root.path().join("image/usr/lib"),
                &root.path().join("image/tmp"),
            ] {
                fs::create_dir_all(path).unwrap();
            }
            fs::set_permissions(root.path().join("image/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
            std::os::unix::fs::symlink("usr/lib", root.path().join("image/lib")).unwrap();
            for name in ["a", "b"] {
                fs::write(store.join(name), name).unwrap();
                fs::set_permissions(store.join(name), fs::Permissions::from_mode(0o644)).unwrap();
            }
            let layers = Self::open(root.path(), &[]);
            Self { root, layers }
        }

        fn open(root: &Path, used: &[&Path]) -> MountLayers {
            let store = root.join("store");
            let content: ContextFiles = Arc::new(move |sha256_hex| {
                let path = store.join(sha256_hex);
                if path.is_file() {
                    Ok(path)
                } else {
                    Err(io::Error::from(io::ErrorKind::NotFound))
                }
            });
            MountLayers::open(root.join("mounts"), content, &used.iter().map(PathBuf::from).collect()).unwrap()
        }

        fn ensure(&self, files: &[MountFile]) -> Result<Option<PathBuf>, MountError> {
            self.layers
                .ensure(&["image".to_owned()], &[self.root.path().join("image")], files)
        }

        fn committed(&self) -> usize {
            fs::read_dir(self.root.path().join("mounts")).unwrap().count() - 1
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn files_have_their_modes_and_directories_those_of_the_image() {
        let world = World::new();
        let files = [
            file("/root/pkg/a.py", "a", None),
            file("/tmp/run", "b", Some(0o755)),
            file("/lib/b.so", "b", Some(0o644)),
        ];
        let layer = world.ensure(&files).unwrap().unwrap();
        assert_eq!(fs::read_to_string(layer.join("root/pkg/a.py")).unwrap(), "a");
        assert_eq!(
            (mode(&layer.join("root/pkg/a.py")), mode(&layer.join("root/pkg"))),
            (0o644, 0o755)
        );
        assert_eq!(
            (mode(&layer.join("tmp/run")), mode(&layer.join("tmp"))),
            (0o755, 0o1777)
        );
        // The image's link is followed, not replaced by a directory.
        assert!(layer.join("usr/lib/b.so").is_file() && !layer.join("lib").exists());
        // Linked where it can be, and the store's own file keeps its mode.
        let store = world.root.path().join("store");
        assert_eq!(
            fs::metadata(store.join("a")).unwrap().ino(),
            fs::metadata(layer.join("root/pkg/a.py")).unwrap().ino()
        );
        assert_eq!(mode(&store.join("b")), 0o644);
    }

    #[test]
    fn a_set_of_files_is_built_once_also_at_the_same_time() {
        let world = World::new();
        let files: Vec<_> = (0..50)
            .map(|index| file(&format!("/root/{index}.py"), "a", Some(0o600)))
            .collect();
        let layers: Vec<_> = std::thread::scope(|scope| {
            let builders: Vec<_> = (0..8).map(|_| scope.spawn(|| world.ensure(&files).unwrap())).collect();
            builders.into_iter().map(|builder| builder.join().unwrap()).collect()
        });
        assert!(layers.iter().all(|layer| *layer == layers[0]));
        assert_eq!(world.committed(), 1);
        world.ensure(&files[1..]).unwrap();
        assert_eq!(world.committed(), 2);
        assert_eq!(world.ensure(&[]).unwrap(), None);
    }

    #[test]
    fn the_last_of_several_files_counts() {
        let world = World::new();
        let layer = world
            .ensure(&[file("/x", "a", None), file("/x", "b", None)])
            .unwrap()
            .unwrap();
        assert_eq!(fs::read_to_string(layer.join("x")).unwrap(), "b");
    }

    #[test]
    fn what_cannot_be_is_refused_and_leaves_nothing() {
        let world = World::new();
        let fails = |files: &[MountFile]| world.ensure(files).unwrap_err().to_string();
        for path in ["relative", "/up/../x", "/", "/dir/", "/nul\0"] {
            assert!(
                fails(&[file(path, "a", None)]).contains("cannot be the path"),
                "{path:?}"
            );
        }
        assert!(fails(&[file(&format!("/{}", "x".repeat(300)), "a", None)]).contains("too long"));
        assert!(fails(&[file("/a/b", "a", None), file("/a", "a", None)]).contains("/a would be both"));
        assert!(fails(&[file("/usr/lib", "a", None)]).contains("the image has a directory"));
        assert!(fails(&[file("/x", "missing", None)]).contains("missing of /x is not in the store"));
        assert_eq!(world.committed(), 0);
    }

    #[test]
    fn a_start_keeps_what_was_used_lately_in_this_boot() {
        let world = World::new();
        let old = world.ensure(&[file("/old", "a", None)]).unwrap().unwrap();
        let new = world.ensure(&[file("/new", "a", None)]).unwrap().unwrap();
        let mounts = world.root.path().join("mounts");
        fs::create_dir_all(mounts.join(".draft-7/fs")).unwrap();
        let long_ago = FileTimes::new().set_modified(SystemTime::now() - UNUSED_AFTER - Duration::from_mins(1));
        fs::File::open(old.parent().unwrap())
            .unwrap()
            .set_times(long_ago)
            .unwrap();
        World::open(world.root.path(), &[&old]);
        assert!(old.exists(), "a container runs on it");
        World::open(world.root.path(), &[]);
        assert!(new.exists() && !old.exists() && !mounts.join(".draft-7").exists());
        fs::write(mounts.join(BOOT_ID_FILE), "another boot").unwrap();
        World::open(world.root.path(), &[]);
        assert!(!new.exists());
    }

    #[test]
    fn without_an_image_paths_are_taken_as_they_are() {
        let world = World::new();
        let root = world.root.path().join("plain");
        world
            .layers
            .materialize(&[file("/root/app.py", "a", None), file("/lib/x", "b", None)], &root)
            .unwrap();
        assert_eq!(fs::read_to_string(root.join("root/app.py")).unwrap(), "a");
        assert!(root.join("lib/x").is_file());
    }
}
