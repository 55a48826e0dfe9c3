//! Whether turns can be recorded: what callers are told while they cannot.
//!
//! The turn loop tries a failed commit again for as long as it takes, and holds every reply back. Whoever
//! waits is told why after a moment; whoever comes later is refused at once, so that nothing piles up. What
//! was held is recorded when the disk takes writes again, so a refused request may still be carried out, and
//! its repetition (clients keep their idempotency key) finds it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::ErrorKind;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::{DISK_FULL, Error};

/// How long callers wait silently: a disk that stalls is not a disk that is full.
const SILENT_WAIT: Duration = Duration::from_secs(3);

/// Since when commits have failed, and for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Since {
    at: Instant,
    is_full: bool,
}

/// Shared by the turn loop, which knows, and its callers, who wait. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Trouble {
    since: Arc<watch::Sender<Option<Since>>>,
    data_dir: Arc<PathBuf>,
}

impl Trouble {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self {
            since: Arc::new(watch::Sender::new(None)),
            data_dir: Arc::new(data_dir.to_owned()),
        }
    }

    /// A commit failed. Tells whether it is the first one, or fails for another reason than the one before.
    pub(crate) fn begin(&self, is_full: bool) -> bool {
        self.since.send_if_modified(|since| match since {
            Some(known) => std::mem::replace(&mut known.is_full, is_full) != is_full,
            None => {
                *since = Some(Since {
                    at: Instant::now(),
                    is_full,
                });
                true
            }
        })
    }

    /// Commits work. Tells whether they had failed before.
    pub(crate) fn end(&self) -> bool {
        self.since.send_if_modified(|since| since.take().is_some())
    }

    /// Resolves once callers should be told.
    pub(crate) async fn lasts(&self) -> Error {
        let mut news = self.since.subscribe();
        loop {
            let since = *news.borrow_and_update();
            let Some(since) = since else {
                // The sender is ours.
                let _changed = news.changed().await;
                continue;
            };
            tokio::select! {
                () = tokio::time::sleep_until(since.at + SILENT_WAIT) => return self.error(since),
                _ = news.changed() => {}
            }
        }
    }

    /// Refuses what comes while nothing can be recorded.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match *self.since.borrow() {
            Some(since) if since.at.elapsed() >= SILENT_WAIT => Err(self.error(since)),
            Some(_) | None => Ok(()),
        }
    }

    fn error(&self, since: Since) -> Error {
        if since.is_full {
            return Error::new(ErrorKind::Exhausted, DISK_FULL);
        }
        let dir = self.data_dir.display();
        Error::new(
            ErrorKind::Unavailable,
            format!("the server cannot write to its database in {dir}, and keeps trying; its log says why"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn callers_are_told_of_lasting_trouble_only() {
        let trouble = Trouble::new(Path::new("/data"));
        assert!(trouble.begin(false));
        assert!(!trouble.begin(false));
        assert!(trouble.begin(true));
        assert!(!trouble.begin(true));
        trouble.check().unwrap();
        let told = tokio::spawn({
            let trouble = trouble.clone();
            async move { trouble.lasts().await }
        });
        tokio::time::sleep(SILENT_WAIT).await;
        let error = told.await.unwrap();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert_eq!(error.message(), DISK_FULL);
        assert_eq!(trouble.check().unwrap_err().message(), error.message());
        assert!(trouble.end());
        assert!(!trouble.end());
        trouble.check().unwrap();
        let told = tokio::time::timeout(SILENT_WAIT * 10, trouble.lasts()).await;
        assert!(told.is_err(), "there is no trouble any more");
    }
}
