//! `ionian doctor`: what this host can do.

use crate::config::Config;

/// Prints every finding; fails when something is missing that the chosen runtime needs.
#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) fn run(config: &Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let state_dir = config.data_dir.clone();
    let probes = runtime.block_on(ionian_container::probe::probe(&state_dir));
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
    Ok(())
}
