//! The few file operations that the crate rests on, with their paths in every error.
//!
//! The order that makes a file crash-safe is always the same: write under a temporary name, sync the
//! file, rename it, sync the directory. All functions block; [`blocking`] runs them off the runtime.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::storage::StorageError;

/// For files that others read (containers get mount files by link or bind). The directory above keeps
/// strangers out.
#[cfg(unix)]
const FILE_MODE: u32 = 0o644;

/// Runs blocking work on the runtime's threads for it. When the caller is dropped the work still ends.
pub(crate) async fn blocking<T, E, F>(work: F) -> Result<T, E>
where
    T: Send + 'static,
    E: From<StorageError> + Send + 'static,
    F: FnOnce() -> Result<T, E> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_cancelled) => Err(StorageError::ShuttingDown.into()),
        },
    }
}

pub(crate) fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StorageError + 'a {
    move |source| StorageError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A file under a name of its own that disappears on drop unless it was renamed into place.
#[derive(Debug)]
pub(crate) struct TempFile {
    path: PathBuf,
    renamed: bool,
}

impl TempFile {
    pub(crate) fn create(directory: &Path) -> Result<(Self, File), StorageError> {
        let path = directory.join(format!("{:032x}", rand::random::<u128>()));
        let file = create_new(&path).map_err(failed("create", &path))?;
        Ok((Self { path, renamed: false }, file))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its final name. The caller has synced the file.
    pub(crate) fn rename(mut self, target: &Path) -> Result<(), StorageError> {
        fs::rename(&self.path, target).map_err(failed("rename a finished file to", target))?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if self.renamed {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            // The directory is emptied at the next start, so this costs space only.
            tracing::warn!(path = %self.path.display(), %error, "failed to remove a temporary file");
        }
    }
}

fn create_new(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(FILE_MODE);
    }
    options.open(path)
}

/// Opens a file for writing at offsets, creating it where it is missing, and keeping what it holds.
pub(crate) fn open_for_spans(path: &Path) -> Result<File, StorageError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(FILE_MODE);
    }
    options.open(path).map_err(failed("open", path))
}

/// A directory tree whose directories are on disk before anything is put into them. A directory that is
/// there need not be: whoever made it may be about to sync it, or may have been killed before that.
#[derive(Debug, Clone)]
pub(crate) struct SafeTree {
    root: PathBuf,
    /// Directories whose names this process has synced. As many as there are shards, so a few hundred.
    safe: Arc<Mutex<HashSet<PathBuf>>>,
}

impl SafeTree {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            safe: Arc::default(),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the directory of `target`, and all above it up to the parent of the root, survive a power
    /// cut.
    pub(crate) fn ensure_parent(&self, target: &Path) -> Result<(), StorageError> {
        let parent = parent_of(target);
        if self.safe.lock().contains(parent) {
            return Ok(());
        }
        fs::create_dir_all(parent).map_err(failed("create directory", parent))?;
        let made = parent.ancestors().take_while(|above| above.starts_with(&self.root));
        for directory in made {
            sync_parent(directory)?;
        }
        self.safe.lock().insert(parent.to_owned());
        Ok(())
    }

    /// Makes `target` hold these bytes and survive a power cut.
    pub(crate) fn write(&self, temporary: &Path, target: &Path, bytes: &[u8]) -> Result<(), StorageError> {
        let (temp, mut file) = TempFile::create(temporary)?;
        file.write_all(bytes).map_err(failed("write", temp.path()))?;
        file.sync_all().map_err(failed("sync", temp.path()))?;
        self.ensure_parent(target)?;
        temp.rename(target)?;
        sync_parent(target)
    }
}

/// Makes `target` hold these bytes, all or nothing as far as this process and its successors can see.
/// A power cut may undo it; for notes about uploads, whose loss means only that the upload starts over.
pub(crate) fn write_note(temporary: &Path, target: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let (temp, mut file) = TempFile::create(temporary)?;
    file.write_all(bytes).map_err(failed("write", temp.path()))?;
    temp.rename(target)
}

pub(crate) fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>, StorageError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

pub(crate) fn remove_if_exists(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

pub(crate) fn sync_parent(path: &Path) -> Result<(), StorageError> {
    let parent = parent_of(path);
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync directory", parent))
}

/// Makes an empty directory of it, whatever was in it.
pub(crate) fn empty_directory(path: &Path) -> Result<(), StorageError> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(failed("empty", path))?;
    }
    fs::create_dir_all(path).map_err(failed("create directory", path))
}

fn parent_of(path: &Path) -> &Path {
    path.parent().expect("kept files lie below a root directory")
}
