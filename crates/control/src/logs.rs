//! Logs of apps: kept in files, followed live.
//!
//! Every entry of an app has a number, counted from 1 and never reused; a follower resumes from the
//! last one it saw. Entries lie in segment files of JSON lines under `<data>/logs/<app>/`, named after
//! their first number; the newest entries are also in memory. Old segments are removed by size.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::containers::ContainerEntry;

/// A segment is closed at this size: small enough to drop one by one, large enough to be few.
const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of logs kept per app. At the limit the oldest segment goes.
const APP_BYTES: u64 = 256 * 1024 * 1024;
/// Bytes of newest entries in memory per app, for followers.
const MEMORY_BYTES: usize = 2 * 1024 * 1024;
/// Entries in one answer.
const PAGE: usize = 1_000;

#[derive(Debug, thiserror::Error)]
#[error("cannot use the log directory {}", path.display())]
pub struct LogError {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// Which entries are wanted.
#[derive(Debug, Clone, Default)]
pub struct LogFilter {
    pub function_id: Option<FunctionId>,
    pub container_id: Option<ContainerId>,
    pub stream: Option<LogStream>,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    pub text: String,
}

impl LogFilter {
    fn matches(&self, entry: &LogEntry) -> bool {
        self.function_id.is_none_or(|id| id == entry.function_id)
            && self.container_id.is_none_or(|id| id == entry.container_id)
            && self.stream.is_none_or(|stream| stream == entry.stream)
            && self.since.is_none_or(|since| entry.at >= since)
            && self.until.is_none_or(|until| entry.at < until)
            && (self.text.is_empty() || entry.text.contains(&self.text))
    }
}

pub type Numbered = (u64, Arc<LogEntry>);

struct Segment {
    first: u64,
    path: PathBuf,
    bytes: u64,
    newest: Timestamp,
}

struct AppLog {
    dir: PathBuf,
    next: u64,
    recent: VecDeque<Numbered>,
    recent_bytes: usize,
    segments: VecDeque<Segment>,
    open: Option<File>,
    stopped: bool,
}

struct App {
    log: Mutex<AppLog>,
    changed: watch::Sender<u64>,
}

/// All apps' logs. Cheap to clone.
#[derive(Clone)]
pub struct Logs {
    root: Arc<PathBuf>,
    apps: Arc<Mutex<HashMap<AppId, Arc<App>>>>,
}

impl std::fmt::Debug for Logs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logs").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Logs {
    pub fn open(root: PathBuf) -> Result<Self, LogError> {
        fs::create_dir_all(&root).map_err(|source| LogError { path: root.clone(), source })?;
        Ok(Self { root: Arc::new(root), apps: Arc::default() })
    }

    fn app(&self, id: AppId) -> Arc<App> {
        let mut apps = self.apps.lock();
        Arc::clone(apps.entry(id).or_insert_with(|| {
            Arc::new(App { log: Mutex::new(AppLog::load(self.root.join(id.to_string()))), changed: watch::channel(0).0 })
        }))
    }

    /// Takes a batch. Returns when it is written to files, so that a chatty container waits here.
    pub async fn append(&self, entries: Vec<LogEntry>) {
        let logs = self.clone();
        // File writes may wait for the disk; the pool of blocking threads may wait with them.
        let done = tokio::task::spawn_blocking(move || {
            let mut by_app: HashMap<AppId, Vec<LogEntry>> = HashMap::new();
            for entry in entries {
                by_app.entry(entry.app_id).or_default().push(entry);
            }
            for (app_id, entries) in by_app {
                let app = logs.app(app_id);
                let newest = {
                    let mut log = app.log.lock();
                    if let Err(error) = log.append(entries) {
                        tracing::error!(app = %app_id, error = &error as &dyn std::error::Error, "log entries were lost");
                    }
                    log.next - 1
                };
                app.changed.send_replace(newest);
            }
        });
        if let Err(panic) = done.await {
            tracing::error!(error = %panic, "writing logs crashed");
        }
    }

    /// A line of the platform's own, in a container's log.
    pub async fn say(&self, entry: &ContainerEntry, text: &str) {
        self.append(vec![LogEntry {
            at: Timestamp::now(),
            app_id: entry.app_id,
            function_id: entry.function_id,
            container_id: entry.id,
            stream: LogStream::Info,
            text: text.to_owned(),
        }])
        .await;
    }

    /// Wakes followers of an app that was stopped, so that they can end.
    pub fn mark_stopped(&self, id: AppId) {
        let app = self.app(id);
        app.log.lock().stopped = true;
        app.changed.send_modify(|_| ());
    }

    pub fn is_stopped(&self, id: AppId) -> bool {
        self.app(id).log.lock().stopped
    }

    /// The number of the newest entry; 0 for none.
    pub fn newest(&self, id: AppId) -> u64 {
        self.app(id).log.lock().next - 1
    }

    /// A page of entries after a number, and a way to wait for more. The second value is where the next
    /// page starts, also where the filter let nothing through.
    pub async fn after(&self, id: AppId, after: u64, filter: LogFilter) -> (Vec<Numbered>, u64, watch::Receiver<u64>) {
        let app = self.app(id);
        let mut news = app.changed.subscribe();
        news.mark_unchanged();
        let from_memory = {
            let log = app.log.lock();
            log.recent.front().is_none_or(|(first, _)| *first <= after + 1).then(|| {
                log.recent.iter().filter(|(number, _)| *number > after).take(PAGE).cloned().collect::<Vec<_>>()
            })
        };
        let page = match from_memory {
            Some(page) => page,
            None => {
                let read = tokio::task::spawn_blocking(move || {
                    let paths = app.log.lock().segments_from(after + 1);
                    read_segments(&paths, |number, _| number > after, PAGE)
                });
                read.await.unwrap_or_default()
            }
        };
        let next = page.last().map_or(after, |(number, _)| *number);
        (page.into_iter().filter(|(_, entry)| filter.matches(entry)).collect(), next, news)
    }

    /// The newest `limit` entries that match, oldest first.
    pub async fn last(&self, id: AppId, filter: LogFilter, limit: usize) -> Vec<Numbered> {
        let app = self.app(id);
        let read = tokio::task::spawn_blocking(move || {
            let mut found: VecDeque<Numbered> = VecDeque::new();
            let paths = {
                let log = app.log.lock();
                let wanted = |segment: &&Segment| filter.since.is_none_or(|since| segment.newest >= since);
                log.segments.iter().filter(wanted).map(|segment| (segment.first, segment.path.clone())).collect::<Vec<_>>()
            };
            for path in paths.into_iter().rev() {
                let mut matching =
                    read_segments(std::slice::from_ref(&path), |_, entry| filter.matches(entry), usize::MAX);
                while found.len() < limit
                    && let Some(entry) = matching.pop()
                {
                    found.push_front(entry);
                }
                if found.len() >= limit {
                    break;
                }
            }
            Vec::from(found)
        });
        read.await.unwrap_or_default()
    }
}

impl AppLog {
    /// Reads what an earlier process left. A line that was cut by a crash is not counted.
    fn load(dir: PathBuf) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        let mut next = 1;
        let mut names: Vec<(u64, PathBuf)> = fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|item| {
                let path = item.path();
                let first = path.file_stem()?.to_str()?.parse().ok()?;
                (path.extension()? == "jsonl").then_some((first, path))
            })
            .collect();
        names.sort();
        for (first, path) in names {
            let entries = read_segments(&[(first, path.clone())], |_, _| true, usize::MAX);
            let bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let newest = entries.last().map_or(Timestamp::default(), |(_, entry)| entry.at);
            next = entries.last().map_or(first, |(number, _)| number + 1);
            segments.push(Segment { first, path, bytes, newest });
        }
        Self { dir, next, recent: VecDeque::new(), recent_bytes: 0, segments: segments.into(), open: None, stopped: false }
    }

    fn append(&mut self, entries: Vec<LogEntry>) -> Result<(), LogError> {
        let mut buffer = Vec::with_capacity(entries.len() * 160);
        let mut newest = Timestamp::default();
        let first = self.next;
        for entry in entries {
            serde_json::to_writer(&mut buffer, &entry).expect("a log entry is JSON");
            buffer.push(b'\n');
            newest = newest.max(entry.at);
            self.recent_bytes += entry.text.len() + 128;
            self.recent.push_back((self.next, Arc::new(entry)));
            self.next += 1;
        }
        while self.recent_bytes > MEMORY_BYTES
            && let Some((_, dropped)) = self.recent.pop_front()
        {
            self.recent_bytes -= dropped.text.len() + 128;
        }
        self.write(first, &buffer, newest).map_err(|source| LogError { path: self.dir.clone(), source })
    }

    fn write(&mut self, first: u64, buffer: &[u8], newest: Timestamp) -> std::io::Result<()> {
        let full = self.segments.back().is_none_or(|segment| segment.bytes >= SEGMENT_BYTES);
        // A new process starts a new segment: the last line of the old one may be cut.
        if full || self.open.is_none() {
            fs::create_dir_all(&self.dir)?;
            let path = self.dir.join(format!("{first:020}.jsonl"));
            self.open = Some(File::options().create(true).append(true).open(&path)?);
            if self.segments.back().is_none_or(|segment| segment.first != first) {
                self.segments.push_back(Segment { first, path, bytes: 0, newest });
            }
        }
        if let (Some(file), Some(segment)) = (&mut self.open, self.segments.back_mut()) {
            file.write_all(buffer)?;
            segment.bytes += buffer.len() as u64;
            segment.newest = segment.newest.max(newest);
        }
        let mut total: u64 = self.segments.iter().map(|segment| segment.bytes).sum();
        while total > APP_BYTES && self.segments.len() > 1 {
            if let Some(oldest) = self.segments.pop_front() {
                total -= oldest.bytes;
                fs::remove_file(&oldest.path)?;
            }
        }
        Ok(())
    }

    fn segments_from(&self, number: u64) -> Vec<(u64, PathBuf)> {
        let start = self.segments.iter().rposition(|segment| segment.first <= number).unwrap_or(0);
        self.segments.iter().skip(start).map(|segment| (segment.first, segment.path.clone())).collect()
    }
}

/// Reads entries in order. Stops at a line that is not whole, which is the end of what was written.
fn read_segments(
    segments: &[(u64, PathBuf)],
    mut wanted: impl FnMut(u64, &LogEntry) -> bool,
    limit: usize,
) -> Vec<Numbered> {
    let mut found = Vec::new();
    for (first, path) in segments {
        let Some(lines) = open_lines(path) else { continue };
        for (number, line) in (*first..).zip(lines) {
            let Ok(entry) = serde_json::from_str::<LogEntry>(&line) else { break };
            if wanted(number, &entry) {
                found.push((number, Arc::new(entry)));
                if found.len() >= limit {
                    return found;
                }
            }
        }
    }
    found
}

fn open_lines(path: &Path) -> Option<impl Iterator<Item = String>> {
    // A segment that was removed for space between the listing and now has nothing to say.
    let file = File::open(path).ok()?;
    Some(BufReader::new(file).lines().map_while(Result::ok))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(app_id: AppId, text: &str) -> LogEntry {
        LogEntry {
            at: Timestamp::now(),
            app_id,
            function_id: FunctionId::generate(),
            container_id: ContainerId::generate(),
            stream: LogStream::Stdout,
            text: text.to_owned(),
        }
    }

    #[tokio::test]
    async fn entries_are_followed_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let app = AppId::generate();
        let logs = Logs::open(dir.path().to_owned()).unwrap();
        logs.append(vec![entry(app, "one\n"), entry(app, "two\n")]).await;
        let (page, next, mut news) = logs.after(app, 0, LogFilter::default()).await;
        assert_eq!(page.iter().map(|(_, e)| e.text.as_str()).collect::<Vec<_>>(), ["one\n", "two\n"]);
        assert_eq!(next, 2);
        logs.append(vec![entry(app, "three\n")]).await;
        news.changed().await.unwrap();

        let reopened = Logs::open(dir.path().to_owned()).unwrap();
        let last = reopened.last(app, LogFilter::default(), 2).await;
        assert_eq!(last.iter().map(|(n, e)| (*n, e.text.as_str())).collect::<Vec<_>>(), [(2, "two\n"), (3, "three\n")]);
        reopened.append(vec![entry(app, "four\n")]).await;
        let (page, next, _) = reopened.after(app, 1, LogFilter::default()).await;
        assert_eq!(page.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(next, 4);
    }

    #[tokio::test]
    async fn old_entries_leave_memory_but_not_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let app = AppId::generate();
        let logs = Logs::open(dir.path().to_owned()).unwrap();
        let long = "x".repeat(100_000);
        for _ in 0..60 {
            logs.append(vec![entry(app, &long)]).await;
        }
        let (page, _, _) = logs.after(app, 0, LogFilter::default()).await;
        assert_eq!(page.first().map(|(n, _)| *n), Some(1));
        assert_eq!(page.len(), 60);
    }

    #[tokio::test]
    async fn a_line_cut_by_a_crash_ends_its_segment() {
        let dir = tempfile::tempdir().unwrap();
        let app = AppId::generate();
        let logs = Logs::open(dir.path().to_owned()).unwrap();
        logs.append(vec![entry(app, "whole\n")]).await;
        let segment = fs::read_dir(dir.path().join(app.to_string())).unwrap().next().unwrap().unwrap().path();
        File::options().append(true).open(&segment).unwrap().write_all(b"{\"at\":12").unwrap();
        let reopened = Logs::open(dir.path().to_owned()).unwrap();
        reopened.append(vec![entry(app, "after\n")]).await;
        let texts: Vec<String> =
            reopened.last(app, LogFilter::default(), 10).await.into_iter().map(|(_, e)| e.text.clone()).collect();
        assert_eq!(texts, ["whole\n", "after\n"]);
    }
}
