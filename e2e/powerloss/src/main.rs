//! Replays what a server asked of its disk, cuts the power at chosen moments, and looks what is left.
//!
//! `preload.c` recorded every write, name and sync below the data directory, and `ionian-loadgen record`
//! what the server acknowledged meanwhile. Here the disk is built anew as it may be after a power cut:
//!
//! * `drop`: nothing is there that was not synced. A file's content is that of its last `fsync`; a name is
//!   there once its directory was synced. Between two syncs nothing changes on such a disk, so that one
//!   moment for each sync, the one right before it returns, stands for every prefix of the trace.
//! * `tear`: of what was not synced, any part is there: of each write some sectors, of the names any number
//!   in their order. Drawn by chance, from a printed seed.
//!
//! In each of them the store must open and be whole, and everything must be there that was acknowledged
//! before the cut. `--ignore-syncs` makes the disk lie: the check must then fail, or it checks nothing.

mod acknowledged;
mod check;
mod disk;
mod image;
mod random;
mod trace;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use serde::Serialize;

use crate::acknowledged::Line;
use crate::disk::{Disk, Moment};
use crate::random::Random;

#[derive(Parser)]
struct Arguments {
    /// What preload.c wrote
    #[arg(long)]
    trace: PathBuf,
    /// The data directory whose trace it is
    #[arg(long)]
    root: PathBuf,
    /// Files of acknowledgements
    #[arg(long, required = true)]
    acknowledged: Vec<PathBuf>,
    /// Where disks are built; best in memory
    #[arg(long)]
    scratch: PathBuf,
    /// How many syncs to cut the power before, evenly spread; all if left out
    #[arg(long)]
    drops: Option<usize>,
    /// How many moments with torn writes, drawn by chance
    #[arg(long, default_value_t = 100)]
    tears: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A disk that forgets to sync these
    #[arg(long)]
    ignore_syncs: Option<Ignored>,
    /// Ends after so many moments at which something was lost
    #[arg(long, default_value_t = 10)]
    failures: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ignored {
    Database,
    Log,
    Blobs,
    Directories,
}

#[derive(Serialize)]
struct Report {
    records: usize,
    writes: usize,
    syncs: usize,
    acknowledged: usize,
    drops: usize,
    tears: usize,
    /// What was lost, at which moment.
    lost: Vec<String>,
}

/// A cut of the power.
struct Cut {
    /// After so many moments of the trace.
    moments: usize,
    torn: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let records = trace::read(&arguments.trace, &arguments.root)?;
    let acknowledged = acknowledged::read(&arguments.acknowledged)?;
    ensure!(!acknowledged.is_empty(), "nothing was acknowledged");
    let moments = disk::moments(&records);
    let mut random = Random::new(arguments.seed);
    let cuts = cuts(&moments, &arguments, &mut random);

    let mut report = Report {
        records: records.len(),
        writes: records.iter().filter(|record| record.is_write()).count(),
        syncs: records.iter().filter(|record| record.is_sync()).count(),
        acknowledged: acknowledged.len(),
        drops: cuts.iter().filter(|cut| !cut.torn).count(),
        tears: cuts.iter().filter(|cut| cut.torn).count(),
        lost: Vec::new(),
    };
    let mut disk = Disk::default();
    let mut scratch = image::Scratch::new(arguments.scratch.clone());
    let mut done = 0;
    for cut in cuts {
        for moment in &moments[done..cut.moments] {
            disk.pass(&records, moment, |path, is_directory| {
                is_ignored(arguments.ignore_syncs, path, is_directory)
            })?;
        }
        done = cut.moments;
        // Right before the next thing happens: acknowledgements may have arrived since the last.
        let at = moments.get(done).map_or(u64::MAX, |moment| moment.at);
        let before: Vec<&Line> = acknowledged.iter().filter(|line| line.monotonic_ns < at).collect();
        let files = if cut.torn {
            disk.torn(&mut random)
        } else {
            disk.dropped()
        };
        scratch.build(&files)?;
        let kind = if cut.torn { "torn" } else { "dropped" };
        if let Err(error) = check::check(scratch.path(), &before, &mut random).await {
            report
                .lost
                .push(format!("{kind} after {done} of {} moments: {error:#}", moments.len()));
            if report.lost.len() >= arguments.failures {
                break;
            }
        }
    }
    if report.lost.is_empty() {
        for moment in &moments[done..] {
            disk.pass(&records, moment, |_, _| false)?;
        }
        disk.compare(&arguments.root)
            .context("the trace is not all that happened")?;
    }
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&report)?)?;
    Ok(())
}

/// The cuts in the order of time.
fn cuts(moments: &[Moment], arguments: &Arguments, random: &mut Random) -> Vec<Cut> {
    let syncs: Vec<usize> = (0..moments.len()).filter(|index| moments[*index].ends_sync).collect();
    let wanted = arguments.drops.unwrap_or(syncs.len()).min(syncs.len());
    let drops = (0..wanted).map(|number| syncs[number * syncs.len() / wanted]);
    let mut cuts: Vec<Cut> = drops.map(|moments| Cut { moments, torn: false }).collect();
    cuts.push(Cut {
        moments: moments.len(),
        torn: false,
    });
    for _ in 0..arguments.tears {
        cuts.push(Cut {
            moments: random.below(moments.len()),
            torn: true,
        });
    }
    cuts.sort_by_key(|cut| cut.moments);
    cuts
}

fn is_ignored(ignored: Option<Ignored>, path: &str, is_directory: bool) -> bool {
    match ignored {
        None => false,
        Some(Ignored::Database) => path == "ionian.db",
        Some(Ignored::Log) => path == "ionian.db-wal",
        Some(Ignored::Blobs) => path.starts_with("blobs/") && !is_directory,
        Some(Ignored::Directories) => is_directory,
    }
}
