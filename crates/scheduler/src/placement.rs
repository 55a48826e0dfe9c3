//! Placement: which pool's container starts next, and what makes room for it.
//!
//! Pools that want more containers than they have stand in line. Each turn gives one container to each
//! pool in turn, first come first served, until the machine is full. A pool whose container does not fit
//! lets those behind it pass: a container may wait for the result of a function that stands behind, so
//! holding the line could hold everything.

use std::collections::VecDeque;
use std::time::Duration;

use ionian_domain::container::StopReason;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, Timestamp};

use crate::breaks::Break;
use crate::event::PoolSettings;
use crate::state::{Container, Phase, State};
use crate::turn::Turn;

/// A start counts against `Config::max_starting` for this long. Importing takes a fraction of a second;
/// what takes longer waits for a download or fills a GPU, and two such starts must not keep all other
/// functions from starting for as long as they take.
pub(crate) const START_BURST: Duration = Duration::from_secs(5);

/// What containers ask of the machine.
#[derive(Debug, Clone, Copy, Default)]
struct Amount {
    cpu_millis: u64,
    memory_mib: u64,
    containers: u64,
}

impl Amount {
    fn asked_by(settings: &PoolSettings) -> Self {
        Self {
            cpu_millis: u64::from(settings.cpu_millis),
            memory_mib: u64::from(settings.memory_mib),
            containers: 1,
        }
    }

    fn held_by(container: &Container) -> Self {
        Self {
            cpu_millis: u64::from(container.cpu_millis),
            memory_mib: u64::from(container.memory_mib),
            containers: 1,
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis + other.cpu_millis,
            memory_mib: self.memory_mib + other.memory_mib,
            containers: self.containers + other.containers,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            containers: self.containers.saturating_sub(other.containers),
        }
    }
}

impl State {
    pub(crate) fn join_line(&mut self, function_id: FunctionId) {
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return;
        };
        if pool.ticket.is_none() {
            pool.ticket = Some(self.next_ticket);
            self.line.insert(self.next_ticket, function_id);
            self.next_ticket += 1;
        }
    }

    pub(crate) fn leave_line(&mut self, function_id: FunctionId) {
        if let Some(ticket) = self.pools.get_mut(&function_id).and_then(|pool| pool.ticket.take()) {
            self.line.remove(&ticket);
        }
    }

    /// Starts what fits, and makes room for what does not.
    pub(crate) fn start_containers(&mut self, now: Timestamp, turn: &mut Turn, fresh: &mut dyn FnMut() -> ContainerId) {
        if self.line.is_empty() {
            return;
        }
        let mut used = Amount::default();
        let mut starting = 0;
        for container in self.containers.values() {
            used = used.plus(Amount::held_by(container));
            starting += u32::from(Self::burst_ends(now, container).is_some());
        }
        let mut line: VecDeque<(FunctionId, u32)> = self
            .line
            .values()
            .map(|function_id| (*function_id, self.shortfall(&self.pools[function_id], true)))
            .filter(|(_, missing)| *missing > 0)
            .collect();
        let mut without_room = Vec::new();
        while let Some((function_id, missing)) = line.pop_front() {
            if starting >= self.config.max_starting && !self.is_broken(Break::IgnoresStartLimit) {
                break;
            }
            let asked = Amount::asked_by(&self.pools[&function_id].settings);
            if !self.fits(used, asked) && !self.is_broken(Break::IgnoresRoom) {
                without_room.push(function_id);
                continue;
            }
            self.start_container(now, function_id, fresh(), turn);
            used = used.plus(asked);
            starting += 1;
            self.leave_line(function_id);
            if missing > 1 {
                self.join_line(function_id);
                line.push_back((function_id, missing - 1));
            }
        }
        if self.is_broken(Break::ForgetsTheLine) {
            for function_id in &without_room {
                self.leave_line(*function_id);
            }
        }
        self.make_room(now, used, &without_room, turn);
    }

    fn start_container(&mut self, now: Timestamp, function_id: FunctionId, container_id: ContainerId, turn: &mut Turn) {
        let pool = self.pools.get_mut(&function_id).expect("a pool in line exists");
        let settings = &pool.settings;
        turn.desired_changed = true;
        turn.writes.push(Write::ContainerCreated {
            container_id,
            worker_id: self.worker,
            app_id: settings.app_id,
            function_id,
            definition_id: settings.definition_id,
            at: now,
        });
        let container = Container {
            app_id: settings.app_id,
            function_id,
            definition_id: settings.definition_id,
            phase: Phase::Starting {
                deadline: now + settings.startup_timeout,
            },
            created_at: now,
            running: std::collections::BTreeMap::new(),
            poll: None,
            silent_since: None,
            idle_since: None,
            web_in_flight: 0,
            ready_at: None,
            has_served: false,
            never_polls: false,
            is_web: settings.is_web,
            cpu_millis: settings.cpu_millis,
            memory_mib: settings.memory_mib,
        };
        let known = self.containers.insert(container_id, container);
        assert!(known.is_none(), "a fresh container id was drawn twice");
        pool.containers.insert(container_id);
        self.dirty.insert(function_id);
    }

    /// Whether the machine holds one more container. What asks for more than the whole machine gets the
    /// whole machine: it starts when nothing else runs.
    fn fits(&self, used: Amount, asked: Amount) -> bool {
        let total = used.plus(asked);
        used.containers == 0
            || total.cpu_millis <= u64::from(self.config.cpu_millis)
                && total.memory_mib <= u64::from(self.config.memory_mib)
    }

    /// Ends idle containers of other pools, longest idle first, so that what waits can start. Only for
    /// pools that have work, and only where it helps.
    fn make_room(&mut self, now: Timestamp, mut used: Amount, waiting: &[FunctionId], turn: &mut Turn) {
        let mut spare: Option<VecDeque<(Timestamp, ContainerId)>> = None;
        for function_id in waiting {
            let pool = &self.pools[function_id];
            if self.shortfall(pool, false) == 0 {
                continue;
            }
            let asked = Amount::asked_by(&pool.settings);
            let spare = spare.get_or_insert_with(|| {
                // What ends anyway is room already; counted once, for whoever waits longest.
                let ending = self.containers.values().filter(|c| Self::ends_soon(c));
                used = ending.fold(used, |used, container| used.minus(Amount::held_by(container)));
                let mut spare: Vec<_> = self
                    .pools
                    .values()
                    .flat_map(|pool| self.spare_containers(pool))
                    .collect();
                spare.sort_unstable();
                spare.into()
            });
            let mut after = used;
            let mut victims = Vec::new();
            let others = spare
                .iter()
                .filter(|(_, id)| self.containers[id].function_id != *function_id);
            for (_, container_id) in others {
                if self.fits(after, asked) {
                    break;
                }
                after = after.minus(Amount::held_by(&self.containers[container_id]));
                victims.push(*container_id);
            }
            if !self.fits(after, asked) {
                // Even all of them would not make room: whoever runs must end first.
                continue;
            }
            used = after.plus(asked);
            spare.retain(|(_, id)| !victims.contains(id));
            for container_id in victims {
                self.drain(now, container_id, StopReason::ScaleDown, turn);
            }
        }
    }

    /// Whether its resources come back without anything else ending first.
    fn ends_soon(container: &Container) -> bool {
        match container.phase {
            Phase::Stopping { .. } => true,
            Phase::Draining { .. } => container.is_empty(),
            Phase::Starting { .. } | Phase::Ready => false,
        }
    }

    fn burst_ends(now: Timestamp, container: &Container) -> Option<Timestamp> {
        match container.phase {
            Phase::Starting { .. } => Some(container.created_at + START_BURST).filter(|ends| *ends > now),
            Phase::Ready | Phase::Draining { .. } | Phase::Stopping { .. } => None,
        }
    }

    /// When a start stops counting, while somebody waits for that.
    pub(crate) fn next_start(&self, now: Timestamp) -> Option<Timestamp> {
        if self.line.is_empty() {
            return None;
        }
        self.containers
            .values()
            .filter_map(|container| Self::burst_ends(now, container))
            .min()
    }
}
