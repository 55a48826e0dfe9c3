//! Decides what runs where and when.
//!
//! A [`Scheduler`] is a value: [`Scheduler::handle`] takes the time and a batch of events and returns a
//! [`Turn`] with what must be recorded, what may then be answered and what may then be ordered. It has
//! no clock, no randomness, no IO and no map of random order, so that equal input gives equal output.
//!
//! Who may do what: `control` owns the one task that calls `handle`, commits `Turn::writes` in one
//! transaction and only then releases replies and commands. No error leaves this crate: a late or stale
//! event is a normal case with a named branch, and a broken invariant is an assert with a sentence.
//!
//! # One turn
//!
//! Every event changes facts and marks the pools that it touched. Then what is due expires. Then each
//! marked pool is reconciled once, however many events touched it: inputs go to containers that ask for
//! them (`delivery`), the size that the pool should have is compared with what it has (`pools`), and
//! pools that want more stand in line for a machine (`placement`). Last, the pool's next deadline is
//! filed (`deadlines`). So a turn costs time for what it touched, not for what exists.
//!
//! # Who owns a waiting thing, and until when
//!
//! | State | Ends by | At the latest |
//! |---|---|---|
//! | input queued | a container's poll | its call is cancelled or its app stops; a pool that cannot start fails it |
//! | input delayed | time | its back-off |
//! | input running | its container's report or exit | the function's timeout, then the container is killed |
//! | container starting | its first poll | `startup_timeout`, then it is killed |
//! | container ready, idle | work, or its scale-down window | `POLL_SILENCE` where it does not ask for work |
//! | container draining | its last input, then its kill switch | its deadline, then it is stopped |
//! | container stopping | its exit | the worker's: SIGKILL after the grace time |
//! | pool in line | room, or a start that is over | what holds the room: the rows above |
//! | worker that is not heard | a sign of life | `Config::worker_silence`, then its containers are lost |
//! | event before `Recovered` | recovery | `EARLY_EVENTS`, since nobody is served before it |
//! | open call without inputs | its client | `FINISHED_CALL_MEMORY`, then it is closed |
//!
//! # Invariants
//!
//! Checked after every turn of the simulation (`tests/invariants.rs`), each with a deliberate mistake that
//! it catches (`breaks`): an accepted input is exactly one of queued, delayed, running or finished; its
//! outcome is recorded once and comes from the live attempt; nothing is answered before its write;
//! recovered state equals live state; no container beyond its slots, no pool beyond its maximum, no
//! machine beyond its resources or without the runtime; when faults stop, everything finishes and idle pools reach their minimum.

mod adoption;
mod attempts;
mod breaks;
mod calls;
mod containers;
mod deadlines;
mod delivery;
mod event;
mod exits;
pub mod journal;
mod placement;
mod pools;
mod recovery;
mod state;
mod turn;
mod views;
mod web;
mod workers;

#[cfg(test)]
mod tests;

pub use event::{AttemptReport, Event, PollId, PoolSettings, Refusal, ReplyId, WebUse};
pub use turn::{Command, Delivery, DesiredEntry, Reply, Turn};
pub use views::{ContainerView, PoolStats};

use std::time::Duration;

use ionian_domain::container::RuntimeKinds;
use ionian_domain::{ContainerId, Timestamp};
use serde::{Deserialize, Serialize};

use state::State;

/// Limits of the platform. Those of a machine come with its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Inputs that may wait for one function. Beyond it callers are told to slow down.
    pub max_queued_inputs: usize,
    /// How long a container has to end by itself after its kill switch.
    pub drain_grace: Duration,
    /// How long it has between SIGINT and SIGKILL.
    pub stop_grace: Duration,
    /// How long a cancelled input may go on before its container is killed.
    pub cancel_grace: Duration,
    /// How long nothing may be heard of a worker before its containers count as lost.
    pub worker_silence: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_queued_inputs: 100_000,
            // The official runtime runs exit hooks and commits volumes in this time.
            drain_grace: Duration::from_secs(30),
            stop_grace: Duration::from_secs(10),
            cancel_grace: Duration::from_secs(10),
            // Longer than a worker takes to restart or a switch to come back; as long as callers of a dead
            // machine wait before their inputs run elsewhere.
            worker_silence: Duration::from_secs(30),
        }
    }
}

/// The whole scheduling state. See the crate documentation.
#[derive(Debug)]
pub struct Scheduler {
    state: State,
}

impl Scheduler {
    pub fn new(config: Config) -> Self {
        Self {
            state: State::new(config),
        }
    }

    /// Applies a batch of events. `fresh` draws ids for the containers that this turn starts.
    pub fn handle(&mut self, now: Timestamp, events: Vec<Event>, fresh: &mut dyn FnMut() -> ContainerId) -> Turn {
        let mut turn = Turn::default();
        for event in events {
            self.state.take(now, event, &mut turn);
        }
        if !self.state.is_recovered && !self.state.is_broken(breaks::Break::StartsBeforeRecovery) {
            // What ran before is not known: what would be decided now could contradict it.
            return turn;
        }
        self.state.expire(now, &mut turn);
        self.state.reconcile(now, &mut turn, fresh);
        turn.wake_at = self.state.next_wake(now);
        turn
    }

    /// What should exist on all workers, in the order of the containers' ids.
    pub fn desired(&self) -> Vec<DesiredEntry> {
        self.state.desired()
    }

    /// Containers for people: `modal container list`, `TaskList`, statistics.
    pub fn containers(&self) -> Vec<ContainerView> {
        self.state.container_views()
    }

    /// The runtimes of the workers that are connected and heard; `None` where there is no such worker.
    pub fn runtimes(&self) -> Option<RuntimeKinds> {
        self.state.runtimes()
    }

    pub fn pool_stats(&self, function_id: ionian_domain::FunctionId) -> PoolStats {
        self.state.pool_stats(function_id)
    }
}
