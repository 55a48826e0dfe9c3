//! Deadlines: each pool files the next moment at which it must be looked at although nothing happens.
//!
//! A pool's deadline is filed anew whenever a turn touched the pool, and only then; so nothing may change
//! what a deadline is made of without marking the pool as dirty.

use std::time::Duration;

use ionian_domain::{FunctionId, Timestamp};

use crate::breaks::Break;
use crate::calls::FINISHED_CALL_MEMORY;
use crate::state::{Container, Phase, Pool, State};
use crate::turn::Turn;

/// A container that is ready, has nothing to do and does not ask for work for this long hangs. The
/// runtime asks again at once after every answer, and an answer comes after 50 seconds at the latest.
pub(crate) const POLL_SILENCE: Duration = Duration::from_secs(90);

impl Container {
    /// When its present phase has lasted too long.
    pub(crate) fn phase_deadline(&self) -> Option<Timestamp> {
        match self.phase {
            Phase::Starting { deadline } | Phase::Draining { deadline, .. } => Some(deadline),
            Phase::Ready if self.never_polls || !self.is_empty() => None,
            Phase::Ready => {
                Some(self.silent_since.max(self.idle_since)? + POLL_SILENCE).filter(|_| self.poll.is_none())
            }
            // The worker's affair: it kills after the grace time.
            Phase::Stopping { .. } => None,
        }
    }

    fn attempt_deadline(&self) -> Option<Timestamp> {
        let is_being_killed = matches!(
            self.phase,
            Phase::Stopping {
                grace: Duration::ZERO,
                ..
            }
        );
        self.running
            .values()
            .filter_map(|running| match running.abandoned_until {
                Some(_) if is_being_killed => None,
                Some(until) => Some(until),
                None => Some(running.deadline),
            })
            .min()
    }
}

impl State {
    /// Handles everything whose time has come.
    pub(crate) fn expire(&mut self, now: Timestamp, turn: &mut Turn) {
        self.expire_workers(now, turn);
        let due: Vec<FunctionId> = self
            .deadlines
            .iter()
            .take_while(|(at, _)| *at <= now)
            .map(|(_, function_id)| *function_id)
            .collect();
        for function_id in due {
            self.expire_attempts(now, function_id, turn);
            if !self.is_broken(Break::IgnoresHangingContainers) {
                self.expire_containers(now, function_id, turn);
            }
            self.dirty.insert(function_id);
        }
        self.forget_quiet_calls(now, turn);
    }

    /// When this pool must be looked at again although nothing happens.
    pub(crate) fn pool_deadline(&self, now: Timestamp, pool: &Pool) -> Option<Timestamp> {
        let of_containers = self
            .containers_in(pool)
            .flat_map(|(_, container)| [container.phase_deadline(), container.attempt_deadline()])
            .flatten()
            .min();
        if !pool.active {
            return of_containers;
        }
        let retry = pool.delayed.first().map(|(until, _)| *until);
        // What is due already waits for a container, not for time.
        let batch = pool.batch_opens_at(self).filter(|opens| *opens > now);
        let start = pool
            .start_not_before
            .filter(|until| *until > now && self.shortfall(pool, true) > 0);
        [of_containers, retry, batch, start, self.next_scale_down(pool)]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn file_deadline(&mut self, now: Timestamp, function_id: FunctionId) {
        if self.is_broken(Break::ForgetsDeadlines) {
            return;
        }
        let Some(pool) = self.pools.get(&function_id) else {
            return;
        };
        let deadline = self.pool_deadline(now, pool);
        if deadline == pool.deadline {
            return;
        }
        self.unfile_deadline(function_id);
        if let (Some(at), Some(pool)) = (deadline, self.pools.get_mut(&function_id)) {
            pool.deadline = Some(at);
            self.deadlines.insert((at, function_id));
        }
    }

    pub(crate) fn unfile_deadline(&mut self, function_id: FunctionId) {
        if let Some(pool) = self.pools.get_mut(&function_id)
            && let Some(at) = pool.deadline.take()
        {
            self.deadlines.remove(&(at, function_id));
        }
    }

    /// When the next turn is due, whatever happens.
    pub(crate) fn next_wake(&self, now: Timestamp) -> Option<Timestamp> {
        let pools = self.deadlines.first().map(|(at, _)| *at);
        let calls = self.quiet_calls.first().map(|(heard, _)| *heard + FINISHED_CALL_MEMORY);
        [pools, calls, self.next_start(now), self.next_silence()]
            .into_iter()
            .flatten()
            .min()
    }
}
