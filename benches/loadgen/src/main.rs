//! Drives a running server the way many clients at once do, over the client's gRPC protocol.
//!
//! * `durability` measures how many inputs per second are acknowledged, round by round beside the rate at
//!   which the same disk takes one `fdatasync` after the other. `benches/durability` runs it.
//! * `record` does a bit of everything that is acknowledged as durable, and writes down what was
//!   acknowledged and when. `e2e/powerloss` checks that a power cut would have lost none of it.
//!
//! It knows nothing of the server but the protocol: no other crate of ours than `proto`.

mod client;
mod disk;
mod inputs;
mod record;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Load for a running Ionian server")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Acknowledged inputs per second against the disk's serial syncs per second; one line of JSON per round
    Durability {
        #[command(flatten)]
        server: Server,
        /// A directory on the disk of the server's data directory
        #[arg(long)]
        disk: PathBuf,
        #[arg(long, default_value_t = 32)]
        callers: usize,
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// Length of each of the measurements of a round
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Writes things and records each acknowledgement, one line of JSON each
    Record {
        #[command(flatten)]
        server: Server,
        /// Where the acknowledgements go
        #[arg(long)]
        acknowledged: PathBuf,
        #[arg(long, default_value_t = 4)]
        callers: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
}

#[derive(Args)]
pub(crate) struct Server {
    #[arg(long, env = "MODAL_SERVER_URL")]
    url: String,
    #[arg(long, env = "MODAL_TOKEN_ID")]
    token_id: String,
    #[arg(long, env = "MODAL_TOKEN_SECRET", hide_env_values = true)]
    token_secret: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Durability {
            server,
            disk,
            callers,
            rounds,
            seconds,
        } => inputs::measure(&server, &disk, callers, rounds, duration(seconds)?).await,
        Command::Record {
            server,
            acknowledged,
            callers,
            seconds,
        } => record::run(&server, &acknowledged, callers, duration(seconds)?).await,
    }
}

fn duration(seconds: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(seconds).context("the number of seconds is no length of time")
}
