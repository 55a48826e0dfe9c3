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
use crate::network::Egress;

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

impl RuntimeKind {
    /// By strength, weakest first.
    pub const ALL: [Self; 3] = [Self::Process, Self::Runc, Self::Gvisor];

    fn strength(self) -> u8 {
        match self {
            Self::Process => 0,
            Self::Runc => 1,
            Self::Gvisor => 2,
        }
    }

    /// Whether it keeps a container from the host at least as well as `other` does.
    pub fn is_as_strong_as(self, other: Self) -> bool {
        self.strength() >= other.strength()
    }
}

/// The runtimes that a worker has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<RuntimeKind>", into = "Vec<RuntimeKind>")]
pub struct RuntimeKinds(u8);

impl RuntimeKinds {
    pub fn contains(self, kind: RuntimeKind) -> bool {
        self.0 & (1 << kind.strength()) != 0
    }

    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Weakest first.
    pub fn iter(self) -> impl Iterator<Item = RuntimeKind> {
        RuntimeKind::ALL.into_iter().filter(move |kind| self.contains(*kind))
    }
}

impl FromIterator<RuntimeKind> for RuntimeKinds {
    fn from_iter<Kinds: IntoIterator<Item = RuntimeKind>>(kinds: Kinds) -> Self {
        Self(kinds.into_iter().fold(0, |bits, kind| bits | (1 << kind.strength())))
    }
}

impl<const COUNT: usize> From<[RuntimeKind; COUNT]> for RuntimeKinds {
    fn from(kinds: [RuntimeKind; COUNT]) -> Self {
        kinds.into_iter().collect()
    }
}

impl From<Vec<RuntimeKind>> for RuntimeKinds {
    fn from(kinds: Vec<RuntimeKind>) -> Self {
        kinds.into_iter().collect()
    }
}

impl From<RuntimeKinds> for Vec<RuntimeKind> {
    fn from(kinds: RuntimeKinds) -> Self {
        kinds.iter().collect()
    }
}

/// For people: `runc and gvisor`.
impl fmt::Display for RuntimeKinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.iter().map(|kind| kind.to_string()).collect();
        if names.is_empty() {
            return f.write_str("none");
        }
        f.write_str(&names.join(" and "))
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
    /// What it may reach outside, beside the platform.
    pub egress: Egress,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_are_counted_once_and_told_in_order() {
        let kinds: RuntimeKinds = [RuntimeKind::Gvisor, RuntimeKind::Runc, RuntimeKind::Gvisor].into();
        assert_eq!(kinds.to_string(), "runc and gvisor");
        assert!(kinds.contains(RuntimeKind::Runc) && !kinds.contains(RuntimeKind::Process));
        assert_eq!(RuntimeKinds::default().to_string(), "none");
        assert_eq!(RuntimeKinds::from(Vec::from(kinds)), kinds);
        assert_eq!(
            kinds.union([RuntimeKind::Process].into()).iter().collect::<Vec<_>>(),
            RuntimeKind::ALL
        );
    }

    #[test]
    fn a_kernel_of_its_own_is_the_strongest() {
        assert!(RuntimeKind::Gvisor.is_as_strong_as(RuntimeKind::Runc));
        assert!(RuntimeKind::Runc.is_as_strong_as(RuntimeKind::Runc));
        assert!(!RuntimeKind::Runc.is_as_strong_as(RuntimeKind::Gvisor));
        assert!(!RuntimeKind::Process.is_as_strong_as(RuntimeKind::Runc));
    }
}
