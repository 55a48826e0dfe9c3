//! Layers stacked into one directory with overlayfs.
//!
//! Layers are handed to the kernel one by one through its newer mount interface, so that their number is not
//! limited by the one page which the options of the classic `mount` must fit into. On kernels before 6.8 the
//! classic call is used, with descriptors in place of paths so that 200 layers fit into the page as well.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_remount, move_mount, unmount,
};

pub use crate::userns::idmap::MapError;

/// The kernel's own limit on the layers of one overlay.
pub const MAX_LAYERS: usize = 500;

/// The kernel copies at most this much of one option's value, its end included.
const MAX_FSCONFIG_VALUE: usize = 256;

/// The kernel copies at most one page of the classic call's options.
const MAX_MOUNT_OPTIONS: usize = 4095;

/// Fixed on every mount, so that a layer means the same on every host:
/// an `upper_dir` must hold plain files that can be packed, not references into the layers below it, and
/// attributes that came with a foreign image must not redirect anything.
const OPTIONS: [(&str, &str); 3] = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off")];

/// Where the writes to an overlay go. Both directories exist and are on one file system.
#[derive(Debug, Clone, Copy)]
pub struct WritableLayer<'a> {
    pub upper_dir: &'a Path,
    /// Empty, and used by the kernel alone.
    pub work_dir: &'a Path,
    /// Skips all syncing to disk: right when `upper_dir` does not outlive the mount.
    pub volatile: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("an overlay at {target} needs at least one layer")]
    NoLayers { target: PathBuf },
    #[error(
        "an overlay at {target} would have {layers} layers; the kernel allows {MAX_LAYERS}. Merge some steps of the image"
    )]
    TooManyLayers { target: PathBuf, layers: usize },
    #[error("failed to open layer {path}")]
    Layer { path: PathBuf, source: io::Error },
    #[error(
        "this kernel cannot stack {layers} layers at {target}: its mount options would take {bytes} bytes of {MAX_MOUNT_OPTIONS}. Use Linux 6.8 or newer"
    )]
    OptionsTooLong {
        target: PathBuf,
        layers: usize,
        bytes: usize,
    },
    #[error("failed to mount an overlay at {target} ({step}){}", if .kernel_says.is_empty() { String::new() } else { format!(": {}", .kernel_says) })]
    Mount {
        target: PathBuf,
        step: &'static str,
        kernel_says: String,
        source: io::Error,
    },
    #[error(
        "the layers of an overlay at {target} cannot be given to a user namespace; keep images and data on ext4, xfs or btrfs, or set runtime.user_namespaces to \"off\""
    )]
    Map { target: PathBuf, source: MapError },
    #[error("failed to unmount {target}")]
    Unmount { target: PathBuf, source: io::Error },
}

/// A mounted directory; dropping it unmounts.
#[derive(Debug)]
#[must_use = "dropping the guard unmounts"]
pub struct MountGuard {
    target: PathBuf,
    mounted: bool,
}

impl MountGuard {
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// What is mounted already: by an earlier process, or what is left of it.
    pub(crate) fn taken_over(target: PathBuf) -> Self {
        Self { target, mounted: true }
    }

    /// Leaves it mounted.
    pub(crate) fn leave(mut self) {
        self.mounted = false;
    }

    /// Unmounts and says whether it worked. What is still in use is detached: out of sight at once, gone with
    /// its last user.
    pub fn unmount(mut self) -> Result<(), OverlayError> {
        self.mounted = false;
        unmount_or_detach(&self.target).map_err(|source| OverlayError::Unmount {
            target: self.target.clone(),
            source,
        })
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = unmount_or_detach(&self.target)
        {
            tracing::error!(target = %self.target.display(), %error, "failed to unmount");
        }
    }
}

pub(crate) fn unmount_or_detach(target: &Path) -> io::Result<()> {
    match unmount(target, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).map_err(io::Error::from),
        // Not a mount any more: someone cleaned up before.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result.map_err(io::Error::from),
    }
}

/// Mounts `lower_dirs` (base first) under `writable` at the existing directory `target`; read-only without
/// `writable`. Blocks; the calls take well under a millisecond each.
pub fn mount_overlay(
    lower_dirs: &[PathBuf],
    writable: Option<WritableLayer<'_>>,
    target: &Path,
) -> Result<MountGuard, OverlayError> {
    if lower_dirs.len() > MAX_LAYERS {
        return Err(OverlayError::TooManyLayers {
            target: target.to_owned(),
            layers: lower_dirs.len(),
        });
    }
    match (lower_dirs, writable) {
        ([], _) => {
            return Err(OverlayError::NoLayers {
                target: target.to_owned(),
            });
        }
        // Overlayfs refuses a single layer that nothing can be written over.
        ([single], None) => bind_read_only(single, target)?,
        _ if KERNEL_IS_OLD.load(Ordering::Relaxed) => mount_classic(lower_dirs, writable, target)?,
        _ => match append_layers(lower_dirs, writable, target) {
            Err(AppendError::NotSupported) => {
                mount_classic(lower_dirs, writable, target)?;
                KERNEL_IS_OLD.store(true, Ordering::Relaxed);
            }
            Err(AppendError::Failed(error)) => return Err(error),
            Ok(()) => {}
        },
    }
    Ok(MountGuard {
        target: target.to_owned(),
        mounted: true,
    })
}

/// Known once the classic way has done what the newer one could not: such a kernel logs each option that it does not
/// know.
static KERNEL_IS_OLD: AtomicBool = AtomicBool::new(false);

enum AppendError {
    /// The kernel is older than `lowerdir+`, or than the interface itself.
    NotSupported,
    Failed(OverlayError),
}

fn append_layers(
    lower_dirs: &[PathBuf],
    writable: Option<WritableLayer<'_>>,
    target: &Path,
) -> Result<(), AppendError> {
    let context = match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NOSYS) => return Err(AppendError::NotSupported),
        Err(error) => return Err(AppendError::Failed(mount_error(target, "open", None, error))),
    };
    let failed = |step| {
        let context = &context;
        move |error| AppendError::Failed(mount_error(target, step, Some(context), error))
    };
    // Opened layers must stay open until the overlay has been created.
    let mut opened = Vec::new();
    let mut value_of = |path: &Path| value_for_fsconfig(path, &mut opened).map_err(AppendError::Failed);

    fsconfig_set_string(&context, "source", "overlay").map_err(failed("source"))?;
    // The kernel takes the topmost first.
    for layer in lower_dirs.iter().rev() {
        match fsconfig_set_string(&context, "lowerdir+", value_of(layer)?.as_path()) {
            Err(Errno::INVAL) => return Err(AppendError::NotSupported),
            result => result.map_err(failed("layer"))?,
        }
    }
    if let Some(writable) = writable {
        fsconfig_set_string(&context, "upperdir", value_of(writable.upper_dir)?.as_path())
            .map_err(failed("upper directory"))?;
        fsconfig_set_string(&context, "workdir", value_of(writable.work_dir)?.as_path())
            .map_err(failed("work directory"))?;
        if writable.volatile {
            fsconfig_set_flag(&context, "volatile").map_err(failed("volatile"))?;
        }
    }
    for (key, value) in OPTIONS {
        fsconfig_set_string(&context, key, value).map_err(failed(key))?;
    }
    match fsconfig_create(&context) {
        // Before 6.5, overlayfs takes every option as it comes and refuses unknown ones here. Where something else is
        // wrong, the classic way says so.
        Err(Errno::INVAL) => return Err(AppendError::NotSupported),
        result => result.map_err(failed("create"))?,
    }
    let detached =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(failed("mount"))?;
    move_mount(&detached, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("attach"))
}

/// The path itself, so that `mount` shows where layers are; a descriptor where the kernel would cut the path
/// or take one of its characters for a separator.
fn value_for_fsconfig(path: &Path, opened: &mut Vec<OwnedFd>) -> Result<PathBuf, OverlayError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let is_plain = bytes.len() < MAX_FSCONFIG_VALUE && !bytes.iter().any(|byte| b"\\:,".contains(byte));
    if is_plain {
        return Ok(path.to_owned());
    }
    open_layer(path, opened)
}

/// Opens a directory and names it by its descriptor.
fn open_layer(path: &Path, opened: &mut Vec<OwnedFd>) -> Result<PathBuf, OverlayError> {
    use rustix::fs::{Mode, OFlags, open};
    let descriptor =
        open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
            OverlayError::Layer {
                path: path.to_owned(),
                source: error.into(),
            }
        })?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    opened.push(descriptor);
    Ok(name)
}

fn mount_classic(
    lower_dirs: &[PathBuf],
    writable: Option<WritableLayer<'_>>,
    target: &Path,
) -> Result<(), OverlayError> {
    let mut opened = Vec::new();
    let mut name = |path: &Path| open_layer(path, &mut opened).map(|path| path.display().to_string());
    let layers = lower_dirs
        .iter()
        .rev()
        .map(|layer| name(layer))
        .collect::<Result<Vec<_>, _>>()?;
    let mut options = vec![format!("lowerdir={}", layers.join(":"))];
    if let Some(writable) = writable {
        options.push(format!("upperdir={}", name(writable.upper_dir)?));
        options.push(format!("workdir={}", name(writable.work_dir)?));
        options.extend(writable.volatile.then(|| "volatile".to_owned()));
    }
    options.extend(OPTIONS.map(|(key, value)| format!("{key}={value}")));
    let options = options.join(",");
    if options.len() > MAX_MOUNT_OPTIONS {
        let (layers, bytes) = (lower_dirs.len(), options.len());
        return Err(OverlayError::OptionsTooLong {
            target: target.to_owned(),
            layers,
            bytes,
        });
    }
    let options = std::ffi::CString::new(options).map_err(|error| OverlayError::Mount {
        target: target.to_owned(),
        step: "options",
        kernel_says: String::new(),
        source: error.into(),
    })?;
    mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str())
        .map_err(|error| mount_error(target, "classic mount", None, error))
}

fn bind_read_only(source: &Path, target: &Path) -> Result<(), OverlayError> {
    mount_bind(source, target).map_err(|error| mount_error(target, "bind", None, error))?;
    mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "").map_err(|error| {
        let error = mount_error(target, "read-only bind", None, error);
        if let Err(error) = unmount_or_detach(target) {
            tracing::error!(target = %target.display(), %error, "failed to unmount");
        }
        error
    })
}

fn mount_error(target: &Path, step: &'static str, context: Option<&OwnedFd>, error: Errno) -> OverlayError {
    let kernel_says = context.map(kernel_messages).unwrap_or_default();
    OverlayError::Mount {
        target: target.to_owned(),
        step,
        kernel_says,
        source: error.into(),
    }
}

/// What the kernel wrote into the context about a refused option, in its words.
fn kernel_messages(context: &OwnedFd) -> String {
    /// The kernel keeps eight messages per context.
    const MAX_MESSAGES: usize = 8;
    let Ok(context) = context.as_fd().try_clone_to_owned() else {
        return String::new();
    };
    let mut context = File::from(context);
    let mut messages = Vec::new();
    for _ in 0..MAX_MESSAGES {
        let mut buffer = [0; 512];
        match context.read(&mut buffer) {
            Ok(length) if length > 0 => messages.push(String::from_utf8_lossy(&buffer[..length]).trim().to_owned()),
            Ok(_) | Err(_) => break,
        }
    }
    messages.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers `0..count`, each with a file of its own and one that all of them have.
    fn layers(root: &Path, count: usize) -> Vec<PathBuf> {
        (0..count)
            .map(|index| {
                let layer = root.join(format!("layer-{index}"));
                std::fs::create_dir(&layer).unwrap();
                std::fs::write(layer.join(format!("file-{index}")), "").unwrap();
                std::fs::write(layer.join("shared"), index.to_string()).unwrap();
                layer
            })
            .collect()
    }

    fn is_root() -> bool {
        let is_root = nix::unistd::geteuid().is_root();
        if !is_root {
            println!("skipped: needs root");
        }
        is_root
    }

    fn directory(root: &Path, name: &str) -> PathBuf {
        let path = root.join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn two_hundred_layers_are_stacked_base_first_by_either_interface() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let lower_dirs = layers(root.path(), 200);
        let (upper_dir, work_dir) = (directory(root.path(), "upper"), directory(root.path(), "work"));
        let target = directory(root.path(), "target");
        let writable = Some(WritableLayer {
            upper_dir: &upper_dir,
            work_dir: &work_dir,
            volatile: false,
        });

        for classic in [false, true] {
            let guard = if classic {
                mount_classic(&lower_dirs, writable, &target).unwrap();
                MountGuard {
                    target: target.clone(),
                    mounted: true,
                }
            } else {
                mount_overlay(&lower_dirs, writable, &target).unwrap()
            };
            assert_eq!(std::fs::read_to_string(target.join("shared")).unwrap(), "199");
            assert!(target.join("file-0").exists() && target.join("file-100").exists());
            std::fs::write(target.join("written"), "x").unwrap();
            assert!(upper_dir.join("written").exists());
            guard.unmount().unwrap();
            assert!(!target.join("shared").exists());
        }
    }

    #[test]
    fn one_layer_or_several_without_an_upper_are_read_only() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let lower_dirs = layers(root.path(), 2);
        let target = directory(root.path(), "target");
        for count in [1, 2] {
            let guard = mount_overlay(&lower_dirs[..count], None, &target).unwrap();
            assert_eq!(
                std::fs::read_to_string(target.join("shared")).unwrap(),
                (count - 1).to_string()
            );
            assert!(std::fs::write(target.join("written"), "x").is_err());
            drop(guard);
            assert!(!target.join("shared").exists());
        }
    }

    #[test]
    fn awkward_and_long_paths_work() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let long = root.path().join("a:b,c\\d").join("x".repeat(200)).join("y".repeat(200));
        std::fs::create_dir_all(&long).unwrap();
        let lower_dirs = layers(&long, 2);
        let target = directory(root.path(), "target");
        let guard = mount_overlay(&lower_dirs, None, &target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("shared")).unwrap(), "1");
        guard.unmount().unwrap();
    }

    #[test]
    fn a_missing_layer_is_named() {
        if !is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let target = directory(root.path(), "target");
        let missing = vec![root.path().join("nothing"), root.path().join("nowhere")];
        let error = mount_overlay(&missing, None, &target).unwrap_err();
        assert!(matches!(error, OverlayError::Mount { step: "layer", .. }), "{error}");
        assert!(matches!(
            mount_overlay(&[], None, &target),
            Err(OverlayError::NoLayers { .. })
        ));
        let many = vec![root.path().to_owned(); MAX_LAYERS + 1];
        assert!(matches!(
            mount_overlay(&many, None, &target),
            Err(OverlayError::TooManyLayers { .. })
        ));
    }
}
