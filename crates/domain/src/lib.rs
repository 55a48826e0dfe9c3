//! The nouns of the platform: ids, specs, states, outcomes, error kinds and time.
//!
//! Everything else depends on this crate, and it depends on nothing of ours. It has no IO, no clock
//! and no runtime. Randomness is limited to [`ids`], where new ids are drawn.

pub mod app;
pub mod call;
pub mod container;
pub mod environment;
pub mod error;
pub mod function;
mod hex_bytes;
pub mod ids;
pub mod image;
pub mod log;
pub mod mount;
pub mod network;
pub mod outcome;
pub mod record;
pub mod secret;
pub mod time;
pub mod web;
pub mod worker;

pub use error::ErrorKind;
pub use ids::*;
pub use outcome::Outcome;
pub use time::Timestamp;
