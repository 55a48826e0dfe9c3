//! Builds under way, and the logs of those that have ended.
//!
//! A live build's log is in memory, where everybody who waits for the image follows it. When the build
//! ends, its log goes to a file under `<data>/build-logs/`, from which it is read again.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ionian_domain::image::ImageState;
use ionian_domain::log::LogStream;
use ionian_domain::{ImageId, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Bytes of one build's log. A build that prints more loses its oldest lines, and says so in their place.
const MAX_LOG_BYTES: usize = 8 * 1024 * 1024;
/// What a line costs beside its text.
const LINE_BYTES: usize = 64;
/// Lines in one answer.
const PAGE: usize = 500;

/// One piece of a build's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildLine {
    pub at: Timestamp,
    pub stream: LogStream,
    pub text: String,
}

/// A page of a build's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLogPage {
    pub lines: Vec<BuildLine>,
    /// Where the next page starts.
    pub next: u64,
    /// Set when the build ended and all of its lines were read.
    pub result: Option<ImageState>,
}

/// Lines with their position.
#[derive(Debug, Default, Serialize, Deserialize)]
struct BuildLog {
    /// The position of the first line that is kept.
    first: u64,
    lines: VecDeque<BuildLine>,
    #[serde(skip)]
    bytes: usize,
    #[serde(skip)]
    finished: bool,
}

impl BuildLog {
    fn append(&mut self, line: BuildLine) {
        self.bytes += line.text.len() + LINE_BYTES;
        self.lines.push_back(line);
        while self.bytes > MAX_LOG_BYTES
            && let Some(dropped) = self.lines.pop_front()
        {
            self.bytes -= dropped.text.len() + LINE_BYTES;
            self.first += 1;
        }
    }

    fn page(&self, from: u64, limit: usize) -> (Vec<BuildLine>, u64) {
        let skip = usize::try_from(from.saturating_sub(self.first)).unwrap_or(usize::MAX);
        let mut lines: Vec<BuildLine> = self.lines.iter().skip(skip).take(limit).cloned().collect();
        let next = from.max(self.first) + lines.len() as u64;
        if from < self.first
            && let Some(oldest) = lines.first()
        {
            let text = format!("({} earlier lines of this build are not kept)\n", self.first - from);
            lines.insert(
                0,
                BuildLine {
                    at: oldest.at,
                    stream: LogStream::Info,
                    text,
                },
            );
        }
        (lines, next)
    }
}

/// A build under way.
#[derive(Debug)]
pub(crate) struct Build {
    log: Mutex<BuildLog>,
    changed: watch::Sender<()>,
}

impl Build {
    pub(crate) fn append(&self, line: BuildLine) {
        self.log.lock().append(line);
        self.changed.send_replace(());
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Lines from a position on, where the next ones start, and whether there will be more.
    pub(crate) fn page(&self, from: u64) -> (Vec<BuildLine>, u64, bool) {
        let log = self.log.lock();
        let (lines, next) = log.page(from, PAGE);
        (lines, next, log.finished)
    }
}

/// All builds.
pub(crate) struct Builds {
    live: Mutex<HashMap<ImageId, Arc<Build>>>,
    dir: PathBuf,
}

impl Builds {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self {
            live: Mutex::default(),
            dir,
        }
    }

    pub(crate) fn begin(&self, id: ImageId) -> Arc<Build> {
        let build = Arc::new(Build {
            log: Mutex::default(),
            changed: watch::channel(()).0,
        });
        self.live.lock().insert(id, Arc::clone(&build));
        build
    }

    /// How many builds are under way.
    pub(crate) fn live_count(&self) -> usize {
        self.live.lock().len()
    }

    pub(crate) fn find(&self, id: ImageId) -> Option<Arc<Build>> {
        self.live.lock().get(&id).cloned()
    }

    pub(crate) fn is_live(&self, id: ImageId) -> bool {
        self.live.lock().contains_key(&id)
    }

    /// The build has ended, and its result is recorded. Whoever follows it reads it to its end.
    pub(crate) async fn finish(&self, id: ImageId, build: &Arc<Build>) {
        let path = self.path(id);
        let json = serde_json::to_vec(&*build.log.lock()).expect("a build's log is JSON");
        // On a thread of its own: the log may be large and the disk slow.
        let written = tokio::task::spawn_blocking(move || write(&path, &json)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(image = %id, error = &error as &dyn std::error::Error, "a build's log could not be kept");
        }
        build.log.lock().finished = true;
        build.changed.send_replace(());
        let mut live = self.live.lock();
        // A forced build of the same image may have begun meanwhile.
        if live.get(&id).is_some_and(|current| Arc::ptr_eq(current, build)) {
            live.remove(&id);
        }
    }

    /// Lines of a build that has ended, from a position on. A build whose log is not kept has none.
    pub(crate) async fn read_finished(&self, id: ImageId, from: u64) -> (Vec<BuildLine>, u64) {
        let path = self.path(id);
        let read = tokio::task::spawn_blocking(move || {
            let bytes = fs::read(path).ok()?;
            serde_json::from_slice::<BuildLog>(&bytes).ok()
        });
        match read.await {
            Ok(Some(log)) => log.page(from, PAGE),
            Ok(None) | Err(_) => (Vec::new(), from),
        }
    }

    /// Removes logs that are older than `age`. Blocks.
    pub(crate) fn sweep(dir: &Path, age: Duration) {
        // A directory that is not there has nothing old in it.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let is_old = modified.is_ok_and(|modified| {
                SystemTime::now()
                    .duration_since(modified)
                    .is_ok_and(|passed| passed > age)
            });
            if is_old && let Err(error) = fs::remove_file(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "an old build log could not be removed");
            }
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, id: ImageId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

/// All or nothing, as far as a reader can see.
fn write(path: &Path, json: &[u8]) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let temporary = path.with_extension("new");
    fs::write(&temporary, json)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> BuildLine {
        BuildLine {
            at: Timestamp::now(),
            stream: LogStream::Stdout,
            text: text.to_owned(),
        }
    }

    fn texts(lines: &[BuildLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[tokio::test]
    async fn a_log_is_followed_and_read_again_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let builds = Builds::new(dir.path().join("logs"));
        let id = ImageId::generate();
        let build = builds.begin(id);
        build.append(line("one"));
        let (lines, next, finished) = build.page(0);
        assert_eq!(
            (texts(&lines).as_slice(), next, finished),
            (["one"].as_slice(), 1, false)
        );
        build.append(line("two"));
        builds.finish(id, &build).await;
        let (lines, next, finished) = build.page(1);
        assert_eq!(
            (texts(&lines).as_slice(), next, finished),
            (["two"].as_slice(), 2, true)
        );
        assert!(builds.find(id).is_none());
        assert_eq!(texts(&builds.read_finished(id, 0).await.0), ["one", "two"]);
        assert_eq!(builds.read_finished(id, 2).await, (Vec::new(), 2));
        Builds::sweep(builds.dir(), Duration::from_hours(1));
        assert_eq!(builds.read_finished(id, 0).await.0.len(), 2);
        Builds::sweep(builds.dir(), Duration::ZERO);
        assert!(builds.read_finished(id, 0).await.0.is_empty());
    }

    #[test]
    fn a_log_that_is_too_long_says_what_it_lost() {
        let mut log = BuildLog::default();
        let long = "x".repeat(MAX_LOG_BYTES / 4 - LINE_BYTES);
        for _ in 0..6 {
            log.append(line(&long));
        }
        let (lines, next) = log.page(0, PAGE);
        assert_eq!(lines[0].text, "(2 earlier lines of this build are not kept)\n");
        assert_eq!((lines.len(), next), (5, 6));
        assert_eq!(log.page(3, PAGE).0.len(), 3);
    }
}
