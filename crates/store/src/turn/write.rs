//! The statements of a turn.

use std::collections::{BTreeMap, HashMap};

use ionian_domain::Timestamp;
use ionian_domain::call::Call;
use ionian_domain::ids::{CallId, InputId};
use ionian_domain::record::PendingContainer;
use sqlx::QueryBuilder;
use sqlx::sqlite::Sqlite;

use super::statements::{Expected, Statements};
use super::{CallChange, CallProgress, InputChange, InputRow, OutputRow, Turn};
use crate::Connection;
use crate::error::Failure;
use crate::idempotency::IdempotencyRecord;
use crate::row::{BULK_ROWS, QueryBuilderExt as _, RowExt as _, bulk_slices, json, payload_columns, signed, tag};

impl Turn {
    /// Writes what was folded, table by table, parents before children.
    pub(super) async fn write(mut self, tx: &mut Connection, idempotency: &[IdempotencyRecord]) -> Result<(), Failure> {
        let new_calls: Vec<(Call, CallProgress)> = std::mem::take(&mut self.new_calls)
            .into_iter()
            .map(|call| {
                let mut progress = CallProgress::new(&call);
                progress.apply(&self.call_changes.remove(&call.id).unwrap_or_default());
                (call, progress)
            })
            .collect();
        let changed_calls = changed_calls(tx, &self.call_changes).await?;
        let mut statements = Statements::new(tx);
        insert_calls(&mut statements, &new_calls).await?;
        update_calls(&mut statements, &changed_calls).await?;
        insert_inputs(&mut statements, &self.new_inputs).await?;
        update_inputs(&mut statements, &self.input_changes).await?;
        insert_outputs(&mut statements, &self.outputs).await?;
        insert_containers(&mut statements, &self.new_containers).await?;
        for (id, exit, at) in &self.ended_containers {
            let exit = json("the container's exit", exit)?;
            let write = |update: &mut QueryBuilder<Sqlite>| {
                update.push("UPDATE containers SET ended_at = ").push_bind(at.micros());
                update.push(", exit = ").push_bind(exit);
                update.push(" WHERE id = ").push_bind(id.to_string());
                update.push(" AND ended_at IS NULL");
            };
            statements.add(1, Expected::Container(*id), write).await?;
        }
        insert_answers(&mut statements, idempotency).await?;
        statements.finish().await
    }
}

/// Where calls of earlier turns are once this turn is written. Those that the sweep took are left out
/// where that is allowed.
async fn changed_calls(
    tx: &mut Connection,
    changes: &BTreeMap<CallId, CallChange>,
) -> Result<Vec<(CallId, CallProgress)>, Failure> {
    let ids: Vec<CallId> = changes.keys().copied().collect();
    let mut found: HashMap<CallId, CallProgress> = HashMap::with_capacity(ids.len());
    for slice in bulk_slices(&ids) {
        let mut select = QueryBuilder::<Sqlite>::new(
            "SELECT id, kind, finished_inputs, input_count, finished_count, last_sequence, last_activity_at, consumed \
             FROM calls WHERE id IN ",
        );
        select.push_ids(slice);
        for row in select.build().fetch_all(&mut *tx).await? {
            found.insert(row.id("id")?, CallProgress::read(&row)?);
        }
    }
    let mut changed = Vec::with_capacity(changes.len());
    for (id, change) in changes {
        match found.remove(id) {
            Some(mut progress) => {
                progress.apply(change);
                changed.push((*id, progress));
            }
            None if change.may_be_late() => {}
            None => return Err(Failure::missing("call", id)),
        }
    }
    Ok(changed)
}

async fn insert_calls(statements: &mut Statements<'_>, calls: &[(Call, CallProgress)]) -> Result<(), Failure> {
    for slice in calls.chunks(BULK_ROWS) {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push(
                "INSERT INTO calls (id, app_id, function_id, kind, invocation, parent_input_id, created_at, \
                                    finished_inputs, input_count, finished_count, last_sequence, last_activity_at, \
                                    consumed, finished) ",
            );
            insert.push_values(slice, |mut row, (call, progress)| {
                row.push_bind(call.id.to_string())
                    .push_bind(call.app_id.to_string())
                    .push_bind(call.function_id.to_string())
                    .push_bind(tag(call.kind))
                    .push_bind(tag(call.invocation))
                    .push_bind(call.parent_input_id.map(|id| id.to_string()))
                    .push_bind(call.created_at.micros())
                    .push_bind(progress.announced.map(i64::from))
                    .push_bind(i64::from(progress.input_count))
                    .push_bind(i64::from(progress.finished_count))
                    .push_bind(signed(progress.last_sequence))
                    .push_bind(progress.last_activity_at.micros())
                    .push_bind(progress.consumed)
                    .push_bind(progress.finished());
            });
        };
        statements.add(slice.len(), Expected::Any, write).await?;
    }
    Ok(())
}

async fn update_calls(statements: &mut Statements<'_>, calls: &[(CallId, CallProgress)]) -> Result<(), Failure> {
    for (id, progress) in calls {
        let write = |update: &mut QueryBuilder<Sqlite>| {
            let announced = progress.announced.map(i64::from);
            update.push("UPDATE calls SET finished_inputs = ").push_bind(announced);
            update
                .push(", input_count = ")
                .push_bind(i64::from(progress.input_count));
            update
                .push(", finished_count = ")
                .push_bind(i64::from(progress.finished_count));
            update
                .push(", last_sequence = ")
                .push_bind(signed(progress.last_sequence));
            update
                .push(", last_activity_at = ")
                .push_bind(progress.last_activity_at.micros());
            update.push(", consumed = ").push_bind(progress.consumed);
            update.push(", finished = ").push_bind(progress.finished());
            update.push(" WHERE id = ").push_bind(id.to_string());
        };
        statements.add(1, Expected::Any, write).await?;
    }
    Ok(())
}

async fn insert_inputs(statements: &mut Statements<'_>, inputs: &[InputRow]) -> Result<(), Failure> {
    for slice in inputs.chunks(BULK_ROWS) {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push(
                "INSERT INTO inputs (id, call_id, function_id, input_index, attempt, retries_used, container_id, \
                                     started_at, not_before, created_at, finished) ",
            );
            insert.push_values(slice, |mut row, input| {
                let running = input.change.running;
                row.push_bind(input.id.to_string())
                    .push_bind(input.call_id.to_string())
                    .push_bind(input.function_id.to_string())
                    .push_bind(i64::from(input.index))
                    .push_bind(i64::from(input.change.attempt.0))
                    .push_bind(i64::from(input.change.retries_used.unwrap_or(0)))
                    .push_bind(running.map(|(container, _)| container.to_string()))
                    .push_bind(running.map(|(_, at)| at.micros()))
                    .push_bind(input.change.not_before.map(Timestamp::micros))
                    .push_bind(input.created_at.micros())
                    .push_bind(input.change.finished);
            });
        };
        statements.add(slice.len(), Expected::Any, write).await?;
    }
    for slice in inputs.chunks(BULK_ROWS) {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push("INSERT INTO input_payloads (input_id, data_format, method_name, blob_id, inline) ");
            insert.push_values(slice, |mut row, input| {
                let (blob_id, inline) = payload_columns(input.payload.payload.clone());
                row.push_bind(input.id.to_string())
                    .push_bind(i64::from(input.payload.data_format))
                    .push_bind(input.payload.method_name.clone())
                    .push_bind(blob_id)
                    .push_bind(inline);
            });
        };
        statements.add(slice.len(), Expected::Any, write).await?;
    }
    Ok(())
}

async fn update_inputs(
    statements: &mut Statements<'_>,
    changes: &BTreeMap<InputId, InputChange>,
) -> Result<(), Failure> {
    // Where it ran last is in the output; the other columns no longer matter.
    let finished: Vec<InputId> = changes
        .iter()
        .filter(|(_, change)| change.finished)
        .map(|(id, _)| *id)
        .collect();
    for slice in finished.chunks(BULK_ROWS) {
        let write = |update: &mut QueryBuilder<Sqlite>| {
            update.push("UPDATE inputs SET finished = TRUE WHERE NOT finished AND id IN ");
            update.push_ids(slice);
        };
        statements
            .add(slice.len(), Expected::Inputs(slice.to_vec()), write)
            .await?;
    }
    for (id, change) in changes.iter().filter(|(_, change)| !change.finished) {
        let write = |update: &mut QueryBuilder<Sqlite>| {
            update
                .push("UPDATE inputs SET attempt = ")
                .push_bind(i64::from(change.attempt.0));
            let retries_used = change.retries_used.map(i64::from);
            update
                .push(", retries_used = COALESCE(")
                .push_bind(retries_used)
                .push(", retries_used)");
            let running = change.running;
            let container = running.map(|(container, _)| container.to_string());
            update.push(", container_id = ").push_bind(container);
            update
                .push(", started_at = ")
                .push_bind(running.map(|(_, at)| at.micros()));
            update
                .push(", not_before = ")
                .push_bind(change.not_before.map(Timestamp::micros));
            update
                .push(" WHERE id = ")
                .push_bind(id.to_string())
                .push(" AND NOT finished");
        };
        statements.add(1, Expected::Input(*id), write).await?;
    }
    Ok(())
}

async fn insert_outputs(statements: &mut Statements<'_>, outputs: &[OutputRow]) -> Result<(), Failure> {
    for slice in outputs.chunks(BULK_ROWS) {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push(
                "INSERT INTO outputs (input_id, call_id, sequence, attempt, container_id, started_at, finished_at, \
                                      status, exit_code, data_format, blob_id, exception, traceback, \
                                      serialized_traceback, traceback_line_cache, inline) ",
            );
            insert.push_values(slice, |mut row, output| {
                let outcome = &output.outcome;
                let (blob_id, inline) = payload_columns(outcome.payload.clone());
                row.push_bind(output.input_id.to_string())
                    .push_bind(output.call_id.to_string())
                    .push_bind(signed(output.sequence))
                    .push_bind(i64::from(output.attempt.0))
                    .push_bind(output.container_id.map(|id| id.to_string()))
                    .push_bind(output.started_at.map(Timestamp::micros))
                    .push_bind(output.at.micros())
                    .push_bind(i64::from(outcome.status.wire()))
                    .push_bind(i64::from(outcome.exit_code))
                    .push_bind(i64::from(outcome.data_format))
                    .push_bind(blob_id)
                    .push_bind(outcome.exception.clone())
                    .push_bind(outcome.traceback.clone())
                    .push_bind(outcome.serialized_traceback.to_vec())
                    .push_bind(outcome.traceback_line_cache.to_vec())
                    .push_bind(inline);
            });
        };
        statements.add(slice.len(), Expected::Any, write).await?;
    }
    Ok(())
}

async fn insert_containers(statements: &mut Statements<'_>, containers: &[PendingContainer]) -> Result<(), Failure> {
    for slice in containers.chunks(BULK_ROWS) {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push("INSERT INTO containers (id, worker_id, definition_id, app_id, function_id, created_at) ");
            insert.push_values(slice, |mut row, container| {
                row.push_bind(container.id.to_string())
                    .push_bind(container.origin.map(|(worker, _)| worker.to_string()))
                    .push_bind(container.origin.map(|(_, definition)| definition.to_string()))
                    .push_bind(container.app_id.to_string())
                    .push_bind(container.function_id.to_string())
                    .push_bind(container.created_at.micros());
            });
        };
        statements.add(slice.len(), Expected::Any, write).await?;
    }
    Ok(())
}

async fn insert_answers(statements: &mut Statements<'_>, answers: &[IdempotencyRecord]) -> Result<(), Failure> {
    for answer in answers {
        let write = |insert: &mut QueryBuilder<Sqlite>| {
            insert.push("INSERT INTO idempotency (key, rpc, at, response) VALUES (");
            insert.push_bind(answer.key.clone()).push(", ");
            insert.push_bind(answer.rpc.clone()).push(", ");
            insert.push_bind(answer.at.micros()).push(", ");
            insert.push_bind(answer.response.to_vec());
            insert.push(") ON CONFLICT (key, rpc) DO NOTHING");
        };
        statements.add(1, Expected::Any, write).await?;
    }
    Ok(())
}
