//! What must be true after every turn, of scenarios and of the simulation.
//!
//! A violation is a sentence, so that a test can ask for a particular one: each has a deliberate mistake
//! (`breaks`) that it catches, shown in `simulation`.

use std::collections::{BTreeMap, BTreeSet};

use ionian_domain::record::Write;
use ionian_domain::{ContainerId, FunctionId, InputId, Timestamp, WorkerId};

use super::record::Record;
use crate::Scheduler;
use crate::event::{Event, PollId, ReplyId};
use crate::placement::START_BURST;
use crate::state::{Container, InputState, Phase, State};
use crate::turn::{Reply, Turn};

/// What was true before a turn, as far as the turn is judged by it.
#[derive(Default)]
pub(super) struct Before {
    /// The server started and has not yet read its record.
    pub is_recovering: bool,
    /// The whole state is looked at another time.
    pub is_cursory: bool,
    ending: BTreeSet<ContainerId>,
    polls: BTreeMap<PollId, (ContainerId, u32)>,
    asked: BTreeMap<ReplyId, Asked>,
    containers: BTreeSet<ContainerId>,
    heard: BTreeSet<WorkerId>,
}

enum Asked {
    Call(ionian_domain::CallId, Vec<InputId>),
    Inputs(Vec<InputId>),
    Outputs(ContainerId),
    Other,
}

impl Before {
    pub(super) fn note(state: &State, events: &[Event]) -> Self {
        let mut before = Self::default();
        for (id, container) in &state.containers {
            before.containers.insert(*id);
            if !container.is_live() {
                before.ending.insert(*id);
            }
            if let Some((poll, max_inputs)) = container.poll {
                before.polls.insert(poll, (*id, max_inputs));
            }
        }
        for event in events {
            match event {
                Event::CallStarted { call, inputs, reply } => {
                    before
                        .asked
                        .insert(*reply, Asked::Call(call.id, inputs.iter().map(|i| i.id).collect()));
                }
                Event::OutputsReported {
                    container_id, reply, ..
                } => {
                    before.asked.insert(*reply, Asked::Outputs(*container_id));
                }
                Event::InputsPut { inputs, reply, .. } => {
                    before
                        .asked
                        .insert(*reply, Asked::Inputs(inputs.iter().map(|i| i.id).collect()));
                }
                Event::CallInputsFinished { reply, .. }
                | Event::CallCancelled { reply, .. }
                | Event::ContainerFailed { reply, .. }
                | Event::ContainerStopRequested { reply, .. }
                | Event::AutoscalerUpdated { reply, .. } => {
                    before.asked.insert(*reply, Asked::Other);
                }
                Event::PollStarted {
                    container_id,
                    poll,
                    max_inputs,
                } => {
                    before.polls.insert(*poll, (*container_id, *max_inputs));
                }
                Event::WorkerConnected { worker_id, .. } | Event::WorkerHeard { worker_id } => {
                    before.heard.insert(*worker_id);
                }
                // Reports that came before it are taken after it.
                Event::Recovered(recovered) => before.containers.extend(recovered.containers.iter().map(|c| c.id)),
                Event::FunctionActivated { .. }
                | Event::FunctionDeactivated { .. }
                | Event::CallConsumed { .. }
                | Event::PollDropped { .. }
                | Event::DeliveryLost { .. }
                | Event::ServerReady { .. }
                | Event::WorkerStarted { .. }
                | Event::WorkerExited { .. }
                | Event::WebDemand { .. }
                | Event::Tick
                | Event::ShuttingDown => {}
            }
        }
        before
    }
}

/// Checks a turn whose writes `record` has taken.
pub(super) fn check(
    state: &State,
    record: &Record,
    now: Timestamp,
    before: &Before,
    turn: &Turn,
) -> Result<(), String> {
    if before.is_recovering {
        return before_recovery(state, turn);
    }
    answers(state, record, before, turn)?;
    starts(state, now, turn)?;
    heard(state, now, before)?;
    if before.is_cursory {
        return time(state, now, turn);
    }
    let recorded: BTreeSet<&ContainerId> = record.live_containers().collect();
    let known: BTreeSet<&ContainerId> = state.containers.keys().collect();
    ensure(known == recorded, || {
        "the containers differ from those that the record says exist".to_owned()
    })?;
    inputs(state, record, now)?;
    calls(state, record)?;
    pools(state, now)?;
    containers(state, now)?;
    workers(state, now)?;
    time(state, now, turn)
}

/// What a restart would recover is what is there: the same inputs in the same places, and the same
/// containers with the same work.
pub(super) fn recovery(state: &State, record: &Record, now: Timestamp) -> Result<(), String> {
    let mut scheduler = Scheduler::new(state.config.clone());
    scheduler.state.broken = state.broken;
    let active = state.pools.iter().filter(|(_, pool)| pool.active);
    let mut events: Vec<Event> = active
        .map(|(id, pool)| Event::FunctionActivated {
            function_id: *id,
            settings: pool.settings.clone(),
        })
        .collect();
    events.push(Event::Recovered(record.recovered()));
    scheduler.handle(now, events, &mut || unreachable!("no worker is connected"));
    let back = &scheduler.state;
    ensure(back.containers.keys().eq(state.containers.keys()), || {
        "a restart would not find the containers that there are".to_owned()
    })?;
    for (id, container) in &state.containers {
        let found = &back.containers[id];
        let same = found.worker_id == container.worker_id
            && found.function_id == container.function_id
            && found.definition_id == container.definition_id
            && found.created_at == container.created_at;
        ensure(same, || {
            format!("{id} would come back as another: {found:?} and {container:?}")
        })?;
        let work = |container: &Container| -> Vec<_> {
            let running = container.running.iter();
            let kept = running.filter(|(_, running)| running.abandoned_until.is_none());
            kept.map(|(input, running)| (*input, running.attempt)).collect()
        };
        let is_stopped = |container: &Container| matches!(container.phase, Phase::Stopping { .. });
        ensure(is_stopped(container) || work(found) == work(container), || {
            format!("{id} would come back with other work: {found:?} and {container:?}")
        })?;
        let pool = &state.pools[&container.function_id];
        let is_outdated = !pool.active || pool.settings.definition_id != container.definition_id;
        ensure(!is_outdated || !found.is_live(), || {
            format!("{id} is of a definition that is over, and would come back for good")
        })?;
    }
    for (id, input) in &state.inputs {
        let Some(found) = back.inputs.get(id) else {
            return Err(format!("{id} would be lost by a restart"));
        };
        let same = found.state == input.state
            && found.attempt == input.attempt
            && found.retries_used == input.retries_used
            && found.call_id == input.call_id;
        ensure(same, || {
            format!("{id} would come back as another: {found:?} and {input:?}")
        })?;
    }
    for (id, pool) in state.pools.iter().filter(|(_, pool)| pool.active) {
        let same = back.pools[id].queue.values().eq(pool.queue.values());
        ensure(same, || format!("the queue of {id} would come back in another order"))?;
    }
    Ok(())
}

fn ensure(holds: bool, sentence: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(sentence()) }
}

/// Who asks is answered once; nothing leaves before its write; polls get what they asked for.
fn answers(state: &State, record: &Record, before: &Before, turn: &Turn) -> Result<(), String> {
    let mut open: BTreeSet<ReplyId> = before.asked.keys().copied().collect();
    let mut polls: BTreeSet<PollId> = before.polls.keys().copied().collect();
    for reply in &turn.replies {
        match reply {
            Reply::Accepted(id) => {
                ensure(open.remove(id), || format!("{id:?} was answered twice or never asked"))?;
                let (call, inputs) = match &before.asked[id] {
                    Asked::Call(call, inputs) => (Some(call), inputs.as_slice()),
                    Asked::Inputs(inputs) => (None, inputs.as_slice()),
                    Asked::Outputs(container_id) => {
                        let is_known =
                            before.containers.contains(container_id) || state.containers.contains_key(container_id);
                        ensure(is_known, || {
                            format!("the report of {container_id} was taken, which is fenced")
                        })?;
                        (None, &[][..])
                    }
                    Asked::Other => (None, &[][..]),
                };
                if let Some(call) = call {
                    ensure(record.calls.contains_key(call), || {
                        format!("{call} was accepted and not recorded")
                    })?;
                }
                for input in inputs {
                    ensure(record.knows_input(input), || {
                        format!("{input} was accepted and not recorded")
                    })?;
                }
            }
            Reply::Refused { reply, .. } => {
                ensure(open.remove(reply), || {
                    format!("{reply:?} was answered twice or never asked")
                })?;
            }
            Reply::Deliver { poll, inputs } => {
                ensure(polls.remove(poll), || {
                    format!("{poll:?} was answered twice or never asked")
                })?;
                let (container_id, max_inputs) = before.polls[poll];
                ensure(inputs.len() <= max_inputs as usize, || {
                    format!("{poll:?} got more than it asked for")
                })?;
                ensure(!before.ending.contains(&container_id), || {
                    format!("{container_id} got work while it ends")
                })?;
                for input in inputs {
                    let recorded = record.pending.get(&input.input_id).and_then(|row| row.running);
                    ensure(recorded.is_some_and(|(holder, _)| holder == container_id), || {
                        format!("{} was delivered before it was recorded as running", input.input_id)
                    })?;
                }
            }
            Reply::KillSwitch { poll } | Reply::Empty { poll } => {
                ensure(polls.remove(poll), || {
                    format!("{poll:?} was answered twice or never asked")
                })?;
            }
        }
    }
    ensure(open.is_empty(), || format!("{open:?} got no answer"))?;
    // A poll that is neither answered nor kept nor withdrawn would hang for its whole hold.
    let kept: BTreeSet<PollId> = state
        .containers
        .values()
        .filter_map(|c| c.poll)
        .map(|(poll, _)| poll)
        .collect();
    ensure(kept.is_subset(&polls), || {
        "a poll that was answered is still kept".to_owned()
    })
}

/// An input that was accepted is exactly one of queued, delayed, running and finished, in memory as in
/// the record.
fn inputs(state: &State, record: &Record, now: Timestamp) -> Result<(), String> {
    ensure(state.inputs.keys().eq(record.pending.keys()), || {
        let memory: BTreeSet<_> = state.inputs.keys().collect();
        let recorded: BTreeSet<_> = record.pending.keys().collect();
        format!(
            "unfinished inputs differ from the record in {:?}",
            memory.symmetric_difference(&recorded)
        )
    })?;
    let mut waiting = 0;
    for (id, input) in &state.inputs {
        let row = &record.pending[id];
        let same = input.attempt == row.attempt
            && input.retries_used == row.retries_used
            && input.call_id == row.call_id
            && input.function_id == row.function_id
            && input.index == row.index;
        let same_state = match input.state {
            InputState::Queued => row.running.is_none() && row.not_before.is_none_or(|until| until <= now),
            InputState::Delayed { until } => row.running.is_none() && row.not_before == Some(until) && until > now,
            InputState::Running { container_id } => row.running.is_some_and(|(holder, _)| holder == container_id),
        };
        ensure(same && same_state, || {
            format!("{id} differs from its record: {input:?} and {row:?}")
        })?;
        let Some(pool) = state.pools.get(&input.function_id) else {
            return Err(format!("{id} waits for a function that is not there"));
        };
        let is_in_place = match input.state {
            InputState::Queued => pool.queue.get(&input.arrival) == Some(id),
            InputState::Delayed { until } => pool.delayed.contains(&(until, *id)),
            InputState::Running { container_id } => state
                .containers
                .get(&container_id)
                .and_then(|container| container.running.get(id))
                .is_some_and(|running| running.attempt == input.attempt),
        };
        ensure(is_in_place, || {
            format!("{id} is lost: nobody holds it in its state {:?}", input.state)
        })?;
        waiting += usize::from(!matches!(input.state, InputState::Running { .. }));
    }
    let held: usize = state
        .pools
        .values()
        .map(|pool| pool.queue.len() + pool.delayed.len())
        .sum();
    ensure(waiting == held, || {
        format!("{waiting} inputs wait, and pools hold {held}")
    })?;
    for pool in state.pools.values() {
        let positions: Vec<usize> = pool.queue.values().map(|id| record.pending[id].position).collect();
        ensure(positions.is_sorted(), || {
            "a queue is not in the order in which its inputs came".to_owned()
        })?;
    }
    Ok(())
}

fn calls(state: &State, record: &Record) -> Result<(), String> {
    for id in &record.open {
        let row = &record.calls[id];
        let Some(call) = state.calls.get(id) else {
            return Err(format!("{id} is open and was forgotten"));
        };
        let same = call.call == row.call
            && call.input_count == row.input_count
            && call.finished_count == row.finished_count
            && call.last_sequence == row.last_sequence;
        ensure(same, || format!("{id} differs from its record: {call:?} and {row:?}"))?;
    }
    for (id, call) in &state.calls {
        let is_open = record.open.contains(id);
        ensure(is_open || call.is_closed() && call.inputs.is_empty(), || {
            format!("{id} is open, and its record says that it is finished")
        })?;
        let is_quiet = state.quiet_calls.contains(&(call.last_active, *id));
        ensure(is_quiet == call.inputs.is_empty(), || {
            format!("{id} is not indexed by its last activity")
        })?;
        ensure(call.inputs.iter().all(|input| state.inputs.contains_key(input)), || {
            format!("{id} counts an input that is not there")
        })?;
    }
    ensure(
        state.quiet_calls.iter().all(|(_, id)| state.calls.contains_key(id)),
        || "a forgotten call is still indexed".to_owned(),
    )
}

fn pools(state: &State, now: Timestamp) -> Result<(), String> {
    ensure(state.dirty.is_empty(), || {
        "a touched pool was not reconciled".to_owned()
    })?;
    let mut deadlines = BTreeSet::new();
    let mut line = BTreeMap::new();
    for (id, pool) in &state.pools {
        let expected = state.pool_deadline(now, pool);
        ensure(pool.deadline == expected, || {
            format!(
                "the deadline of {id} is filed as {:?} and is {expected:?}",
                pool.deadline
            )
        })?;
        deadlines.extend(pool.deadline.map(|at| (at, *id)));
        line.extend(pool.ticket.map(|ticket| (ticket, *id)));
        let is_paused = pool.start_not_before.is_some_and(|until| until > now);
        let is_short = state.shortfall(pool, true) > 0 && !is_paused && !state.shutting_down;
        ensure(pool.ticket.is_some() == is_short, || {
            format!("{id} should stand in line: {is_short}")
        })?;
        ensure(pool.active || !pool.containers.is_empty(), || {
            format!("{id} is over and still kept")
        })?;
    }
    ensure(deadlines == state.deadlines, || {
        "deadlines are filed for pools that have none".to_owned()
    })?;
    ensure(line == state.line, || {
        "the line holds pools that do not stand in it".to_owned()
    })?;
    let is_needed = |(id, queued): (&FunctionId, &u32)| *queued > 0 && !state.pools.contains_key(id);
    ensure(state.web_waiting.iter().all(is_needed), || {
        "requests are kept for a function that has a pool, or where none wait".to_owned()
    })
}

fn containers(state: &State, now: Timestamp) -> Result<(), String> {
    let mut by_function: BTreeMap<FunctionId, BTreeSet<ContainerId>> = BTreeMap::new();
    for (id, container) in &state.containers {
        by_function.entry(container.function_id).or_default().insert(*id);
        let Some(pool) = state.pools.get(&container.function_id) else {
            return Err(format!("the pool of {id} is gone"));
        };
        if container.definition_id == pool.settings.definition_id {
            ensure(container.running.len() <= pool.settings.capacity() as usize, || {
                format!("{id} runs {} inputs, more than its slots", container.running.len())
            })?;
        }
        for (input, running) in &container.running {
            let overruns = running.abandoned_until.is_none() && running.deadline <= now;
            ensure(!overruns, || format!("{input} overran its time on {id}"))?;
            let stuck = running.abandoned_until.is_some_and(|until| until <= now);
            ensure(!stuck || matches!(container.phase, Phase::Stopping { .. }), || {
                format!("{id} did not let go of {input} and still runs")
            })?;
            // Who runs an input that is no longer its own was told to let go of it.
            let is_own = state.inputs.get(input).is_some_and(|known| {
                known.attempt == running.attempt && known.state == (InputState::Running { container_id: *id })
            });
            ensure(
                is_own || running.abandoned_until.is_some() || matches!(container.phase, Phase::Stopping { .. }),
                || format!("{id} runs {input} for nobody"),
            )?;
        }
        let is_late = container.phase_deadline().is_some_and(|deadline| deadline <= now);
        ensure(!is_late, || {
            format!("{id} is past the deadline of {:?}", container.phase)
        })?;
        let is_idle = container.ready_at.is_some() && container.is_empty();
        ensure(container.idle_since.is_some() == is_idle, || {
            format!("{id} is idle: {is_idle}")
        })?;
        ensure(
            container.poll.is_none()
                || container.awaits_worker()
                || matches!(container.phase, Phase::Ready | Phase::Draining { .. }),
            || format!("{id} keeps a poll in {:?}", container.phase),
        )?;
    }
    for (id, pool) in &state.pools {
        ensure(pool.containers == by_function.remove(id).unwrap_or_default(), || {
            format!("{id} counts containers that are not there")
        })?;
    }
    Ok(())
}

/// Before the record is read nothing starts, ends or is decided.
fn before_recovery(state: &State, turn: &Turn) -> Result<(), String> {
    let is_silent = turn.writes.is_empty() && turn.replies.is_empty() && turn.commands.is_empty();
    ensure(
        is_silent && state.containers.is_empty() && state.line.is_empty() && !turn.desired_changed,
        || "something was decided before the record was read".to_owned(),
    )
}

/// Who spoke in this turn is not given up.
fn heard(state: &State, now: Timestamp, before: &Before) -> Result<(), String> {
    for id in &before.heard {
        let is_noted = state
            .workers
            .get(id)
            .is_none_or(|worker| worker.heard_at == now && !worker.is_silent);
        ensure(is_noted, || format!("{id} spoke, and that was not noted"))?;
    }
    Ok(())
}

/// Who is silent for too long is given up, and has no containers then.
fn workers(state: &State, now: Timestamp) -> Result<(), String> {
    let silences: BTreeSet<_> = state
        .workers
        .iter()
        .filter(|(_, worker)| !worker.is_silent)
        .map(|(id, worker)| (worker.heard_at, *id))
        .collect();
    ensure(silences == state.silences, || {
        "workers are not indexed by their last sign of life".to_owned()
    })?;
    for (id, worker) in &state.workers {
        ensure(
            worker.is_silent || now < worker.heard_at + state.config.worker_silence,
            || format!("{id} was silent for too long and is waited for"),
        )?;
    }
    for (id, container) in &state.containers {
        let Some(worker) = state.workers.get(&container.worker_id) else {
            return Err(format!("{id} is on a worker that nobody knows"));
        };
        ensure(!worker.is_silent, || format!("{id} is on a worker that was given up"))?;
    }
    Ok(())
}

/// No container starts beyond its pool's maximum, its worker's resources, or its worker's limit of starts.
/// One that ends counts until it is gone.
fn starts(state: &State, now: Timestamp, turn: &Turn) -> Result<(), String> {
    for write in &turn.writes {
        let Write::ContainerCreated {
            container_id,
            worker_id,
            function_id,
            ..
        } = write
        else {
            continue;
        };
        let pool = &state.pools[function_id];
        let same = pool
            .containers
            .iter()
            .filter(|id| state.containers[id].definition_id == pool.settings.definition_id)
            .count();
        ensure(same <= pool.settings.maximum() as usize, || {
            format!("{container_id} made {function_id} larger than its maximum")
        })?;
        let capacity = state.workers.get(worker_id).and_then(|worker| worker.capacity);
        let Some(capacity) = capacity else {
            return Err(format!("{container_id} starts on {worker_id}, which did not connect"));
        };
        ensure(capacity.runtimes.contains(pool.settings.runtime), || {
            format!("{container_id} starts on {worker_id}, which does not have its runtime")
        })?;
        let there: Vec<&Container> = state
            .containers
            .values()
            .filter(|container| container.worker_id == *worker_id)
            .collect();
        let cpu: u64 = there.iter().map(|c| u64::from(c.cpu_millis)).sum();
        let memory: u64 = there.iter().map(|c| u64::from(c.memory_mib)).sum();
        let fits = cpu <= u64::from(capacity.cpu_millis) && memory <= u64::from(capacity.memory_mib);
        let fits_elsewhere = state
            .workers
            .values()
            .filter(|worker| !worker.is_silent)
            .filter_map(|worker| worker.capacity)
            .filter(|other| other.runtimes.contains(pool.settings.runtime))
            .any(|other| other.cpu_millis >= pool.settings.cpu_millis && other.memory_mib >= pool.settings.memory_mib);
        ensure(fits || there.len() == 1 && !fits_elsewhere, || {
            format!("{worker_id} is over its resources: {cpu} and {memory}")
        })?;
        let starting = there
            .iter()
            .filter(|c| matches!(c.phase, Phase::Starting { .. }) && now.since(c.created_at) < START_BURST)
            .count();
        ensure(starting <= capacity.max_starting as usize, || {
            format!("{starting} containers start at once on {worker_id}")
        })?;
    }
    Ok(())
}

/// The next turn is planned, and not at once for ever.
fn time(state: &State, now: Timestamp, turn: &Turn) -> Result<(), String> {
    ensure(turn.wake_at.is_none_or(|at| at > now), || {
        "the next turn is due in the past".to_owned()
    })?;
    let waits = [state.deadlines.first().map(|(at, _)| *at), state.next_silence()];
    ensure(
        waits
            .into_iter()
            .flatten()
            .all(|at| turn.wake_at.is_some_and(|wake| wake <= at)),
        || "the next turn comes after a deadline".to_owned(),
    )
}
