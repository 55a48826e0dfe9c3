//! Carries out `RUN`: gathers what the command sees (variables, secrets, mounts), has the runner run it,
//! and removes what mount points left in the layer.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::build::{BuildError, BuilderConfig};
use crate::context::ContextItem;
use crate::copy::{self, CopyError};
use crate::dockerfile::shorten;
use crate::engine::{Site, io_error};
use crate::layers::layer_key;
use crate::output::StepOutput;
use crate::plan::{BindSource, CopyAction, CopySource, PlannedMount, RunAction, SCRIPT_TARGET, SecretFile};
use crate::rooted::Rooted;
use crate::step::{BuildLog, MountedRoot, StepBind, StepError, StepExecution, StepExit};

/// How long output may still arrive after the command has ended, before it is given up.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Where runtimes make mount points of their own, which are no part of an image.
const RUNTIME_MOUNT_POINTS: [&str; 6] = [
    "/dev",
    "/proc",
    "/sys",
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/hostname",
];

/// What must outlive the command: mounted views, temporary files, locks on caches.
#[derive(Default)]
struct Held {
    views: Vec<Box<dyn MountedRoot>>,
    dirs: Vec<TempDir>,
    locks: Vec<tokio::sync::OwnedMutexGuard<()>>,
}

pub(crate) async fn run(site: &Site<'_>, action: &RunAction) -> Result<(), BuildError> {
    let mut held = Held::default();
    let trust = &site.builder.trust;
    let mut binds = trust.binds();
    let mut env = action.env.clone();
    // Secrets win over the image's variables: that is what they are given for.
    for (name, value) in &site.request.secrets {
        env.retain(|(other, _)| other != name);
        env.push((name.clone(), value.clone()));
    }
    for mount in &action.mounts {
        site.mount(mount, &mut binds, &mut env, &mut held).await?;
    }
    env.extend(trust.trust_env(&env));
    if let Some(script) = &action.script {
        let dir = scratch(&site.builder.scratch_dir)?;
        let path = dir.path().join("script");
        write_file(&path, script.as_bytes(), 0o755, 0, 0)?;
        binds.push(StepBind {
            source: path,
            target: SCRIPT_TARGET.to_owned(),
            read_only: true,
        });
        held.dirs.push(dir);
    }
    let mount_points: Vec<PathBuf> = RUNTIME_MOUNT_POINTS
        .iter()
        .map(PathBuf::from)
        .chain(binds.iter().map(|bind| PathBuf::from(&bind.target)))
        .collect();
    let step = StepExecution {
        lower_dirs: site.lower_dirs.clone(),
        upper_dir: site.draft.fs().to_owned(),
        work_dir: site.draft.work().to_owned(),
        argv: action.argv.clone(),
        env,
        workdir: action.workdir.clone(),
        user: action.user.clone(),
        binds,
        has_network: action.has_network,
        gpu: action.gpu.clone(),
        timeout: site.builder.step_timeout,
        cancel: site.cancel.child_token(),
    };
    let (exit, tail) = run_logged(site, step).await.map_err(|source| site.step_error(source))?;
    drop(held);
    match exit {
        StepExit::Exited(0) => {}
        StepExit::Exited(_) | StepExit::Signaled(_) | StepExit::OutOfMemory | StepExit::TimedOut => {
            return Err(BuildError::StepFailed {
                step: site.number,
                instruction: shorten(&site.step.text),
                exit,
                timeout: site.builder.step_timeout,
                tail,
            });
        }
    }
    let (upper, lower_dirs) = (site.draft.fs().to_owned(), site.lower_dirs.clone());
    site.blocking(move || {
        remove_mount_points(&upper, &lower_dirs, &mount_points).map_err(|source| CopyError::Io {
            what: "mount points away".to_owned(),
            source,
        })
    })
    .await
}

/// Runs a step; its output goes to the log as it comes, masked, and its end is kept.
async fn run_logged(site: &Site<'_>, step: StepExecution) -> Result<(StepExit, String), StepError> {
    let (log, mut chunks) = BuildLog::channel();
    let mut output = StepOutput::new(&site.request.secrets);
    let ended = CancellationToken::new();
    let run = async {
        let exit = site.builder.runner.run(step, &log).await;
        drop(log);
        ended.cancel();
        exit
    };
    // Side by side: a reader that stalls must not keep the runner from its timeout.
    let forward = async {
        loop {
            let held_open = async {
                ended.cancelled().await;
                tokio::time::sleep(DRAIN_LIMIT).await;
            };
            tokio::select! {
                chunk = chunks.recv() => match chunk {
                    Some(chunk) => site.log.chunk(chunk.stream, output.push(&chunk)).await,
                    None => break,
                },
                () = held_open => {
                    tracing::warn!("a step ended, and its output is still held open");
                    break;
                }
            }
        }
    };
    let (exit, ()) = tokio::join!(run, forward);
    for (stream, bytes) in output.finish() {
        site.log.chunk(stream, bytes).await;
    }
    Ok((exit?, output.tail.text()))
}

impl Site<'_> {
    async fn mount(
        &self,
        mount: &PlannedMount,
        binds: &mut Vec<StepBind>,
        env: &mut Vec<(String, String)>,
        held: &mut Held,
    ) -> Result<(), BuildError> {
        match mount {
            PlannedMount::Bind {
                source: BindSource::Context(item),
                target,
                read_only,
            } => {
                let dir = scratch(&self.builder.scratch_dir)?;
                let source = self.place_context(item, dir.path()).await?;
                // What a command writes into a writable one goes away with it.
                binds.push(StepBind {
                    source,
                    target: target.clone(),
                    read_only: *read_only,
                });
                held.dirs.push(dir);
            }
            PlannedMount::Bind {
                source: BindSource::Layers { source, path },
                target,
                ..
            } => {
                let view = self.mount_source(source).await?;
                let root =
                    Rooted::open(view.path()).map_err(|source| io_error("open the source of a bind mount", source))?;
                let host_path = root.host_path(Path::new(path)).map_err(|error| {
                    self.refused(format!("the source of a bind mount, '{path}', is not there: {error}"))
                })?;
                binds.push(StepBind {
                    source: host_path,
                    target: target.clone(),
                    read_only: true,
                });
                held.views.push(view);
            }
            PlannedMount::Cache {
                id,
                target,
                mode,
                uid,
                gid,
                exclusive,
            } => {
                let dir = self.builder.cache_dir.join(&layer_key(&[id])[..32]);
                make_cache(&dir, *mode, *uid, *gid)?;
                if *exclusive {
                    held.locks.push(cache_lock(&dir).lock_owned().await);
                }
                binds.push(StepBind {
                    source: dir,
                    target: target.clone(),
                    read_only: false,
                });
            }
            PlannedMount::Secret {
                name,
                file,
                env: variable,
                required: _,
            } => {
                // Whether a required one is there was checked by the plan.
                let Some((_, value)) = self.request.secrets.iter().find(|(other, _)| other == name) else {
                    return Ok(());
                };
                if let Some(variable) = variable {
                    env.retain(|(other, _)| other != variable);
                    env.push((variable.clone(), value.clone()));
                }
                if let Some(SecretFile { target, mode, uid, gid }) = file {
                    let dir = volatile(self.builder)?;
                    let path = dir.path().join("secret");
                    write_file(&path, value.as_bytes(), *mode, *uid, *gid)?;
                    binds.push(StepBind {
                        source: path,
                        target: target.clone(),
                        read_only: true,
                    });
                    held.dirs.push(dir);
                }
            }
            PlannedMount::Tmpfs { target } => {
                let dir = volatile(self.builder)?;
                let path = dir.path().join("tmp");
                fs::create_dir(&path).map_err(|source| io_error("make a directory in memory", source))?;
                set_attributes(&path, 0o1777, 0, 0)?;
                binds.push(StepBind {
                    source: path,
                    target: target.clone(),
                    read_only: false,
                });
                held.dirs.push(dir);
            }
        }
        Ok(())
    }

    /// Writes files of the context where they can be bound from.
    async fn place_context(&self, item: &ContextItem, dir: &Path) -> Result<PathBuf, BuildError> {
        let root = dir.join("context");
        fs::create_dir(&root).map_err(|source| io_error("make a directory for the build context", source))?;
        set_attributes(&root, 0o755, 0, 0)?;
        let action = CopyAction {
            source: CopySource::Context {
                items: vec![item.clone()],
                inline: Vec::new(),
            },
            destination: "/".to_owned(),
            into_directory: true,
            chown: None,
            chmod: None,
            extract: false,
        };
        let (target, files) = (root.clone(), self.builder.files.clone());
        self.blocking(move || copy::copy(&action, &target, None, &files))
            .await?;
        Ok(match item {
            ContextItem::File(file) => root.join(&file.path),
            ContextItem::Directory(_) => root,
        })
    }
}

fn scratch(parent: &Path) -> Result<TempDir, BuildError> {
    fs::create_dir_all(parent)
        .and_then(|()| tempfile::Builder::new().prefix("ionian-step-").tempdir_in(parent))
        .map_err(|source| io_error(&format!("make a directory in {}", parent.display()), source))
}

/// A directory for secrets, which must not touch a disk.
fn volatile(builder: &BuilderConfig) -> Result<TempDir, BuildError> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let dir = &builder.volatile_dir;
    let found =
        rustix::fs::statfs(dir).map_err(|source| io_error(&format!("inspect {}", dir.display()), source.into()))?;
    if !matches!(found.f_type, TMPFS | RAMFS) {
        let problem = "it is not a file system in memory, and secrets must not reach a disk";
        return Err(io_error(&format!("use {}", dir.display()), io::Error::other(problem)));
    }
    scratch(dir)
}

fn write_file(path: &Path, content: &[u8], mode: u32, uid: u32, gid: u32) -> Result<(), BuildError> {
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(content)
    };
    write().map_err(|source| io_error(&format!("write {}", path.display()), source))?;
    set_attributes(path, mode, uid, gid)
}

fn set_attributes(path: &Path, mode: u32, uid: u32, gid: u32) -> Result<(), BuildError> {
    chown(path, Some(uid), Some(gid))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|source| io_error(&format!("set the owner and mode of {}", path.display()), source))
}

/// A cache that exists keeps the attributes it was made with.
fn make_cache(dir: &Path, mode: u32, uid: u32, gid: u32) -> Result<(), BuildError> {
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(|source| io_error(&format!("make the cache {}", dir.display()), source))?;
    set_attributes(dir, mode, uid, gid)
}

/// Steps of this process that share a cache with `sharing=locked` take turns.
fn cache_lock(dir: &Path) -> Arc<tokio::sync::Mutex<()>> {
    static LOCKS: LazyLock<Mutex<HashMap<PathBuf, Weak<tokio::sync::Mutex<()>>>>> = LazyLock::new(Mutex::default);
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(lock) = locks.get(dir).and_then(Weak::upgrade) {
        return lock;
    }
    locks.retain(|_, lock| lock.strong_count() > 0);
    let lock = Arc::new(tokio::sync::Mutex::new(()));
    locks.insert(dir.to_owned(), Arc::downgrade(&lock));
    lock
}

/// Removes empty files and directories that stand in a layer only because something was mounted there.
fn remove_mount_points(upper: &Path, lower_dirs: &[PathBuf], mount_points: &[PathBuf]) -> io::Result<()> {
    let lowers = lower_dirs
        .iter()
        .map(|dir| Rooted::open(dir))
        .collect::<io::Result<Vec<_>>>()?;
    for point in mount_points {
        let Ok(relative) = point.strip_prefix("/") else {
            continue;
        };
        let mut path = relative;
        while path != Path::new("") {
            let in_layer = upper.join(path);
            if passes_a_link(upper, path) || lowers.iter().any(|lower| !matches!(lower.find(path), Ok(None))) {
                break;
            }
            let removed = match fs::symlink_metadata(&in_layer) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir(&in_layer).is_ok(),
                // Only the end of the path can be a mount point that is a file.
                Ok(metadata) if metadata.is_file() && metadata.len() == 0 && path == relative => {
                    fs::remove_file(&in_layer)?;
                    true
                }
                Ok(_) => false,
                // Made by nobody, or below something already gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => true,
                Err(error) => return Err(error),
            };
            if !removed {
                break;
            }
            path = path.parent().unwrap_or(Path::new(""));
        }
    }
    Ok(())
}

/// Whether a path of a layer goes through a symbolic link, which on this host would lead elsewhere.
fn passes_a_link(upper: &Path, path: &Path) -> bool {
    let mut at = upper.to_owned();
    path.parent().is_some_and(|parent| {
        parent.components().any(|component| {
            at.push(component);
            at.is_symlink()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_mount_points_go_and_everything_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("upper"), dir.path().join("lower"));
        fs::create_dir_all(upper.join("__ionian")).unwrap();
        fs::write(upper.join("__ionian/ca.crt"), "").unwrap();
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::write(upper.join("etc/resolv.conf"), "").unwrap();
        fs::write(upper.join("etc/hosts"), "the user's").unwrap();
        fs::create_dir_all(upper.join("cache/pip")).unwrap();
        fs::write(upper.join("cache/kept"), "").unwrap();
        fs::create_dir_all(lower.join("etc")).unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir_all(outside.join("point")).unwrap();
        std::os::unix::fs::symlink(&outside, upper.join("link")).unwrap();
        let points: Vec<PathBuf> = [
            "/__ionian/ca.crt",
            "/etc/resolv.conf",
            "/etc/hosts",
            "/cache/pip",
            "/proc",
            "/link/point",
        ]
        .iter()
        .map(PathBuf::from)
        .collect();
        remove_mount_points(&upper, &[lower], &points).unwrap();
        assert!(!upper.join("__ionian").exists());
        assert!(!upper.join("etc/resolv.conf").exists());
        assert!(upper.join("etc/hosts").exists());
        assert!(upper.join("cache/kept").exists() && !upper.join("cache/pip").exists());
        assert!(outside.join("point").exists());
    }
}
