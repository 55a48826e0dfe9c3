//! Clients' sessions with their apps: when each was last heard of, and which have ended.
//!
//! In memory: a restart gives each client a new chance to be heard.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use ionian_domain::AppId;
use parking_lot::Mutex;
use tokio::time::Instant;

#[derive(Debug, Default)]
pub(crate) struct Heartbeats {
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    seen: HashMap<AppId, Instant>,
    /// Detached apps whose session said that it ended, and that have something left to do.
    ended: HashSet<AppId>,
}

impl Heartbeats {
    pub(crate) fn touch(&self, id: AppId) {
        self.sessions.lock().seen.insert(id, Instant::now());
    }

    pub(crate) fn end_session(&self, id: AppId) {
        self.sessions.lock().ended.insert(id);
    }

    /// The app was stopped.
    pub(crate) fn forget(&self, id: AppId) {
        let mut sessions = self.sessions.lock();
        sessions.seen.remove(&id);
        sessions.ended.remove(&id);
    }

    pub(crate) fn is_silent(&self, id: AppId, limit: Duration) -> bool {
        self.sessions
            .lock()
            .seen
            .get(&id)
            .is_none_or(|seen| seen.elapsed() > limit)
    }

    pub(crate) fn has_ended(&self, id: AppId) -> bool {
        self.sessions.lock().ended.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_is_silent_when_it_was_not_heard_for_long() {
        let heartbeats = Heartbeats::default();
        let (id, limit) = (AppId::generate(), Duration::from_mins(1));
        assert!(heartbeats.is_silent(id, limit));
        heartbeats.touch(id);
        tokio::time::sleep(limit).await;
        assert!(!heartbeats.is_silent(id, limit));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(heartbeats.is_silent(id, limit));
    }
}
