//! Content by digest on a worker that is not on the server's disk: fetched once, checked, kept within a bound.
//!
//! Mount layers link the files they use, so what is removed here is gone for new layers only, and is fetched
//! again when one needs it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt, TryStreamExt, stream};
use ionian_image::ContextFiles;
use reqwest::StatusCode;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::link::CONTENT_PATH;
use crate::worker::FetchContent;

/// Files that are fetched at the same time, for one container: enough to fill a connection with small ones.
const CONCURRENT_FETCHES: usize = 8;
/// Attempts at one file. A server that restarts is back within a second or two.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// No byte for this long: the connection is dead.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What was asked for within this time may be about to be linked, and is not removed.
const IN_USE: Duration = Duration::from_mins(10);
/// Making room goes down to this share of the limit, so that not every fetch has to.
const ROOM_AFTER_EVICTION: f64 = 0.9;
const DRAFT_SUFFIX: &str = "part";
const BOOT_ID_FILE: &str = "boot_id";

/// Files that came from the server. Cheap to clone.
#[derive(Clone)]
pub struct ContentCache {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    limit_bytes: u64,
    server: String,
    credential: String,
    http: reqwest::Client,
    bytes: AtomicU64,
    drafts: AtomicU64,
    /// One at a time makes room.
    eviction: tokio::sync::Mutex<()>,
}

#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error("{digest:?} is not a digest")]
    Digest { digest: String },
    #[error("the server does not have {digest} any more; deploy the app again")]
    Missing { digest: String },
    #[error("the server refused {digest}: {status}")]
    Refused { digest: String, status: StatusCode },
    #[error("{digest} arrived damaged")]
    Damaged { digest: String },
    #[error(
        "{needed} bytes do not fit into this worker's cache of {limit} bytes, all of which is in use; give it more \
         (worker.content_cache_gib)"
    )]
    Full { needed: u64, limit: u64 },
    #[error("failed to fetch {digest}")]
    Fetch { digest: String, source: reqwest::Error },
    #[error("failed to keep {path}")]
    Io { path: PathBuf, source: io::Error },
}

impl ContentError {
    /// A file that could not be written now can be written in a moment only if the network was at fault.
    fn is_transient(&self) -> bool {
        match self {
            Self::Fetch { .. } | Self::Damaged { .. } => true,
            Self::Refused { status, .. } => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Self::Digest { .. } | Self::Missing { .. } | Self::Full { .. } | Self::Io { .. } => false,
        }
    }
}

impl ContentCache {
    /// Opens the directory and removes what a crash left half-written. Blocks.
    pub fn open(dir: PathBuf, limit_bytes: u64, server: &str, credential: &str) -> Result<Self, ContentError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ContentError::Io { path, source }
        };
        fs::create_dir_all(&dir).map_err(failed(&dir))?;
        // Files are not synced to the disk, since they can be fetched again: after a power failure none is trusted.
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let boot_id_path = dir.join(BOOT_ID_FILE);
        let is_same_boot = !boot_id.is_empty() && fs::read_to_string(&boot_id_path).unwrap_or_default() == boot_id;
        let mut bytes = 0;
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let path = entry.map_err(failed(&dir))?.path();
            if path == boot_id_path {
                continue;
            }
            if is_same_boot && path.extension().is_none() {
                bytes += fs::metadata(&path).map_err(failed(&path))?.len();
            } else {
                fs::remove_file(&path).map_err(failed(&path))?;
            }
        }
        fs::write(&boot_id_path, boot_id).map_err(failed(&boot_id_path))?;
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            // The server is named by its own address, and content does not pass strangers.
            .no_proxy()
            .build()
            .map_err(|source| ContentError::Fetch {
                digest: "content".to_owned(),
                source,
            })?;
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                limit_bytes,
                server: server.trim_end_matches('/').to_owned(),
                credential: credential.to_owned(),
                http,
                bytes: AtomicU64::new(bytes),
                drafts: AtomicU64::new(0),
                eviction: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// For the worker: where fetched content lies.
    pub fn files(&self) -> ContextFiles {
        let cache = self.clone();
        Arc::new(move |digest| {
            let invalid = || io::Error::new(io::ErrorKind::NotFound, format!("{digest:?} is not a digest"));
            let path = cache.path(digest).map_err(|_| invalid())?;
            if path.is_file() {
                Ok(path)
            } else {
                let text = format!("the content {digest} has not been fetched");
                Err(io::Error::new(io::ErrorKind::NotFound, text))
            }
        })
    }

    /// For the worker: brings what is missing.
    pub fn fetcher(&self) -> FetchContent {
        let cache = self.clone();
        Arc::new(move |digests| {
            let cache = cache.clone();
            Box::pin(async move { cache.fetch(digests).await.map_err(|error| crate::chain(&error)) })
        })
    }

    /// Makes all of these files be here, and stay for long enough to be linked.
    pub async fn fetch(&self, digests: Vec<String>) -> Result<(), ContentError> {
        let digests: BTreeSet<String> = digests.into_iter().collect();
        stream::iter(digests.into_iter().map(Ok))
            .try_for_each_concurrent(CONCURRENT_FETCHES, |digest| async move { self.ensure(&digest).await })
            .await
    }

    async fn ensure(&self, digest: &str) -> Result<(), ContentError> {
        let path = self.path(digest)?;
        if touch(&path) {
            return Ok(());
        }
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            match self.fetch_one(digest, &path).await {
                Ok(()) => break,
                Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                    tracing::info!(error = crate::chain(&error), attempt, "content is fetched again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn fetch_one(&self, digest: &str, path: &Path) -> Result<(), ContentError> {
        let inner = &self.inner;
        let failed = |source| ContentError::Fetch {
            digest: digest.to_owned(),
            source,
        };
        let url = format!("{}{CONTENT_PATH}{digest}", inner.server);
        let request = inner.http.get(url).bearer_auth(&inner.credential);
        let response = request.send().await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                return Err(ContentError::Missing {
                    digest: digest.to_owned(),
                });
            }
            status => {
                return Err(ContentError::Refused {
                    digest: digest.to_owned(),
                    status,
                });
            }
        }
        let length = response.content_length().unwrap_or(0);
        self.make_room(length).await?;
        let number = inner.drafts.fetch_add(1, Ordering::Relaxed);
        let draft = Draft(inner.dir.join(format!("{digest}-{number}.{DRAFT_SUFFIX}")));
        let written = |source| ContentError::Io {
            path: draft.0.clone(),
            source,
        };
        let mut file = tokio::fs::File::create(&draft.0).await.map_err(written)?;
        let (mut hasher, mut received) = (Sha256::new(), 0_u64);
        let mut chunks = response.bytes_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(failed)?;
            received += chunk.len() as u64;
            if received > length {
                break;
            }
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(written)?;
        }
        file.flush().await.map_err(written)?;
        if received != length || hex::encode(hasher.finalize()) != digest {
            return Err(ContentError::Damaged {
                digest: digest.to_owned(),
            });
        }
        tokio::fs::rename(&draft.0, path).await.map_err(written)?;
        inner.bytes.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    /// The digest is a file name: nothing else may be in it.
    fn path(&self, digest: &str) -> Result<PathBuf, ContentError> {
        let is_digest = digest.len() == 64 && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_digest {
            Ok(self.inner.dir.join(digest))
        } else {
            Err(ContentError::Digest {
                digest: digest.chars().take(80).collect(),
            })
        }
    }

    /// Removes what was not used for longest. Files on their way at the same moment may exceed the limit by
    /// their own size, which the next call mends.
    async fn make_room(&self, needed: u64) -> Result<(), ContentError> {
        let inner = &self.inner;
        let fits = || inner.bytes.load(Ordering::Relaxed).saturating_add(needed) <= inner.limit_bytes;
        if fits() {
            return Ok(());
        }
        let _turn = inner.eviction.lock().await;
        if fits() {
            return Ok(());
        }
        let wanted = ((inner.limit_bytes as f64 * ROOM_AFTER_EVICTION) as u64).saturating_sub(needed);
        let dir = inner.dir.clone();
        let evicted = tokio::task::spawn_blocking(move || evict(&dir, wanted)).await;
        match evicted {
            Ok(Ok(bytes)) => inner.bytes.store(bytes, Ordering::Relaxed),
            Ok(Err(source)) => {
                return Err(ContentError::Io {
                    path: inner.dir.clone(),
                    source,
                });
            }
            Err(error) => tracing::error!(%error, "making room for content crashed"),
        }
        if fits() {
            Ok(())
        } else {
            Err(ContentError::Full {
                needed,
                limit: inner.limit_bytes,
            })
        }
    }
}

/// Marks a file as used now; `false` where there is none.
fn touch(path: &Path) -> bool {
    fs::File::open(path)
        .and_then(|file| file.set_modified(SystemTime::now()))
        .is_ok()
}

/// Removes files, the longest unused first, until at most `wanted` bytes are left. Returns what is left.
fn evict(dir: &Path, wanted: u64) -> io::Result<u64> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_none() && entry.file_name() != BOOT_ID_FILE {
            let metadata = entry.metadata()?;
            files.push((metadata.modified()?, metadata.len(), path));
        }
    }
    files.sort_unstable();
    let mut bytes: u64 = files.iter().map(|(_, length, _)| length).sum();
    for (used_at, length, path) in files {
        if bytes <= wanted || used_at.elapsed().unwrap_or_default() < IN_USE {
            break;
        }
        fs::remove_file(path)?;
        bytes -= length;
    }
    Ok(bytes)
}

/// A file that is not whole yet; after the rename there is nothing to remove.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_file(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // The next start of the worker removes it.
            Err(error) => tracing::warn!(path = %self.0.display(), %error, "failed to remove a half-fetched file"),
        }
    }
}

#[cfg(test)]
mod tests;
