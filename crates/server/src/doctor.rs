//! `ionian doctor`: what this host can do.

use anyhow::bail;
use ionian_container::{Probe, probe_gvisor};
use ionian_domain::container::RuntimeKind;

use crate::config::Config;
use crate::serve::container_config;

/// Prints every finding; fails when something is missing that the chosen runtime needs.
#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) fn run(config: &Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let state_dir = config.data_dir.clone();
    let mut probes = runtime.block_on(ionian_container::probe::probe(&state_dir));
    let gvisor = runtime.block_on(gvisor(config));
    let gvisor_is_missing = !gvisor.ok;
    probes.push(gvisor);
    let mut missing = 0;
    for probe in &probes {
        let mark = if probe.ok { "ok  " } else { "MISS" };
        println!("{mark}  {:<16} {}", probe.name, probe.detail);
        if !probe.ok {
            missing += 1;
            println!("      to mend: {}", probe.how_to_mend);
        }
    }
    println!("gpu   this server does not hand out GPUs yet");
    println!("{} of {} checks passed", probes.len() - missing, probes.len());
    if config.runtime == RuntimeKind::Gvisor && gvisor_is_missing {
        bail!("`runtime.kind` is gvisor, which cannot be used here");
    }
    Ok(())
}

/// Whether functions can have it that ask for it, with the program that the configuration names.
async fn gvisor(config: &Config) -> Probe {
    let (ok, detail) = match probe_gvisor(&container_config(config)).await {
        Ok(found) => (true, found),
        Err(error) => (false, error.to_string()),
    };
    let how_to_mend = match (ok, config.runtime) {
        (true, _) => "",
        (false, RuntimeKind::Gvisor) => "install runsc, or name it with `runtime.runsc`: `runtime.kind` is gvisor",
        (false, RuntimeKind::Runc | RuntimeKind::Process) => {
            "only for functions that ask for gvisor: install runsc, or name it with `runtime.runsc`"
        }
    };
    Probe {
        name: "gvisor",
        ok,
        detail,
        how_to_mend: how_to_mend.to_owned(),
    }
}
