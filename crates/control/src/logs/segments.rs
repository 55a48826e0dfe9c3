//! One app's log on disk: segment files of JSON lines, named after the number of their first entry.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use ionian_domain::Timestamp;
use ionian_domain::log::LogEntry;

use super::Numbered;

/// A segment is closed at this size: small enough to drop one by one, large enough to be few.
pub(super) const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of logs kept per app. At the limit the oldest segment goes.
const APP_BYTES: u64 = 256 * 1024 * 1024;

/// A file to read: the number of its first entry, and where it is.
pub(super) type Place = (u64, PathBuf);

struct Segment {
    first: u64,
    path: PathBuf,
    bytes: u64,
    /// No entry in it is newer.
    newest: Timestamp,
}

/// All segments of an app, oldest first, and the file that is written to.
pub(super) struct Segments {
    dir: PathBuf,
    all: VecDeque<Segment>,
    open: Option<File>,
    /// The last segment ends with a whole line, so that more can follow.
    is_whole: bool,
}

impl Segments {
    /// Finds what an earlier process left, and the number of the next entry.
    pub(super) fn load(dir: PathBuf) -> (Self, u64) {
        let mut all: VecDeque<Segment> = VecDeque::new();
        for (first, path) in list(&dir) {
            let metadata = fs::metadata(&path);
            let bytes = metadata.as_ref().map_or(0, fs::Metadata::len);
            // Written after its newest entry happened.
            let newest = metadata
                .and_then(|metadata| metadata.modified())
                .map_or(Timestamp(i64::MAX), Timestamp::from_system);
            all.push_back(Segment {
                first,
                path,
                bytes,
                newest,
            });
        }
        // Only the last one has to be read: the others end where the next ones begin.
        let (next, is_whole) = all.back().map_or((1, false), |last| {
            let mut next = last.first;
            let mut bytes = 0;
            read(&[(last.first, last.path.clone())], |number, line, _| {
                next = number + 1;
                bytes += line.len() as u64 + 1;
                ControlFlow::Continue(())
            });
            (next, bytes == last.bytes)
        });
        (
            Self {
                dir,
                all,
                open: None,
                is_whole,
            },
            next,
        )
    }

    /// Appends lines whose first has the number `first`. After a failure, which may have left half a line, the
    /// next lines begin a segment of their own.
    pub(super) fn write(&mut self, first: u64, lines: &[u8], newest: Timestamp) -> std::io::Result<()> {
        let written = self.try_write(first, lines, newest);
        if written.is_err() {
            self.open = None;
            self.is_whole = false;
        }
        written
    }

    fn try_write(&mut self, first: u64, lines: &[u8], newest: Timestamp) -> std::io::Result<()> {
        let full = self.all.back().is_none_or(|segment| segment.bytes >= SEGMENT_BYTES);
        if self.open.is_none()
            && !full
            && self.is_whole
            && let Some(last) = self.all.back()
        {
            self.open = Some(File::options().append(true).open(&last.path)?);
        }
        if full || self.open.is_none() {
            fs::create_dir_all(&self.dir)?;
            let path = self.dir.join(format!("{first:020}.jsonl"));
            self.open = Some(File::options().create(true).append(true).open(&path)?);
            if self.all.back().is_none_or(|segment| segment.first != first) {
                self.all.push_back(Segment {
                    first,
                    path,
                    bytes: 0,
                    newest,
                });
            }
        }
        if let (Some(file), Some(segment)) = (&mut self.open, self.all.back_mut()) {
            file.write_all(lines)?;
            segment.bytes += lines.len() as u64;
            segment.newest = segment.newest.max(newest);
        }
        let mut total: u64 = self.all.iter().map(|segment| segment.bytes).sum();
        while total > APP_BYTES && self.all.len() > 1 {
            if let Some(oldest) = self.all.pop_front() {
                total -= oldest.bytes;
                remove(&oldest.path)?;
            }
        }
        Ok(())
    }

    /// Where the entries from a number on are.
    pub(super) fn from(&self, number: u64) -> Vec<Place> {
        let start = self
            .all
            .iter()
            .rposition(|segment| segment.first <= number)
            .unwrap_or(0);
        self.all
            .iter()
            .skip(start)
            .map(|segment| (segment.first, segment.path.clone()))
            .collect()
    }

    /// Where entries that are not older than a time can be.
    pub(super) fn since(&self, since: Option<Timestamp>) -> Vec<Place> {
        let wanted = |segment: &&Segment| since.is_none_or(|since| segment.newest >= since);
        self.all
            .iter()
            .filter(wanted)
            .map(|segment| (segment.first, segment.path.clone()))
            .collect()
    }

    /// Drops segments without entries newer than a time. The one that is written to stays.
    pub(super) fn drop_older(&mut self, than: Timestamp) -> std::io::Result<()> {
        while self.all.len() > 1
            && self.all.front().is_some_and(|oldest| oldest.newest < than)
            && let Some(oldest) = self.all.pop_front()
        {
            remove(&oldest.path)?;
        }
        Ok(())
    }
}

/// Removes the segments of an app that nobody uses, without entries newer than a time.
pub(super) fn remove_older(dir: &Path, than: Timestamp) -> std::io::Result<()> {
    for (_, path) in list(dir) {
        let modified = fs::metadata(&path)
            .and_then(|metadata| metadata.modified())
            .unwrap_or_else(|_| SystemTime::now());
        if Timestamp::from_system(modified) < than {
            remove(&path)?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if !matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Segment files in order. A directory that is not there has none.
fn list(dir: &Path) -> Vec<Place> {
    let mut places: Vec<Place> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|item| {
            let path = item.path();
            let first = path.file_stem()?.to_str()?.parse().ok()?;
            (path.extension()? == "jsonl").then_some((first, path))
        })
        .collect();
    places.sort();
    places
}

/// Shows entries in order, each with its line, until told to stop. A line that is not whole was cut by a crash and ends its
/// segment.
pub(super) fn read(places: &[Place], mut show: impl FnMut(u64, &str, LogEntry) -> ControlFlow<()>) {
    for (first, path) in places {
        // A segment that was removed for space between the listing and now has nothing to say.
        let Ok(file) = File::open(path) else { continue };
        for (number, line) in (*first..).zip(BufReader::new(file).lines()) {
            let Ok(line) = line else { break };
            let Ok(entry) = serde_json::from_str::<LogEntry>(&line) else {
                break;
            };
            if show(number, &line, entry).is_break() {
                return;
            }
        }
    }
}

/// A page of entries from a number on.
pub(super) fn read_page(places: &[Place], from: u64, limit: usize) -> Vec<Numbered> {
    let mut page = Vec::new();
    read(places, |number, _, entry| {
        if number >= from {
            page.push((number, Arc::new(entry)));
        }
        if page.len() >= limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    page
}
