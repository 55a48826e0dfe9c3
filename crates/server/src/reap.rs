//! `ionian reap`: removes what a killed server left on its host.

use anyhow::Context;
use ionian_container::{RuncRuntime, Runtime};

use crate::config::Config;

/// Opening the runtime reaps what is left behind, and fails where a server still runs on the directory.
#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn run(config: &Config) -> anyhow::Result<()> {
    let runtime = RuncRuntime::open(crate::serve::container_config(config))
        .await
        .context("cannot reap")?;
    runtime.remove_all().await.context("cannot remove everything")?;
    println!("nothing of the server on {} is left", config.data_dir.display());
    Ok(())
}
