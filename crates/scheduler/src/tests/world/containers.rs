//! The worker and its containers: slow, forgetful, and mortal.

use std::collections::BTreeMap;

use ionian_domain::call::AttemptNumber;
use ionian_domain::container::ContainerExit;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::worker::DesiredState;
use ionian_domain::{ContainerId, FunctionId, InputId, Outcome};

use super::{Action, Ask, World};
use crate::event::{AttemptReport, Event, PollId};
use crate::turn::{Delivery, DesiredEntry};

/// A poll is held this long before it is answered with nothing.
const POLL_HOLD_MS: u64 = 50_000;
/// The same once nothing goes wrong any more: saves time.
const CALM_HOLD_MS: u64 = 3_600_000;
/// An exit that was not acknowledged is told again.
const EXIT_REPEAT_MS: u64 = 1_000;

#[expect(
    clippy::struct_excessive_bools,
    reason = "a process of others can be in any combination of these"
)]
pub(super) struct ContainerModel {
    function_id: FunctionId,
    /// Inputs that it takes at a time, and in one answer.
    slots: u32,
    batch: u32,
    is_single_use: bool,
    never_polls: bool,
    is_up: bool,
    was_ready: bool,
    must_end: bool,
    exit: Option<ContainerExit>,
    poll: Option<PollId>,
    running: BTreeMap<InputId, AttemptNumber>,
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
    Die(ContainerExit),
    TellExit,
}

impl World {
    pub(super) fn worker_sees(&mut self, generation: u64, entries: &[DesiredEntry]) -> Result<(), String> {
        if generation < self.seen_generation {
            return Ok(());
        }
        self.seen_generation = generation;
        for (id, container) in &self.containers {
            if container.exit.is_none() && !entries.iter().any(|entry| entry.container_id == *id) {
                return Err(format!("{id} runs and vanished from the desired set"));
            }
        }
        let acknowledged: Vec<ContainerId> = self
            .containers
            .keys()
            .filter(|id| !entries.iter().any(|entry| entry.container_id == **id))
            .copied()
            .collect();
        for id in acknowledged {
            self.containers.remove(&id);
            self.acknowledged.insert(id);
        }
        for entry in entries {
            let id = entry.container_id;
            if self.acknowledged.contains(&id) {
                return Err(format!("{id} ended, and the desired set names it again"));
            }
            match (
                entry.state,
                self.containers.get(&id).map(|container| container.exit.is_some()),
            ) {
                (_, None) if entry.must_exist => {
                    self.start(entry);
                    self.die(id, ContainerExit::Lost);
                }
                (DesiredState::Running, None) => self.start(entry),
                (DesiredState::Stopped { .. }, None) => {
                    self.start(entry);
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

    fn start(&mut self, entry: &DesiredEntry) {
        let function = self.function_of(entry.function_id);
        let settings = &function.settings;
        let model = ContainerModel {
            function_id: entry.function_id,
            slots: settings.slots,
            batch: settings.batching.map_or(1, |batching| batching.max_size),
            is_single_use: settings.single_use,
            never_polls: function.never_polls,
            is_up: false,
            was_ready: false,
            must_end: false,
            exit: None,
            poll: None,
            running: BTreeMap::new(),
        };
        let id = entry.container_id;
        self.containers.insert(id, model);
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
    }

    pub(super) fn container_step(&mut self, id: ContainerId, step: ContainerStep) {
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
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
                if container.running.get(&input_id) == Some(&attempt) {
                    container.running.remove(&input_id);
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
                if !self.mishap(20)
                    && let Some(container) = self.containers.get_mut(&id)
                    && let Some(attempt) = container.running.remove(&input_id)
                {
                    self.report(id, input_id, attempt, OutcomeStatus::Terminated);
                    self.after_input(id);
                }
            }
            ContainerStep::Die(exit) => self.die(id, exit),
            ContainerStep::TellExit => {
                if let Some(exit) = container.exit.clone() {
                    self.after_ms(0, Action::Event(Event::WorkerExited { container_id: id, exit }));
                    self.after_ms(EXIT_REPEAT_MS, Action::Container(id, ContainerStep::TellExit));
                }
            }
        }
    }

    fn booted(&mut self, id: ContainerId) {
        let function_id = self.containers[&id].function_id;
        let never_polls = self.containers[&id].never_polls;
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
        container.is_up = true;
        container.was_ready = true;
        if never_polls {
            self.after_ms(1, Action::Event(Event::ServerReady { container_id: id }));
        } else {
            self.poll(id);
        }
    }

    fn poll(&mut self, id: ContainerId) {
        let poll = PollId(self.number());
        let greedy = self.mishap(3);
        let modest = self.random.percent(20);
        let Some(container) = self.containers.get_mut(&id) else {
            return;
        };
        // A runtime polls when it has a free slot; a strange one polls all the same.
        let wants = container.has_free_slot() || greedy;
        if !container.is_up || container.exit.is_some() || container.must_end || container.never_polls || !wants {
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
            if container.running.insert(delivery.input_id, delivery.attempt).is_some() {
                return Err(format!(
                    "{} was given to {id}, which runs it already",
                    delivery.input_id
                ));
            }
        }
        let is_single_use = container.is_single_use;
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

    fn report(&mut self, id: ContainerId, input_id: InputId, attempt: AttemptNumber, status: OutcomeStatus) {
        let times = if self.mishap(5) { 2 } else { 1 };
        for _ in 0..times {
            let delay = u64::from(self.random.below(20));
            let outcome = Outcome::decided(status, "");
            let outputs = vec![AttemptReport {
                input_id,
                attempt,
                outcome,
                started_at: None,
            }];
            let reply = self.ask(Ask::Nobody);
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

    fn die(&mut self, id: ContainerId, exit: ContainerExit) {
        let Some(container) = self
            .containers
            .get_mut(&id)
            .filter(|container| container.exit.is_none())
        else {
            return;
        };
        let (function_id, was_ready) = (container.function_id, container.was_ready);
        container.is_up = false;
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
