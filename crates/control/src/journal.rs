//! Writes the scheduler's journal to a file, for diagnosis: a turn never waits for it.
//!
//! Lines go to a thread of its own. A journal with a gap is worth nothing, so where the thread falls behind,
//! fails or has written enough, the journal ends there, and the log says so.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use ionian_domain::Timestamp;
use ionian_scheduler::journal::{self, Entry};
use ionian_scheduler::{Config, Event};

/// Lines that may wait: some seconds of a busy server. A line has some hundred bytes for each of its events.
const WAITING_LINES: usize = 4_096;
/// The journal ends at this size: whoever forgot to turn it off must not find a full disk.
const MAX_BYTES: u64 = 4 << 30;
/// Read at a time when the end of an earlier journal is looked for.
const TAIL_BYTES: u64 = 64 << 10;

#[derive(Debug, thiserror::Error)]
#[error("cannot write the journal {}", path.display())]
pub struct JournalError {
    path: PathBuf,
    source: io::Error,
}

/// Where turns are noted, or nowhere.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    lines: Option<SyncSender<Vec<u8>>>,
}

impl Journal {
    /// Appends a life of the server to the file.
    pub(crate) fn open(path: &Path, config: &Config) -> Result<Self, JournalError> {
        let failed = |source| JournalError {
            path: path.to_owned(),
            source,
        };
        let (file, length) = open(path).map_err(failed)?;
        let (lines, waiting) = sync_channel(WAITING_LINES);
        let _room = lines.try_send(journal::opening(config));
        let written = path.to_owned();
        std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || {
                if let Err(error) = write(file, length, &waiting) {
                    tracing::warn!(path = %written.display(), %error, "the journal of the scheduler ends here");
                }
            })
            .map_err(failed)?;
        tracing::warn!(path = %path.display(), "turns of the scheduler are written to a journal");
        Ok(Self { lines: Some(lines) })
    }

    /// Notes what the scheduler is about to be told.
    pub(crate) fn begin(&self, now: Timestamp, events: &[Event]) -> Option<Entry> {
        self.lines.as_ref().map(|_| Entry::begin(now, events))
    }

    pub(crate) fn write(&mut self, line: Vec<u8>) {
        if let Some(lines) = &self.lines
            && lines.try_send(line).is_err()
        {
            tracing::warn!("the journal of the scheduler cannot keep up, or has ended; nothing more is written to it");
            self.lines = None;
        }
    }
}

/// Opens the file after its last whole line: a killed server leaves half a one.
fn open(path: &Path) -> io::Result<(File, u64)> {
    // Names of users' things are in it.
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut tail = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        tail.clear();
        (&file).take(end - start).read_to_end(&mut tail)?;
        if let Some(newline) = tail.iter().rposition(|byte| *byte == b'\n') {
            end = start + newline as u64 + 1;
            break;
        }
        end = start;
    }
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    Ok((file, end))
}

/// Writes until nobody sends any more.
fn write(file: File, mut length: u64, lines: &Receiver<Vec<u8>>) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    loop {
        let line = match lines.try_recv() {
            Ok(line) => line,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                file.flush()?;
                match lines.recv() {
                    Ok(line) => line,
                    Err(_disconnected) => break,
                }
            }
        };
        length += line.len() as u64;
        if length > MAX_BYTES {
            return Err(io::Error::other(format!(
                "it has reached its limit of {MAX_BYTES} bytes"
            )));
        }
        file.write_all(&line)?;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ionian_domain::ContainerId;
    use ionian_domain::record::Recovered;
    use ionian_scheduler::Scheduler;

    use super::*;

    fn live(path: &Path) {
        let config = Config::default();
        let mut journal = Journal::open(path, &config).unwrap();
        let mut scheduler = Scheduler::new(config);
        let now = Timestamp(7);
        let events = vec![Event::Recovered(Recovered::default())];
        let mut entry = journal.begin(now, &events).unwrap();
        let turn = scheduler.handle(now, events, &mut || entry.drew(ContainerId::generate()));
        journal.write(entry.end(&turn));
    }

    fn replayed(path: &Path, lives: usize) {
        // The thread ends with the journal, a moment later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            let text = fs::read_to_string(path).unwrap();
            let report = journal::replay(text.lines()).unwrap();
            if (report.lives, report.turns) == (lives, lives) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{report:?}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn every_life_is_appended_after_the_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        live(&path);
        replayed(&path, 1);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&vec![b'x'; TAIL_BYTES as usize + 5]).unwrap();
        live(&path);
        replayed(&path, 2);
    }
}
