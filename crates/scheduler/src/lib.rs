//! Decides what runs where and when.
//!
//! A [`Scheduler`] is a value: [`Scheduler::handle`] takes the time and a batch of events and returns a
//! [`Turn`] with what must be recorded, what may then be answered and what may then be ordered. It has
//! no clock, no randomness, no IO and no map of random order, so that equal input gives equal output.
//!
//! Who may do what: `control` owns the one task that calls `handle`, commits `Turn::writes` in one
//! transaction and only then releases replies and commands. No error leaves this crate: a late or stale
//! event is a normal case with a named branch, and a broken invariant is an assert with a sentence.

mod attempts;
mod calls;
mod containers;
mod event;
mod pools;
mod recovery;
mod state;
mod turn;

pub use event::{AttemptReport, Event, PollId, PoolSettings, Refusal, ReplyId, WebUse};
pub use state::{ContainerView, PoolStats};
pub use turn::{Command, Delivery, DesiredEntry, Reply, Turn};

use std::time::Duration;

use ionian_domain::{ContainerId, Timestamp};

use state::State;

/// Limits of the machine and of the platform.
#[derive(Debug, Clone)]
pub struct Config {
    /// CPU that containers may ask for in total, in thousandths of a core.
    pub cpu_millis: u32,
    pub memory_mib: u32,
    /// Containers that may be starting at the same time: importing Python is CPU-bound, so more than
    /// the machine has cores only makes all of them late.
    pub max_starting: u32,
    /// Inputs that may wait for one function. Beyond it callers are told to slow down.
    pub max_queued_inputs: usize,
    /// How long a container has to end by itself after its kill switch.
    pub drain_grace: Duration,
    /// How long it has between SIGINT and SIGKILL.
    pub stop_grace: Duration,
    /// How long a cancelled input may go on before its container is killed.
    pub cancel_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cpu_millis: 2_000,
            memory_mib: 8_192,
            max_starting: 2,
            max_queued_inputs: 100_000,
            // The official runtime runs exit hooks and commits volumes in this time.
            drain_grace: Duration::from_secs(30),
            stop_grace: Duration::from_secs(10),
            cancel_grace: Duration::from_secs(10),
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
        Self { state: State::new(config) }
    }

    /// Applies a batch of events. `fresh` draws ids for the containers that this turn starts.
    pub fn handle(&mut self, now: Timestamp, events: Vec<Event>, fresh: &mut dyn FnMut() -> ContainerId) -> Turn {
        let mut turn = Turn::default();
        for event in events {
            self.state.apply(now, event, &mut turn);
        }
        self.state.expire(now, &mut turn);
        self.state.reconcile(now, &mut turn, fresh);
        turn.wake_at = self.state.next_deadline(now);
        turn
    }

    /// What should exist on the worker, in id order.
    pub fn desired(&self) -> Vec<DesiredEntry> {
        self.state.desired()
    }

    /// Containers for people: `modal container list`, `TaskList`, statistics.
    pub fn containers(&self) -> Vec<ContainerView> {
        self.state.container_views()
    }

    pub fn pool_stats(&self, function_id: ionian_domain::FunctionId) -> PoolStats {
        self.state.pool_stats(function_id)
    }
}
