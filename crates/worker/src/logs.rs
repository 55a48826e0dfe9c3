//! A container's output, from its two pipes to the log sink.
//!
//! Back-pressure is the whole design: nothing is read while the sink is busy or the container has used up its
//! rate, the pipe fills, and the container's own `write` waits. So a container that prints without end slows
//! itself, and the memory used here is one buffer and one batch.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use ionian_container::OutputStream;
use ionian_domain::container::ContainerSpec;
use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::{ContainerId, Timestamp};
use tokio::time::Instant;

use crate::lines::LineSplitter;

/// Takes entries, in order; the future resolves when they are written.
pub type LogSink = Arc<dyn Fn(Vec<LogEntry>) -> BoxFuture<'static, ()> + Send + Sync>;

/// Entries handed over at once, at most. What is there is handed over at once, however little it is.
const MAX_BATCH_ENTRIES: usize = 256;
/// The same in bytes, for long lines.
const MAX_BATCH_BYTES: usize = 512 * 1024;
/// One read: what a pipe holds.
const READ_BYTES: usize = 64 * 1024;
/// How long the start of a line waits for its end. Prompts and progress bars have none.
pub(crate) const PARTIAL_LINE_AFTER: Duration = Duration::from_millis(200);
/// With its rate used up, a container waits for this many bytes to be granted, and not for each single one.
const MIN_GRANT_BYTES: u64 = 16 * 1024;

/// How much one container may print: bursts are free, a flood is slowed down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    pub bytes_per_second: u64,
    pub burst_bytes: u64,
}

impl Default for LogLimits {
    /// Far above what anybody reads, and far below what a disk takes from a hundred containers.
    fn default() -> Self {
        Self {
            bytes_per_second: 2 * 1024 * 1024,
            burst_bytes: 8 * 1024 * 1024,
        }
    }
}

/// Writes entries of one container.
#[derive(Clone)]
pub(crate) struct LogWriter {
    sink: LogSink,
    id: ContainerId,
    spec: Arc<ContainerSpec>,
}

impl LogWriter {
    pub(crate) fn new(sink: LogSink, id: ContainerId, spec: Arc<ContainerSpec>) -> Self {
        Self { sink, id, spec }
    }

    /// A line of the platform's own.
    pub(crate) async fn say(&self, text: String) {
        (self.sink)(vec![self.entry(LogStream::Info, text)]).await;
    }

    fn entry(&self, stream: LogStream, text: String) -> LogEntry {
        LogEntry {
            at: Timestamp::now(),
            app_id: self.spec.app_id,
            function_id: self.spec.function_id,
            container_id: self.id,
            stream,
            text,
        }
    }
}

/// Reads both streams to their ends. By its return everything has been written.
pub(crate) async fn pump(writer: &LogWriter, limits: LogLimits, stdout: OutputStream, stderr: OutputStream) {
    let mut taps = [Tap::new(LogStream::Stdout, stdout), Tap::new(LogStream::Stderr, stderr)];
    let mut bucket = TokenBucket::new(limits, Instant::now());
    let mut buffer = vec![0; READ_BYTES];
    let mut batch = Vec::new();
    loop {
        let [out, err] = &taps;
        if out.is_closed() && err.is_closed() {
            return;
        }
        let partial_due = taps.iter().filter_map(Tap::partial_due).min();
        tokio::select! {
            () = out.readable() => {}
            () = err.readable() => {}
            () = tokio::time::sleep_until(partial_due.unwrap_or_else(Instant::now)), if partial_due.is_some() => {}
        }
        let mut bytes = 0;
        loop {
            let mut progress = false;
            for tap in &mut taps {
                // Where the container writes faster than it may, a few bytes are granted in each microsecond: read
                // as they come they would take a core.
                let granted = bucket.grant(Instant::now()).min(READ_BYTES as u64) as usize;
                if granted == 0 {
                    continue;
                }
                let read = tap.read(&mut buffer[..granted], |stream, text| {
                    batch.push(writer.entry(stream, text));
                });
                bucket.take(read as u64);
                bytes += read;
                progress |= read > 0;
            }
            if !progress || batch.len() >= MAX_BATCH_ENTRIES || bytes >= MAX_BATCH_BYTES {
                break;
            }
        }
        let now = Instant::now();
        for tap in &mut taps {
            if let Some(text) = tap.take_partial(now) {
                batch.push(writer.entry(tap.stream, text));
            }
        }
        if !batch.is_empty() {
            (writer.sink)(std::mem::take(&mut batch)).await;
        }
        if let Some(wait) = bucket.until_grant(Instant::now()) {
            tokio::time::sleep(wait).await;
        }
    }
}

/// One of the two streams.
struct Tap {
    stream: LogStream,
    /// `None` at its end.
    pipe: Option<OutputStream>,
    lines: LineSplitter,
    /// When the unfinished line began to wait.
    partial_since: Option<Instant>,
}

impl Tap {
    fn new(stream: LogStream, pipe: OutputStream) -> Self {
        Self {
            stream,
            pipe: Some(pipe),
            lines: LineSplitter::default(),
            partial_since: None,
        }
    }

    fn is_closed(&self) -> bool {
        self.pipe.is_none()
    }

    async fn readable(&self) {
        match &self.pipe {
            // An error here is seen again, and handled, by the read.
            Some(pipe) => drop(pipe.readable().await),
            None => std::future::pending().await,
        }
    }

    /// Reads what is there; an empty buffer reads nothing.
    fn read(&mut self, buffer: &mut [u8], mut piece: impl FnMut(LogStream, String)) -> usize {
        let (Some(pipe), false) = (&self.pipe, buffer.is_empty()) else {
            return 0;
        };
        match pipe.try_read(buffer) {
            Ok(0) => {
                self.pipe = None;
                self.partial_since = None;
                if let Some(rest) = self.lines.finish() {
                    piece(self.stream, rest);
                }
                0
            }
            Ok(read) => {
                self.lines.push(&buffer[..read], |text| piece(self.stream, text));
                if !self.lines.has_partial() {
                    self.partial_since = None;
                } else if self.partial_since.is_none() {
                    self.partial_since = Some(Instant::now());
                }
                read
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                tracing::error!(%error, stream = ?self.stream, "failed to read a container's output");
                self.pipe = None;
                0
            }
        }
    }

    fn partial_due(&self) -> Option<Instant> {
        self.partial_since.map(|since| since + PARTIAL_LINE_AFTER)
    }

    fn take_partial(&mut self, now: Instant) -> Option<String> {
        if self.partial_due()? > now {
            return None;
        }
        // Half a character may stay behind: it is flushed with what follows it, or at the end.
        self.partial_since = None;
        self.lines.take_partial()
    }
}

/// The classic token bucket, in bytes.
#[derive(Debug)]
struct TokenBucket {
    limits: LogLimits,
    tokens: f64,
    filled_at: Instant,
}

impl TokenBucket {
    fn new(limits: LogLimits, now: Instant) -> Self {
        Self {
            limits,
            tokens: limits.burst_bytes as f64,
            filled_at: now,
        }
    }

    fn available(&mut self, now: Instant) -> u64 {
        let gained = now.saturating_duration_since(self.filled_at).as_secs_f64() * self.limits.bytes_per_second as f64;
        self.tokens = (self.tokens + gained).min(self.limits.burst_bytes as f64);
        self.filled_at = now;
        self.tokens as u64
    }

    fn take(&mut self, bytes: u64) {
        self.tokens -= bytes as f64;
    }

    /// How much may be read now: nothing, where it is too little to be worth the while.
    fn grant(&mut self, now: Instant) -> u64 {
        let available = self.available(now);
        if available < self.least_grant() { 0 } else { available }
    }

    fn least_grant(&self) -> u64 {
        MIN_GRANT_BYTES.min(self.limits.burst_bytes).max(1)
    }

    /// How long to wait where too little is left.
    fn until_grant(&mut self, now: Instant) -> Option<Duration> {
        let missing = self.least_grant().saturating_sub(self.available(now));
        // Rounded up by a millisecond, so that the wait is always long enough.
        let wait = missing as f64 / self.limits.bytes_per_second.max(1) as f64 + 0.001;
        (missing > 0).then(|| Duration::from_secs_f64(wait))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use parking_lot::Mutex;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::launch::tests::spec;

    #[test]
    fn a_bucket_that_is_empty_grants_nothing_until_it_is_worth_a_read() {
        let limits = LogLimits {
            bytes_per_second: 2 << 20,
            burst_bytes: 8 << 20,
        };
        let begin = Instant::now();
        let mut bucket = TokenBucket::new(limits, begin);
        bucket.take(8 << 20);
        // Two bytes, and then just too few for a read.
        assert_eq!(bucket.grant(begin + Duration::from_micros(1)), 0);
        assert_eq!(bucket.grant(begin + Duration::from_micros(7_800)), 0);
        let wait = bucket.until_grant(begin + Duration::from_micros(7_800)).unwrap();
        assert!(bucket.grant(begin + Duration::from_micros(7_800) + wait) >= MIN_GRANT_BYTES);
    }

    type Written = Arc<Mutex<Vec<(LogStream, String)>>>;

    fn pipe() -> (OutputStream, OwnedFd) {
        let (reader, writer) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        (OutputStream::from_owned_fd(reader).unwrap(), writer)
    }

    fn write(pipe: &OwnedFd, bytes: &[u8]) {
        assert_eq!(nix::unistd::write(pipe.as_fd(), bytes).unwrap(), bytes.len());
    }

    /// As much as the pipe takes; how much that was.
    fn fill(pipe: &OwnedFd) -> usize {
        let line = [b"x".repeat(99), b"\n".to_vec()].concat();
        let mut written = 0;
        while let Ok(bytes) = nix::unistd::write(pipe.as_fd(), &line) {
            written += bytes;
        }
        written
    }

    /// A sink that needs a permit for each batch.
    fn gated(gate: Arc<Semaphore>) -> (LogSink, Written) {
        let written = Written::default();
        let kept = Arc::clone(&written);
        let sink: LogSink = Arc::new(move |entries| {
            let (gate, kept) = (Arc::clone(&gate), Arc::clone(&kept));
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                kept.lock()
                    .extend(entries.into_iter().map(|entry| (entry.stream, entry.text)));
            })
        });
        (sink, written)
    }

    fn writer(sink: LogSink) -> LogWriter {
        LogWriter::new(sink, ContainerId::generate(), Arc::new(spec()))
    }

    fn open_gate() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(1_000_000))
    }

    #[tokio::test]
    async fn both_streams_are_tagged_and_read_to_the_end() {
        let (sink, written) = gated(open_gate());
        let ((out, out_end), (err, err_end)) = (pipe(), pipe());
        write(&out_end, b"one\ntwo\nrest");
        write(&err_end, b"oops\n");
        drop((out_end, err_end));
        pump(&writer(sink), LogLimits::default(), out, err).await;
        let mut got = written.lock().clone();
        got.sort_by_key(|(stream, _)| stream.wire());
        let expected = [
            (LogStream::Stdout, "one\n"),
            (LogStream::Stdout, "two\n"),
            (LogStream::Stdout, "rest"),
            (LogStream::Stderr, "oops\n"),
        ];
        assert_eq!(got, expected.map(|(stream, text)| (stream, text.to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unfinished_line_is_shown_after_a_moment() {
        let (sink, written) = gated(open_gate());
        let ((out, out_end), (err, err_end)) = (pipe(), pipe());
        write(&out_end, b"50 %");
        let writer = writer(sink);
        let pumping = pump(&writer, LogLimits::default(), out, err);
        tokio::pin!(pumping);
        assert!(
            tokio::time::timeout(PARTIAL_LINE_AFTER * 2, &mut pumping)
                .await
                .is_err()
        );
        assert_eq!(*written.lock(), [(LogStream::Stdout, "50 %".to_owned())]);
        drop((out_end, err_end));
        pumping.await;
        assert_eq!(written.lock().len(), 1);
    }

    #[tokio::test]
    async fn a_slow_sink_stops_the_reading() {
        let gate = Arc::new(Semaphore::new(0));
        let (sink, written) = gated(Arc::clone(&gate));
        let ((out, out_end), (err, err_end)) = (pipe(), pipe());
        let mut total = fill(&out_end);
        let writer = writer(sink);
        let pumping = pump(&writer, LogLimits::default(), out, err);
        tokio::pin!(pumping);
        // It reads one batch and waits with it; the pipe then takes as much again, and no more ever.
        assert!(
            tokio::time::timeout(Duration::from_millis(50), &mut pumping)
                .await
                .is_err()
        );
        total += fill(&out_end);
        assert!(
            tokio::time::timeout(Duration::from_millis(50), &mut pumping)
                .await
                .is_err()
        );
        assert_eq!(fill(&out_end), 0);
        assert!(written.lock().is_empty());
        gate.add_permits(1_000_000);
        drop((out_end, err_end));
        pumping.await;
        assert_eq!(written.lock().iter().map(|(_, text)| text.len()).sum::<usize>(), total);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_slowed_to_its_rate() {
        let (sink, written) = gated(open_gate());
        let ((out, out_end), (err, err_end)) = (pipe(), pipe());
        drop(err_end);
        let limits = LogLimits {
            bytes_per_second: 10_000,
            burst_bytes: 20_000,
        };
        let total = fill(&out_end);
        assert!(total >= 60_000);
        drop(out_end);
        let started = Instant::now();
        pump(&writer(sink), limits, out, err).await;
        let expected = (total as f64 - 20_000.0) / 10_000.0;
        let took = started.elapsed().as_secs_f64();
        assert!(
            took >= expected && took < expected * 1.2 + 2.0,
            "{took} s for {total} bytes, {expected} s expected"
        );
        assert_eq!(written.lock().iter().map(|(_, text)| text.len()).sum::<usize>(), total);
    }
}
