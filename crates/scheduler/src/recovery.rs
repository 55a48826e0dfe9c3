//! Recovery: the recorded past becomes state again.

use std::collections::BTreeSet;

use ionian_domain::container::ContainerExit;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{Recovered, Write};
use ionian_domain::{Outcome, Timestamp};

use crate::state::{CallState, Input, InputState, State};
use crate::turn::Turn;

impl State {
    /// Folds what was recorded. Sent after every active function was announced, so that inputs find
    /// their pools; inputs of functions that are gone end here.
    pub(crate) fn recovered(&mut self, now: Timestamp, recovered: Recovered, turn: &mut Turn) {
        for pending in recovered.calls {
            self.calls.insert(
                pending.call.id,
                CallState {
                    call: pending.call,
                    inputs: BTreeSet::new(),
                    input_count: pending.input_count,
                    finished_count: pending.finished_count,
                    last_sequence: pending.last_sequence,
                    last_active: now,
                },
            );
        }
        // The embedded worker's containers end with the process that started them; what they ran was lost.
        for container in recovered.containers {
            turn.writes.push(Write::ContainerEnded { container_id: container.id, exit: ContainerExit::Lost, at: now });
        }
        let mut inputs = recovered.inputs;
        inputs.sort_by_key(|input| (input.created_at, input.call_id, input.index));
        for pending in inputs {
            let Some(call) = self.calls.get_mut(&pending.call_id) else { continue };
            call.inputs.insert(pending.id);
            let until = pending.not_before.filter(|until| *until > now && pending.running.is_none());
            self.inputs.insert(
                pending.id,
                Input {
                    call_id: pending.call_id,
                    function_id: pending.function_id,
                    index: pending.index,
                    attempt: pending.attempt,
                    retries_used: pending.retries_used,
                    lost_attempts: 0,
                    state: until.map_or(InputState::Queued, |until| InputState::Delayed { until }),
                    created_at: pending.created_at,
                },
            );
            let Some(pool) = self.pools.get_mut(&pending.function_id) else {
                let outcome = Outcome::decided(OutcomeStatus::Terminated, "the input's app was stopped");
                self.finish_input(now, pending.id, None, None, outcome, turn);
                continue;
            };
            self.dirty.insert(pending.function_id);
            match (pending.running, until) {
                (Some(_), _) => {
                    self.attempt_lost(now, pending.id, "the server restarted", turn);
                }
                (None, Some(until)) => {
                    pool.delayed.insert((until, pending.id));
                }
                (None, None) => {
                    pool.queue.push_back(pending.id);
                    pool.batch_opened.get_or_insert(pending.created_at);
                }
            }
        }
    }
}
