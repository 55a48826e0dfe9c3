//! Use cases, one file per noun.

pub mod apps;
pub(crate) mod builds;
pub mod calls;
pub mod container_calls;
pub mod environments;
pub mod functions;
pub mod images;
pub mod mounts;
pub mod payloads;
pub mod routes;
pub mod secrets;
pub mod streams;
pub(crate) mod targets;
pub mod tasks;
pub mod tokens;
