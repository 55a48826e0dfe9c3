//! Images: from the Dockerfile commands that a client sends to layers of files that a container runs on.
//!
//! The way through the crate: [`dockerfile`] parses, [`plan`] turns instructions into steps with keys
//! (both pure), `engine` executes the steps that no layer exists for yet, and [`layers`] holds what
//! came of them. [`base`] brings base images from registries, archives or a Debian mirror. [`build`] is
//! the door: callers need [`build::ImageBuilder`] and little else.
//!
//! This crate starts no container itself: whoever owns a container runtime hands in a
//! [`step::StepRunner`]. It knows nothing of protobuf, SQL or HTTP status codes.

pub mod base;
pub mod build;
pub mod client_bundle;
mod context;
mod copy;
pub mod dockerfile;
mod engine;
mod extract;
#[doc(hidden)]
pub mod fuzzing;
mod inspect;
pub mod layers;
mod output;
mod patterns;
pub mod plan;
mod rooted;
mod run;
pub mod step;
pub mod trust;

pub use build::{BuildError, BuildRequest, BuilderConfig, ContextEntry, ContextFiles, ImageBuilder, StepNumber};
pub use layers::{Begin, LayerDraft, LayerError, LayerNote, LayerRecord, LayerStore, layer_key};
pub use step::{
    BuildLog, BuildLogChunk, LogStream, MountedRoot, StepBind, StepError, StepExecution, StepExit, StepRunner,
};
pub use trust::HostTrust;
