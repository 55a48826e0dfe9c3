//! The binary `ionian`: configuration, wiring, supervision, commands.

mod config;
mod doctor;
mod host;
mod keys;
mod logging;
mod reap;
mod replay;
mod serve;
mod settings;
mod token;
mod uninstall;
mod worker_command;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Config;

/// Measured beside glibc's, with 32 callers that record inputs: a tenth less processor time for each, and a
/// server of two thirds the size afterwards.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(
    name = "ionian",
    version,
    about = "A self-hosted serverless platform for Python apps written with the modal SDK"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the platform: API, web endpoints, scheduler and one worker in one process.
    Serve {
        #[command(flatten)]
        source: Source,
        /// Address and port of the one listener; port 0 lets the system choose.
        #[arg(long, value_name = "ADDR:PORT")]
        listen: Option<String>,
    },
    /// Run containers for a server that is another process.
    Worker {
        /// Configuration file; see `ionian config`.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Where the worker keeps its data; not the server's directory.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// The server, as in `http://127.0.0.1:8800`.
        #[arg(long, value_name = "URL")]
        server: String,
        /// A file with a join token; see `ionian token new --worker`.
        #[arg(long, value_name = "FILE")]
        join_token_file: PathBuf,
    },
    /// API tokens, for clients.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// What this host can do, and how to mend what is missing.
    Doctor {
        #[command(flatten)]
        source: Source,
    },
    /// Remove what a killed server left behind: containers, networks, mounts, control groups.
    Reap {
        #[command(flatten)]
        source: Source,
    },
    /// Remove everything of a stopped server from this host: what `reap` removes, and its data directory.
    Uninstall {
        #[command(flatten)]
        source: Source,
        /// Really do it; without, it is only told what would go.
        #[arg(long)]
        yes: bool,
    },
    /// Run a journal of the scheduler (the setting `debug.journal`) through this version's scheduler, and
    /// compare what it decides.
    Replay { journal: PathBuf },
    /// Print a configuration file with every key, its default and what it means.
    Config,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token, and print what a shell must set to use it.
    New {
        #[command(flatten)]
        source: Source,
        #[arg(long, default_value = "")]
        name: String,
        /// A token for `ionian worker` to join with, in place of one for clients.
        #[arg(long, conflicts_with = "name")]
        worker: bool,
    },
    /// List tokens, without their secrets.
    List {
        #[command(flatten)]
        source: Source,
    },
    /// Make a token worthless.
    Revoke {
        #[command(flatten)]
        source: Source,
        id: String,
    },
}

/// Where settings come from.
#[derive(Debug, Clone, clap::Args)]
struct Source {
    /// Configuration file; see `ionian config`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the platform keeps its data.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl Source {
    fn load(&self) -> anyhow::Result<Config> {
        Config::load(self.config.as_deref(), self.data_dir.as_deref())
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint_error(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a command that failed")]
fn eprint_error(error: &anyhow::Error) {
    eprintln!("ionian: {error:#}");
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve { source, listen } => {
            let mut config = source.load()?;
            if let Some(listen) = listen {
                config.listen =
                    config::parse_listen(&listen).map_err(|reason| anyhow::anyhow!("--listen: {reason}"))?;
            }
            logging::start(&config.log);
            runtime()?.block_on(serve::run(config))
        }
        Command::Worker {
            config,
            data_dir,
            server,
            join_token_file,
        } => {
            let config = Config::load(config.as_deref(), Some(&data_dir))?;
            logging::start(&config.log);
            runtime()?.block_on(worker_command::run(config, server, &join_token_file))
        }
        Command::Token {
            command: TokenCommand::New { source, name, worker },
        } => {
            let config = source.load()?;
            if worker {
                runtime()?.block_on(token::new_worker(&config))
            } else {
                runtime()?.block_on(token::new(&config, &name))
            }
        }
        Command::Token {
            command: TokenCommand::List { source },
        } => runtime()?.block_on(token::list(&source.load()?)),
        Command::Token {
            command: TokenCommand::Revoke { source, id },
        } => runtime()?.block_on(token::revoke(&source.load()?, &id)),
        Command::Doctor { source } => doctor::run(&source.load()?),
        Command::Reap { source } => {
            let config = source.load()?;
            logging::start(&config.log);
            runtime()?.block_on(reap::run(&config))
        }
        Command::Uninstall { source, yes } => {
            let config = source.load()?;
            logging::start(&config.log);
            runtime()?.block_on(uninstall::run(&config, yes))
        }
        Command::Replay { journal } => replay::run(&journal),
        Command::Config => {
            settings::print_documented();
            Ok(())
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
