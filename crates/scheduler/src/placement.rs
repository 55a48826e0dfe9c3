//! Placement: which pool's container starts next, and what makes room for it.
//!
//! Pools that want more containers than they have stand in line. Each turn gives one container to each
//! pool in turn, first come first served, until the machines are full. A pool whose container does not fit
//! lets those behind it pass: a container may wait for the result of a function that stands behind, so
//! holding the line could hold everything.
//!
//! A container goes to the worker with the most free CPU, then memory, then the first by id. Only workers
//! that connected to this process, are heard, and have the pool's runtime count; where there is none, the pool
//! waits in line, and where that is for want of the runtime, this is said.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ionian_domain::container::{RuntimeKind, StopReason};
use ionian_domain::record::Write;
use ionian_domain::worker::WorkerCapacity;
use ionian_domain::{ContainerId, FunctionId, Timestamp, WorkerId};

use crate::breaks::Break;
use crate::event::PoolSettings;
use crate::state::{Container, Phase, State};
use crate::turn::{Command, Turn};

/// A start counts against its worker's `max_starting` for this long. Importing takes a fraction of a second;
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

/// What a pool asks for one more container.
#[derive(Debug, Clone, Copy)]
struct Asked {
    amount: Amount,
    runtime: RuntimeKind,
}

impl Asked {
    fn by(settings: &PoolSettings) -> Self {
        Self {
            amount: Amount {
                cpu_millis: u64::from(settings.cpu_millis),
                memory_mib: u64::from(settings.memory_mib),
                containers: 1,
            },
            runtime: settings.runtime,
        }
    }
}

/// A worker that takes containers, and what is left of it.
#[derive(Debug, Clone, Copy)]
struct Machine {
    worker_id: WorkerId,
    capacity: WorkerCapacity,
    used: Amount,
    /// Containers in the first seconds of their start.
    starting: u32,
}

impl Machine {
    fn takes_starts(&self) -> bool {
        // A worker on which nothing may start would be none.
        self.starting < self.capacity.max_starting.max(1)
    }

    /// Whether such a container could run here if nothing else did.
    fn suits(&self, asked: Asked) -> bool {
        self.capacity.runtimes.contains(asked.runtime) && self.holds(asked.amount)
    }

    fn holds(&self, amount: Amount) -> bool {
        amount.cpu_millis <= u64::from(self.capacity.cpu_millis)
            && amount.memory_mib <= u64::from(self.capacity.memory_mib)
    }

    /// Whether there is room for one more container. What asks for more than any whole machine gets a whole
    /// machine: it starts where nothing else runs.
    fn has_room(&self, asked: Asked, is_oversized: bool) -> bool {
        if is_oversized {
            self.used.containers == 0
        } else {
            self.holds(self.used.plus(asked.amount))
        }
    }

    /// Free CPU, then free memory.
    fn free(&self) -> (u64, u64) {
        (
            u64::from(self.capacity.cpu_millis).saturating_sub(self.used.cpu_millis),
            u64::from(self.capacity.memory_mib).saturating_sub(self.used.memory_mib),
        )
    }
}

/// Idle containers, longest idle first, and how many of each function's may end.
#[derive(Debug, Default)]
struct Spare {
    idle: Vec<(Timestamp, ContainerId)>,
    most: BTreeMap<FunctionId, u32>,
}

impl Spare {
    fn take(&mut self, victims: &[ContainerId], function_of: impl Fn(ContainerId) -> FunctionId) {
        self.idle.retain(|(_, id)| !victims.contains(id));
        for victim in victims {
            if let Some(left) = self.most.get_mut(&function_of(*victim)) {
                *left = left.saturating_sub(1);
            }
        }
    }
}

/// Where a container may start.
enum Placement {
    On(usize),
    /// There is room, where too much starts at the moment.
    AwaitsStarts,
    NoRoom,
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
        let mut machines = self.machines(now);
        let mut line: VecDeque<(FunctionId, u32)> = self
            .line
            .values()
            .map(|function_id| (*function_id, self.shortfall(&self.pools[function_id], true)))
            .collect();
        let mut without_room = Vec::new();
        while let Some((function_id, missing)) = line.pop_front() {
            if !machines.iter().any(Machine::takes_starts) && !self.is_broken(Break::IgnoresStartLimit) {
                break;
            }
            let asked = Asked::by(&self.pools[&function_id].settings);
            self.tell_missing_runtime(function_id, &machines, turn);
            match self.place(&machines, asked) {
                Placement::On(index) => {
                    let machine = &mut machines[index];
                    self.start_container(now, function_id, fresh(), machine.worker_id, turn);
                    machine.used = machine.used.plus(asked.amount);
                    machine.starting += 1;
                    self.leave_line(function_id);
                    if missing > 1 {
                        self.join_line(function_id);
                        line.push_back((function_id, missing - 1));
                    }
                }
                Placement::AwaitsStarts => {}
                Placement::NoRoom => without_room.push(function_id),
            }
        }
        if self.is_broken(Break::ForgetsTheLine) {
            for function_id in &without_room {
                self.leave_line(*function_id);
            }
        }
        self.make_room(now, machines, &without_room, turn);
    }

    /// Workers that take containers, in the order of their ids.
    fn machines(&self, now: Timestamp) -> Vec<Machine> {
        let mut used: BTreeMap<WorkerId, (Amount, u32)> = BTreeMap::new();
        for container in self.containers.values() {
            let (amount, starting) = used.entry(container.worker_id).or_default();
            *amount = amount.plus(Amount::held_by(container));
            *starting += u32::from(Self::burst_ends(now, container).is_some());
        }
        self.workers
            .iter()
            .filter(|(_, worker)| !worker.is_silent || self.is_broken(Break::PlacesOnSilentWorkers))
            .filter_map(|(id, worker)| {
                let (used, starting) = used.get(id).copied().unwrap_or_default();
                worker.capacity.map(|capacity| Machine {
                    worker_id: *id,
                    capacity,
                    used,
                    starting,
                })
            })
            .collect()
    }

    /// Says once per definition that a function waits for a worker of another kind than there are. Where no
    /// worker is connected at all, this is not the reason.
    fn tell_missing_runtime(&mut self, function_id: FunctionId, machines: &[Machine], turn: &mut Turn) {
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return;
        };
        let runtime = pool.settings.runtime;
        if machines
            .iter()
            .any(|machine| machine.capacity.runtimes.contains(runtime))
        {
            pool.missing_runtime_told = false;
        } else if !machines.is_empty() && !pool.missing_runtime_told {
            pool.missing_runtime_told = true;
            turn.commands.push(Command::RuntimeMissing { function_id, runtime });
        }
    }

    fn place(&self, machines: &[Machine], asked: Asked) -> Placement {
        let is_oversized = !machines.iter().any(|machine| machine.suits(asked));
        let ignores_room = self.is_broken(Break::IgnoresRoom);
        let ignores_starts = self.is_broken(Break::IgnoresStartLimit);
        let ignores_runtime = self.is_broken(Break::IgnoresRuntime);
        let mut with_room: Vec<(usize, &Machine)> = machines
            .iter()
            .enumerate()
            .filter(|(_, machine)| machine.capacity.runtimes.contains(asked.runtime) || ignores_runtime)
            .filter(|(_, machine)| machine.has_room(asked, is_oversized) || ignores_room)
            .collect();
        if with_room.is_empty() {
            return Placement::NoRoom;
        }
        with_room.retain(|(_, machine)| machine.takes_starts() || ignores_starts);
        let freest = with_room
            .into_iter()
            .min_by_key(|(_, machine)| (Reverse(machine.free()), machine.worker_id));
        match freest {
            Some((index, _)) => Placement::On(index),
            None => Placement::AwaitsStarts,
        }
    }

    fn start_container(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        container_id: ContainerId,
        worker_id: WorkerId,
        turn: &mut Turn,
    ) {
        let pool = self.pools.get_mut(&function_id).expect("a pool in line exists");
        let settings = &pool.settings;
        turn.desired_changed = true;
        turn.writes.push(Write::ContainerCreated {
            container_id,
            worker_id,
            app_id: settings.app_id,
            function_id,
            definition_id: settings.definition_id,
            at: now,
        });
        let container = Container {
            worker_id,
            app_id: settings.app_id,
            function_id,
            definition_id: settings.definition_id,
            phase: Phase::Starting {
                deadline: now + settings.startup_timeout,
            },
            created_at: now,
            running: BTreeMap::new(),
            poll: None,
            silent_since: None,
            idle_since: None,
            web_in_flight: 0,
            ready_at: None,
            has_served: false,
            never_polls: false,
            is_web: settings.is_web,
            seen_at: None,
            adopted: None,
            cpu_millis: settings.cpu_millis,
            memory_mib: settings.memory_mib,
        };
        let known = self.containers.insert(container_id, container);
        assert!(known.is_none(), "a fresh container id was drawn twice");
        pool.containers.insert(container_id);
        self.dirty.insert(function_id);
    }

    /// Ends idle containers of other pools, longest idle first, so that what waits can start: where the
    /// fewest must end for it. Only for pools that have work, and only where it helps.
    fn make_room(&mut self, now: Timestamp, mut machines: Vec<Machine>, waiting: &[FunctionId], turn: &mut Turn) {
        let mut spare: Option<Spare> = None;
        for function_id in waiting {
            let pool = &self.pools[function_id];
            if self.shortfall(pool, false) == 0 {
                continue;
            }
            let asked = Asked::by(&pool.settings);
            let is_oversized = !machines.iter().any(|machine| machine.suits(asked));
            let spare = spare.get_or_insert_with(|| {
                // What ends anyway is room already; counted once, for whoever waits longest.
                for machine in &mut machines {
                    let ending = self
                        .containers
                        .values()
                        .filter(|c| c.worker_id == machine.worker_id && Self::ends_soon(c));
                    machine.used = ending.fold(machine.used, |used, c| used.minus(Amount::held_by(c)));
                }
                self.spare()
            });
            let best = machines
                .iter()
                .enumerate()
                .filter(|(_, machine)| machine.capacity.runtimes.contains(asked.runtime))
                .filter(|(_, machine)| is_oversized || machine.holds(asked.amount))
                .filter_map(|(index, machine)| {
                    let victims = self.victims(spare, machine, *function_id, asked, is_oversized)?;
                    Some((victims.len(), index, victims))
                })
                .min();
            let Some((_, index, victims)) = best else {
                // Even all of them would not make room: whoever runs must end first.
                continue;
            };
            let machine = &mut machines[index];
            for container_id in &victims {
                machine.used = machine.used.minus(Amount::held_by(&self.containers[container_id]));
            }
            machine.used = machine.used.plus(asked.amount);
            spare.take(&victims, |id| self.containers[&id].function_id);
            for container_id in victims {
                self.drain(now, container_id, StopReason::ScaleDown, turn);
            }
        }
    }

    /// Idle containers that pools can do without.
    fn spare(&self) -> Spare {
        let mut spare = Spare::default();
        for (function_id, pool) in &self.pools {
            let (idle, most) = self.spare_containers(pool);
            spare.idle.extend(idle);
            spare.most.insert(*function_id, most);
        }
        spare.idle.sort_unstable();
        spare
    }

    /// Which containers of a machine must end so that one more has room there; `None` where that is in vain.
    fn victims(
        &self,
        spare: &Spare,
        machine: &Machine,
        function_id: FunctionId,
        asked: Asked,
        is_oversized: bool,
    ) -> Option<Vec<ContainerId>> {
        let mut after = *machine;
        let mut most = spare.most.clone();
        let mut victims = Vec::new();
        for (_, container_id) in &spare.idle {
            if after.has_room(asked, is_oversized) {
                break;
            }
            let container = &self.containers[container_id];
            if container.worker_id != machine.worker_id || container.function_id == function_id {
                continue;
            }
            let Some(left) = most.get_mut(&container.function_id).filter(|left| **left > 0) else {
                continue;
            };
            *left -= 1;
            after.used = after.used.minus(Amount::held_by(container));
            victims.push(*container_id);
        }
        after.has_room(asked, is_oversized).then_some(victims)
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
