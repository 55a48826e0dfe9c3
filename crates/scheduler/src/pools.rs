//! Pools: how many containers a function has. Decisions follow events and deadlines, never a period.

use std::collections::{BTreeMap, BTreeSet};

use ionian_domain::container::StopReason;
use ionian_domain::function::Autoscaler;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::breaks::Break;
use crate::event::{PoolSettings, Refusal, ReplyId};
use crate::state::{Container, InputState, Phase, Pool, State, count};
use crate::turn::{Reply, Turn};

impl Pool {
    pub(crate) fn new(settings: PoolSettings) -> Self {
        Self {
            settings,
            active: true,
            queue: BTreeMap::new(),
            delayed: BTreeSet::new(),
            containers: BTreeSet::new(),
            web_queued: 0,
            failures: 0,
            start_not_before: None,
            ticket: None,
            missing_runtime_told: false,
            deadline: None,
        }
    }

    /// A function that serves no requests any more may still have been asked for some.
    fn waiting_requests(&self) -> u32 {
        if self.settings.is_web { self.web_queued } else { 0 }
    }
}

impl State {
    pub(crate) fn function_activated(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        settings: PoolSettings,
        turn: &mut Turn,
    ) {
        self.dirty.insert(function_id);
        let Some(pool) = self.pools.get_mut(&function_id) else {
            let web_queued = self.web_waiting.remove(&function_id).unwrap_or(0);
            self.pools.insert(
                function_id,
                Pool {
                    web_queued,
                    ..Pool::new(settings)
                },
            );
            return;
        };
        let is_replaced = pool.settings.definition_id != settings.definition_id;
        let is_restarted = !pool.active;
        pool.settings = settings;
        pool.active = true;
        if is_replaced || is_restarted {
            // Somebody did something about it: the next start is a first one.
            pool.failures = 0;
            pool.start_not_before = None;
            pool.missing_runtime_told = false;
        }
        let definition = pool.settings.definition_id;
        for container_id in self.containers_of(function_id, |container| container.definition_id != definition) {
            self.drain(now, container_id, StopReason::Superseded, turn);
        }
    }

    /// The function's app stopped. What waits ends now; what runs is ended and its callers get `outcome`.
    pub(crate) fn function_deactivated(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        reason: StopReason,
        outcome: &Outcome,
        turn: &mut Turn,
    ) {
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return;
        };
        self.dirty.insert(function_id);
        pool.active = false;
        let waiting = pool
            .queue
            .values()
            .copied()
            .chain(pool.delayed.iter().map(|(_, input_id)| *input_id));
        let mut unfinished: Vec<InputId> = waiting.collect();
        let pool = &self.pools[&function_id];
        for (container_id, container) in self.containers_in(pool) {
            // An entry can be older than the input's present attempt, which then waits or runs elsewhere.
            let is_held = |id: &&InputId| {
                self.inputs
                    .get(*id)
                    .is_some_and(|input| input.state == InputState::Running { container_id })
            };
            unfinished.extend(container.running.keys().filter(is_held));
        }
        for input_id in unfinished {
            self.finish_input(now, input_id, None, None, outcome.clone(), turn);
        }
        for container_id in self.containers_of(function_id, |_| true) {
            self.stop_soon(now, container_id, reason, turn);
        }
        self.drop_pool_if_unused(function_id);
    }

    pub(crate) fn autoscaler_updated(
        &mut self,
        function_id: FunctionId,
        autoscaler: Autoscaler,
        reply: ReplyId,
        turn: &mut Turn,
    ) {
        match self.pools.get_mut(&function_id) {
            Some(pool) => {
                pool.settings.autoscaler = autoscaler;
                self.dirty.insert(function_id);
                turn.replies.push(Reply::Accepted(reply));
            }
            None => self.refuse(reply, Refusal::UnknownFunction, turn),
        }
    }

    pub(crate) fn drop_pool_if_unused(&mut self, function_id: FunctionId) {
        if self
            .pools
            .get(&function_id)
            .is_some_and(|pool| !pool.active && pool.containers.is_empty())
        {
            self.leave_line(function_id);
            self.unfile_deadline(function_id);
            if let Some(pool) = self.pools.remove(&function_id) {
                self.note_waiting(function_id, pool.web_queued);
            }
            self.dirty.remove(&function_id);
        }
    }

    /// Brings every pool that this turn touched to where it should be.
    pub(crate) fn reconcile(&mut self, now: Timestamp, turn: &mut Turn, fresh: &mut dyn FnMut() -> ContainerId) {
        let mut touched = BTreeSet::new();
        // Draining marks the pool again; it ends, since a container drains once.
        while let Some(function_id) = self.dirty.pop_first() {
            touched.insert(function_id);
            self.deliver(now, function_id, turn);
            self.resize(now, function_id, turn);
        }
        self.start_containers(now, turn, fresh);
        // Pools that got containers, and pools that lost a spare one and want it back when there is room.
        while let Some(function_id) = self.dirty.pop_first() {
            touched.insert(function_id);
            self.resize(now, function_id, turn);
        }
        for function_id in touched {
            self.file_deadline(now, function_id);
        }
    }

    /// Compares the pool's size with what it should be: stands in line for more, or drains.
    fn resize(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) {
        let Some(pool) = self.pools.get(&function_id) else {
            return;
        };
        if !pool.active || self.shutting_down {
            self.leave_line(function_id);
            return;
        }
        let is_paused = pool.start_not_before.is_some_and(|until| until > now);
        if self.shortfall(pool, true) > 0 && !is_paused {
            self.join_line(function_id);
            return;
        }
        let surplus = self.surplus(now, pool);
        self.leave_line(function_id);
        for container_id in surplus {
            self.drain(now, container_id, StopReason::ScaleDown, turn);
        }
    }

    /// How many containers the function should have: with or without those that only wait for more work.
    fn wanted(&self, pool: &Pool, with_buffer: bool) -> u32 {
        let settings = &pool.settings;
        let running = self
            .containers_in(pool)
            .filter(|(_, container)| container.is_live())
            .fold(0u32, |sum, (_, container)| sum.saturating_add(container.load()));
        let demand = count(pool.queue.len())
            .saturating_add(pool.waiting_requests())
            .saturating_add(running);
        let mut wanted = demand.div_ceil(settings.planned_load());
        if demand > 0 && with_buffer {
            wanted = wanted.saturating_add(settings.autoscaler.buffer_containers);
        }
        wanted.max(settings.autoscaler.min_containers).min(settings.maximum())
    }

    fn live_count(&self, pool: &Pool) -> u32 {
        count(
            self.containers_in(pool)
                .filter(|(_, container)| container.is_live())
                .count(),
        )
    }

    /// How many containers may start now.
    pub(crate) fn shortfall(&self, pool: &Pool, with_buffer: bool) -> u32 {
        if !pool.active {
            return 0;
        }
        let missing = self.wanted(pool, with_buffer).saturating_sub(self.live_count(pool));
        if self.is_broken(Break::IgnoresMaximum) {
            return missing;
        }
        // A container that ends counts until it is gone: a maximum of one says that two must never run.
        // Those of an older definition do not, or a deploy would wait for the longest input.
        let existing = self
            .containers_in(pool)
            .filter(|(_, c)| c.definition_id == pool.settings.definition_id)
            .count();
        missing.min(pool.settings.maximum().saturating_sub(count(existing)))
    }

    /// Containers that can end, newest first: the oldest is the one that work is packed onto.
    fn surplus(&self, now: Timestamp, pool: &Pool) -> Vec<ContainerId> {
        if self.is_broken(Break::NeverScalesDown) {
            return Vec::new();
        }
        let count = self.live_count(pool).saturating_sub(self.wanted(pool, true));
        let window = pool.settings.autoscaler.scaledown_window;
        let mut idle: Vec<(Timestamp, ContainerId)> = self
            .idle_containers(pool)
            .filter(|(_, since, _)| now.since(*since) >= window)
            .map(|(id, _, container)| (container.created_at, id))
            .collect();
        idle.sort_unstable();
        idle.into_iter().rev().take(count as usize).map(|(_, id)| id).collect()
    }

    pub(crate) fn next_scale_down(&self, pool: &Pool) -> Option<Timestamp> {
        if self.live_count(pool) <= self.wanted(pool, true) || self.is_broken(Break::NeverScalesDown) {
            return None;
        }
        let oldest = self.idle_containers(pool).map(|(_, since, _)| since).min()?;
        Some(oldest + pool.settings.autoscaler.scaledown_window)
    }

    /// Ready containers without work, with the time since when.
    fn idle_containers<'a>(
        &'a self,
        pool: &'a Pool,
    ) -> impl Iterator<Item = (ContainerId, Timestamp, &'a Container)> + 'a {
        self.containers_in(pool)
            .filter(|(_, container)| container.phase == Phase::Ready && container.is_empty())
            .filter_map(|(id, container)| container.idle_since.map(|since| (id, since, container)))
    }

    /// Idle containers of which this pool can do without some while another pool cannot start, and how
    /// many: all beyond its minimum and beyond what it works with, if nothing waits for them.
    pub(crate) fn spare_containers(&self, pool: &Pool) -> (Vec<(Timestamp, ContainerId)>, u32) {
        if !pool.queue.is_empty() || pool.waiting_requests() > 0 {
            return (Vec::new(), 0);
        }
        let needed = if pool.active { self.wanted(pool, false) } else { 0 };
        let spare = self.live_count(pool).saturating_sub(needed);
        let idle = self.idle_containers(pool).map(|(id, since, _)| (since, id)).collect();
        (idle, spare)
    }
}

impl PoolSettings {
    /// A maximum of none would be a function that cannot run; the client refuses it.
    pub(crate) fn maximum(&self) -> u32 {
        self.autoscaler
            .max_containers
            .map_or(u32::MAX, |maximum| maximum.max(1))
    }
}
