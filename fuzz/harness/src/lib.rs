//! What the fuzzers do with their bytes: one module per target, each with `run`, which must return, whatever it gets.
//!
//! A finding is a panic: of the code under test, in whatever thread, or of an assertion here. Hangs and growth are for
//! libFuzzer's limits, which `scripts/fuzz` sets. The crate is compiled twice: by `cargo fuzz` with coverage counters,
//! and by the main workspace, whose tests replay the checked-in corpora (`tests/corpus.rs`).

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a panic is how a fuzzer reports, and its setup has nobody else to report to"
)]

pub mod archive;
pub mod blobs;
mod bytes_in;
pub mod dockerfile;
pub mod grpc;
pub mod http_front;
mod logs;
pub mod messages;
pub mod oci;
mod platform;
mod scratch;

pub type Run = fn(&[u8]);

/// Every target, for the replay of the corpora.
pub const TARGETS: &[(&str, Run)] = &[
    ("archive", archive::run),
    ("blobs", blobs::run),
    ("dockerfile", dockerfile::run),
    ("grpc", grpc::run),
    ("http_front", http_front::run),
    ("messages", messages::run),
    ("oci", oci::run),
];
