//! What a user declared about a function.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::container::RuntimeKind;
use crate::ids::{AppId, DefinitionId, FunctionId, ImageId, MountId, SecretId, VolumeId};
use crate::network::Egress;
use crate::time::Timestamp;
use crate::web::WebSpec;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FunctionKind {
    Function,
    Generator,
}

/// What is asked of the machine. Zero on the wire means "the default", which is `None` here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resources {
    pub memory_mib: Option<u32>,
    pub memory_limit_mib: Option<u32>,
    pub cpu_millis: Option<u32>,
    pub cpu_limit_millis: Option<u32>,
    pub ephemeral_disk_mib: Option<u32>,
    pub gpu: Option<GpuRequest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRequest {
    /// As the client sends it: upper case, such as `H100` or `A10G`.
    pub kind: String,
    pub count: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autoscaler {
    pub min_containers: u32,
    /// `None`: as many as the machine takes.
    pub max_containers: Option<u32>,
    pub buffer_containers: u32,
    /// How long a container may be idle before it is stopped.
    pub scaledown_window: Duration,
}

/// How long a container of a function goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerUse {
    /// One input after the other.
    #[default]
    Repeated,
    /// Every input gets a container of its own, which ends with it.
    Single,
}

/// How many inputs one container runs at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Concurrency {
    pub max_inputs: u32,
    pub target_inputs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batching {
    pub max_size: u32,
    pub wait: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RetryPolicy {
    pub max_retries: u32,
    pub backoff_coefficient: f32,
    pub initial_delay: Duration,
    pub max_delay: Duration,
}

impl RetryPolicy {
    pub const NONE: Self = Self {
        max_retries: 0,
        backoff_coefficient: 1.0,
        initial_delay: Duration::ZERO,
        max_delay: Duration::ZERO,
    };

    /// How long to wait before try `retry_count` (1 for the first retry).
    pub fn delay(&self, retry_count: u32) -> Duration {
        let exponent = i32::try_from(retry_count.saturating_sub(1)).unwrap_or(i32::MAX);
        let factor = f64::from(self.backoff_coefficient.max(1.0)).powi(exponent);
        let seconds = (self.initial_delay.as_secs_f64() * factor).min(self.max_delay.as_secs_f64());
        Duration::from_secs_f64(if seconds.is_finite() { seconds.max(0.0) } else { 0.0 })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub volume_id: VolumeId,
    pub path: String,
    pub read_only: bool,
    pub sub_path: Option<String>,
}

/// A function as its app declared it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// The tag in the app's layout: `"f"`, or `"C.*"` for a class.
    pub name: String,
    pub kind: FunctionKind,
    /// Whether this is the service function of a class.
    pub is_class: bool,
    /// `@app.server`: no calls, only HTTP on a port of the user's.
    pub is_server: bool,
    #[serde(default)]
    pub container_use: ContainerUse,
    pub image_id: Option<ImageId>,
    pub mount_ids: Vec<MountId>,
    pub secret_ids: Vec<SecretId>,
    pub volume_mounts: Vec<VolumeMount>,
    /// Ids in the order in which the runtime expects them back in the container's layout.
    pub object_dependencies: Vec<String>,
    pub resources: Resources,
    pub timeout: Duration,
    pub startup_timeout: Duration,
    pub autoscaler: Autoscaler,
    pub concurrency: Concurrency,
    pub batching: Option<Batching>,
    pub retry: RetryPolicy,
    pub web: Option<WebSpec>,
    /// Web methods of a class, by method name.
    pub web_methods: Vec<(String, WebSpec)>,
    /// All methods of a class, so that a call of an unknown method is refused before it reaches a container.
    pub methods: Vec<String>,
    /// The image has no client dependencies of its own: lay ours over it.
    pub mount_client_dependencies: bool,
    /// How its containers are isolated, where it says so; else as the server's are.
    #[serde(default)]
    pub runtime: Option<RuntimeKind>,
    /// What its containers may reach outside.
    #[serde(default)]
    pub egress: Egress,
    /// The version of the client that declared this function, whose runtime the container gets.
    pub client_version: String,
    /// The `Function` message as the client sent it. It goes back to clients and on to containers as
    /// it came; only `api` looks inside.
    #[serde(skip)]
    pub definition: Bytes,
}

impl FunctionSpec {
    /// Whether requests reach this function over HTTP only (`.remote()` on it is refused by clients).
    pub fn is_web(&self) -> bool {
        self.web.is_some() || self.is_server
    }
}

/// A function of an app, with its newest definition.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    pub id: FunctionId,
    pub app_id: AppId,
    pub definition_id: DefinitionId,
    pub spec: FunctionSpec,
    /// Set for a variant that was bound to parameters or options.
    pub binding: Option<Binding>,
    pub created_at: Timestamp,
}

/// What makes a bound function differ from its base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub base: FunctionId,
    /// The class's constructor arguments, opaque.
    pub serialized_params: Bytes,
}
