//! Tells control how many requests wait and run, as often as it matters and no more often.
//!
//! One task reports for all functions. A pool *notes* that its numbers changed; the note says whether
//! control can act on it at once (a request waits, a draining container is empty) or only keeps its
//! books with it. Notes of one function between two reports cost nothing but a flag.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ionian_control::web::DemandSender;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::slots::FunctionPool;

/// A report follows any activity within this time: four per second and function at most.
pub(crate) const REPORT_DELAY: Duration = Duration::from_millis(250);

/// Urgent reports of one function keep this distance. The first is sent at once; the rest of a burst of
/// arrivals is told together, so that a queue of thousands costs the scheduler tens of turns.
pub(crate) const URGENT_GAP: Duration = Duration::from_millis(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    Urgent,
    Routine,
}

/// Pools whose numbers are to be told, by when.
#[derive(Debug, Default)]
pub(crate) struct DemandBoard {
    due: Mutex<Due>,
    earlier: Notify,
}

#[derive(Debug, Default)]
struct Due {
    /// The number keeps pools that are due at the same instant apart.
    by_time: BTreeMap<(Instant, u64), (Arc<FunctionPool>, Urgency)>,
    next_number: u64,
}

impl DemandBoard {
    /// Plans a report. The caller makes sure that a pool is planned once per urgency.
    pub(crate) fn plan(&self, at: Instant, pool: Arc<FunctionPool>, urgency: Urgency) {
        let is_first = {
            let mut due = self.due.lock();
            let key = (at, due.next_number);
            due.next_number += 1;
            due.by_time.insert(key, (pool, urgency));
            due.by_time.first_key_value().is_some_and(|(first, _)| *first == key)
        };
        if is_first {
            self.earlier.notify_one();
        }
    }

    /// The next pool that is due, or when that will be.
    fn next(&self, now: Instant) -> Next {
        let mut due = self.due.lock();
        match due.by_time.first_key_value() {
            None => Next::Nothing,
            Some(((at, _), _)) if *at > now => Next::At(*at),
            Some(_) => match due.by_time.pop_first() {
                Some((_, (pool, urgency))) => Next::Report(pool, urgency),
                None => Next::Nothing,
            },
        }
    }
}

enum Next {
    Report(Arc<FunctionPool>, Urgency),
    At(Instant),
    Nothing,
}

/// Sends reports until shutdown. Waits where control is behind; notes gather meanwhile.
pub(crate) async fn run(board: Arc<DemandBoard>, demand: DemandSender, shutdown: CancellationToken) {
    let work = async {
        loop {
            match board.next(Instant::now()) {
                Next::Report(pool, urgency) => {
                    if let Some(report) = pool.take_report(urgency, Instant::now()) {
                        demand.send(report).await;
                    }
                }
                // `notify_one` keeps a permit: a plan made before these lines is not missed.
                Next::At(at) => {
                    let _either = tokio::time::timeout_at(at, board.earlier.notified()).await;
                }
                Next::Nothing => board.earlier.notified().await,
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = shutdown.cancelled() => {}
    }
}
