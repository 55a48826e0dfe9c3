//! The server: takes a turn, commits it, checks it, lets answers and orders leave; and dies.

use std::time::Duration;

use ionian_domain::ContainerId;
use ionian_domain::record::Write;

use super::containers::ContainerStep;
use super::ingress::IngressStep;
use super::{Action, Server, World};
use crate::Scheduler;
use crate::event::Event;
use crate::state::{InputState, Phase};
use crate::tests::ids::numbered;
use crate::tests::invariants::{self, Before};
use crate::turn::{Command, Reply, Turn};

impl World {
    pub(super) fn turn(&mut self) -> Result<(), String> {
        let events = std::mem::take(&mut self.batch);
        let mut before = Before::note(&self.scheduler.state, &events);
        before.is_recovering =
            self.server == Server::Recovering && !events.iter().any(|e| matches!(e, Event::Recovered(_)));
        self.turns += 1;
        let next = &mut self.next_number;
        let turn = self.scheduler.handle(self.now, events, &mut || {
            *next += 1;
            numbered(*next)
        });
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
                Command::OutputsReady { .. } | Command::Forget { .. } | Command::BackedOff { .. } => {}
                Command::CancelInputs {
                    container_id,
                    input_ids,
                } => {
                    for input_id in input_ids {
                        let delay = 1 + u64::from(self.random.below(1_000));
                        self.after_ms(delay, Action::Container(container_id, ContainerStep::Cancel(input_id)));
                    }
                }
                Command::WebReady {
                    function_id,
                    container_id,
                } => {
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
            self.generation += 1;
            let entries = self.scheduler.desired();
            let delay = 1 + u64::from(self.random.below(30));
            self.after_ms(
                delay,
                Action::WorkerSees {
                    generation: self.generation,
                    entries,
                },
            );
        }
        Ok(())
    }

    /// The process dies, and its containers with it.
    fn crash(&mut self, when: &str) {
        self.note(|| format!("the server dies {when}"));
        self.crashes += 1;
        self.life += 1;
        self.server = Server::Down;
        self.wake_at = None;
        self.batch.clear();
        self.containers.clear();
        self.polls.clear();
        self.ingress.clear();
        self.repeat_unanswered();
        let delay = u64::from(self.random.below(3_000));
        self.after_ms(delay, Action::Restart);
    }

    /// Recovers, and compares what came back with what the record holds.
    pub(super) fn restart(&mut self) -> Result<(), String> {
        self.server = Server::Recovering;
        self.generation = 0;
        self.seen_generation = 0;
        self.scheduler = Scheduler::new(self.config.clone());
        self.scheduler.state.broken = self.broken;
        for function in 0..self.functions.len() {
            self.functions[function].failures.0 = 0;
            if self.functions[function].is_active {
                let event = self.activation(function);
                self.batch.push(event);
            }
        }
        if self.random.percent(50) {
            // Containers may start before the record is read.
            let life = self.life;
            self.turn()?;
            if life != self.life {
                return Ok(());
            }
        }
        let was = self.record.pending.clone();
        let recovered = self.record.recovered();
        self.note(|| "the server recovers".to_owned());
        self.batch.push(Event::Recovered(recovered));
        self.batch.push(Event::WorkerConnected {
            worker_id: numbered(1),
            capacity: ionian_domain::worker::WorkerCapacity {
                cpu_millis: 2000,
                memory_mib: 4096,
                max_starting: 2,
            },
        });
        let life = self.life;
        self.turn()?;
        if life != self.life {
            return Ok(());
        }
        for (id, row) in was {
            let Some(input) = self.scheduler.state.inputs.get(&id) else {
                continue;
            };
            let waits = match input.state {
                InputState::Queued | InputState::Delayed { .. } => true,
                InputState::Running { .. } => false,
            };
            let attempt = if row.running.is_some() {
                row.attempt.next()
            } else {
                row.attempt
            };
            if !waits || input.attempt != attempt || input.retries_used != row.retries_used {
                return Err(format!("{id} came back as {input:?}, and was {row:?}"));
            }
        }
        Ok(())
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
