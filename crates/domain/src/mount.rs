//! Mounts: sets of content-addressed files that are laid over a container's file system.

use serde::{Deserialize, Serialize};

use crate::ids::MountId;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MountFile {
    /// Absolute path in the container (or in a build context, where `/` is its root).
    pub path: String,
    pub sha256_hex: String,
    /// Permission bits; `None` where the client sent none.
    pub mode: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub id: MountId,
    /// SHA-256 over the sorted files.
    pub checksum_hex: String,
    pub files: Vec<MountFile>,
}
