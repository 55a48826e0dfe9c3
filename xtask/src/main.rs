//! `cargo xtask …`: checks of this repository that neither the compiler nor a test can make.
//!
//! Each command is a module with one public `run`. Nothing here is part of the product.

mod check_deps;
mod descriptors;
mod limits;
mod rpc_coverage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of this repository")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fail when a crate depends on something that it must not know.
    CheckDeps,
    /// Print which RPCs of the client's service are answered, as Markdown.
    RpcCoverage,
    /// Write docs/limits.md from the constants of the code and from docs/limits.toml.
    Limits {
        /// Write nothing, and fail when the page, the table or the code is behind.
        #[arg(long)]
        check: bool,
    },
    /// Write the encoded descriptors of our .proto files to OUT.
    Descriptors { out: PathBuf },
}

#[expect(clippy::print_stderr, reason = "a command says on stderr why it failed")]
fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::CheckDeps => check_deps::run(),
        Command::RpcCoverage => rpc_coverage::run(),
        Command::Limits { check } => limits::run(check),
        Command::Descriptors { out } => descriptors::run(&out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Without a backtrace, whatever the environment says: these errors are about files, not about this program.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder with the workspace's Cargo.toml: the parent of this crate's.
fn repository_root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has no parent folder")
}
