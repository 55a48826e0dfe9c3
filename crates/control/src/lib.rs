//! The application: one method per use case, the turn loop, background sweeps.
//!
//! [`Control`] is the handle that `api` and `ingress` hold. Its use cases are grouped by noun under
//! [`app`]: `control.apps().publish(…)`. Nothing here knows a protobuf type, an SQL statement or a
//! status code.

mod adoption;
pub mod app;
pub mod caller;
pub mod config;
pub mod containers;
pub mod data_channel;
pub mod dispatch;
pub mod effects;
pub mod error;
mod journal;
pub mod logs;
mod notices;
pub mod seal;
mod sessions;
mod start;
mod sweep;
mod trouble;
pub mod turn_loop;
pub mod web;
pub mod workers;

pub use app::images::{BuildFailure, BuildFn, BuildJob};
pub use caller::Caller;
pub use config::ControlConfig;
pub use error::{DISK_FULL, Error, Result};
pub use ionian_scheduler::AttemptReport;
pub use journal::JournalError;
pub use start::{Control, Parts, StartError, Started};
