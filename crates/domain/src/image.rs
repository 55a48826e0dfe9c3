//! Images: what the client asked for, and what came of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, FunctionId, ImageId, MountId, SecretId};
use crate::time::Timestamp;

/// One layer definition as the client sends it: Dockerfile commands upon base images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The name that `FROM` uses for each base (always `base` so far).
    pub base_images: Vec<(String, ImageId)>,
    /// Joined with newlines they are a Dockerfile.
    pub dockerfile_commands: Vec<String>,
    /// Files in the root of the build context, by name (with a leading slash).
    pub context_files: Vec<ContextFile>,
    /// A mount whose paths are the build context.
    pub context_mount_id: Option<MountId>,
    /// Variables for `RUN` steps that must not end up in the image.
    pub secret_ids: Vec<SecretId>,
    pub build_args: BTreeMap<String, String>,
    pub registry_auth: RegistryAuth,
    pub gpu: Option<String>,
    /// Set for `run_function`: the function whose run makes this layer.
    pub build_function_id: Option<FunctionId>,
    pub builder_version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextFile {
    pub name: String,
    /// Where the content-addressed store holds the content.
    pub sha256_hex: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryAuth {
    #[default]
    Public,
    /// `REGISTRY_USERNAME` and `REGISTRY_PASSWORD` in this secret.
    Static(SecretId),
    Aws(SecretId),
    Gcp(SecretId),
}

/// What an image is made of, once built: everything a container needs to run on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BuiltImage {
    /// Layer keys, base first. Each names a directory in the layer store.
    pub layers: Vec<String>,
    pub config: ImageConfig,
    pub metadata: ImageMetadata,
}

/// The part of an OCI image configuration that running needs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `KEY=value` pairs in order; later ones win.
    pub env: Vec<(String, String)>,
    pub workdir: Option<String>,
    pub user: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// The shell of `RUN` steps; empty for `/bin/sh -c`.
    pub shell: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageMetadata {
    /// Such as `Python 3.11.2 (main, …)`; `None` where the image has no Python.
    pub python_version_info: Option<String>,
    /// Such as `glibc 2.36`; `None` where unknown.
    pub libc_version_info: Option<String>,
    /// Installed Python distributions and their versions.
    pub python_packages: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
#[expect(
    clippy::large_enum_variant,
    reason = "states are looked at one at a time, never kept in bulk"
)]
pub enum ImageState {
    Building,
    Ready { image: BuiltImage },
    Failed { message: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub id: ImageId,
    pub app_id: Option<AppId>,
    pub spec: ImageSpec,
    pub state: ImageState,
    pub created_at: Timestamp,
}
