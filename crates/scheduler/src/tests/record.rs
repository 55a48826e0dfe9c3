//! What the scheduler wrote: a model of the store that refuses what the store refuses, and more.
//!
//! The store takes a turn or refuses it as a whole. Here a write that the store would refuse, or one that
//! it would take although it makes no sense (an attempt that starts twice, an output that leaves a gap),
//! is an error with a sentence.

use std::collections::{BTreeMap, BTreeSet};

use ionian_domain::call::{AttemptNumber, Call, CallKind};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{PendingCall, PendingContainer, PendingInput, Recovered, Write};
use ionian_domain::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, Timestamp, WorkerId};

#[derive(Debug, Clone)]
pub(super) struct CallRow {
    pub call: Call,
    pub input_count: u32,
    pub finished_count: u32,
    pub last_sequence: u64,
    pub consumed: bool,
    position: usize,
}

impl CallRow {
    /// The store's rule, see its `turn` module.
    pub(super) fn is_finished(&self) -> bool {
        let closed = self.consumed
            || self.call.finished_inputs.is_some()
            || self.call.kind == CallKind::Unary && self.input_count > 0;
        closed && self.finished_count == self.input_count
    }
}

#[derive(Debug, Clone)]
pub(super) struct InputRow {
    pub call_id: CallId,
    pub function_id: FunctionId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub retries_used: u32,
    pub running: Option<(ContainerId, Timestamp)>,
    pub not_before: Option<Timestamp>,
    pub created_at: Timestamp,
    pub position: usize,
}

#[derive(Debug, Clone)]
struct ContainerRow {
    origin: Option<(WorkerId, DefinitionId)>,
    app_id: AppId,
    function_id: FunctionId,
    created_at: Timestamp,
    web_ready_at: Option<Timestamp>,
    position: usize,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    pub calls: BTreeMap<CallId, CallRow>,
    /// Those of them that are not finished.
    pub open: BTreeSet<CallId>,
    /// Unfinished inputs.
    pub pending: BTreeMap<InputId, InputRow>,
    pub outcomes: BTreeMap<InputId, OutcomeStatus>,
    live: BTreeMap<ContainerId, ContainerRow>,
    ended: BTreeMap<ContainerId, Timestamp>,
    next_position: usize,
}

impl Record {
    /// Takes a whole turn.
    pub(super) fn commit(&mut self, writes: &[Write]) -> Result<(), String> {
        for write in writes {
            self.take(write).map_err(|reason| format!("{reason}, in {write:?}"))?;
            if let Write::CallCreated { call: Call { id, .. } }
            | Write::InputsCreated { call_id: id, .. }
            | Write::InputFinished { call_id: id, .. }
            | Write::CallInputsFinished { call_id: id, .. }
            | Write::CallConsumed { call_id: id } = write
            {
                self.note_open(*id);
            }
        }
        Ok(())
    }

    fn note_open(&mut self, id: CallId) {
        if self.calls.get(&id).is_some_and(|row| !row.is_finished()) {
            self.open.insert(id);
        } else {
            self.open.remove(&id);
        }
    }

    pub(super) fn knows_input(&self, id: &InputId) -> bool {
        self.pending.contains_key(id) || self.outcomes.contains_key(id)
    }

    pub(super) fn live_containers(&self) -> impl Iterator<Item = &ContainerId> {
        self.live.keys()
    }

    pub(super) fn is_live(&self, id: &ContainerId) -> bool {
        self.live.contains_key(id)
    }

    /// Notes that a container's web endpoints are known, as the platform does behind the announcement.
    pub(super) fn web_ready(&mut self, container_id: ContainerId, at: Timestamp) {
        if let Some(row) = self.live.get_mut(&container_id) {
            row.web_ready_at = Some(at);
        }
    }

    /// Records a container as versions did that did not note where it runs.
    pub(super) fn forget_origin(&mut self, container_id: ContainerId) {
        if let Some(row) = self.live.get_mut(&container_id) {
            row.origin = None;
        }
    }

    fn position(&mut self) -> usize {
        self.next_position += 1;
        self.next_position
    }

    fn pending(&mut self, id: &InputId) -> Result<&mut InputRow, String> {
        match self.outcomes.get(id) {
            Some(_) => Err("the input has its outcome already".to_owned()),
            None => self
                .pending
                .get_mut(id)
                .ok_or_else(|| "the input is unknown".to_owned()),
        }
    }

    fn take(&mut self, write: &Write) -> Result<(), String> {
        let position = self.position();
        match write {
            Write::CallCreated { call } => {
                let row = CallRow {
                    call: call.clone(),
                    input_count: 0,
                    finished_count: 0,
                    last_sequence: 0,
                    consumed: false,
                    position,
                };
                unless(self.calls.insert(call.id, row).is_some(), "the call exists")?;
            }
            Write::InputsCreated {
                call_id,
                function_id,
                inputs,
                at,
            } => {
                let row = self.calls.get_mut(call_id).ok_or("the call is unknown")?;
                row.input_count += u32::try_from(inputs.len()).expect("a test has few inputs");
                for input in inputs {
                    let position = self.position();
                    unless(self.outcomes.contains_key(&input.id), "the input finished before")?;
                    let row = InputRow {
                        call_id: *call_id,
                        function_id: *function_id,
                        index: input.index,
                        attempt: AttemptNumber(0),
                        retries_used: 0,
                        running: None,
                        not_before: None,
                        created_at: *at,
                        position,
                    };
                    unless(self.pending.insert(input.id, row).is_some(), "the input exists")?;
                }
            }
            Write::InputStarted {
                input_id,
                container_id,
                attempt,
                at,
            } => {
                unless(!self.live.contains_key(container_id), "the container does not run")?;
                let row = self.pending(input_id)?;
                unless(row.running.is_some(), "the input runs already")?;
                unless(
                    row.attempt != *attempt,
                    "the attempt's number is not the one that was recorded",
                )?;
                row.running = Some((*container_id, *at));
                row.not_before = None;
            }
            Write::InputRequeued {
                input_id,
                attempt,
                not_before,
                retries_used,
            } => {
                let row = self.pending(input_id)?;
                unless(row.running.is_none(), "the input does not run")?;
                unless(*attempt != row.attempt.next(), "the attempt's number is not the next")?;
                row.running = None;
                row.attempt = *attempt;
                row.not_before = Some(*not_before);
                row.retries_used = *retries_used;
            }
            Write::InputFinished {
                input_id,
                call_id,
                sequence,
                attempt,
                container_id,
                outcome,
                ..
            } => {
                let row = self.pending(input_id)?;
                unless(row.call_id != *call_id, "the input is of another call")?;
                unless(row.attempt != *attempt, "the outcome is not the live attempt's")?;
                if let (OutcomeStatus::Success, Some(container_id)) = (outcome.status, container_id) {
                    let holder = row.running.map(|(holder, _)| holder);
                    unless(
                        holder != Some(*container_id),
                        "the outcome is not of the container that runs the input",
                    )?;
                }
                self.pending.remove(input_id);
                self.outcomes.insert(*input_id, outcome.status);
                let call = self.calls.get_mut(call_id).ok_or("the call is unknown")?;
                unless(*sequence != call.last_sequence + 1, "the output's number leaves a gap")?;
                call.last_sequence = *sequence;
                call.finished_count += 1;
            }
            // These two may be late: the call may have been swept.
            Write::CallInputsFinished { call_id, count } => {
                if let Some(row) = self.calls.get_mut(call_id) {
                    row.call.finished_inputs = Some(*count);
                }
            }
            Write::CallConsumed { call_id } => {
                if let Some(row) = self.calls.get_mut(call_id) {
                    row.consumed = true;
                }
            }
            Write::ContainerCreated {
                container_id,
                worker_id,
                app_id,
                function_id,
                definition_id,
                at,
            } => {
                unless(self.ended.contains_key(container_id), "the container existed before")?;
                let row = ContainerRow {
                    origin: Some((*worker_id, *definition_id)),
                    app_id: *app_id,
                    function_id: *function_id,
                    created_at: *at,
                    web_ready_at: None,
                    position,
                };
                unless(self.live.insert(*container_id, row).is_some(), "the container exists")?;
            }
            Write::ContainerEnded { container_id, at, .. } => {
                unless(self.live.remove(container_id).is_none(), "the container does not run")?;
                self.ended.insert(*container_id, *at);
            }
        }
        Ok(())
    }

    /// What a recovery reads, each kind in the order of its creation.
    pub(super) fn recovered(&self) -> Recovered {
        let mut calls: Vec<&CallRow> = self.open.iter().map(|id| &self.calls[id]).collect();
        calls.sort_by_key(|row| row.position);
        let mut inputs: Vec<(&InputId, &InputRow)> = self.pending.iter().collect();
        inputs.sort_by_key(|(_, row)| row.position);
        let mut containers: Vec<(&ContainerId, &ContainerRow)> = self.live.iter().collect();
        containers.sort_by_key(|(_, row)| row.position);
        Recovered {
            calls: calls
                .into_iter()
                .map(|row| PendingCall {
                    call: row.call.clone(),
                    input_count: row.input_count,
                    finished_count: row.finished_count,
                    last_sequence: row.last_sequence,
                })
                .collect(),
            inputs: inputs
                .into_iter()
                .map(|(id, row)| PendingInput {
                    id: *id,
                    call_id: row.call_id,
                    function_id: row.function_id,
                    index: row.index,
                    attempt: row.attempt,
                    retries_used: row.retries_used,
                    running: row.running,
                    not_before: row.not_before,
                    created_at: row.created_at,
                })
                .collect(),
            containers: containers
                .into_iter()
                .map(|(id, row)| PendingContainer {
                    id: *id,
                    origin: row.origin,
                    app_id: row.app_id,
                    function_id: row.function_id,
                    created_at: row.created_at,
                    web_ready_at: row.web_ready_at,
                })
                .collect(),
        }
    }
}

fn unless(wrong: bool, sentence: &str) -> Result<(), String> {
    if wrong { Err(sentence.to_owned()) } else { Ok(()) }
}
