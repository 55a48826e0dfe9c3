//! Calls, their inputs and their outputs: the turn's commit, recovery, what readers ask for, and the
//! sweep. How a turn is written is in `turn.rs`.

use std::collections::HashMap;

use futures_util::TryStreamExt as _;
use ionian_domain::Timestamp;
use ionian_domain::call::{AttemptNumber, Call, InputPayload};
use ionian_domain::ids::{AppId, CallId, ContainerId, FunctionId, InputId};
use ionian_domain::outcome::{Outcome, OutcomeStatus};
use ionian_domain::record::{OutputRecord, Recovered, Write};
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{QueryBuilder, query};

use crate::error::{During as _, Failure, StoreError};
use crate::idempotency::IdempotencyRecord;
use crate::row::{QueryBuilderExt as _, RowExt as _, bulk_slices, signed, unreadable};
use crate::{Store, recovery, turn};

/// A page of outputs ends before it would hold more than this, unless its first output alone does:
/// results of 2 MiB each must not add up to gigabytes in memory, nor to a message over the
/// protocol's 128 MiB.
pub const OUTPUT_PAGE_BYTES: usize = 16 << 20;

/// How many inputs the sweep deletes in one transaction: some milliseconds, for which a turn waits.
const SWEEP_INPUTS: i64 = 500;

pub(crate) const OUTPUTS_BY_SEQUENCE: &str = "SELECT o.*, i.input_index FROM outputs o \
    JOIN inputs i ON i.id = o.input_id \
    WHERE o.call_id = $1 AND o.sequence > $2 ORDER BY o.sequence LIMIT $3";

/// `CROSS JOIN`, by which `SQLite` keeps the order of the tables: otherwise it would walk all outputs
/// of a call by sequence to find the 49 that a client asks for.
pub(crate) const OUTPUTS_BY_INDEX: &str = "SELECT o.*, i.input_index FROM inputs i CROSS JOIN outputs o \
    WHERE i.call_id = $1 AND i.input_index BETWEEN $4 AND $5 AND o.input_id = i.id AND o.sequence > $2 \
    ORDER BY o.sequence LIMIT $3";

pub(crate) const EXPIRED_CALLS: &str = "SELECT id FROM calls WHERE finished AND last_activity_at < $1 \
    UNION SELECT id FROM calls WHERE finished AND consumed AND last_activity_at < $2 LIMIT $3";

/// A call and how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallSummary {
    pub call: Call,
    pub input_count: u32,
    pub finished_count: u32,
    /// The sequence number of its newest output; 0 for none.
    pub last_sequence: u64,
    /// The reader of a synchronous call has its results.
    pub consumed: bool,
    /// No more inputs will come, and all have finished.
    pub finished: bool,
    /// When an input was last put or finished.
    pub last_activity_at: Timestamp,
}

/// An input without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSummary {
    pub id: InputId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub created_at: Timestamp,
    pub status: InputStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputStatus {
    Queued {
        not_before: Option<Timestamp>,
    },
    Running {
        container_id: ContainerId,
        started_at: Timestamp,
    },
    Finished {
        status: OutcomeStatus,
        container_id: Option<ContainerId>,
        finished_at: Timestamp,
    },
}

/// How long finished calls are kept, as points in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expiry {
    /// Calls whose last activity is older than this have expired.
    pub finished_before: Timestamp,
    /// The same for consumed calls. Not "now": the answer that consumed them can have been lost, and
    /// the client then asks once more.
    pub consumed_before: Timestamp,
}

#[derive(Debug, Clone, Copy)]
pub struct Calls<'a>(pub(crate) &'a Store);

impl Calls<'_> {
    /// Records a turn of the scheduler, with the answers that rest on it: one transaction and one
    /// sync. After an error nothing of it is visible.
    pub async fn commit(&self, writes: Vec<Write>, idempotency: &[IdempotencyRecord]) -> Result<(), StoreError> {
        turn::commit(self.0, writes, idempotency).await.during("record a turn")
    }

    /// Everything that is not finished, as of one commit, each kind in the order of its creation.
    pub async fn load_pending(&self) -> Result<Recovered, StoreError> {
        recovery::load_pending(self.0).await.during("load what was pending")
    }

    /// Reads the ids of all calls, once, after which calls that do not exist are known without asking the
    /// database. For the process that creates calls, and for no other: it may run beside everything else.
    pub async fn remember_calls(&self) -> Result<(), StoreError> {
        const OPERATION: &str = "list all calls";
        let mut rows = query("SELECT id FROM calls").fetch(&self.0.readers);
        while let Some(row) = rows.try_next().await.during(OPERATION)? {
            self.0.memory.calls.insert(row.id("id").during(OPERATION)?);
        }
        self.0.memory.calls.complete();
        Ok(())
    }

    /// The payloads of inputs; unknown ids are left out. The caller bounds how many it holds.
    pub async fn input_payloads(&self, ids: &[InputId]) -> Result<HashMap<InputId, InputPayload>, StoreError> {
        const OPERATION: &str = "read the payloads of inputs";
        let mut payloads = HashMap::with_capacity(ids.len());
        for slice in bulk_slices(ids) {
            let mut select = QueryBuilder::<Sqlite>::new("SELECT * FROM input_payloads WHERE input_id IN ");
            select.push_ids(slice);
            for row in select.build().fetch_all(&self.0.readers).await.during(OPERATION)? {
                let (id, payload) = input_payload(&row).during(OPERATION)?;
                payloads.insert(id, payload);
            }
        }
        Ok(payloads)
    }

    /// Outputs of a call in the order in which they were recorded, from after `after_sequence` (0
    /// for the start). `index_range` leaves out inputs outside of it; both ends are included. The
    /// page ends at `limit` outputs or at [`OUTPUT_PAGE_BYTES`].
    pub async fn outputs(
        &self,
        call: CallId,
        after_sequence: u64,
        limit: u32,
        index_range: Option<(u32, u32)>,
    ) -> Result<Vec<OutputRecord>, StoreError> {
        self.output_page(call, after_sequence, limit, index_range)
            .await
            .during("read the outputs of a call")
    }

    async fn output_page(
        &self,
        call: CallId,
        after_sequence: u64,
        limit: u32,
        index_range: Option<(u32, u32)>,
    ) -> Result<Vec<OutputRecord>, Failure> {
        let select = match index_range {
            None => query(OUTPUTS_BY_SEQUENCE)
                .bind(call.to_string())
                .bind(signed(after_sequence))
                .bind(i64::from(limit)),
            Some((first, last)) => query(OUTPUTS_BY_INDEX)
                .bind(call.to_string())
                .bind(signed(after_sequence))
                .bind(i64::from(limit))
                .bind(i64::from(first))
                .bind(i64::from(last)),
        };
        let mut rows = select.fetch(&self.0.readers);
        let mut page = Vec::new();
        let mut page_bytes = 0;
        while let Some(row) = rows.try_next().await? {
            let output = output(&row)?;
            page_bytes += outcome_bytes(&output.outcome);
            if page_bytes > OUTPUT_PAGE_BYTES && !page.is_empty() {
                break;
            }
            page.push(output);
        }
        Ok(page)
    }

    pub async fn call_summary(&self, id: CallId) -> Result<Option<CallSummary>, StoreError> {
        const OPERATION: &str = "find a call";
        if !self.0.memory.calls.may_hold(id) {
            return Ok(None);
        }
        let row = query("SELECT * FROM calls WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(call_summary).transpose().during(OPERATION)
    }

    /// Calls of an app's functions, newest first.
    pub async fn calls_by_app(&self, app: AppId, limit: u32) -> Result<Vec<CallSummary>, StoreError> {
        const OPERATION: &str = "list the calls of an app";
        let rows = query("SELECT * FROM calls WHERE app_id = $1 ORDER BY position DESC LIMIT $2")
            .bind(app.to_string())
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(call_summary)
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    /// Calls of a function, newest first.
    pub async fn calls_by_function(&self, function: FunctionId, limit: u32) -> Result<Vec<CallSummary>, StoreError> {
        const OPERATION: &str = "list the calls of a function";
        let rows = query("SELECT * FROM calls WHERE function_id = $1 ORDER BY position DESC LIMIT $2")
            .bind(function.to_string())
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(call_summary)
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    /// Inputs of a call by index, from `from_index` on.
    pub async fn inputs(&self, call: CallId, from_index: u32, limit: u32) -> Result<Vec<InputSummary>, StoreError> {
        const OPERATION: &str = "list the inputs of a call";
        let rows = query(
            "SELECT i.id, i.input_index, i.attempt, i.created_at, i.container_id, i.started_at, i.not_before, \
                    i.finished, o.status, o.attempt AS last_attempt, o.container_id AS last_container_id, o.finished_at \
             FROM inputs i LEFT JOIN outputs o ON o.input_id = i.id \
             WHERE i.call_id = $1 AND i.input_index >= $2 ORDER BY i.input_index, i.position LIMIT $3",
        )
        .bind(call.to_string())
        .bind(i64::from(from_index))
        .bind(i64::from(limit))
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter()
            .map(input_summary)
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    /// Finds the call of an input.
    pub async fn find_call_of_input(&self, input: InputId) -> Result<Option<CallId>, StoreError> {
        const OPERATION: &str = "find the call of an input";
        let row = query("SELECT call_id FROM inputs WHERE id = $1")
            .bind(input.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.map(|row| row.id("call_id")).transpose().during(OPERATION)
    }

    /// Calls that wait for inputs or for an end, all of whose inputs have finished, and of which
    /// nothing was heard since `quiet_since`: their client is gone (`.map()` has no last word unless
    /// its reader lives to say it). The caller has the scheduler close them; the sweep does the rest.
    pub async fn open_and_quiet(&self, quiet_since: Timestamp, limit: u32) -> Result<Vec<CallId>, StoreError> {
        const OPERATION: &str = "list abandoned calls";
        let rows = query(
            "SELECT id FROM calls WHERE NOT finished AND finished_count = input_count AND last_activity_at < $1 \
             ORDER BY last_activity_at LIMIT $2",
        )
        .bind(quiet_since.micros())
        .bind(i64::from(limit))
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter()
            .map(|row| row.id("id"))
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    /// Deletes up to `limit` expired calls with all that belongs to them, in short transactions
    /// between which turns get their chance. Returns the calls that are gone.
    ///
    /// Interrupted, it leaves a call with fewer inputs, which the next sweep takes.
    pub async fn delete_expired(&self, expiry: Expiry, limit: u32) -> Result<Vec<CallId>, StoreError> {
        const OPERATION: &str = "delete expired calls";
        let rows = query(EXPIRED_CALLS)
            .bind(expiry.finished_before.micros())
            .bind(expiry.consumed_before.micros())
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        let calls: Vec<CallId> = rows
            .iter()
            .map(|row| row.id("id"))
            .collect::<Result<_, _>>()
            .during(OPERATION)?;
        for call in &calls {
            self.delete_call(*call).await.during(OPERATION)?;
        }
        Ok(calls)
    }

    async fn delete_call(&self, call: CallId) -> Result<(), Failure> {
        loop {
            // Payloads and outputs go with their inputs.
            let done = query(
                "DELETE FROM inputs WHERE position IN \
                 (SELECT position FROM inputs WHERE call_id = $1 ORDER BY input_index LIMIT $2)",
            )
            .bind(call.to_string())
            .bind(SWEEP_INPUTS)
            .execute(&self.0.writer)
            .await?;
            if done.rows_affected() < SWEEP_INPUTS as u64 {
                break;
            }
        }
        query("DELETE FROM calls WHERE id = $1")
            .bind(call.to_string())
            .execute(&self.0.writer)
            .await?;
        Ok(())
    }
}

/// What an output weighs in memory and in a message.
fn outcome_bytes(outcome: &Outcome) -> usize {
    outcome.payload.inline_len()
        + outcome.exception.len()
        + outcome.traceback.len()
        + outcome.serialized_traceback.len()
        + outcome.traceback_line_cache.len()
}

pub(crate) fn call(row: &SqliteRow) -> Result<Call, Failure> {
    Ok(Call {
        id: row.id("id")?,
        app_id: row.id("app_id")?,
        function_id: row.id("function_id")?,
        kind: row.tag("kind")?,
        invocation: row.tag("invocation")?,
        parent_input_id: row.optional_id("parent_input_id")?,
        created_at: row.time("created_at")?,
        finished_inputs: row.optional_number("finished_inputs")?,
    })
}

fn call_summary(row: &SqliteRow) -> Result<CallSummary, Failure> {
    Ok(CallSummary {
        call: call(row)?,
        input_count: row.number("input_count")?,
        finished_count: row.number("finished_count")?,
        last_sequence: row.number("last_sequence")?,
        consumed: row.flag("consumed")?,
        finished: row.flag("finished")?,
        last_activity_at: row.time("last_activity_at")?,
    })
}

fn input_payload(row: &SqliteRow) -> Result<(InputId, InputPayload), Failure> {
    let payload = InputPayload {
        payload: row.payload()?,
        data_format: row.number("data_format")?,
        method_name: row.optional_text("method_name")?,
    };
    Ok((row.id("input_id")?, payload))
}

fn input_summary(row: &SqliteRow) -> Result<InputSummary, Failure> {
    let container: Option<ContainerId> = row.optional_id("container_id")?;
    let (attempt, status) = match (row.flag("finished")?, container) {
        (true, _) => (
            row.number("last_attempt")?,
            InputStatus::Finished {
                status: outcome_status(row)?,
                container_id: row.optional_id("last_container_id")?,
                finished_at: row.time("finished_at")?,
            },
        ),
        (false, Some(container_id)) => (
            row.number("attempt")?,
            InputStatus::Running {
                container_id,
                started_at: row.time("started_at")?,
            },
        ),
        (false, None) => (
            row.number("attempt")?,
            InputStatus::Queued {
                not_before: row.optional_time("not_before")?,
            },
        ),
    };
    Ok(InputSummary {
        id: row.id("id")?,
        index: row.number("input_index")?,
        attempt: AttemptNumber(attempt),
        created_at: row.time("created_at")?,
        status,
    })
}

fn output(row: &SqliteRow) -> Result<OutputRecord, Failure> {
    Ok(OutputRecord {
        sequence: row.number("sequence")?,
        input_id: row.id("input_id")?,
        index: row.number("input_index")?,
        attempt: AttemptNumber(row.number("attempt")?),
        container_id: row.optional_id("container_id")?,
        outcome: Outcome {
            status: outcome_status(row)?,
            payload: row.payload()?,
            data_format: row.number("data_format")?,
            exception: row.text("exception")?,
            traceback: row.text("traceback")?,
            serialized_traceback: row.bytes("serialized_traceback")?,
            traceback_line_cache: row.bytes("traceback_line_cache")?,
            exit_code: row.number("exit_code")?,
        },
        started_at: row.optional_time("started_at")?,
        finished_at: row.time("finished_at")?,
    })
}

fn outcome_status(row: &SqliteRow) -> Result<OutcomeStatus, Failure> {
    let number: i32 = row.number("status")?;
    OutcomeStatus::from_wire(number)
        .ok_or_else(|| unreadable("status", format!("{number} is not the number of an outcome's status")))
}
