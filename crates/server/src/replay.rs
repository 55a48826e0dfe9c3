//! `ionian replay`: runs a journal of the scheduler again.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context;
use ionian_scheduler::journal;

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) fn run(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut failed = None;
    let lines = BufReader::new(file).lines().map_while(|line| match line {
        Ok(line) => Some(line),
        Err(error) => {
            failed = Some(error);
            None
        }
    });
    let report = journal::replay(lines).with_context(|| format!("{} was not replayed", path.display()))?;
    if let Some(error) = failed {
        return Err(error).with_context(|| format!("cannot read {}", path.display()));
    }
    println!(
        "{} turns with {} events in {} lives of the server are decided as they were",
        report.turns, report.events, report.lives
    );
    Ok(())
}
