//! The server's own log, on stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// `IONIAN_LOG` wins over the configured filter, as is usual for log filters.
pub(crate) fn start(filter: &str) {
    let text = std::env::var("IONIAN_LOG").unwrap_or_else(|_| filter.to_owned());
    let filter = EnvFilter::try_new(&text).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
