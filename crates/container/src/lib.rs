//! Starting and ending containers, and nothing about why.
//!
//! This is the only crate that starts container processes. It owns what the kernel and the disk keep for
//! one: the mounted root, the namespaces, the control groups, the network interface and the OCI bundle.
//! The worker and the image builder call it with a [`Launch`] and get a [`RunningContainer`].
//!
//! It never decides what should run, never reads an image's configuration, never speaks to the platform's
//! client, and never falls back to weaker isolation: what a [`Runtime`] cannot do, it refuses by name.
//!
//! | module | owns |
//! |---|---|
//! | [`runtime`], `running` | the [`Runtime`] trait and the life of one container |
//! | [`config`] | what an instance of the platform has of its own |
//! | `keeper` | the process that stays with a container when this one ends |
//! | `runc`, `bundle`, `seccomp`, `passwd` | the isolated runtime and the OCI bundle it starts from |
//! | `userns` | the ids that a container has on the host, and its files with them |
//! | `gvisor` | the isolated runtime with a kernel of its own |
//! | `oci` | what `runc` and `runsc` are called with, and what their ends mean |
//! | `process` | the runtime without isolation |
//! | [`overlay`] | layers stacked into one directory |
//! | [`network`] | bridge, addresses, firewall, name servers |
//! | `cgroup`, `mounts` | limits and mounts, as the kernel reports them |
//! | [`probe`] | what this host can do |

mod bundle;
mod cgroup;
mod command;
pub mod config;
mod descriptor;
mod gvisor;
mod keeper;
mod mounts;
pub mod network;
mod oci;
pub mod overlay;
mod passwd;
pub mod probe;
mod process;
mod runc;
mod running;
pub mod runtime;
mod seccomp;
mod userns;

use std::sync::Arc;

use ionian_domain::container::RuntimeKind;

pub use config::{AddressPool, ContainerConfig};
pub use gvisor::{GvisorRuntime, probe_gvisor};
pub use network::{Cidr, CidrError, Egress, Network, NetworkError};
pub use overlay::{MountGuard, OverlayError, WritableLayer, mount_overlay};
pub use probe::{Probe, probe};
pub use process::ProcessRuntime;
pub use runc::RuncRuntime;
pub use runtime::{
    Bind, Capabilities, ContainerHandle, DisposeError, Feature, Launch, Limits, NetworkMode, OpenError, OutputStream,
    ReapError, ReapReport, Rootfs, RunningContainer, Runtime, SignalError, StartError, Upper,
};
pub use userns::UserNamespaces;

pub use nix::sys::signal::Signal;

/// The runtime that was asked for, or why it cannot be had; never another one.
pub async fn open(kind: RuntimeKind, config: ContainerConfig) -> Result<Arc<dyn Runtime>, OpenError> {
    match kind {
        RuntimeKind::Runc => Ok(Arc::new(RuncRuntime::open(config).await?)),
        RuntimeKind::Gvisor => Ok(Arc::new(GvisorRuntime::open(config).await?)),
        RuntimeKind::Process => Ok(Arc::new(ProcessRuntime::new())),
    }
}

/// An error with its causes, for logs and for errors that keep only text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}
