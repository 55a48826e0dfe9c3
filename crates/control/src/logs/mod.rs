//! Logs of apps: kept in files, followed live.
//!
//! Every entry of an app has a number, counted from 1 and never reused; a follower resumes from the
//! last one it saw. Entries lie in segment files under `<data>/logs/<app>/`; the newest entries of apps
//! in use are also in memory. Old segments are removed by size and by age.

mod segments;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::containers::ContainerEntry;
use segments::Segments;

/// Bytes of newest entries in memory per app, for followers.
const MEMORY_BYTES: usize = 2 * 1024 * 1024;
/// What an entry costs beside its text.
const ENTRY_BYTES: usize = 128;
/// Entries in one answer to a follower.
const PAGE: usize = 1_000;
/// Bytes of text in one answer about the past; at most so much of the newest. A message has 128 MiB.
const FETCH_BYTES: usize = 48 * 1024 * 1024;
/// How long an app that nobody logs to or follows stays in memory.
const IDLE: Duration = Duration::from_mins(10);
/// How long entries are kept. The client asks for at most 35 days.
pub const RETENTION: Duration = Duration::from_hours(35 * 24);

#[derive(Debug, thiserror::Error)]
#[error("cannot use the log directory {}", path.display())]
pub struct LogError {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// Which entries are wanted.
#[derive(Debug, Clone, Default)]
pub struct LogFilter {
    /// Those of any of these functions; of all where it is empty.
    pub function_ids: Vec<FunctionId>,
    pub container_id: Option<ContainerId>,
    pub stream: Option<LogStream>,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    pub text: String,
}

impl LogFilter {
    fn matches(&self, entry: &LogEntry) -> bool {
        (self.function_ids.is_empty() || self.function_ids.contains(&entry.function_id))
            && self.container_id.is_none_or(|id| id == entry.container_id)
            && self.stream.is_none_or(|stream| stream == entry.stream)
            && self.since.is_none_or(|since| entry.at >= since)
            && self.until.is_none_or(|until| entry.at < until)
            && (self.text.is_empty() || entry.text.contains(&self.text))
    }
}

pub type Numbered = (u64, Arc<LogEntry>);

/// How many entries each stream has in a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogCount {
    pub stdout: u64,
    pub stderr: u64,
    pub info: u64,
}

struct App {
    log: Mutex<AppLog>,
    changed: watch::Sender<()>,
}

struct AppLog {
    next: u64,
    recent: VecDeque<Numbered>,
    recent_bytes: usize,
    segments: Segments,
    last_used: Instant,
}

/// All apps' logs. Cheap to clone.
#[derive(Clone)]
pub struct Logs {
    root: Arc<PathBuf>,
    /// References are handed out under this lock only, so that what nobody holds can be dropped.
    apps: Arc<Mutex<HashMap<AppId, Arc<App>>>>,
    /// The last entries could not be written.
    failing: Arc<AtomicBool>,
}

impl std::fmt::Debug for Logs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logs").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Logs {
    pub fn open(root: PathBuf) -> Result<Self, LogError> {
        fs::create_dir_all(&root).map_err(|source| LogError {
            path: root.clone(),
            source,
        })?;
        Ok(Self {
            root: Arc::new(root),
            apps: Arc::default(),
            failing: Arc::default(),
        })
    }

    fn loaded(&self, id: AppId) -> Option<Arc<App>> {
        self.apps.lock().get(&id).cloned()
    }

    /// Reads files the first time.
    fn load(&self, id: AppId) -> Arc<App> {
        if let Some(app) = self.loaded(id) {
            return app;
        }
        let (segments, next) = Segments::load(self.root.join(id.to_string()));
        let log = AppLog {
            next,
            recent: VecDeque::new(),
            recent_bytes: 0,
            segments,
            last_used: Instant::now(),
        };
        let app = Arc::new(App {
            log: Mutex::new(log),
            changed: watch::channel(()).0,
        });
        // Somebody else may have been faster: there must be one writer.
        Arc::clone(self.apps.lock().entry(id).or_insert(app))
    }

    async fn app(&self, id: AppId) -> Arc<App> {
        if let Some(app) = self.loaded(id) {
            return app;
        }
        self.blocking(move |logs| logs.load(id)).await
    }

    /// Works with files where waiting for the disk holds nobody up.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(Self) -> T + Send + 'static) -> T {
        let logs = self.clone();
        match tokio::task::spawn_blocking(move || work(logs)).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(cancelled) => panic!("the runtime ended in the middle of work on logs: {cancelled}"),
            },
        }
    }

    /// Takes a batch. Returns when it is written to files, so that a chatty container waits here.
    pub async fn append(&self, entries: Vec<LogEntry>) {
        self.blocking(move |logs| {
            let mut by_app: HashMap<AppId, Vec<LogEntry>> = HashMap::new();
            for entry in entries {
                by_app.entry(entry.app_id).or_default().push(entry);
            }
            for (app_id, entries) in by_app {
                let app = logs.load(app_id);
                let written = app.log.lock().append(entries);
                logs.report(app_id, written);
                app.changed.send_replace(());
            }
        })
        .await;
    }

    /// Says once that entries do not reach the disk, and once that they do again. Followers see them all the
    /// same; whoever asks later does not.
    fn report(&self, app_id: AppId, written: std::io::Result<()>) {
        let failed = written.is_err();
        let was_failing = self.failing.swap(failed, Ordering::Relaxed);
        match written {
            Err(error) if !was_failing => tracing::error!(
                app = %app_id,
                dir = %self.root.display(),
                error = &error as &dyn std::error::Error,
                "log entries are lost: the log directory cannot be written to"
            ),
            Ok(()) if was_failing => tracing::info!("log entries are kept again"),
            Ok(()) | Err(_) => {}
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
    pub fn wake(&self, id: AppId) {
        if let Some(app) = self.loaded(id) {
            app.changed.send_replace(());
        }
    }

    /// The number of the newest entry; 0 for none.
    pub async fn newest(&self, id: AppId) -> u64 {
        self.app(id).await.log.lock().next - 1
    }

    /// A page of entries after a number, and a way to wait for more. The second value is where the next
    /// page starts, also where the filter let nothing through.
    pub async fn after(&self, id: AppId, after: u64, filter: &LogFilter) -> (Vec<Numbered>, u64, watch::Receiver<()>) {
        let app = self.app(id).await;
        let mut news = app.changed.subscribe();
        news.mark_unchanged();
        let from_memory = app.log.lock().after(after);
        let page = match from_memory {
            Some(page) => page,
            None => {
                self.blocking(move |_| {
                    let places = app.log.lock().segments.from(after + 1);
                    segments::read_page(&places, after + 1, PAGE)
                })
                .await
            }
        };
        let next = page.last().map_or(after, |(number, _)| *number);
        (
            page.into_iter().filter(|(_, entry)| filter.matches(entry)).collect(),
            next,
            news,
        )
    }

    /// The newest `limit` entries that match, oldest first.
    pub async fn last(&self, id: AppId, filter: LogFilter, limit: usize) -> Vec<Numbered> {
        self.blocking(move |logs| {
            let places = logs.load(id).log.lock().segments.since(filter.since);
            let mut found: VecDeque<Numbered> = VecDeque::new();
            let mut bytes = 0;
            for place in places.into_iter().rev() {
                let mut matching = Vec::new();
                segments::read(std::slice::from_ref(&place), |number, _, entry| {
                    if filter.matches(&entry) {
                        matching.push((number, Arc::new(entry)));
                    }
                    ControlFlow::Continue(())
                });
                while let Some(entry) = matching.pop() {
                    bytes += entry.1.text.len() + ENTRY_BYTES;
                    if found.len() >= limit || bytes > FETCH_BYTES {
                        return found.into();
                    }
                    found.push_front(entry);
                }
            }
            found.into()
        })
        .await
    }

    /// Counts matching entries by stretches of time of this width, named by their beginnings. Stretches
    /// without entries are left out.
    pub async fn count(&self, id: AppId, filter: LogFilter, width: Duration) -> BTreeMap<Timestamp, LogCount> {
        let width = i64::try_from(width.as_micros()).unwrap_or(i64::MAX).max(1);
        self.blocking(move |logs| {
            let places = logs.load(id).log.lock().segments.since(filter.since);
            let mut counts: BTreeMap<Timestamp, LogCount> = BTreeMap::new();
            segments::read(&places, |_, _, entry| {
                if filter.matches(&entry) {
                    let start = Timestamp(entry.at.micros().div_euclid(width) * width);
                    let count = counts.entry(start).or_default();
                    match entry.stream {
                        LogStream::Stdout => count.stdout += 1,
                        LogStream::Stderr => count.stderr += 1,
                        LogStream::Info => count.info += 1,
                    }
                }
                ControlFlow::Continue(())
            });
            counts
        })
        .await
    }

    /// Forgets apps that nobody uses. Their entries stay on disk.
    pub(crate) fn forget_idle(&self) {
        self.apps.lock().retain(|_, app| {
            Arc::strong_count(app) > 1 || app.changed.receiver_count() > 0 || app.log.lock().last_used.elapsed() < IDLE
        });
    }

    /// Removes entries that are too old, segment by segment.
    pub(crate) async fn sweep(&self) {
        let than = Timestamp::now() - RETENTION;
        self.blocking(move |logs| {
            for item in fs::read_dir(&*logs.root).into_iter().flatten().flatten() {
                let Some(id) = item.file_name().to_str().and_then(|name| name.parse::<AppId>().ok()) else {
                    continue;
                };
                let removed = match logs.loaded(id) {
                    Some(app) => app.log.lock().segments.drop_older(than),
                    None => segments::remove_older(&item.path(), than),
                };
                if let Err(error) = removed {
                    tracing::warn!(path = %item.path().display(), %error, "old log entries could not be removed");
                }
            }
        })
        .await;
    }
}

impl AppLog {
    fn append(&mut self, entries: Vec<LogEntry>) -> Result<(), std::io::Error> {
        let mut lines = Vec::with_capacity(entries.len() * 160);
        let mut newest = Timestamp::default();
        let first = self.next;
        self.last_used = Instant::now();
        for entry in entries {
            serde_json::to_writer(&mut lines, &entry).expect("a log entry is JSON");
            lines.push(b'\n');
            newest = newest.max(entry.at);
            self.recent_bytes += entry.text.len() + ENTRY_BYTES;
            self.recent.push_back((self.next, Arc::new(entry)));
            self.next += 1;
        }
        while self.recent_bytes > MEMORY_BYTES
            && let Some((_, dropped)) = self.recent.pop_front()
        {
            self.recent_bytes -= dropped.text.len() + ENTRY_BYTES;
        }
        self.segments.write(first, &lines, newest)
    }

    /// A page from memory; `None` where older entries are wanted than are there.
    fn after(&mut self, after: u64) -> Option<Vec<Numbered>> {
        self.last_used = Instant::now();
        let oldest = self.recent.front().map_or(self.next, |(number, _)| *number);
        (oldest <= after.saturating_add(1)).then(|| {
            self.recent
                .iter()
                .filter(|(number, _)| *number > after)
                .take(PAGE)
                .cloned()
                .collect()
        })
    }
}

#[cfg(test)]
mod tests;
