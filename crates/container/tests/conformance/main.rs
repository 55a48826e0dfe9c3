//! One suite over every runtime that can run here, and what the isolated ones promise beyond it.
//!
//! What needs root says so and is skipped without it.

mod common;
mod isolated;
mod leftovers;
mod network;
mod support;
