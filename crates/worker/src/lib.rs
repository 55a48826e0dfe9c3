//! The worker: makes one host match the desired set that the control process sends (D7), and builds images.
//!
//! [`Worker::run`] takes desired sets and gives reports; nothing else connects it to the control process, which
//! may be this very process or one at the other end of a [`link`]. It decides nothing about what should
//! run. It names no SQL and no configuration key, and RPCs in [`link`] only; it starts processes through `ionian_container` only.
//!
//! | module | owns |
//! |---|---|
//! | [`worker`] | the loop that turns desired sets into orders, and sightings into reports |
//! | `reconcile` | what to do next, as a pure state machine |
//! | `container` | the life of one container, from preparation to disposal |
//! | `launch` | what a container finds: command, environment, binds, limits |
//! | `mounts`, `image_files` | a function's files as one more layer over its image |
//! | `logs`, `lines` | output from pipes to the log sink, with back-pressure |
//! | `hook` | the platform's own Python, put where containers find it |
//! | [`steps`], [`builds`] | build steps in containers, and image builds with their log |
//! | [`link`] | the protocol with a control process that is not this one |
//! | [`content`], [`forwarder`] | what such a worker needs besides: files by digest, containers' way to the server |
//! | [`doctor`] | what an operator should know about this host's disk |

pub mod builds;
mod container;
pub mod content;
pub mod doctor;
pub mod forwarder;
#[doc(hidden)]
pub mod fuzzing;
mod hook;
mod image_files;
mod launch;
mod lines;
pub mod link;
pub mod logs;
mod mounts;
mod reconcile;
pub mod steps;
pub mod worker;

pub use builds::{BuildFailure, BuildLine, BuildOrder, Builder};
pub use content::ContentCache;
pub use forwarder::Forwarder;
pub use link::{Link, LinkConfig, LinkEnds, LinkError};
pub use logs::{LogLimits, LogSink};
pub use steps::{ContainerSteps, StepLimits};
pub use worker::{FetchContent, FoundContainer, OpenError, Worker, WorkerLimits, WorkerParts, find_containers};

/// An error with its causes, for messages that must be one text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their source in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
