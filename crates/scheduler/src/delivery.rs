//! Delivery: polls, and how waiting inputs reach the containers that poll.

use ionian_domain::container::StopReason;
use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Timestamp};

use crate::breaks::Break;
use crate::event::{PollId, PoolSettings};
use crate::state::{Arrival, InputState, Phase, Pool, RunningInput, State, count};
use crate::turn::{Delivery, Reply, Turn};

impl PoolSettings {
    /// Inputs that one answer may carry.
    fn batch_size(&self) -> u32 {
        self.batching.map_or(1, |batching| batching.max_size.max(1))
    }

    /// Inputs that one container holds at most: a batch takes one slot.
    pub(crate) fn capacity(&self) -> u32 {
        self.slots.max(1).saturating_mul(self.batch_size())
    }

    /// Inputs (or requests) per container that the autoscaler plans with.
    pub(crate) fn planned_load(&self) -> u32 {
        // The ingress fills a container to its slots before it asks for another.
        let slots = if self.is_web { self.slots } else { self.target_slots };
        slots.max(1).saturating_mul(self.batch_size())
    }
}

impl Pool {
    /// Until when the inputs that wait may wait for more to share a batch with; `None` once it is time.
    pub(crate) fn batch_opens_at(&self, state: &State) -> Option<Timestamp> {
        let batching = self.settings.batching?;
        let (_, oldest) = self.queue.first_key_value()?;
        let is_full = self.queue.len() >= batching.max_size as usize;
        (!is_full).then(|| state.inputs[oldest].waiting_since + batching.wait)
    }
}

impl State {
    pub(crate) fn poll_started(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        poll: PollId,
        max_inputs: u32,
        turn: &mut Turn,
    ) {
        if !self.containers.contains_key(&container_id) {
            // It was given up while this poll travelled: it must end.
            turn.replies.push(Reply::KillSwitch { poll });
            return;
        }
        self.adopted_polls(now, container_id, turn);
        self.container_seen(now, container_id, turn);
        let container = self.containers.get_mut(&container_id).expect("it was just seen");
        container.silent_since = None;
        self.dirty.insert(container.function_id);
        if let Some((superseded, _)) = container.poll.replace((poll, max_inputs.max(1))) {
            // A runtime has one poll at a time; the older one is a retry whose answer would be lost.
            turn.replies.push(Reply::Empty { poll: superseded });
        }
        self.container_ready(now, container_id, turn);
        self.end_if_drained(now, container_id, turn);
    }

    pub(crate) fn poll_dropped(&mut self, now: Timestamp, container_id: ContainerId, poll: PollId) {
        if let Some(container) = self.containers.get_mut(&container_id)
            && container.poll.is_some_and(|(current, _)| current == poll)
        {
            container.take_poll(now);
            self.dirty.insert(container.function_id);
        }
    }

    /// Takes back inputs that never reached the container they were handed to.
    pub(crate) fn delivery_lost(
        &mut self,
        now: Timestamp,
        container_id: ContainerId,
        inputs: &[InputId],
        turn: &mut Turn,
    ) {
        for input_id in inputs {
            if let Some(container) = self.containers.get_mut(&container_id) {
                container.running.remove(input_id);
                container.note_idle(now);
                self.dirty.insert(container.function_id);
            }
            let is_held = |state| state == InputState::Running { container_id };
            if self.inputs.get(input_id).is_some_and(|input| is_held(input.state)) {
                self.attempt_lost(now, *input_id, "its poll was cut off", turn);
            }
        }
        self.end_if_drained(now, container_id, turn);
    }

    /// Hands waiting inputs of a pool to containers that poll for them, oldest container first.
    pub(crate) fn deliver(&mut self, now: Timestamp, function_id: FunctionId, turn: &mut Turn) {
        self.release_delayed(now, function_id);
        let Some(pool) = self.pools.get(&function_id) else {
            return;
        };
        if pool.queue.is_empty() {
            return;
        }
        let mut polling: Vec<(Timestamp, ContainerId)> = self
            .containers_in(pool)
            .filter(|(_, container)| {
                let takes_work = container.phase == Phase::Ready
                    || self.is_broken(Break::DeliversToDraining) && matches!(container.phase, Phase::Draining { .. });
                takes_work && container.definition_id == pool.settings.definition_id && container.poll.is_some()
            })
            .map(|(id, container)| (container.created_at, id))
            .collect();
        polling.sort_unstable();
        for (_, container_id) in polling {
            let pool = &self.pools[&function_id];
            if pool.queue.is_empty() || pool.batch_opens_at(self).is_some_and(|opens| now < opens) {
                return;
            }
            self.deliver_to(now, function_id, container_id, turn);
        }
    }

    fn deliver_to(&mut self, now: Timestamp, function_id: FunctionId, container_id: ContainerId, turn: &mut Turn) {
        let ignores_slots = self.is_broken(Break::IgnoresSlots);
        let ignores_poll = self.is_broken(Break::IgnoresPollLimit);
        let pool = self.pools.get_mut(&function_id).expect("deliver chose a known pool");
        let container = self
            .containers
            .get_mut(&container_id)
            .expect("deliver chose a known container");
        let (_, max_inputs) = container.poll.expect("deliver chose a polling container");
        let free = pool.settings.capacity().saturating_sub(count(container.running.len()));
        let free = if ignores_slots {
            pool.settings.batch_size()
        } else {
            free
        };
        let max_inputs = if ignores_poll { u32::MAX } else { max_inputs };
        let wanted = pool.settings.batch_size().min(max_inputs).min(free);
        // An attempt that the container was told to let go of is cancelled by its input's name, so the
        // next attempt of the same input must not be there with it.
        let chosen: Vec<(Arrival, InputId)> = pool
            .queue
            .iter()
            .filter(|(_, input_id)| !container.running.contains_key(input_id))
            .take(wanted as usize)
            .map(|(arrival, input_id)| (*arrival, *input_id))
            .collect();
        if chosen.is_empty() {
            return;
        }
        let (poll, _) = container.take_poll(now).expect("deliver chose a polling container");
        let deadline = now + pool.settings.timeout;
        let mut inputs = Vec::with_capacity(chosen.len());
        for (arrival, input_id) in chosen {
            pool.queue.remove(&arrival);
            let input = self.inputs.get_mut(&input_id).expect("a queued input is known");
            let call = self
                .calls
                .get(&input.call_id)
                .expect("an unfinished input keeps its call in memory");
            input.state = InputState::Running { container_id };
            let running = RunningInput {
                attempt: input.attempt,
                deadline,
                abandoned_until: None,
                is_doubtful: false,
            };
            container.running.insert(input_id, running);
            turn.writes.push(Write::InputStarted {
                input_id,
                container_id,
                attempt: input.attempt,
                at: now,
            });
            inputs.push(Delivery {
                input_id,
                call_id: input.call_id,
                index: input.index,
                attempt: input.attempt,
                invocation: call.call.invocation,
            });
        }
        container.idle_since = None;
        if pool.settings.single_use {
            // It ends by itself after this input.
            container.phase = Phase::Draining {
                reason: StopReason::ScaleDown,
                deadline: deadline + self.config.drain_grace,
                awaits_ingress: false,
            };
        }
        turn.replies.push(Reply::Deliver { poll, inputs });
    }

    fn release_delayed(&mut self, now: Timestamp, function_id: FunctionId) {
        let Some(pool) = self.pools.get_mut(&function_id) else {
            return;
        };
        while let Some((until, input_id)) = pool.delayed.first().copied()
            && until <= now
        {
            pool.delayed.remove(&(until, input_id));
            let input = self.inputs.get_mut(&input_id).expect("a delayed input is known");
            input.state = InputState::Queued;
            pool.queue.insert(input.arrival, input_id);
        }
    }
}
