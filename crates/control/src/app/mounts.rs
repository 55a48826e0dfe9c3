//! Mounts: which files a container gets, by content.

use ionian_domain::MountId;
use ionian_domain::mount::{Mount, MountFile};
use sha2::{Digest, Sha256};

use crate::Control;
use crate::error::{Error, Result};

/// More files than any package tree has; each costs a link at container start.
pub const MAX_MOUNT_FILES: usize = 200_000;
/// The kernel takes no longer path.
const MAX_PATH_BYTES: usize = 4_096;

pub struct Mounts<'a>(pub(crate) &'a Control);

impl Mounts<'_> {
    /// A mount of these files. Equal files give an equal mount.
    pub async fn create(&self, mut files: Vec<MountFile>) -> Result<Mount> {
        if files.len() > MAX_MOUNT_FILES {
            return Err(Error::invalid(format!(
                "the mount has {} files; at most {MAX_MOUNT_FILES} are supported: exclude what is not needed with `ignore=`",
                files.len()
            )));
        }
        for file in &files {
            check_path(&file.path)?;
        }
        files.sort();
        let mut hasher = Sha256::new();
        for file in &files {
            hasher.update(file.path.as_bytes());
            hasher.update([0]);
            hasher.update(file.sha256_hex.as_bytes());
            hasher.update(file.mode.unwrap_or(u32::MAX).to_be_bytes());
        }
        let digest: [u8; 32] = hasher.finalize().into();
        let mount = Mount {
            id: MountId::from_digest(&digest),
            checksum_hex: hex::encode(digest),
            files,
        };
        self.0.store().mounts().upsert(&mount).await?;
        Ok(mount)
    }

    /// A mount that every server has by name, such as the client's own package. It is virtual: workers
    /// provide its content at the version that the name says.
    pub async fn get_global(&self, name: &str) -> Result<Mount> {
        if name.starts_with("modal-client-mount-") {
            return self.create(Vec::new()).await;
        }
        let found = self.0.store().mounts().find_named(name).await?;
        found.ok_or_else(|| {
            Error::not_found(format!(
                "this server has no mount named '{name}'; Python builds for `add_python=` are not available here, use a \
                 base image that has Python"
            ))
        })
    }

    pub async fn get(&self, id: MountId) -> Result<Mount> {
        let found = self.0.store().mounts().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("mount {id} does not exist")))
    }
}

/// Paths go to a file system as they are: they must stay inside it.
fn check_path(path: &str) -> Result<()> {
    let inside = path.starts_with('/') && path.split('/').all(|part| part != "..") && !path.contains('\0');
    if inside && path.len() <= MAX_PATH_BYTES {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "'{}' is not a valid path for a mounted file: it must be absolute, have no '..' and at most \
             {MAX_PATH_BYTES} bytes",
            path.chars().take(200).collect::<String>()
        )))
    }
}
