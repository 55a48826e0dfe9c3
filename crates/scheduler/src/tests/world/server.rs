//! The server: takes a turn, commits it, checks it, lets answers and orders leave; and dies.

use std::time::Duration;

use ionian_domain::record::Write;
use ionian_domain::{ContainerId, InputId};

use super::containers::ContainerStep;
use super::ingress::IngressStep;
use super::workers::WorkerStep;
use super::{Action, Server, World};
use crate::Scheduler;
use crate::event::Event;
use crate::journal::{self, Entry};
use crate::state::Phase;
use crate::tests::ids::numbered;
use crate::tests::invariants::{self, Before};
use crate::turn::{Command, Reply, Turn};

/// Every so many turns what would be recovered is compared with what is.
const RECOVERY_SAMPLE: usize = 16;
/// Once nothing goes wrong any more, every so many turns the whole state is looked at.
const CALM_SAMPLE: usize = 4;

impl World {
    pub(super) fn turn(&mut self) -> Result<(), String> {
        let events = std::mem::take(&mut self.batch);
        let is_recovering =
            self.server == Server::Recovering && !events.iter().any(|e| matches!(e, Event::Recovered(_)));
        let mut before = if is_recovering {
            // Who speaks before the record was read is answered after it.
            self.early.extend(events.iter().cloned());
            Before::default()
        } else if self.early.is_empty() {
            Before::note(&self.scheduler.state, &events)
        } else {
            self.early.extend(events.iter().cloned());
            Before::note(&self.scheduler.state, &std::mem::take(&mut self.early))
        };
        before.is_recovering = is_recovering;
        before.is_cursory = !self.goes_wrong && !self.turns.is_multiple_of(CALM_SAMPLE);
        self.turns += 1;
        let next = &mut self.next_number;
        let mut entry = self.journal.is_some().then(|| Entry::begin(self.now, &events));
        let turn = self.scheduler.handle(self.now, events, &mut || {
            *next += 1;
            let id = numbered(*next);
            entry.as_mut().map_or(id, |entry| entry.drew(id))
        });
        if let (Some(journal), Some(entry)) = (&mut self.journal, entry) {
            journal.extend(entry.end(&turn));
        }
        self.wake_at = turn.wake_at;
        self.server = if before.is_recovering {
            Server::Recovering
        } else {
            Server::Up
        };
        let crash = self.mishap(1).then(|| self.random.percent(50));
        if crash == Some(false) {
            self.crash("before its commit");
            return Ok(());
        }
        self.note(|| format!("  {:?} {:?} {:?}", turn.writes, turn.replies, turn.commands));
        self.record
            .commit(&turn.writes)
            .map_err(|sentence| format!("the record refuses a write: {sentence}"))?;
        // Costs as much as the rest of the turn together.
        if !before.is_recovering && self.turns.is_multiple_of(RECOVERY_SAMPLE) {
            invariants::recovery(&self.scheduler.state, &self.record, self.now)?;
        }
        invariants::check(&self.scheduler.state, &self.record, self.now, &before, &turn)?;
        self.check_pauses(&turn)?;
        if crash == Some(true) {
            self.crash("after its commit");
            return Ok(());
        }
        self.release(turn)
    }

    fn release(&mut self, turn: Turn) -> Result<(), String> {
        for reply in turn.replies {
            match reply {
                Reply::Accepted(reply) => self.answered(reply, Ok(())),
                Reply::Refused { reply, refusal } => self.answered(reply, Err(refusal)),
                Reply::Deliver { poll, inputs } => self.delivered(poll, &inputs)?,
                Reply::KillSwitch { poll } => self.kill_switch(poll),
                Reply::Empty { poll } => self.poll_ended(poll),
            }
        }
        for command in turn.commands {
            match command {
                Command::OutputsReady { .. }
                | Command::Forget { .. }
                | Command::BackedOff { .. }
                | Command::RuntimeMissing { .. } => {}
                Command::CancelInputs {
                    container_id,
                    input_ids,
                } => {
                    for input_id in input_ids {
                        self.check_cancel(container_id, input_id)?;
                        let delay = 1 + u64::from(self.random.below(1_000));
                        self.after_ms(delay, Action::Container(container_id, ContainerStep::Cancel(input_id)));
                    }
                }
                Command::WebReady {
                    function_id,
                    container_id,
                } => {
                    self.check_web(container_id)?;
                    let delay = u64::from(self.random.below(60));
                    self.after_ms(delay, Action::WebNoted(container_id));
                    self.tell_ingress(function_id, IngressStep::Ready(container_id));
                }
                Command::WebDraining {
                    function_id,
                    container_id,
                } => {
                    self.tell_ingress(function_id, IngressStep::Draining(container_id));
                }
                Command::WebGone {
                    function_id,
                    container_id,
                } => {
                    self.tell_ingress(function_id, IngressStep::Gone(container_id));
                }
                Command::WebStartFailed { function_id, .. } => {
                    self.tell_ingress(function_id, IngressStep::StartFailed);
                }
            }
        }
        if turn.desired_changed {
            self.tell_workers();
        }
        Ok(())
    }

    /// The process dies. Its containers live on, and so do their workers.
    pub(super) fn crash(&mut self, when: &str) {
        self.note(|| format!("the server dies {when}"));
        self.crashes += 1;
        self.life += 1;
        self.server = Server::Down;
        self.wake_at = None;
        self.batch.clear();
        self.early.clear();
        self.ingress.clear();
        self.containers_lose_the_server();
        self.repeat_unanswered();
        let limit = if self.random.percent(80) { 3_000 } else { 40_000 };
        let delay = u64::from(self.random.below(limit));
        self.after_ms(delay, Action::Restart);
    }

    /// Starts again: announces what may run, and reads the record a moment later.
    pub(super) fn restart(&mut self) -> Result<(), String> {
        self.note(|| "the server starts".to_owned());
        self.server = Server::Recovering;
        self.generation = 0;
        self.scheduler = Scheduler::new(self.config.clone());
        if let Some(journal) = &mut self.journal {
            journal.extend(journal::opening(&self.config));
        }
        self.scheduler.state.broken = self.broken;
        for function in 0..self.functions.len() {
            self.functions[function].failures.0 = 0;
            if self.functions[function].is_active {
                let event = self.activation(function);
                self.batch.push(event);
            }
        }
        for index in 0..self.workers.len() {
            let delay = u64::from(self.random.below(2_000));
            self.after_ms(delay, Action::Worker(index, WorkerStep::Connect));
        }
        if self.random.percent(50) {
            self.read_record();
        } else {
            let delay = u64::from(self.random.below(1_500));
            self.after_ms(delay, Action::ReadRecord);
        }
        let life = self.life;
        self.turn()?;
        assert!(
            life == self.life || self.server == Server::Down,
            "only a crash begins a life"
        );
        Ok(())
    }

    pub(super) fn read_record(&mut self) {
        self.note(|| "the server reads its record".to_owned());
        self.batch.push(Event::Recovered(self.record.recovered()));
    }

    /// Requests are sent to containers of which it is known, in this life of the server, where they are.
    fn check_web(&self, container_id: ContainerId) -> Result<(), String> {
        let container = self.scheduler.state.containers.get(&container_id);
        let is_unknown = container.is_some_and(|container| container.adopted.is_some())
            && !self.located.contains(&(self.life, container_id));
        if is_unknown {
            return Err(format!("requests go to {container_id}, and nobody knows where that is"));
        }
        Ok(())
    }

    /// An attempt is not taken from a container that asked for work and never had it.
    fn check_cancel(&self, container_id: ContainerId, input_id: InputId) -> Result<(), String> {
        let state = &self.scheduler.state;
        let attempt = state
            .containers
            .get(&container_id)
            .and_then(|container| container.running.get(&input_id))
            .map(|running| running.attempt);
        let has_polled = self
            .containers
            .get(&container_id)
            .is_some_and(|container| container.polled_in == Some(self.life));
        match attempt {
            Some(attempt) if has_polled && !self.received.contains(&(input_id, attempt)) => {
                Err(format!("{input_id} was waited for, and {container_id} never got it"))
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn count_failure(&mut self, container_id: ContainerId) {
        let now = self.now;
        let Some(container) = self.scheduler.state.containers.get(&container_id) else {
            return;
        };
        let (function_id, definition_id, phase) = (container.function_id, container.definition_id, container.phase);
        let function = self.function_of(function_id);
        if function.settings.definition_id == definition_id && matches!(phase, Phase::Starting { .. }) {
            function.failures = (function.failures.0 + 1, now);
        }
    }

    /// Starts of a function that cannot be set up keep growing distances.
    fn check_pauses(&mut self, turn: &Turn) -> Result<(), String> {
        for write in &turn.writes {
            let Write::ContainerCreated { function_id, .. } = write else {
                continue;
            };
            let now = self.now;
            let Some(function) = self.functions.iter().find(|function| function.id == *function_id) else {
                continue;
            };
            let (failures, last) = function.failures;
            if failures >= 2 && now.since(last) < Duration::from_secs(4) {
                return Err(format!(
                    "{function_id} was started again at once after {failures} failures"
                ));
            }
        }
        Ok(())
    }
}
