//! The statements of a turn.

use std::collections::BTreeMap;

use ionian_domain::Timestamp;
use ionian_domain::call::Call;
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{CallId, ContainerId, InputId};
use ionian_domain::record::PendingContainer;
use sqlx::sqlite::Sqlite;
use sqlx::{QueryBuilder, query};

use super::{CallChange, CallProgress, InputChange, InputRow, OutputRow, Turn};
use crate::Connection;
use crate::error::Failure;
use crate::row::{QueryBuilderExt as _, bulk_slices, json, payload_columns, signed, tag};

impl Turn {
    /// Writes what was folded, table by table, parents before children.
    pub(super) async fn write(mut self, tx: &mut Connection) -> Result<(), Failure> {
        for call in std::mem::take(&mut self.new_calls) {
            let change = self.call_changes.remove(&call.id).unwrap_or_default();
            insert_call(tx, &call, &change).await?;
        }
        for (id, change) in std::mem::take(&mut self.call_changes) {
            update_call(tx, id, &change).await?;
        }
        insert_inputs(tx, self.new_inputs).await?;
        update_inputs(tx, &self.input_changes).await?;
        insert_outputs(tx, self.outputs).await?;
        insert_containers(tx, &self.new_containers).await?;
        for (id, exit, at) in &self.ended_containers {
            end_container(tx, *id, exit, *at).await?;
        }
        Ok(())
    }
}

async fn insert_call(tx: &mut Connection, call: &Call, change: &CallChange) -> Result<(), Failure> {
    let mut progress = CallProgress::new(call);
    progress.apply(change);
    query(
        "INSERT INTO calls (id, app_id, function_id, kind, invocation, parent_input_id, created_at, finished_inputs, \
                            input_count, finished_count, last_sequence, last_activity_at, consumed, finished) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind(call.id.to_string())
    .bind(call.app_id.to_string())
    .bind(call.function_id.to_string())
    .bind(tag(call.kind))
    .bind(tag(call.invocation))
    .bind(call.parent_input_id.map(|id| id.to_string()))
    .bind(call.created_at.micros())
    .bind(progress.announced.map(i64::from))
    .bind(i64::from(progress.input_count))
    .bind(i64::from(progress.finished_count))
    .bind(signed(progress.last_sequence))
    .bind(progress.last_activity_at.micros())
    .bind(progress.consumed)
    .bind(progress.finished())
    .execute(tx)
    .await?;
    Ok(())
}

async fn update_call(tx: &mut Connection, id: CallId, change: &CallChange) -> Result<(), Failure> {
    let row = query(
        "SELECT kind, finished_inputs, input_count, finished_count, last_sequence, last_activity_at, consumed \
         FROM calls WHERE id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(&mut *tx)
    .await?;
    let mut progress = match row {
        Some(row) => CallProgress::read(&row)?,
        None if change.may_be_late() => return Ok(()),
        None => return Err(Failure::missing("call", &id)),
    };
    progress.apply(change);
    query(
        "UPDATE calls SET finished_inputs = $1, input_count = $2, finished_count = $3, last_sequence = $4, \
                          last_activity_at = $5, consumed = $6, finished = $7 \
         WHERE id = $8",
    )
    .bind(progress.announced.map(i64::from))
    .bind(i64::from(progress.input_count))
    .bind(i64::from(progress.finished_count))
    .bind(signed(progress.last_sequence))
    .bind(progress.last_activity_at.micros())
    .bind(progress.consumed)
    .bind(progress.finished())
    .bind(id.to_string())
    .execute(tx)
    .await?;
    Ok(())
}

async fn insert_inputs(tx: &mut Connection, inputs: Vec<InputRow>) -> Result<(), Failure> {
    for slice in bulk_slices(&inputs) {
        let mut insert = QueryBuilder::<Sqlite>::new(
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
        insert.build().execute(&mut *tx).await?;
    }
    for slice in bulk_slices(&inputs) {
        let mut insert = QueryBuilder::<Sqlite>::new(
            "INSERT INTO input_payloads (input_id, data_format, method_name, blob_id, inline) ",
        );
        insert.push_values(slice, |mut row, input| {
            let (blob_id, inline) = payload_columns(input.payload.payload.clone());
            row.push_bind(input.id.to_string())
                .push_bind(i64::from(input.payload.data_format))
                .push_bind(input.payload.method_name.clone())
                .push_bind(blob_id)
                .push_bind(inline);
        });
        insert.build().execute(&mut *tx).await?;
    }
    Ok(())
}

async fn update_inputs(tx: &mut Connection, changes: &BTreeMap<InputId, InputChange>) -> Result<(), Failure> {
    // Where it ran last is in the output; the other columns no longer matter.
    let finished: Vec<InputId> = changes
        .iter()
        .filter(|(_, change)| change.finished)
        .map(|(id, _)| *id)
        .collect();
    for slice in bulk_slices(&finished) {
        let mut update = QueryBuilder::<Sqlite>::new("UPDATE inputs SET finished = TRUE WHERE NOT finished AND id IN ");
        update.push_ids(slice);
        let done = update.build().execute(&mut *tx).await?;
        if done.rows_affected() != slice.len() as u64 {
            let ids: Vec<String> = slice.iter().map(ToString::to_string).collect();
            return Err(Failure::missing("unfinished input, one of", &ids.join(", ")));
        }
    }
    for (id, change) in changes.iter().filter(|(_, change)| !change.finished) {
        let done = query(
            "UPDATE inputs SET attempt = $1, retries_used = COALESCE($2, retries_used), container_id = $3, \
                               started_at = $4, not_before = $5 \
             WHERE id = $6 AND NOT finished",
        )
        .bind(i64::from(change.attempt.0))
        .bind(change.retries_used.map(i64::from))
        .bind(change.running.map(|(container, _)| container.to_string()))
        .bind(change.running.map(|(_, at)| at.micros()))
        .bind(change.not_before.map(Timestamp::micros))
        .bind(id.to_string())
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("unfinished input", &id));
        }
    }
    Ok(())
}

async fn insert_outputs(tx: &mut Connection, outputs: Vec<OutputRow>) -> Result<(), Failure> {
    for slice in bulk_slices(&outputs) {
        let mut insert = QueryBuilder::<Sqlite>::new(
            "INSERT INTO outputs (input_id, call_id, sequence, attempt, container_id, started_at, finished_at, status, \
                                  exit_code, data_format, blob_id, exception, traceback, serialized_traceback, \
                                  traceback_line_cache, inline) ",
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
        insert.build().execute(&mut *tx).await?;
    }
    Ok(())
}

async fn insert_containers(tx: &mut Connection, containers: &[PendingContainer]) -> Result<(), Failure> {
    for slice in bulk_slices(containers) {
        let mut insert = QueryBuilder::<Sqlite>::new(
            "INSERT INTO containers (id, worker_id, definition_id, app_id, function_id, created_at) ",
        );
        insert.push_values(slice, |mut row, container| {
            row.push_bind(container.id.to_string())
                .push_bind(container.origin.map(|(worker, _)| worker.to_string()))
                .push_bind(container.origin.map(|(_, definition)| definition.to_string()))
                .push_bind(container.app_id.to_string())
                .push_bind(container.function_id.to_string())
                .push_bind(container.created_at.micros());
        });
        insert.build().execute(&mut *tx).await?;
    }
    Ok(())
}

async fn end_container(
    tx: &mut Connection,
    id: ContainerId,
    exit: &ContainerExit,
    at: Timestamp,
) -> Result<(), Failure> {
    let done = query("UPDATE containers SET ended_at = $1, exit = $2 WHERE id = $3 AND ended_at IS NULL")
        .bind(at.micros())
        .bind(json("the container's exit", exit)?)
        .bind(id.to_string())
        .execute(tx)
        .await?;
    if done.rows_affected() == 0 {
        return Err(Failure::missing("running container", &id));
    }
    Ok(())
}
