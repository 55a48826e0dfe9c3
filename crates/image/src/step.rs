//! What a build needs from whoever can run containers: the [`StepRunner`], and the log it writes to.
//!
//! The worker implements the runner with its container runtime; this crate only says what is to be run
//! on which layers. Nothing here names a runtime, a namespace or a cgroup.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How many log chunks may wait for a slow reader before the build itself is slowed down. A chunk is
/// at most [`MAX_CHUNK_BYTES`], so one build holds at most 4 MiB of log in memory.
const LOG_CHUNKS_IN_FLIGHT: usize = 256;

/// Longer writes are split, so that the bound above is one in bytes too.
const MAX_CHUNK_BYTES: usize = 16 * 1024;

/// Runs the `RUN` steps of a build and mounts stacks of layers.
///
/// Layers are stacked in other combinations later, so overlay mounts need `redirect_dir=off`,
/// `index=off` and `metacopy=off`: what these write into an upper directory means something in the very
/// stack only that it was written in.
#[async_trait]
pub trait StepRunner: Send + Sync {
    /// Runs one command in an isolated container whose root is `lower_dirs` below `upper_dir`.
    ///
    /// By the time this returns, nothing of the container is left: no process, and no mount that
    /// holds `upper_dir`. A command that fails is an `Ok`: [`StepError`] is the platform's fault.
    async fn run(&self, step: StepExecution, log: &BuildLog) -> Result<StepExit, StepError>;

    /// Mounts the merged view of layers (base first) on this host; unmounted when the guard drops.
    ///
    /// `upper` is the pair of upper and work directory; without it the view is read-only. There may be
    /// no layer below (`FROM scratch`: the view is then the upper directory itself) or only one without
    /// an upper, for which overlayfs has no mount and a bind mount does.
    async fn mount(
        &self,
        lower_dirs: &[PathBuf],
        upper: Option<(&Path, &Path)>,
    ) -> Result<Box<dyn MountedRoot>, StepError>;
}

/// A merged view of layers, mounted somewhere on this host until it is dropped.
pub trait MountedRoot: Send + Sync {
    fn path(&self) -> &Path;
}

/// One command to run on a stack of layers.
#[derive(Clone)]
pub struct StepExecution {
    /// The layers below, base first. May be empty (`FROM scratch`).
    pub lower_dirs: Vec<PathBuf>,
    /// Takes what the command changes.
    pub upper_dir: PathBuf,
    /// The work directory of overlayfs, on the same file system as `upper_dir`.
    pub work_dir: PathBuf,
    pub argv: Vec<String>,
    /// The complete environment. Contains secrets: never log it.
    pub env: Vec<(String, String)>,
    /// Exists already in the merged view.
    pub workdir: String,
    /// As the Dockerfile names it: `name`, `uid`, or either with `:group`. `None` is root.
    pub user: Option<String>,
    pub binds: Vec<StepBind>,
    /// False for `RUN --network=none`.
    pub has_network: bool,
    /// The kind of GPU that the client asked for, such as `T4`.
    pub gpu: Option<String>,
    /// After this long the runner kills the command and reports [`StepExit::TimedOut`].
    pub timeout: Duration,
    /// When cancelled, the runner kills the command and reports [`StepError::Cancelled`].
    pub cancel: CancellationToken,
}

impl fmt::Debug for StepExecution {
    /// Leaves the values of variables out: secrets are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.env.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("StepExecution")
            .field("lower_dirs", &self.lower_dirs)
            .field("upper_dir", &self.upper_dir)
            .field("argv", &self.argv)
            .field("env", &names)
            .field("workdir", &self.workdir)
            .field("user", &self.user)
            .field("binds", &self.binds)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// A file or directory of this host that the command sees at `target`.
///
/// The runner creates a missing target. What that leaves in `upper_dir` (an empty file or empty
/// directories) is removed by the engine, so that it does not become part of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepBind {
    pub source: PathBuf,
    pub target: String,
    pub read_only: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepExit {
    Exited(i32),
    Signaled(i32),
    OutOfMemory,
    TimedOut,
}

/// The platform failed to run a step. Never used for a command that ran and failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("failed to {action}")]
    Runtime {
        action: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the build was cancelled")]
    Cancelled,
}

impl StepError {
    pub fn runtime(action: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Runtime {
            action: action.into(),
            source: source.into(),
        }
    }
}

/// Where a chunk of a build log came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// Written by the builder: `Step 3/7: RUN …`.
    Builder,
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLogChunk {
    pub stream: LogStream,
    pub bytes: Bytes,
}

/// The writing end of a build's log; cheap to clone.
///
/// The channel is bounded: a reader that does not keep up slows the build, and output is never
/// dropped. When the reader is gone the build goes on without a log, because other callers may be
/// waiting for the same layer.
#[derive(Debug, Clone)]
pub struct BuildLog {
    tx: Option<mpsc::Sender<BuildLogChunk>>,
}

impl BuildLog {
    pub fn channel() -> (Self, mpsc::Receiver<BuildLogChunk>) {
        let (tx, rx) = mpsc::channel(LOG_CHUNKS_IN_FLIGHT);
        (Self { tx: Some(tx) }, rx)
    }

    /// A log that nobody reads.
    pub fn discard() -> Self {
        Self { tx: None }
    }

    /// Writes one line of the builder's own.
    pub async fn line(&self, text: impl Into<String>) {
        let mut text: String = text.into();
        text.push('\n');
        self.chunk(LogStream::Builder, Bytes::from(text)).await;
    }

    /// Writes output of a command as it came, split where it is large.
    pub async fn chunk(&self, stream: LogStream, mut bytes: Bytes) {
        let Some(tx) = &self.tx else { return };
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_CHUNK_BYTES));
            if tx.send(BuildLogChunk { stream, bytes: piece }).await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn large_output_is_split_and_kept_in_order() {
        let (log, mut rx) = BuildLog::channel();
        let sent: Vec<u8> = (0..MAX_CHUNK_BYTES * 2 + 7).map(|i| (i % 251) as u8).collect();
        log.chunk(LogStream::Stdout, Bytes::from(sent.clone())).await;
        drop(log);
        let mut got = Vec::new();
        while let Some(chunk) = rx.recv().await {
            assert!(chunk.bytes.len() <= MAX_CHUNK_BYTES);
            got.extend_from_slice(&chunk.bytes);
        }
        assert_eq!(got, sent);
    }

    #[tokio::test]
    async fn a_reader_that_left_does_not_stop_the_build() {
        let (log, rx) = BuildLog::channel();
        drop(rx);
        for _ in 0..LOG_CHUNKS_IN_FLIGHT * 2 {
            log.line("still building").await;
        }
    }

    #[tokio::test]
    async fn a_slow_reader_slows_the_writer() {
        let (log, mut rx) = BuildLog::channel();
        for _ in 0..LOG_CHUNKS_IN_FLIGHT {
            log.line("x").await;
        }
        let blocked = log.line("one too many");
        tokio::pin!(blocked);
        assert!(
            tokio::time::timeout(Duration::from_millis(20), &mut blocked)
                .await
                .is_err()
        );
        rx.recv().await.expect("a chunk is waiting");
        blocked.await;
    }
}
