//! Recovery: the recorded past becomes state again.

use ionian_domain::container::ContainerExit;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{PendingInput, Recovered, Write};
use ionian_domain::{Outcome, Timestamp};

use crate::breaks::Break;
use crate::state::{CallState, Input, InputState, State};
use crate::turn::Turn;

impl State {
    /// Folds what was recorded. Sent after every active function was announced, so that inputs find
    /// their pools; inputs of functions that are gone end here.
    ///
    /// Announced functions may have started containers already, and the record was read after that: what
    /// is known here is not from the past, and stays.
    pub(crate) fn recovered(&mut self, now: Timestamp, recovered: Recovered, turn: &mut Turn) {
        for pending in recovered.calls {
            let id = pending.call.id;
            if self.calls.contains_key(&id) {
                continue;
            }
            if pending.input_count == pending.finished_count {
                self.quiet_calls.insert((now, id));
            }
            let call = CallState {
                input_count: pending.input_count,
                finished_count: pending.finished_count,
                last_sequence: pending.last_sequence,
                ..CallState::new(now, pending.call)
            };
            self.calls.insert(id, call);
        }
        // The embedded worker's containers end with the process that started them; what they ran was lost.
        for container in recovered.containers {
            if !self.containers.contains_key(&container.id) {
                let exit = ContainerExit::Lost;
                turn.writes.push(Write::ContainerEnded {
                    container_id: container.id,
                    exit,
                    at: now,
                });
            }
        }
        for pending in recovered.inputs {
            if !self.inputs.contains_key(&pending.id) {
                self.recover_input(now, &pending, turn);
            }
        }
    }

    /// The store gives inputs in the order of their creation, which is the order in which they wait.
    fn recover_input(&mut self, now: Timestamp, pending: &PendingInput, turn: &mut Turn) {
        let call = self
            .calls
            .get_mut(&pending.call_id)
            .expect("a call with unfinished inputs is recovered before them");
        call.inputs.insert(pending.id);
        let running = pending.running.filter(|_| !self.is_broken(Break::RecoversAttempts));
        let state = match (running, pending.not_before) {
            // Its container is gone: decided below, once the input is known.
            (Some((container_id, _)), _) => InputState::Running { container_id },
            (None, Some(until)) if until > now => InputState::Delayed { until },
            (None, Some(_) | None) => InputState::Queued,
        };
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        self.inputs.insert(
            pending.id,
            Input {
                call_id: pending.call_id,
                function_id: pending.function_id,
                index: pending.index,
                arrival,
                attempt: pending.attempt,
                retries_used: pending.retries_used,
                state,
                waiting_since: pending.not_before.unwrap_or(pending.created_at),
            },
        );
        let Some(pool) = self.pools.get_mut(&pending.function_id).filter(|pool| pool.active) else {
            let outcome = Outcome::decided(OutcomeStatus::Terminated, "the input's app was stopped");
            self.finish_input(now, pending.id, None, None, outcome, turn);
            return;
        };
        self.dirty.insert(pending.function_id);
        match state {
            InputState::Running { .. } => self.attempt_lost(now, pending.id, "the server restarted", turn),
            InputState::Delayed { until } => {
                pool.delayed.insert((until, pending.id));
            }
            InputState::Queued => {
                pool.queue.insert(arrival, pending.id);
            }
        }
    }
}
