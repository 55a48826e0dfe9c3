//! The layer store: directories of files on this machine, each named by the key of what made it.
//!
//! A layer is a directory in the form that overlayfs stacks: deleted files are character devices with
//! number 0:0, replaced directories carry the attribute `trusted.overlay.opaque`. A layer exists when
//! its directory stands under `l/`, and it gets there by one rename after everything in it has reached
//! the disk. Until then it is a draft under `d/`, which counts for nothing and is swept when its maker
//! died. Several server processes may share one store: makers of the same key exclude each other by
//! `flock`, which the kernel releases when a process dies.
//!
//! Deciding what is in a layer, and deleting layers that nobody needs, is not done here.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ionian_domain::time::Timestamp;
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Directory names hold this much of a key: 96 bits cannot collide by accident, and mount options,
/// which repeat one path per layer, are limited to one page on older kernels.
const NAME_LENGTH: usize = 24;

/// How often a maker asks again for a lock that another process holds. `flock` has no way to wait that
/// can be cancelled, and waiting processes are rare; the cap is what a finished layer is noticed late by.
const LOCK_POLL_FIRST: Duration = Duration::from_millis(10);
const LOCK_POLL_CAP: Duration = Duration::from_millis(500);

/// A key over parts of any content. Lengths are hashed too, so that `["ab", "c"]` is not `["a", "bc"]`.
pub fn layer_key<Part: AsRef<[u8]>>(parts: &[Part]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("layer key '{key}' is not 64 lowercase hexadecimal digits")]
    InvalidKey { key: String },
    #[error("layer {key} does not exist")]
    NotFound { key: String },
    #[error("layer {key} has a record that belongs to layer {other}")]
    ForeignRecord { key: String, other: String },
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("failed to read the layer record {path}")]
    Record { path: PathBuf, source: serde_json::Error },
    #[error("a task of the layer store ended early")]
    TaskLost,
}

/// Says what made a layer. Written to disk: it must never hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerNote {
    /// Such as `RUN pip install numpy`, or the reference of a base image.
    pub made_by: String,
    /// The key of the layer below, where the maker knows one.
    pub parent: Option<String>,
}

/// What is known of a committed layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    pub key: String,
    #[serde(flatten)]
    pub note: LayerNote,
    /// Disk space the files take, hard links counted once.
    pub size_bytes: u64,
    pub entries: u64,
    pub created_at: Timestamp,
}

/// Content-addressed directories of files; a cheap clone shares the store.
#[derive(Debug, Clone)]
pub struct LayerStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Makers within this process queue here first, and so start at once when their turn comes.
    gates: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    drafts: AtomicU64,
}

/// What [`LayerStore::begin`] found when its turn came.
#[derive(Debug)]
pub enum Begin {
    Exists,
    Build(LayerDraft),
}

/// The right to make one layer, and the directory to make it in. Dropping it discards the work.
#[derive(Debug)]
pub struct LayerDraft {
    store: LayerStore,
    key: String,
    dir: PathBuf,
    fs: PathBuf,
    work: PathBuf,
    committed: bool,
    /// Last, so that the draft is swept before the next maker may start.
    _lock: BuildLock,
}

#[derive(Debug)]
struct BuildLock {
    _file: OwnedFd,
    _gate: tokio::sync::OwnedMutexGuard<()>,
}

impl LayerStore {
    /// Opens the store and sweeps the drafts of makers that died.
    pub fn open(root: PathBuf) -> Result<Self, LayerError> {
        for name in ["l", "d", "k", "n"] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(|source| io_error("create", &path, source))?;
        }
        // Layers hold other people's files, setuid programs among them.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))
            .map_err(|source| io_error("restrict", &root, source))?;
        let store = Self {
            inner: Arc::new(Inner {
                root,
                gates: Mutex::default(),
                drafts: AtomicU64::new(0),
            }),
        };
        store.sweep_drafts()?;
        Ok(store)
    }

    /// Whether the layer is committed; a half-built layer never counts.
    pub fn contains(&self, key: &str) -> bool {
        is_key(key) && self.record_path(key).is_file()
    }

    /// The directory that overlayfs gets. Short, because mount options are limited.
    pub fn fs_path(&self, key: &str) -> PathBuf {
        self.layer_dir(key).join("fs")
    }

    pub fn describe(&self, key: &str) -> Result<LayerRecord, LayerError> {
        check_key(key)?;
        let path = self.record_path(key);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LayerError::NotFound { key: key.to_owned() });
            }
            Err(source) => return Err(io_error("read", &path, source)),
        };
        let record: LayerRecord =
            serde_json::from_slice(&text).map_err(|source| LayerError::Record { path, source })?;
        if record.key != key {
            return Err(LayerError::ForeignRecord {
                key: key.to_owned(),
                other: record.key,
            });
        }
        Ok(record)
    }

    /// The keys of all layers that are here. Reads a small file for each.
    pub fn keys(&self) -> Result<Vec<String>, LayerError> {
        let dir = self.inner.root.join("l");
        let mut keys = Vec::new();
        for entry in fs::read_dir(&dir).map_err(|source| io_error("list", &dir, source))? {
            let path = entry
                .map_err(|source| io_error("list", &dir, source))?
                .path()
                .join("layer.json");
            // A layer that is being made, or removed, has no record.
            let Ok(text) = fs::read(&path) else { continue };
            let record: LayerRecord =
                serde_json::from_slice(&text).map_err(|source| LayerError::Record { path, source })?;
            keys.push(record.key);
        }
        Ok(keys)
    }

    /// Waits for whoever makes the same layer, in this process or in another, then says whether it exists.
    ///
    /// A caller that stops waiting (its future is dropped) leaves nothing behind.
    pub async fn begin(&self, key: &str) -> Result<Begin, LayerError> {
        check_key(key)?;
        if self.contains(key) {
            return Ok(Begin::Exists);
        }
        let gate = self.gate(key).lock_owned().await;
        let lock_path = self.lock_path(key);
        let file = open_lock(&lock_path)?;
        let mut pause = LOCK_POLL_FIRST;
        while !try_lock(&file, &lock_path)? {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOCK_POLL_CAP);
        }
        if self.contains(key) {
            return Ok(Begin::Exists);
        }
        self.create_draft(
            key,
            BuildLock {
                _file: file,
                _gate: gate,
            },
        )
        .map(Begin::Build)
    }

    /// A small text kept beside the layers under a key of its own (such as what an inspection found).
    pub fn find_note(&self, key: &str) -> Result<Option<Vec<u8>>, LayerError> {
        check_key(key)?;
        let path = self.inner.root.join("n").join(&key[..NAME_LENGTH]);
        match fs::read(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(io_error("read", &path, source)),
        }
    }

    /// Keeps such a text; a reader sees all of it or none.
    pub fn put_note(&self, key: &str, text: &[u8]) -> Result<(), LayerError> {
        check_key(key)?;
        let dir = self.inner.root.join("n");
        let path = dir.join(&key[..NAME_LENGTH]);
        let mut file = tempfile::NamedTempFile::new_in(&dir).map_err(|source| io_error("create", &path, source))?;
        io::Write::write_all(&mut file, text)
            .and_then(|()| file.as_file().sync_all())
            .map_err(|source| io_error("write", &path, source))?;
        file.persist(&path)
            .map_err(|error| io_error("rename", &path, error.error))?;
        Ok(())
    }

    fn create_draft(&self, key: &str, lock: BuildLock) -> Result<LayerDraft, LayerError> {
        let number = self.inner.drafts.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{}.{number}", &key[..NAME_LENGTH], std::process::id());
        let dir = self.inner.root.join("d").join(name);
        // A dead process with our id may have left one; whoever holds the lock owns the key's drafts.
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &dir, error)),
            Ok(()) | Err(_) => {}
        }
        let (fs, work) = (dir.join("fs"), dir.join("work"));
        for path in [&dir, &fs, &work] {
            fs::create_dir(path).map_err(|source| io_error("create", path, source))?;
        }
        // The root of a layer is the root of the image: it must not depend on the server's umask.
        fs::set_permissions(&fs, fs::Permissions::from_mode(0o755))
            .map_err(|source| io_error("set the mode of", &fs, source))?;
        Ok(LayerDraft {
            store: self.clone(),
            key: key.to_owned(),
            dir,
            fs,
            work,
            committed: false,
            _lock: lock,
        })
    }

    fn gate(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut gates = self.inner.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = gates.get(key).and_then(Weak::upgrade) {
            return gate;
        }
        gates.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(tokio::sync::Mutex::new(()));
        gates.insert(key.to_owned(), Arc::downgrade(&gate));
        gate
    }

    fn layer_dir(&self, key: &str) -> PathBuf {
        // Only `begin` makes layers, and it refuses odd keys; here they name a directory that is not there.
        self.inner
            .root
            .join("l")
            .join(key.get(..NAME_LENGTH).unwrap_or("invalid"))
    }

    fn record_path(&self, key: &str) -> PathBuf {
        self.layer_dir(key).join("layer.json")
    }

    fn lock_path(&self, key: &str) -> PathBuf {
        self.inner.root.join("k").join(&key[..NAME_LENGTH])
    }

    fn sweep_drafts(&self) -> Result<(), LayerError> {
        let dir = self.inner.root.join("d");
        let entries = fs::read_dir(&dir).map_err(|source| io_error("list", &dir, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| io_error("list", &dir, source))?;
            let name = entry.file_name();
            let Some(prefix) = name.to_str().and_then(|name| name.get(..NAME_LENGTH)) else {
                continue;
            };
            let lock_path = self.inner.root.join("k").join(prefix);
            let lock = open_lock(&lock_path)?;
            if try_lock(&lock, &lock_path)? {
                tracing::info!(draft = %entry.path().display(), "sweeping the draft of a build that died");
                if let Err(error) = fs::remove_dir_all(entry.path()) {
                    // A mount that outlived its server keeps it busy; the next start tries again.
                    tracing::warn!(draft = %entry.path().display(), %error, "failed to sweep a draft");
                }
            }
        }
        Ok(())
    }
}

impl LayerDraft {
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Where the layer's files go.
    pub fn fs(&self) -> &Path {
        &self.fs
    }

    /// The work directory for overlayfs, on the same file system.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Makes the layer exist, once everything in it is on the disk.
    pub async fn commit(mut self, note: LayerNote) -> Result<(), LayerError> {
        // On a thread of its own: measuring and syncing a layer of gigabytes takes seconds. The draft
        // moves along, so that its lock is held until the rename even when the caller goes away.
        tokio::task::spawn_blocking(move || self.commit_blocking(note))
            .await
            .map_err(|_| LayerError::TaskLost)?
    }

    fn commit_blocking(&mut self, note: LayerNote) -> Result<(), LayerError> {
        fs::remove_dir_all(&self.work).map_err(|source| io_error("remove", &self.work, source))?;
        let (size_bytes, entries) = measure(&self.fs)?;
        let record = LayerRecord {
            key: self.key.clone(),
            note,
            size_bytes,
            entries,
            created_at: Timestamp::now(),
        };
        let record_path = self.dir.join("layer.json");
        let text = serde_json::to_vec_pretty(&record).map_err(|source| LayerError::Record {
            path: record_path.clone(),
            source,
        })?;
        fs::write(&record_path, text).map_err(|source| io_error("write", &record_path, source))?;
        let dir = open_dir(&self.dir)?;
        rustix::fs::syncfs(&dir).map_err(|source| io_error("sync", &self.dir, source.into()))?;
        let target = self.store.layer_dir(&self.key);
        fs::rename(&self.dir, &target).map_err(|source| io_error("commit", &target, source))?;
        self.committed = true;
        let parent = self.store.inner.root.join("l");
        rustix::fs::fsync(open_dir(&parent)?).map_err(|source| io_error("sync", &parent, source.into()))
    }
}

impl Drop for LayerDraft {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // Renamed first: removing a large tree takes long, and until it is done nothing may take it for
        // the draft of whoever comes next. Then removed by a thread that nobody waits for.
        let name = format!("{}.discarded", self.dir.display());
        let discarded = PathBuf::from(name);
        let path = if fs::rename(&self.dir, &discarded).is_ok() {
            discarded
        } else {
            self.dir.clone()
        };
        let remove = move || match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(draft = %path.display(), %error, "failed to remove a discarded draft; the next start sweeps it");
            }
            Ok(()) | Err(_) => {}
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

fn is_key(key: &str) -> bool {
    key.len() == 64
        && key
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn check_key(key: &str) -> Result<(), LayerError> {
    if is_key(key) {
        Ok(())
    } else {
        Err(LayerError::InvalidKey {
            key: key.chars().take(128).collect(),
        })
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> LayerError {
    LayerError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, LayerError> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|source| io_error("open", path, source.into()))
}

fn open_lock(path: &Path) -> Result<OwnedFd, LayerError> {
    rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map_err(|source| io_error("open the lock", path, source.into()))
}

fn try_lock(file: &OwnedFd, path: &Path) -> Result<bool, LayerError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(source) => Err(io_error("lock", path, source.into())),
    }
}

/// Disk space and number of entries of a tree; hard links count once.
fn measure(root: &Path) -> Result<(u64, u64), LayerError> {
    let (mut bytes, mut entries) = (0_u64, 0_u64);
    let mut linked = std::collections::HashSet::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).map_err(|source| io_error("list", &dir, source))? {
            let entry = entry.map_err(|source| io_error("list", &dir, source))?;
            let metadata = entry
                .metadata()
                .map_err(|source| io_error("inspect", &entry.path(), source))?;
            entries += 1;
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
            if metadata.nlink() == 1 || metadata.is_dir() || linked.insert(metadata.ino()) {
                bytes += metadata.blocks() * 512;
            }
        }
    }
    Ok((bytes, entries))
}

#[cfg(test)]
mod tests;
