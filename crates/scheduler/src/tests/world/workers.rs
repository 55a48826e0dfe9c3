//! Workers: processes that crash, freeze or are cut off, and come back to containers that lived on or not.

use std::time::Duration;

use ionian_domain::container::{ContainerExit, RuntimeKind};
use ionian_domain::worker::{DesiredState, WorkerCapacity};
use ionian_domain::{ContainerId, WorkerId};

use super::containers::ContainerStep;
use super::{Action, Server, World};
use crate::event::Event;
use crate::tests::ids::numbered;
use crate::turn::DesiredEntry;

/// How often a worker says that it is there; well within the silence that the world allows.
const BEAT_MS: u64 = 3_000;
/// The same once nothing goes wrong any more, with a longer silence: saves time.
const CALM_BEAT_MS: u64 = 3_600_000;
pub(super) const SILENCE: Duration = Duration::from_secs(10);
pub(super) const CALM_SILENCE: Duration = Duration::from_hours(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    Up,
    /// Its process is gone.
    Down,
    /// Its process does nothing (`SIGSTOP`); its containers do.
    Frozen,
    /// Neither it nor its containers reach the server.
    Cut,
}

pub(super) struct WorkerModel {
    pub id: WorkerId,
    pub capacity: WorkerCapacity,
    pub condition: Condition,
    /// Counts its processes: what was on its way to an earlier one never arrives.
    incarnation: u64,
    /// The life of the server that it is connected to.
    connected_to: Option<u64>,
    /// The newest desired set that it saw, by the server's life and its generation.
    seen: (u64, u64),
}

pub(super) enum WorkerStep {
    Connect,
    Beat,
    /// Something happens to it, and ends after so many milliseconds.
    Trouble(Condition, u64),
    Back,
    Sees {
        incarnation: u64,
        stamp: (u64, u64),
        entries: Vec<DesiredEntry>,
    },
}

impl World {
    pub(super) fn declare_workers(&mut self) {
        let count = 1 + self.random.below(3);
        for index in 0..count {
            // The first takes what all functions need at the least.
            let cpu_millis = if index == 0 {
                1_800 + 300 * self.random.below(3)
            } else {
                600 + 400 * self.random.below(4)
            };
            let runtimes = if index == 0 || self.random.percent(50) {
                [RuntimeKind::Runc, RuntimeKind::Gvisor].into()
            } else {
                [RuntimeKind::Runc].into()
            };
            let capacity = WorkerCapacity {
                cpu_millis,
                memory_mib: 4_096,
                max_starting: 1 + self.random.below(3),
                runtimes,
            };
            let id = numbered(self.number());
            self.workers.push(WorkerModel {
                id,
                capacity,
                condition: Condition::Up,
                incarnation: 0,
                connected_to: None,
                seen: (0, 0),
            });
            let delay = u64::from(self.random.below(1_000));
            self.after_ms(delay, Action::Worker(index as usize, WorkerStep::Connect));
            self.after_ms(BEAT_MS, Action::Worker(index as usize, WorkerStep::Beat));
        }
    }

    /// Whether the worker can say something to the server now.
    pub(super) fn worker_speaks(&self, index: usize) -> bool {
        let worker = &self.workers[index];
        worker.condition == Condition::Up && self.server != Server::Down && worker.connected_to == Some(self.life)
    }

    /// Something happens to a worker, sooner or later.
    pub(super) fn make_trouble(&mut self) {
        let count = u32::try_from(self.workers.len()).expect("few workers");
        let index = self.random.below(count) as usize;
        let condition = match self.random.below(10) {
            0..4 => Condition::Down,
            4..7 => Condition::Frozen,
            _ => Condition::Cut,
        };
        let limit = if self.random.percent(50) { 3_000 } else { 25_000 };
        let lasts = u64::from(self.random.below(limit));
        self.after_ms(0, Action::Worker(index, WorkerStep::Trouble(condition, lasts)));
    }

    pub(super) fn worker_step(&mut self, index: usize, step: WorkerStep) -> Result<(), String> {
        match step {
            WorkerStep::Connect => self.connect(index),
            WorkerStep::Beat => {
                if self.worker_speaks(index) {
                    let worker_id = self.workers[index].id;
                    if !self.mishap(10) {
                        self.after_ms(1, Action::Event(Event::WorkerHeard { worker_id }));
                    }
                }
                let period = if self.goes_wrong { BEAT_MS } else { CALM_BEAT_MS };
                self.after_ms(period, Action::Worker(index, WorkerStep::Beat));
            }
            WorkerStep::Trouble(condition, lasts) => {
                if self.workers[index].condition == Condition::Up {
                    self.trouble(index, condition);
                    self.after_ms(lasts, Action::Worker(index, WorkerStep::Back));
                }
            }
            WorkerStep::Back => self.back(index),
            WorkerStep::Sees {
                incarnation,
                stamp,
                entries,
            } => {
                let worker = &self.workers[index];
                if worker.incarnation != incarnation {
                    return Ok(());
                }
                match worker.condition {
                    Condition::Up => return self.worker_sees(index, stamp, &entries),
                    // It waits in its socket.
                    Condition::Frozen => {
                        let step = WorkerStep::Sees {
                            incarnation,
                            stamp,
                            entries,
                        };
                        self.after_ms(500, Action::Worker(index, step));
                    }
                    Condition::Down | Condition::Cut => {}
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self, index: usize) {
        if self.workers[index].condition != Condition::Up {
            return;
        }
        if self.server == Server::Down {
            self.after_ms(500, Action::Worker(index, WorkerStep::Connect));
            return;
        }
        let life = self.life;
        let worker = &mut self.workers[index];
        worker.connected_to = Some(life);
        let (worker_id, capacity) = (worker.id, worker.capacity);
        self.note(|| format!("{worker_id} connects"));
        self.after_ms(1, Action::Event(Event::WorkerConnected { worker_id, capacity }));
        let running: Vec<ContainerId> = self
            .containers
            .iter()
            .filter(|(_, container)| container.worker == index && container.exit.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in running {
            let delay = 2 + u64::from(self.random.below(100));
            self.after_ms(delay, Action::Container(id, ContainerStep::TellStarted));
        }
    }

    fn trouble(&mut self, index: usize, condition: Condition) {
        let id = self.workers[index].id;
        self.note(|| format!("{id} is {condition:?}"));
        self.troubles += 1;
        self.workers[index].condition = condition;
        match condition {
            Condition::Up | Condition::Frozen => {}
            Condition::Down => {
                if self.random.percent(35) {
                    // Its machine went down with it.
                    self.note(|| format!("{id} loses its containers"));
                    let lost: Vec<ContainerId> = self.containers_on(index);
                    for container_id in lost {
                        self.containers.remove(&container_id);
                    }
                }
            }
            Condition::Cut => {
                for container_id in self.containers_on(index) {
                    let container = self.containers.get_mut(&container_id).expect("it was just listed");
                    if let Some(poll) = container.poll.take() {
                        // Which the server notices late.
                        let delay = u64::from(self.random.below(5_000));
                        self.after_ms(delay, Action::Event(Event::PollDropped { container_id, poll }));
                        self.after_ms(300, Action::Container(container_id, ContainerStep::Poll));
                    }
                }
            }
        }
    }

    fn containers_on(&self, index: usize) -> Vec<ContainerId> {
        self.containers
            .iter()
            .filter(|(_, container)| container.worker == index)
            .map(|(id, _)| *id)
            .collect()
    }

    fn back(&mut self, index: usize) {
        let was = self.workers[index].condition;
        let id = self.workers[index].id;
        self.note(|| format!("{id} is back"));
        let reconnects = was != Condition::Frozen || self.random.percent(50);
        let worker = &mut self.workers[index];
        worker.condition = Condition::Up;
        if was == Condition::Down {
            worker.incarnation += 1;
            worker.seen = (0, 0);
        }
        let is_new_server = worker.connected_to != Some(self.life);
        if reconnects || is_new_server {
            self.after_ms(1, Action::Worker(index, WorkerStep::Connect));
        } else {
            self.after_ms(1, Action::Event(Event::WorkerHeard { worker_id: id }));
        }
    }

    /// The server tells each worker what should be there. A connection that loses something breaks, and
    /// everything is told again.
    pub(super) fn tell_workers(&mut self) {
        self.generation += 1;
        let entries = self.scheduler.desired();
        for index in 0..self.workers.len() {
            if self.workers[index].connected_to != Some(self.life) {
                continue;
            }
            if self.mishap(3) {
                self.after_ms(200, Action::Worker(index, WorkerStep::Connect));
                continue;
            }
            let worker = &self.workers[index];
            let its: Vec<DesiredEntry> = entries
                .iter()
                .filter(|entry| entry.worker_id == worker.id)
                .cloned()
                .collect();
            let incarnation = worker.incarnation;
            let times = if self.mishap(3) { 2 } else { 1 };
            for _ in 0..times {
                let delay = 1 + u64::from(self.random.below(30));
                let step = WorkerStep::Sees {
                    incarnation,
                    stamp: (self.life, self.generation),
                    entries: its.clone(),
                };
                self.after_ms(delay, Action::Worker(index, step));
            }
        }
    }

    fn worker_sees(&mut self, index: usize, stamp: (u64, u64), entries: &[DesiredEntry]) -> Result<(), String> {
        if stamp < self.workers[index].seen {
            return Ok(());
        }
        self.workers[index].seen = stamp;
        for id in self.containers_on(index) {
            if entries.iter().any(|entry| entry.container_id == id) {
                continue;
            }
            if self.containers[&id].exit.is_none() {
                if self.record.is_live(&id) {
                    return Err(format!("{id} runs and vanished from the desired set"));
                }
                self.note(|| format!("{id} is not wanted any more, and killed"));
            }
            self.containers.remove(&id);
            self.acknowledged.insert(id);
        }
        for entry in entries {
            let id = entry.container_id;
            if self.acknowledged.contains(&id) {
                return Err(format!("{id} ended, and the desired set names it again"));
            }
            let has_exited = self.containers.get(&id).map(|container| container.exit.is_some());
            match (entry.state, has_exited) {
                (_, None) if entry.must_exist => {
                    self.insert_model(index, entry);
                    self.die(id, ContainerExit::Lost);
                }
                (DesiredState::Running, None) => self.start(index, entry)?,
                (DesiredState::Stopped { .. }, None) => {
                    self.insert_model(index, entry);
                    let exit = ContainerExit::StartFailed {
                        message: "stopped before it started".to_owned(),
                    };
                    self.die(id, exit);
                }
                (DesiredState::Stopped { grace, .. }, Some(false)) => {
                    let grace = u32::try_from(grace.as_millis()).expect("a short grace time");
                    let delay = u64::from(self.random.below(grace + 1));
                    let exit = if self.random.percent(50) {
                        ContainerExit::Exited { code: 0 }
                    } else {
                        ContainerExit::Signaled { signal: 9 }
                    };
                    self.after_ms(delay, Action::Container(id, ContainerStep::Die(exit)));
                }
                (DesiredState::Running, Some(_)) | (DesiredState::Stopped { .. }, Some(true)) => {}
            }
        }
        Ok(())
    }
}
