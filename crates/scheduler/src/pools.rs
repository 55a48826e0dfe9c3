//! Pools: how many containers a function has. Decisions follow events and deadlines, never a period.

use ionian_domain::container::StopReason;
use ionian_domain::function::Autoscaler;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome, Timestamp};

use crate::event::{PoolSettings, Refusal, ReplyId};
use crate::state::{Container, Phase, Pool, State};
use crate::turn::{Reply, Turn};

/// How often finished calls are looked through; each look costs time proportional to their number.
const CALL_SWEEP_PERIOD: std::time::Duration = std::time::Duration::from_secs(60);

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
            self.pools.insert(function_id, Pool::new(settings));
            return;
        };
        let replaced = pool.settings.definition_id != settings.definition_id;
        pool.settings = settings;
        pool.active = true;
        if !replaced {
            return;
        }
        pool.failures = 0;
        pool.start_not_before = None;
        let definition = pool.settings.definition_id;
        for container_id in self.containers_of(function_id, |c| c.definition_id != definition && c.is_live()) {
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
        let Some(pool) = self.pools.get_mut(&function_id) else { return };
        pool.active = false;
        pool.web_queued = 0;
        let inputs: Vec<InputId> =
            self.inputs.iter().filter(|(_, input)| input.function_id == function_id).map(|(id, _)| *id).collect();
        for input_id in inputs {
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
            None => turn.replies.push(Reply::Refused { reply, refusal: Refusal::UnknownFunction }),
        }
    }

    pub(crate) fn drop_pool_if_unused(&mut self, function_id: FunctionId) {
        let unused = self.pools.get(&function_id).is_some_and(|pool| !pool.active)
            && !self.containers.values().any(|c| c.function_id == function_id);
        if unused {
            self.pools.remove(&function_id);
            self.dirty.remove(&function_id);
        }
    }

    pub(crate) fn containers_of(
        &self,
        function_id: FunctionId,
        filter: impl Fn(&Container) -> bool,
    ) -> Vec<ContainerId> {
        self.containers
            .iter()
            .filter(|(_, c)| c.function_id == function_id && filter(c))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Everything whose time has come.
    pub(crate) fn expire(&mut self, now: Timestamp, turn: &mut Turn) {
        self.expire_attempts(now, turn);
        self.expire_containers(now, turn);
        if now.since(self.calls_swept_at) >= CALL_SWEEP_PERIOD {
            self.calls_swept_at = now;
            self.forget_finished_calls(now);
        }
        let due: Vec<FunctionId> = self
            .pools
            .iter()
            .filter(|(id, pool)| self.pool_deadline(**id, pool).is_some_and(|deadline| deadline <= now))
            .map(|(id, _)| *id)
            .collect();
        self.dirty.extend(due);
    }

    pub(crate) fn reconcile(&mut self, now: Timestamp, turn: &mut Turn, fresh: &mut dyn FnMut() -> ContainerId) {
        while let Some(function_id) = self.dirty.pop_first() {
            self.deliver(now, function_id, turn);
            self.scale(now, function_id, turn, fresh);
        }
    }

    fn scale(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        turn: &mut Turn,
        fresh: &mut dyn FnMut() -> ContainerId,
    ) {
        let Some(pool) = self.pools.get(&function_id) else { return };
        if !pool.active || self.shutting_down {
            return;
        }
        let wanted = self.wanted_containers(function_id, pool);
        let live = self.containers_of(function_id, Container::is_live);
        let live_count = u32::try_from(live.len()).unwrap_or(u32::MAX);
        if live_count < wanted {
            if pool.start_not_before.is_none_or(|until| until <= now) {
                self.start_containers(now, function_id, wanted - live_count, turn, fresh);
            }
        } else {
            self.starved.remove(&function_id);
            self.scale_down(now, function_id, &live, wanted, turn);
        }
    }

    /// How many containers the function should have.
    fn wanted_containers(&self, function_id: FunctionId, pool: &Pool) -> u32 {
        let settings = &pool.settings;
        let per_container = match settings.batching {
            Some(batching) => batching.max_size,
            None if settings.is_web => settings.slots,
            None => settings.target_slots,
        }
        .max(1);
        let running: u32 = self
            .containers
            .values()
            .filter(|c| c.function_id == function_id && c.is_live())
            .map(|c| u32::try_from(c.running.len()).unwrap_or(u32::MAX) + c.web_in_flight)
            .sum();
        let demand = u32::try_from(pool.queue.len()).unwrap_or(u32::MAX).saturating_add(pool.web_queued) + running;
        let mut wanted = demand.div_ceil(per_container);
        if demand > 0 {
            wanted = wanted.saturating_add(settings.autoscaler.buffer_containers);
        }
        wanted = wanted.max(settings.autoscaler.min_containers);
        if let Some(max) = settings.autoscaler.max_containers {
            wanted = wanted.min(max.max(1));
        }
        wanted
    }

    fn start_containers(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        count: u32,
        turn: &mut Turn,
        fresh: &mut dyn FnMut() -> ContainerId,
    ) {
        let settings = self.pools[&function_id].settings.clone();
        for _ in 0..count {
            let starting = self.containers.values().filter(|c| matches!(c.phase, Phase::Starting { .. })).count();
            if starting >= self.config.max_starting as usize || !self.has_room(&settings) {
                // Tried again when a container becomes ready or ends.
                self.starved.insert(function_id);
                return;
            }
            let container_id = fresh();
            turn.desired_changed = true;
            turn.writes.push(Write::ContainerCreated {
                container_id,
                app_id: settings.app_id,
                function_id,
                at: now,
            });
            self.containers.insert(
                container_id,
                Container {
                    app_id: settings.app_id,
                    function_id,
                    definition_id: settings.definition_id,
                    phase: Phase::Starting { deadline: now + settings.startup_timeout },
                    created_at: now,
                    started: false,
                    running: std::collections::BTreeMap::new(),
                    poll: None,
                    idle_since: None,
                    web_in_flight: 0,
                    ever_ready: false,
                    is_web: settings.is_web,
                    cpu_millis: settings.cpu_millis,
                    memory_mib: settings.memory_mib,
                },
            );
        }
        self.starved.remove(&function_id);
    }

    /// Whether the machine has room for one more container of these settings. What asks for more than
    /// the whole machine gets the whole machine: it starts when nothing else runs.
    fn has_room(&self, settings: &PoolSettings) -> bool {
        if self.containers.is_empty() {
            return true;
        }
        let cpu: u32 = self.containers.values().map(|c| c.cpu_millis).sum();
        let memory: u32 = self.containers.values().map(|c| c.memory_mib).sum();
        cpu.saturating_add(settings.cpu_millis) <= self.config.cpu_millis
            && memory.saturating_add(settings.memory_mib) <= self.config.memory_mib
    }

    /// Drains containers that were idle for their window.
    fn scale_down(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        live: &[ContainerId],
        wanted: u32,
        turn: &mut Turn,
    ) {
        let window = self.pools[&function_id].settings.autoscaler.scaledown_window;
        let mut surplus = u32::try_from(live.len()).unwrap_or(u32::MAX).saturating_sub(wanted);
        // Newest first: the oldest is the one that requests are packed onto.
        let mut idle: Vec<(Timestamp, ContainerId)> = live
            .iter()
            .filter_map(|id| {
                let container = &self.containers[id];
                let since = container.idle_since.filter(|_| container.phase == Phase::Ready && container.is_empty())?;
                (now.since(since) >= window).then_some((container.created_at, *id))
            })
            .collect();
        idle.sort_unstable();
        while surplus > 0
            && let Some((_, container_id)) = idle.pop()
        {
            self.drain(now, container_id, StopReason::ScaleDown, turn);
            surplus -= 1;
        }
    }

    /// When this pool must be looked at again although nothing happens.
    fn pool_deadline(&self, function_id: FunctionId, pool: &Pool) -> Option<Timestamp> {
        if !pool.active {
            return None;
        }
        let mut deadline = pool.delayed.first().map(|(until, _)| *until);
        let mut consider = |candidate: Timestamp| {
            deadline = Some(deadline.map_or(candidate, |current| current.min(candidate)));
        };
        if let (Some(batching), Some(opened), false) =
            (pool.settings.batching, pool.batch_opened, pool.queue.is_empty())
            && pool.queue.len() < batching.max_size as usize
        {
            consider(opened + batching.wait);
        }
        let wanted = self.wanted_containers(function_id, pool);
        let live = self.containers_of(function_id, Container::is_live).len();
        if let Some(until) = pool.start_not_before
            && live < wanted as usize
        {
            consider(until);
        }
        if live > wanted as usize {
            let window = pool.settings.autoscaler.scaledown_window;
            for container in self.containers.values().filter(|c| {
                c.function_id == function_id && c.phase == Phase::Ready && c.is_empty()
            }) {
                if let Some(since) = container.idle_since {
                    consider(since + window);
                }
            }
        }
        deadline
    }

    pub(crate) fn next_deadline(&self, now: Timestamp) -> Option<Timestamp> {
        let mut deadline: Option<Timestamp> = None;
        let mut consider = |candidate: Timestamp| {
            // A deadline in the past would spin; what is overdue was handled in this turn, and what could
            // not be handled (no room) waits for an event.
            if candidate > now {
                deadline = Some(deadline.map_or(candidate, |current| current.min(candidate)));
            }
        };
        for (function_id, pool) in &self.pools {
            if let Some(candidate) = self.pool_deadline(*function_id, pool) {
                consider(candidate);
            }
        }
        for container in self.containers.values() {
            match container.phase {
                Phase::Starting { deadline } | Phase::Draining { deadline, .. } => consider(deadline),
                Phase::Ready | Phase::Stopping { .. } => {}
            }
            for running in container.running.values() {
                consider(running.abandoned_until.unwrap_or(running.deadline));
            }
        }
        deadline
    }
}

impl Pool {
    pub(crate) fn new(settings: PoolSettings) -> Self {
        Self {
            settings,
            active: true,
            queue: std::collections::VecDeque::new(),
            delayed: std::collections::BTreeSet::new(),
            batch_opened: None,
            web_queued: 0,
            failures: 0,
            start_not_before: None,
        }
    }
}
