//! Recovery: the recorded past becomes state again.

use std::collections::BTreeMap;

use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{PendingInput, Recovered};
use ionian_domain::{ContainerId, Outcome, Timestamp};

use crate::breaks::Break;
use crate::state::{CallState, Input, InputState, State};
use crate::turn::Turn;

impl State {
    /// Folds what was recorded. Sent after every active function was announced, so that inputs find
    /// their pools; inputs of functions that are gone end here, and their containers are stopped.
    pub(crate) fn recovered(&mut self, now: Timestamp, recovered: Recovered, turn: &mut Turn) {
        assert!(!self.is_recovered, "the record is read once");
        self.is_recovered = true;
        turn.desired_changed = true;
        for pending in recovered.calls {
            let id = pending.call.id;
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
        for container in &recovered.containers {
            self.adopt(now, container, turn);
        }
        // What a container was given last may not have reached it.
        let mut last_delivery: BTreeMap<ContainerId, Timestamp> = BTreeMap::new();
        for (container_id, started_at) in recovered.inputs.iter().filter_map(|pending| pending.running) {
            let last = last_delivery.entry(container_id).or_insert(started_at);
            *last = started_at.max(*last);
        }
        for pending in &recovered.inputs {
            let is_last = pending.running.is_some_and(|(id, at)| last_delivery[&id] == at);
            self.recover_input(now, pending, is_last, turn);
        }
        for container in &recovered.containers {
            self.end_outdated(now, container.id, turn);
        }
    }

    /// The store gives inputs in the order of their creation, which is the order in which they wait.
    fn recover_input(&mut self, now: Timestamp, pending: &PendingInput, is_last: bool, turn: &mut Turn) {
        let call = self
            .calls
            .get_mut(&pending.call_id)
            .expect("a call with unfinished inputs is recovered before them");
        call.inputs.insert(pending.id);
        let running = pending.running.filter(|_| !self.is_broken(Break::RecoversAttempts));
        let state = match (running, pending.not_before) {
            // Whether its container is still there is decided below, once the input is known.
            (Some((container_id, _)), _) => InputState::Running { container_id },
            // One whose time has come is released when its pool is reconciled, in this turn.
            (None, Some(until)) => InputState::Delayed { until },
            (None, None) => InputState::Queued,
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
            InputState::Running { container_id } => match pending.running {
                Some((_, started_at)) if self.containers.contains_key(&container_id) => {
                    if !self.is_broken(Break::ForgetsWhatSurvivorsRun) {
                        self.adopt_input(now, pending.id, container_id, started_at, is_last);
                    }
                }
                Some(_) | None => self.attempt_lost(now, pending.id, "the server restarted", turn),
            },
            InputState::Delayed { until } => {
                pool.delayed.insert((until, pending.id));
            }
            InputState::Queued => {
                pool.queue.insert(arrival, pending.id);
            }
        }
    }
}
