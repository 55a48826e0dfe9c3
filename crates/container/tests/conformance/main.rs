//! One suite over every runtime that can run here, and what the isolated ones promise beyond it.
//!
//! What needs root says so and is skipped without it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]
#![expect(clippy::print_stdout, reason = "tests say what they skip and what they measured")]

mod adoption;
mod common;
mod guest;
mod isolated;
mod leftovers;
mod network;
mod outside;
mod packages;
mod probe;
mod support;
mod table;
mod userns;
