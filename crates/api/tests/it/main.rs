//! The service as a client and a container see it: real gRPC messages, a real database on a temporary
//! directory, everything in one process. The worker and the builder are stand-ins that start nothing.

#![expect(clippy::unwrap_used, reason = "what a test is built from fails the test")]

mod adoption;
mod apps;
mod auth;
mod calls;
mod containers;
mod data_channel;
mod environments;
mod functions;
mod generators;
mod images;
mod limits;
mod logs;
mod maps;
mod restart;
mod secrets;
mod support;
mod worker_protocol;
