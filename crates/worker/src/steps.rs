//! Build steps in containers: the [`StepRunner`] that the image builder asks for.
//!
//! A step runs with the same runtime and the same isolation as functions do. What it changes lands in a
//! directory that the builder owns, so a step is over only when nothing of its container holds that directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use ionian_container::{
    Bind, Launch, Limits, MountGuard, NetworkMode, OutputStream, Rootfs, RunningContainer, Runtime, StartError, Upper,
    WritableLayer, mount_overlay,
};
use ionian_domain::Timestamp;
use ionian_domain::container::ContainerExit;
use ionian_image::{BuildLog, LogStream, MountedRoot, StepError, StepExecution, StepExit, StepRunner};
use tokio::io::AsyncReadExt;

/// One read of a step's output; the log splits and bounds what it keeps.
const READ_BYTES: usize = 16 * 1024;
/// As for a container's end: nothing that a namespace holds can keep a pipe open for longer.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// What a shell answers for a command that cannot be found, or cannot be run.
const EXIT_NOT_FOUND: i32 = 127;
const EXIT_NOT_RUN: i32 = 126;

/// What one step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    pub memory_bytes: Option<u64>,
    pub cpu_millis: Option<u32>,
    pub pids: u32,
}

impl StepLimits {
    /// Compilers and installers start a process per core and file; a fork bomb starts more than this.
    const DEFAULT_PIDS: u32 = 8192;

    /// Three quarters of the host's memory, so that a build that needs too much ends before the platform does.
    pub fn for_host() -> Self {
        let memory_bytes = crate::worker::host_memory_bytes().map(|bytes| bytes / 4 * 3);
        Self {
            memory_bytes,
            cpu_millis: None,
            pids: Self::DEFAULT_PIDS,
        }
    }
}

/// Runs steps with one runtime. Cheap to clone.
#[derive(Clone)]
pub struct ContainerSteps {
    inner: Arc<Inner>,
}

struct Inner {
    runtime: Arc<dyn Runtime>,
    /// Mount points.
    roots: PathBuf,
    /// The lowest layer of an image from nothing: overlayfs wants one.
    empty: PathBuf,
    limits: StepLimits,
    /// Names of steps are unique also among those that an earlier process of this worker left.
    opened_at: Timestamp,
    numbers: AtomicU64,
}

#[derive(Debug, thiserror::Error)]
#[error("failed to {action} {path}")]
pub struct OpenStepsError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl ContainerSteps {
    /// `state_dir` belongs to this alone. What an earlier run left mounted in it is unmounted.
    pub fn open(runtime: Arc<dyn Runtime>, state_dir: &Path, limits: StepLimits) -> Result<Self, OpenStepsError> {
        fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> OpenStepsError + 'a {
            move |source| OpenStepsError {
                action,
                path: path.to_owned(),
                source,
            }
        }
        let (roots, empty) = (state_dir.join("roots"), state_dir.join("empty"));
        for path in [&roots, &empty] {
            fs::create_dir_all(path).map_err(failed("create", path))?;
        }
        for entry in fs::read_dir(&roots).map_err(failed("list", &roots))? {
            let path = entry.map_err(failed("list", &roots))?.path();
            unmount_all(&path);
            // Not recursively: if it is still mounted, these are the files of an image.
            fs::remove_dir(&path).map_err(failed("remove the mount point", &path))?;
        }
        let inner = Inner {
            runtime,
            roots,
            empty,
            limits,
            opened_at: Timestamp::now(),
            numbers: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn next_number(&self) -> u64 {
        self.inner.numbers.fetch_add(1, Ordering::Relaxed)
    }

    fn step_name(&self) -> String {
        format!("build-{:x}-{}", self.inner.opened_at.micros(), self.next_number())
    }

    fn lower_dirs(&self, lower_dirs: &[PathBuf]) -> Vec<PathBuf> {
        if lower_dirs.is_empty() {
            vec![self.inner.empty.clone()]
        } else {
            lower_dirs.to_vec()
        }
    }

    fn launch(&self, step: &StepExecution) -> Launch {
        let upper = Upper::Keep {
            upper_dir: step.upper_dir.clone(),
            work_dir: step.work_dir.clone(),
        };
        let rootfs = Rootfs {
            lower_dirs: self.lower_dirs(&step.lower_dirs),
            upper,
        };
        let mut launch = Launch::new(self.step_name(), rootfs, step.argv.clone());
        launch.env.clone_from(&step.env);
        launch.workdir.clone_from(&step.workdir);
        launch.user.clone_from(&step.user);
        launch.binds = step
            .binds
            .iter()
            .map(|bind| Bind {
                source: bind.source.clone(),
                target: bind.target.clone(),
                read_only: bind.read_only,
            })
            .collect();
        let StepLimits {
            memory_bytes,
            cpu_millis,
            pids,
        } = self.inner.limits;
        launch.limits = Limits {
            memory_bytes,
            cpu_millis,
            pids: Some(pids),
        };
        launch.network = if step.has_network {
            NetworkMode::Bridge
        } else {
            NetworkMode::None
        };
        launch
    }
}

#[async_trait]
impl StepRunner for ContainerSteps {
    async fn run(&self, step: StepExecution, log: &BuildLog) -> Result<StepExit, StepError> {
        if let Some(gpu) = &step.gpu {
            let action = format!("run a build step that asks for a GPU ({gpu})");
            return Err(StepError::runtime(action, "this worker has none"));
        }
        if step.cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        let mut container = match self.inner.runtime.start(self.launch(&step)).await {
            Ok(container) => container,
            // These are about the image and the command in it, not about this host.
            Err(error @ (StartError::Refused { .. } | StartError::User { .. } | StartError::InvalidLaunch { .. })) => {
                let code = if matches!(error, StartError::Refused { .. }) {
                    EXIT_NOT_FOUND
                } else {
                    EXIT_NOT_RUN
                };
                log.chunk(LogStream::Stderr, Bytes::from(format!("{}\n", crate::chain(&error))))
                    .await;
                return Ok(StepExit::Exited(code));
            }
            Err(error) => return Err(StepError::runtime("start a build step", error)),
        };
        let end = watch_over(&mut container, &step, log).await;
        container
            .dispose()
            .await
            .map_err(|error| StepError::runtime("clean up after a build step", error))?;
        match end {
            End::Exited(exit) => Ok(exit),
            End::Cancelled => Err(StepError::Cancelled),
            End::Lost => Err(StepError::runtime("run a build step", "its container was lost")),
        }
    }

    async fn mount(
        &self,
        lower_dirs: &[PathBuf],
        upper: Option<(&Path, &Path)>,
    ) -> Result<Box<dyn MountedRoot>, StepError> {
        let lower_dirs = self.lower_dirs(lower_dirs);
        let upper = upper.map(|(upper_dir, work_dir)| (upper_dir.to_owned(), work_dir.to_owned()));
        let target = self.inner.roots.join(self.next_number().to_string());
        let mounted = tokio::task::spawn_blocking(move || {
            fs::create_dir(&target).map_err(|error| StepError::runtime("create a mount point", error))?;
            let mut root = Root {
                target: target.clone(),
                guard: None,
            };
            let writable = upper.as_ref().map(|(upper_dir, work_dir)| WritableLayer {
                upper_dir,
                work_dir,
                volatile: false,
            });
            let guard = mount_overlay(&lower_dirs, writable, &target)
                .map_err(|error| StepError::runtime("mount an image", error))?;
            root.guard = Some(guard);
            Ok(Box::new(root) as Box<dyn MountedRoot>)
        });
        mounted
            .await
            .map_err(|error| StepError::runtime("mount an image", error))?
    }
}

enum End {
    Exited(StepExit),
    Cancelled,
    /// Its process was lost sight of.
    Lost,
}

async fn watch_over(container: &mut RunningContainer, step: &StepExecution, log: &BuildLog) -> End {
    let (stdout, stderr) = (container.stdout.take(), container.stderr.take());
    let output = async {
        tokio::join!(
            copy(stdout, LogStream::Stdout, log),
            copy(stderr, LogStream::Stderr, log)
        );
    };
    tokio::pin!(output);
    let mut drained = false;
    let timeout = tokio::time::sleep(step.timeout);
    tokio::pin!(timeout);
    // Why it was killed, if it was.
    let mut reason = None;
    let exit = loop {
        tokio::select! {
            exit = container.wait() => break exit,
            () = &mut output, if !drained => drained = true,
            () = &mut timeout, if reason.is_none() => {
                reason = Some(End::Exited(StepExit::TimedOut));
                container.kill();
            }
            () = step.cancel.cancelled(), if reason.is_none() => {
                reason = Some(End::Cancelled);
                container.kill();
            }
        }
    };
    if !drained && tokio::time::timeout(DRAIN_TIMEOUT, output).await.is_err() {
        tracing::warn!(
            step = container.name,
            "a build step's output was not read to its end in time"
        );
    }
    reason.unwrap_or(match exit {
        ContainerExit::Exited { code } => End::Exited(StepExit::Exited(code)),
        ContainerExit::Signaled { signal } => End::Exited(StepExit::Signaled(signal)),
        ContainerExit::OutOfMemory => End::Exited(StepExit::OutOfMemory),
        ContainerExit::Lost | ContainerExit::StartFailed { .. } => End::Lost,
    })
}

/// The log slows the reading, and so the step.
async fn copy(pipe: Option<OutputStream>, stream: LogStream, log: &BuildLog) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ_BYTES);
        match pipe.read_buf(&mut buffer).await {
            Ok(0) => return,
            Ok(_) => log.chunk(stream, buffer.split().freeze()).await,
            Err(error) => {
                tracing::error!(%error, "failed to read a build step's output");
                return;
            }
        }
    }
}

/// A mounted image; unmounted, and its mount point removed, on drop.
struct Root {
    target: PathBuf,
    guard: Option<MountGuard>,
}

impl MountedRoot for Root {
    fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take()
            && let Err(error) = guard.unmount()
        {
            tracing::error!(error = crate::chain(&error), "failed to unmount an image");
        }
        if let Err(error) = fs::remove_dir(&self.target) {
            tracing::warn!(path = %self.target.display(), %error, "failed to remove a mount point");
        }
    }
}

/// Takes off whatever is mounted at a path, also several times.
fn unmount_all(path: &Path) {
    /// A crash leaves one mount; more than a few would be somebody else's doing.
    const MAX_MOUNTS: usize = 16;
    for _ in 0..MAX_MOUNTS {
        // Fails where nothing is mounted (any more), which is the way out; removing the directory tells the rest.
        if nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use ionian_container::ProcessRuntime;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn step(root: &Path) -> StepExecution {
        StepExecution {
            lower_dirs: vec![root.to_owned()],
            upper_dir: root.join("upper"),
            work_dir: root.join("work"),
            argv: vec!["true".to_owned()],
            env: Vec::new(),
            workdir: "/".to_owned(),
            user: None,
            binds: Vec::new(),
            has_network: true,
            gpu: None,
            timeout: DRAIN_TIMEOUT,
            cancel: CancellationToken::new(),
        }
    }

    fn open(root: &Path) -> ContainerSteps {
        ContainerSteps::open(Arc::new(ProcessRuntime::new()), root, StepLimits::for_host()).unwrap()
    }

    #[tokio::test]
    async fn a_step_never_runs_without_isolation() {
        let root = tempfile::tempdir().unwrap();
        let steps = open(root.path());
        let error = steps.run(step(root.path()), &BuildLog::discard()).await.unwrap_err();
        assert!(
            crate::chain(&error).contains("the process runtime has no"),
            "{}",
            crate::chain(&error)
        );
    }

    #[tokio::test]
    async fn what_cannot_be_had_is_said() {
        let root = tempfile::tempdir().unwrap();
        let steps = open(root.path());
        let mut asks_for_gpu = step(root.path());
        asks_for_gpu.gpu = Some("T4".to_owned());
        let error = steps.run(asks_for_gpu, &BuildLog::discard()).await.unwrap_err();
        assert!(crate::chain(&error).contains("GPU (T4): this worker has none"));
        let cancelled = step(root.path());
        cancelled.cancel.cancel();
        assert!(matches!(
            steps.run(cancelled, &BuildLog::discard()).await,
            Err(StepError::Cancelled)
        ));
    }

    #[tokio::test]
    async fn what_a_crash_left_mounted_is_unmounted_and_nothing_in_it_is_touched() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let steps = open(root.path());
        let layer = root.path().join("layer");
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("file"), "kept").unwrap();
        let mounted = steps.mount(std::slice::from_ref(&layer), None).await.unwrap();
        let target = mounted.path().to_owned();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "kept");
        // As a crash does: nobody unmounts.
        std::mem::forget(mounted);
        drop(steps);
        open(root.path());
        assert!(!target.exists() && layer.join("file").exists());
    }
}
