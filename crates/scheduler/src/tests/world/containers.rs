//! Containers: slow, forgetful and mortal. They outlive the server and, mostly, their worker.

use std::collections::BTreeSet;

use ionian_domain::call::AttemptNumber;
use ionian_domain::container::ContainerExit;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome};

use super::{Action, Ask, Server, World, workers};
use crate::event::{AttemptReport, Event, PollId};
use crate::turn::{Delivery, DesiredEntry};

/// A poll is held this long before it is answered with nothing.
const POLL_HOLD_MS: u64 = 50_000;
/// The same once nothing goes wrong any more: saves time.
const CALM_HOLD_MS: u64 = 3_600_000;
/// An exit that was not acknowledged is told again.
const EXIT_REPEAT_MS: u64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Starting,
    Up,
    /// It asks for nothing any more, and does not end.
    Hung,
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "a process of others can be in any combination of these"
)]
pub(super) struct ContainerModel {
    pub worker: usize,
    function_id: FunctionId,
    /// Inputs that it takes at a time, and in one answer.
    slots: u32,
    batch: u32,
    is_single_use: bool,
    never_polls: bool,
    cpu_millis: u32,
    condition: Condition,
    was_ready: bool,
    must_end: bool,
    pub exit: Option<ContainerExit>,
    pub poll: Option<PollId>,
    /// The life of the server that heard its last poll.
    pub polled_in: Option<u64>,
    running: BTreeSet<(InputId, AttemptNumber)>,
}

impl ContainerModel {
    fn has_free_slot(&self) -> bool {
        let batches = u32::try_from(self.running.len())
            .expect("few inputs")
            .div_ceil(self.batch);
        batches < self.slots
    }
}

pub(super) enum ContainerStep {
    Booted,
    Poll,
    HoldOver(PollId),
    Finish(InputId, AttemptNumber),
    Cancel(InputId),
    /// Tells a result, until that is answered.
    Report(InputId, AttemptNumber, OutcomeStatus),
    Die(ContainerExit),
    TellStarted,
    TellExit,
    /// A container that never polls says that it is ready.
    Announce,
}

impl World {
    pub(super) fn insert_model(&mut self, worker: usize, entry: &DesiredEntry) {
        let function = self.function_of(entry.function_id);
        let settings = &function.settings;
        let model = ContainerModel {
            worker,
            function_id: entry.function_id,
            slots: settings.slots,
            batch: settings.batching.map_or(1, |batching| batching.max_size),
            cpu_millis: settings.cpu_millis,
            is_single_use: settings.single_use,
            never_polls: function.never_polls,
            condition: Condition::Starting,
            was_ready: false,
            must_end: false,
            exit: None,
            poll: None,
            polled_in: None,
            running: BTreeSet::new(),
        };
        self.containers.insert(entry.container_id, model);
    }

    pub(super) fn start(&mut self, worker: usize, entry: &DesiredEntry) -> Result<(), String> {
        let id = entry.container_id;
        if self.has_worked.contains(&id) {
            return Err(format!("{id} had work, and is started again"));
        }
        self.insert_model(worker, entry);
        let there = self
            .containers
            .values()
            .filter(|c| c.worker == worker && c.exit.is_none());
        let used: u32 = there.map(|container| container.cpu_millis).sum();
        if used > self.workers[worker].capacity.cpu_millis {
            return Err(format!("{id} does not fit on its worker, which has {used} then"));
        }
        let full = ContainerExit::StartFailed {
            message: "no space left on device".to_owned(),
        };
        match self.goes_wrong.then(|| self.random.below(50)) {
            Some(0) => self.die(id, full),
            Some(1) => self.die(id, ContainerExit::Exited { code: 1 }),
            // It hangs.
            Some(2) => {}
            Some(_) | None => {
                let delay = 50 + u64::from(self.random.below(900));
                self.after_ms(delay, Action::Container(id, ContainerStep::Booted));
            }
        }
        if self.mishap(15) {
            let exit = match self.random.below(5) {
                0 => ContainerExit::Exited { code: 1 },
                1 => ContainerExit::Signaled { signal: 9 },
                2 => ContainerExit::Signaled { signal: 11 },
                3 => ContainerExit::OutOfMemory,
                _ => ContainerExit::Lost,
            };
            let delay = u64::from(self.random.below(15_000));
            self.after_ms(delay, Action::Container(id, ContainerStep::Die(exit)));
        }
        let delay = 5 + u64::from(self.random.below(100));
        self.after_ms(delay, Action::Container(id, ContainerStep::TellStarted));
        Ok(())
    }

    /// Whether the container can say something to the server now.
    fn reaches_server(&self, id: ContainerId) -> bool {
        let container = &self.containers[&id];
        self.server != Server::Down && self.workers[container.worker].condition != workers::Condition::Cut
    }

    pub(super) fn container_step(&mut self, id: ContainerId, step: ContainerStep) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        let worker = container.worker;
        if container.exit.is_some() && !matches!(step, ContainerStep::TellExit) {
            return;
        }
        match step {
            ContainerStep::Booted => self.booted(id),
            ContainerStep::Poll => self.poll(id),
            ContainerStep::HoldOver(poll) => {
                if container.poll == Some(poll) {
                    container.poll = None;
                    self.after_ms(0, Action::Event(Event::PollDropped { container_id: id, poll }));
                    self.after_ms(1, Action::Container(id, ContainerStep::Poll));
                }
            }
            ContainerStep::Finish(input_id, attempt) => {
                if container.running.remove(&(input_id, attempt)) {
                    let status = if self.random.percent(80) {
                        OutcomeStatus::Success
                    } else {
                        OutcomeStatus::Failure
                    };
                    self.report(id, input_id, attempt, status);
                    self.after_input(id);
                }
            }
            ContainerStep::Cancel(input_id) => {
                // Some runtimes do not listen.
                let named: Vec<_> = container
                    .running
                    .iter()
                    .filter(|(running, _)| *running == input_id)
                    .copied()
                    .collect();
                if !self.mishap(20) {
                    for (input_id, attempt) in named {
                        let container = self.containers.get_mut(&id).expect("it was just found");
                        container.running.remove(&(input_id, attempt));
                        self.report(id, input_id, attempt, OutcomeStatus::Terminated);
                        self.after_input(id);
                    }
                }
            }
            ContainerStep::Report(input_id, attempt, status) => self.report(id, input_id, attempt, status),
            ContainerStep::Announce => {
                if self.reaches_server(id) {
                    self.after_ms(1, Action::Event(Event::ServerReady { container_id: id }));
                } else {
                    self.after_ms(400, Action::Container(id, ContainerStep::Announce));
                }
            }
            ContainerStep::TellStarted => {
                if self.worker_speaks(worker) && !self.mishap(5) {
                    self.after_ms(0, Action::Event(Event::WorkerStarted { container_id: id }));
                } else {
                    self.after_ms(800, Action::Container(id, ContainerStep::TellStarted));
                }
            }
            ContainerStep::Die(exit) => self.die(id, exit),
            ContainerStep::TellExit => {
                if let Some(exit) = container.exit.clone() {
                    if self.worker_speaks(worker) && !self.mishap(10) {
                        self.after_ms(0, Action::Event(Event::WorkerExited { container_id: id, exit }));
                    }
                    self.after_ms(EXIT_REPEAT_MS, Action::Container(id, ContainerStep::TellExit));
                }
            }
        }
    }

    fn booted(&mut self, id: ContainerId) {
        let function_id = self.containers[&id].function_id;
        let never_polls = self.containers[&id].never_polls;
        if !self.reaches_server(id) {
            self.after_ms(400, Action::Container(id, ContainerStep::Booted));
            return;
        }
        if self.function_of(function_id).is_broken {
            let outcome = Outcome::decided(OutcomeStatus::Failure, "ImportError");
            let reply = self.ask(Ask::Nobody);
            self.after_ms(
                1,
                Action::Event(Event::ContainerFailed {
                    container_id: id,
                    outcome,
                    reply,
                }),
            );
            self.after_ms(
                50,
                Action::Container(id, ContainerStep::Die(ContainerExit::Exited { code: 0 })),
            );
            return;
        }
        let container = self.containers.get_mut(&id).expect("it just booted");
        container.condition = Condition::Up;
        container.was_ready = true;
        if never_polls {
            self.after_ms(1, Action::Container(id, ContainerStep::Announce));
        } else {
            self.poll(id);
        }
    }

    fn poll(&mut self, id: ContainerId) {
        let poll = PollId(self.number());
        let greedy = self.mishap(3);
        let modest = self.random.percent(20);
        let hangs = self.goes_wrong && self.random.below(400) == 0;
        if !self.containers.contains_key(&id) {
            return;
        }
        let reaches_server = self.reaches_server(id);
        let container = self.containers.get_mut(&id).expect("it was just found");
        if hangs && container.running.is_empty() {
            container.condition = Condition::Hung;
        }
        // A runtime polls when it has a free slot; a strange one polls all the same.
        let wants = container.has_free_slot() || greedy;
        let is_up = container.condition == Condition::Up && container.exit.is_none();
        if !is_up || container.must_end || container.never_polls || !wants {
            return;
        }
        if !reaches_server {
            self.after_ms(350, Action::Container(id, ContainerStep::Poll));
            return;
        }
        let max_inputs = if modest { 1 } else { container.batch };
        let older = container.poll.replace(poll);
        self.polls.insert(poll, id);
        let delay = 1 + u64::from(self.random.below(10));
        self.after_ms(
            delay,
            Action::Event(Event::PollStarted {
                container_id: id,
                poll,
                max_inputs,
            }),
        );
        let hold = if self.goes_wrong { POLL_HOLD_MS } else { CALM_HOLD_MS };
        self.after_ms(hold, Action::Container(id, ContainerStep::HoldOver(poll)));
        if let Some(older) = older {
            // Its connection is gone, which is noticed late.
            let delay = u64::from(self.random.below(200));
            self.after_ms(
                delay,
                Action::Event(Event::PollDropped {
                    container_id: id,
                    poll: older,
                }),
            );
        } else if self.mishap(3) {
            self.after_ms(delay, Action::Container(id, ContainerStep::Poll));
        }
    }

    pub(super) fn delivered(&mut self, poll: PollId, inputs: &[Delivery]) -> Result<(), String> {
        let Some(id) = self.polls.remove(&poll) else {
            return Err(format!("nobody has {poll:?}"));
        };
        let is_lost = self.mishap(4);
        let container = self
            .containers
            .get_mut(&id)
            .filter(|container| container.exit.is_none());
        let found = container.filter(|container| container.poll == Some(poll) && !is_lost);
        let Some(container) = found else {
            let inputs = inputs.iter().map(|delivery| delivery.input_id).collect();
            // Comes with the next turn, before anything else.
            self.batch.push(Event::DeliveryLost {
                container_id: id,
                inputs,
            });
            self.after_ms(0, Action::Event(Event::Tick));
            if let Some(container) = self.containers.get_mut(&id)
                && container.poll == Some(poll)
            {
                container.poll = None;
                self.after_ms(20, Action::Container(id, ContainerStep::Poll));
            }
            return Ok(());
        };
        container.poll = None;
        for delivery in inputs {
            container.running.insert((delivery.input_id, delivery.attempt));
        }
        let is_single_use = container.is_single_use;
        self.has_worked.insert(id);
        for delivery in inputs {
            if !self.received.insert((delivery.input_id, delivery.attempt)) {
                return Err(format!(
                    "{} runs twice as the same attempt, now on {id}",
                    delivery.input_id
                ));
            }
        }
        for delivery in inputs {
            if !self.mishap(3) {
                let delay = if self.random.percent(10) {
                    self.random.below(20_000)
                } else {
                    self.random.below(1_500)
                };
                let step = ContainerStep::Finish(delivery.input_id, delivery.attempt);
                self.after_ms(u64::from(delay), Action::Container(id, step));
            }
        }
        if !is_single_use {
            self.after_ms(1, Action::Container(id, ContainerStep::Poll));
        }
        Ok(())
    }

    /// Tells a result; again, if the server died over it.
    fn report(&mut self, id: ContainerId, input_id: InputId, attempt: AttemptNumber, status: OutcomeStatus) {
        if !self.reaches_server(id) {
            let step = ContainerStep::Report(input_id, attempt, status);
            self.after_ms(300, Action::Container(id, step));
            return;
        }
        let times = if self.mishap(5) { 2 } else { 1 };
        for time in 0..times {
            let delay = u64::from(self.random.below(20));
            let outcome = Outcome::decided(status, "");
            let outputs = vec![AttemptReport {
                input_id,
                attempt,
                outcome,
                started_at: None,
            }];
            let reply = self.ask(if time == 0 {
                Ask::Report(id, input_id, attempt, status)
            } else {
                Ask::Nobody
            });
            self.after_ms(
                delay,
                Action::Event(Event::OutputsReported {
                    container_id: id,
                    outputs,
                    reply,
                }),
            );
        }
        let function_id = self.containers[&id].function_id;
        self.function_of(function_id).failures.0 = 0;
    }

    /// The server died: who waited for its answer asks the next one.
    pub(super) fn containers_lose_the_server(&mut self) {
        let all: Vec<ContainerId> = self.containers.keys().copied().collect();
        for id in all {
            let delay = 100 + u64::from(self.random.below(900));
            let announces_again = self.random.percent(50);
            let container = self.containers.get_mut(&id).expect("it was just listed");
            if container.poll.take().is_some() {
                self.after_ms(delay, Action::Container(id, ContainerStep::Poll));
            } else if container.never_polls && container.condition == Condition::Up && announces_again {
                self.after_ms(delay, Action::Container(id, ContainerStep::Announce));
            }
        }
        self.polls.clear();
    }

    fn after_input(&mut self, id: ContainerId) {
        let container = &self.containers[&id];
        if container.running.is_empty() && (container.must_end || container.is_single_use) {
            self.end(id);
        } else if container.poll.is_none() {
            self.after_ms(0, Action::Container(id, ContainerStep::Poll));
        }
    }

    pub(super) fn kill_switch(&mut self, poll: PollId) {
        let Some(id) = self.polls.remove(&poll) else { return };
        let is_lost = self.mishap(3);
        let Some(container) = self
            .containers
            .get_mut(&id)
            .filter(|c| c.exit.is_none() && c.poll == Some(poll))
        else {
            return;
        };
        container.poll = None;
        if is_lost {
            self.after_ms(20, Action::Container(id, ContainerStep::Poll));
            return;
        }
        container.must_end = true;
        if container.running.is_empty() {
            self.end(id);
        }
    }

    pub(super) fn poll_ended(&mut self, poll: PollId) {
        let Some(id) = self.polls.remove(&poll) else { return };
        if let Some(container) = self.containers.get_mut(&id)
            && container.poll == Some(poll)
        {
            container.poll = None;
            self.after_ms(1, Action::Container(id, ContainerStep::Poll));
        }
    }

    /// Exit hooks run, and hang at times.
    fn end(&mut self, id: ContainerId) {
        if !self.mishap(5) {
            let delay = 5 + u64::from(self.random.below(300));
            self.after_ms(
                delay,
                Action::Container(id, ContainerStep::Die(ContainerExit::Exited { code: 0 })),
            );
        }
    }

    pub(super) fn die(&mut self, id: ContainerId, exit: ContainerExit) {
        let Some(container) = self
            .containers
            .get_mut(&id)
            .filter(|container| container.exit.is_none())
        else {
            return;
        };
        let (function_id, was_ready) = (container.function_id, container.was_ready);
        container.poll = None;
        container.exit = Some(exit);
        container.running.clear();
        let function = self.function_of(function_id);
        if was_ready {
            function.failures.0 = 0;
        }
        let delay = u64::from(self.random.below(50));
        self.after_ms(delay, Action::Container(id, ContainerStep::TellExit));
    }
}
