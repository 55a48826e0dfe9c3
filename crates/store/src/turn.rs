//! Turns of the scheduler: records what was decided.
//!
//! A turn is folded in memory first and then written, table by table: the last state of each row is
//! written once, however often the turn changed it, rows of a kind share multi-row statements, and
//! statements travel to the connection's thread together (`statements.rs`).
//! That is sound because the writes of a turn become visible together or not at all, so the states
//! in between exist for nobody.
//!
//! # When a call is finished
//!
//! All inputs that came have an outcome, and no more will come: the client said so, or it has
//! consumed the results, or it is a call with a single input and that one came. Finished calls are
//! not recovered, and are swept by age. See [`CallProgress::finished`].
//!
//! # What is refused
//!
//! A write about an input, call or container that does not exist, or a second outcome of an input,
//! is a broken invariant of the scheduler: the whole turn fails and nothing of it is visible. The
//! exceptions are `CallInputsFinished` and `CallConsumed`, which can be late: the sweep may have
//! taken the call.

mod statements;
mod write;

use std::collections::{BTreeMap, HashMap};

use ionian_domain::Timestamp;
use ionian_domain::call::{AttemptNumber, Call, CallKind, InputPayload};
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{CallId, ContainerId, FunctionId, InputId};
use ionian_domain::outcome::Outcome;
use ionian_domain::record::{PendingContainer, Write};
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::Failure;
use crate::idempotency::IdempotencyRecord;
use crate::row::RowExt as _;

/// Writes a whole turn in one transaction.
pub(crate) async fn commit(
    store: &Store,
    writes: Vec<Write>,
    idempotency: &[IdempotencyRecord],
) -> Result<(), Failure> {
    if writes.is_empty() && idempotency.is_empty() {
        return Ok(());
    }
    let turn = Turn::fold(writes)?;
    // Before the commit: from it on, they are there.
    for call in &turn.new_calls {
        store.memory.calls.insert(call.id);
    }
    let mut tx = store.begin().await?;
    turn.write(&mut tx, idempotency).await?;
    tx.commit().await?;
    Ok(())
}

/// The folded writes of one turn.
#[derive(Default)]
struct Turn {
    new_calls: Vec<Call>,
    call_changes: BTreeMap<CallId, CallChange>,
    new_inputs: Vec<InputRow>,
    /// Where the inputs of this turn are in `new_inputs`.
    new_input_places: HashMap<InputId, usize>,
    /// Changes of inputs from earlier turns.
    input_changes: BTreeMap<InputId, InputChange>,
    outputs: Vec<OutputRow>,
    new_containers: Vec<PendingContainer>,
    ended_containers: Vec<(ContainerId, ContainerExit, Timestamp)>,
}

struct InputRow {
    id: InputId,
    call_id: CallId,
    function_id: FunctionId,
    index: u32,
    created_at: Timestamp,
    payload: InputPayload,
    change: InputChange,
}

/// The last state that a turn gave an input.
#[derive(Default)]
struct InputChange {
    attempt: AttemptNumber,
    /// `None`: as it was.
    retries_used: Option<u32>,
    running: Option<(ContainerId, Timestamp)>,
    not_before: Option<Timestamp>,
    finished: bool,
}

struct OutputRow {
    input_id: InputId,
    call_id: CallId,
    sequence: u64,
    attempt: AttemptNumber,
    container_id: Option<ContainerId>,
    outcome: Outcome,
    started_at: Option<Timestamp>,
    at: Timestamp,
}

/// What a turn adds to a call.
#[derive(Default)]
struct CallChange {
    created_inputs: u32,
    finished_inputs: u32,
    last_sequence: u64,
    activity_at: Option<Timestamp>,
    announced: Option<u32>,
    consumed: bool,
}

impl CallChange {
    fn active(&mut self, at: Timestamp) {
        self.activity_at = self.activity_at.max(Some(at));
    }

    /// Whether the change may come after its call was swept.
    fn may_be_late(&self) -> bool {
        self.created_inputs == 0 && self.finished_inputs == 0
    }
}

/// How far a call is.
struct CallProgress {
    kind: CallKind,
    announced: Option<u32>,
    input_count: u32,
    finished_count: u32,
    last_sequence: u64,
    last_activity_at: Timestamp,
    consumed: bool,
}

impl CallProgress {
    fn new(call: &Call) -> Self {
        Self {
            kind: call.kind,
            announced: call.finished_inputs,
            input_count: 0,
            finished_count: 0,
            last_sequence: 0,
            last_activity_at: call.created_at,
            consumed: false,
        }
    }

    fn read(row: &SqliteRow) -> Result<Self, Failure> {
        Ok(Self {
            kind: row.tag("kind")?,
            announced: row.optional_number("finished_inputs")?,
            input_count: row.number("input_count")?,
            finished_count: row.number("finished_count")?,
            last_sequence: row.number("last_sequence")?,
            last_activity_at: row.time("last_activity_at")?,
            consumed: row.flag("consumed")?,
        })
    }

    fn apply(&mut self, change: &CallChange) {
        self.announced = change.announced.or(self.announced);
        self.input_count += change.created_inputs;
        self.finished_count += change.finished_inputs;
        self.last_sequence = self.last_sequence.max(change.last_sequence);
        self.last_activity_at = change
            .activity_at
            .map_or(self.last_activity_at, |at| at.max(self.last_activity_at));
        self.consumed |= change.consumed;
    }

    /// The rule of the module's documentation.
    fn finished(&self) -> bool {
        let closed = self.consumed
            || self.announced.is_some()
            || match self.kind {
                CallKind::Unary => self.input_count > 0,
                CallKind::Map => false,
            };
        closed && self.finished_count == self.input_count
    }
}

impl Turn {
    fn fold(writes: Vec<Write>) -> Result<Self, Failure> {
        let mut turn = Self::default();
        for write in writes {
            turn.add(write)?;
        }
        Ok(turn)
    }

    fn add(&mut self, write: Write) -> Result<(), Failure> {
        match write {
            Write::CallCreated { call } => {
                self.new_calls.push(call);
            }
            Write::InputsCreated {
                call_id,
                function_id,
                inputs,
                at,
            } => {
                let change = self.call_changes.entry(call_id).or_default();
                change.created_inputs += u32::try_from(inputs.len()).map_err(|source| Failure::Unwritable {
                    what: "a call with more inputs than can be counted",
                    source: source.into(),
                })?;
                change.active(at);
                for input in inputs {
                    self.new_input_places.insert(input.id, self.new_inputs.len());
                    self.new_inputs.push(InputRow {
                        id: input.id,
                        call_id,
                        function_id,
                        index: input.index,
                        created_at: at,
                        payload: input.payload,
                        change: InputChange::default(),
                    });
                }
            }
            Write::InputStarted {
                input_id,
                container_id,
                attempt,
                at,
            } => {
                let change = self.unfinished_input(input_id)?;
                change.attempt = attempt;
                change.running = Some((container_id, at));
                change.not_before = None;
            }
            Write::InputRequeued {
                input_id,
                attempt,
                not_before,
                retries_used,
            } => {
                let change = self.unfinished_input(input_id)?;
                change.attempt = attempt;
                change.running = None;
                change.not_before = Some(not_before);
                change.retries_used = Some(retries_used);
            }
            Write::InputFinished {
                input_id,
                call_id,
                sequence,
                attempt,
                container_id,
                outcome,
                started_at,
                at,
            } => {
                self.unfinished_input(input_id)?.finished = true;
                let change = self.call_changes.entry(call_id).or_default();
                change.finished_inputs += 1;
                change.last_sequence = change.last_sequence.max(sequence);
                change.active(at);
                self.outputs.push(OutputRow {
                    input_id,
                    call_id,
                    sequence,
                    attempt,
                    container_id,
                    outcome,
                    started_at,
                    at,
                });
            }
            Write::CallInputsFinished { call_id, count } => {
                self.call_changes.entry(call_id).or_default().announced = Some(count);
            }
            Write::CallConsumed { call_id } => {
                self.call_changes.entry(call_id).or_default().consumed = true;
            }
            Write::ContainerCreated {
                container_id,
                worker_id,
                app_id,
                function_id,
                definition_id,
                at,
            } => {
                self.new_containers.push(PendingContainer {
                    id: container_id,
                    origin: Some((worker_id, definition_id)),
                    app_id,
                    function_id,
                    created_at: at,
                    web_ready_at: None,
                });
            }
            Write::ContainerEnded { container_id, exit, at } => {
                self.ended_containers.push((container_id, exit, at));
            }
        }
        Ok(())
    }

    /// The state of an input that this turn may still change. Whether an earlier turn finished it is
    /// checked by the statement that writes the change.
    fn unfinished_input(&mut self, id: InputId) -> Result<&mut InputChange, Failure> {
        let change = match self.new_input_places.get(&id) {
            Some(place) => &mut self.new_inputs[*place].change,
            None => self.input_changes.entry(id).or_default(),
        };
        if change.finished {
            Err(Failure::missing("unfinished input", &id))
        } else {
            Ok(change)
        }
    }
}
