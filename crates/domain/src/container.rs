//! Containers: what one should be, and what was seen of it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::function::{Resources, VolumeMount};
use crate::ids::{AppId, ContainerId, FunctionId, ImageId};
use crate::image::{BuiltImage, ImageConfig};
use crate::mount::MountFile;

/// Which `Runtime` starts a container. Chosen, never lost by accident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeKind {
    Runc,
    Gvisor,
    /// No isolation; must be asked for by name.
    Process,
}

impl fmt::Display for RuntimeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Runc => "runc",
            Self::Gvisor => "gvisor",
            Self::Process => "process",
        })
    }
}

/// Everything a worker needs to start one container of a function.
#[derive(Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    pub app_id: AppId,
    pub function_id: FunctionId,
    /// For log lines: the function's name.
    pub function_name: String,
    pub runtime: RuntimeKind,
    pub image_id: ImageId,
    pub image: Arc<BuiltImage>,
    /// Files laid over the image, from all the function's mounts.
    pub files: Vec<MountFile>,
    pub volumes: Vec<VolumeMount>,
    pub resources: Resources,
    /// Variables of the user's secrets, in order. In the clear: never log this struct's `Debug` of them.
    pub secret_env: Vec<(String, String)>,
    /// Variables that the platform sets (`MODAL_*`), which win over the user's.
    pub platform_env: BTreeMap<String, String>,
    /// The serialized `ContainerArguments` for the official runtime.
    pub arguments: bytes::Bytes,
    /// Which client bundle to lay under the container.
    pub client_version: String,
    pub mount_client_dependencies: bool,
    /// How the web hook should behave.
    pub web_hook: WebHookMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WebHookMode {
    /// Not a web container, or the fallback is forced: leave the runtime alone.
    Off,
    /// Serve the user's app directly.
    On,
}

/// `secret_env` and the container's credential must not reach a log by `{:?}`.
impl fmt::Debug for ContainerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContainerSpec")
            .field("app_id", &self.app_id)
            .field("function_id", &self.function_id)
            .field("function_name", &self.function_name)
            .field("runtime", &self.runtime)
            .field("image_id", &self.image_id)
            .field("files", &self.files.len())
            .field("secrets", &self.secret_env.len())
            .finish_non_exhaustive()
    }
}

impl ContainerSpec {
    pub fn image_config(&self) -> &ImageConfig {
        &self.image.config
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// Idle for longer than its window.
    ScaleDown,
    /// A newer version of the app replaced it, or its app was stopped.
    Superseded,
    AppStopped,
    /// It did not become ready, or an input overran its time.
    TimedOut,
    /// By request (`modal container stop`, cancellation with `terminate_containers`).
    Requested,
    ShuttingDown,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerExit {
    /// It never ran: what failed, for people.
    StartFailed {
        message: String,
    },
    Exited {
        code: i32,
    },
    Signaled {
        signal: i32,
    },
    OutOfMemory,
    /// The worker lost it: it was gone after a restart.
    Lost,
}

impl fmt::Display for ContainerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StartFailed { message } => write!(f, "the container could not start: {message}"),
            Self::Exited { code } => write!(f, "the container exited with code {code}"),
            Self::Signaled { signal } => write!(f, "the container was killed by signal {signal}"),
            Self::OutOfMemory => write!(f, "the container ran out of memory and was killed"),
            Self::Lost => write!(f, "the container was lost when its worker restarted"),
        }
    }
}

/// How long each step of a start took, for the log and the start-up histogram.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StartTimings {
    pub steps: Vec<(String, Duration)>,
}

/// What a worker saw of a started container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStarted {
    pub container_id: ContainerId,
    /// Where the platform reaches ports of the container.
    pub address: IpAddr,
    pub timings: StartTimings,
}
