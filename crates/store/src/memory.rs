//! What the store keeps in memory, so that a request which starts a call reads nothing from disk.
//!
//! A read costs two changes of thread, and at thousands of requests per second those are what a machine
//! spends its time with. Neither part of this decides anything: the filter only says "certainly not
//! there", and a kept token is as good as one that was read [`TOKEN_LIFETIME`] ago.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ionian_domain::ids::{CallId, TokenId};

use crate::tokens::TokenRecord;

/// How long a token that was read may be used without reading it again. Another process may revoke it
/// meanwhile (`ionian token revoke`), which therefore waits this long before it says so.
pub const TOKEN_LIFETIME: Duration = Duration::from_millis(500);

/// More tokens than are used at one time. When it is full, all are forgotten.
const TOKENS: usize = 1_024;

/// 2 MiB. With a million calls, one question in 500 is answered "perhaps", and read from disk; with ten
/// million it is most of them, as if there were no filter.
const FILTER_BITS: u64 = 1 << 24;

/// Bits per call; few, because a filter of fixed size must not fill up early.
const PROBES: u64 = 4;

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) calls: CallFilter,
    pub(crate) tokens: RecentTokens,
}

/// Which calls are certainly not in the database (a Bloom filter). Calls that were deleted stay in it
/// until the next start.
///
/// It is right because calls are created by one process, and by turns alone, which enter them here before
/// they commit.
#[derive(Debug)]
pub(crate) struct CallFilter {
    bits: Box<[AtomicU64]>,
    /// It holds all calls of the database, too. Until then it says nothing.
    is_complete: AtomicBool,
}

impl Default for CallFilter {
    fn default() -> Self {
        Self {
            bits: (0..FILTER_BITS / 64).map(|_| AtomicU64::new(0)).collect(),
            is_complete: AtomicBool::new(false),
        }
    }
}

impl CallFilter {
    pub(crate) fn insert(&self, id: CallId) {
        for (word, mask) in probes(id) {
            self.bits[word].fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// Every call that was in the database when it was opened has been inserted.
    pub(crate) fn complete(&self) {
        self.is_complete.store(true, Ordering::Release);
    }

    /// `false`: there is no such call.
    pub(crate) fn may_hold(&self, id: CallId) -> bool {
        !self.is_complete.load(Ordering::Acquire)
            || probes(id).all(|(word, mask)| self.bits[word].load(Ordering::Relaxed) & mask != 0)
    }
}

/// Two halves of one hash give all probes, as good as that many hashes.
fn probes(id: CallId) -> impl Iterator<Item = (usize, u64)> {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    let hash = hasher.finish();
    let (first, step) = (hash & 0xffff_ffff, hash >> 32 | 1);
    (0..PROBES).map(move |probe| {
        let bit = first.wrapping_add(probe.wrapping_mul(step)) % FILTER_BITS;
        ((bit / 64) as usize, 1 << (bit % 64))
    })
}

/// Tokens that were read a moment ago.
#[derive(Debug, Default)]
pub(crate) struct RecentTokens(Mutex<HashMap<TokenId, (TokenRecord, Instant)>>);

impl RecentTokens {
    pub(crate) fn find(&self, id: TokenId) -> Option<TokenRecord> {
        let tokens = self.0.lock().expect("nothing panics while it holds this");
        let (token, read_at) = tokens.get(&id)?;
        (read_at.elapsed() < TOKEN_LIFETIME).then(|| token.clone())
    }

    /// `read_at` is from before the reading began.
    pub(crate) fn keep(&self, token: TokenRecord, read_at: Instant) {
        let mut tokens = self.0.lock().expect("nothing panics while it holds this");
        if tokens.len() >= TOKENS {
            tokens.clear();
        }
        tokens.insert(token.id, (token, read_at));
    }

    pub(crate) fn forget(&self, id: TokenId) {
        self.0.lock().expect("nothing panics while it holds this").remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_says_nothing_until_it_is_complete() {
        let filter = CallFilter::default();
        let id = CallId::generate();
        assert!(filter.may_hold(id));
        filter.complete();
        assert!(!filter.may_hold(id));
        filter.insert(id);
        assert!(filter.may_hold(id));
    }

    #[test]
    fn the_filter_forgets_no_call_and_knows_most_of_the_others() {
        let filter = CallFilter::default();
        filter.complete();
        let held: Vec<CallId> = (0..100_000).map(|_| CallId::generate()).collect();
        for id in &held {
            filter.insert(*id);
        }
        assert!(held.iter().all(|id| filter.may_hold(*id)));
        let mistaken = (0..10_000).filter(|_| filter.may_hold(CallId::generate())).count();
        assert!(mistaken < 100, "{mistaken} of 10,000");
    }
}
