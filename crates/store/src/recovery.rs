//! Reads back what recovery starts from.

use ionian_domain::call::AttemptNumber;
use ionian_domain::ids::{ContainerId, DefinitionId, WorkerId};
use ionian_domain::record::{PendingCall, PendingContainer, PendingInput, Recovered};
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::calls::call;
use crate::error::Failure;
use crate::row::RowExt as _;

pub(crate) const PENDING_CALLS: &str = "SELECT * FROM calls WHERE NOT finished ORDER BY position";
pub(crate) const PENDING_INPUTS: &str = "SELECT * FROM inputs WHERE NOT finished ORDER BY position";
pub(crate) const LIVE_CONTAINERS: &str = "SELECT * FROM containers WHERE ended_at IS NULL ORDER BY position";

/// Reads everything that is not finished, as of one commit, each kind in the order of its creation.
pub(crate) async fn load_pending(store: &Store) -> Result<Recovered, Failure> {
    let mut snapshot = store.readers.begin().await?;
    let calls = query(PENDING_CALLS).fetch_all(&mut *snapshot).await?;
    let inputs = query(PENDING_INPUTS).fetch_all(&mut *snapshot).await?;
    let containers = query(LIVE_CONTAINERS).fetch_all(&mut *snapshot).await?;
    snapshot.commit().await?;
    Ok(Recovered {
        calls: calls.iter().map(pending_call).collect::<Result<_, _>>()?,
        inputs: inputs.iter().map(pending_input).collect::<Result<_, _>>()?,
        containers: containers.iter().map(pending_container).collect::<Result<_, _>>()?,
    })
}

fn pending_call(row: &SqliteRow) -> Result<PendingCall, Failure> {
    Ok(PendingCall {
        call: call(row)?,
        input_count: row.number("input_count")?,
        finished_count: row.number("finished_count")?,
        last_sequence: row.number("last_sequence")?,
    })
}

fn pending_input(row: &SqliteRow) -> Result<PendingInput, Failure> {
    let container: Option<ContainerId> = row.optional_id("container_id")?;
    Ok(PendingInput {
        id: row.id("id")?,
        call_id: row.id("call_id")?,
        function_id: row.id("function_id")?,
        index: row.number("input_index")?,
        attempt: AttemptNumber(row.number("attempt")?),
        retries_used: row.number("retries_used")?,
        running: container
            .map(|id| Ok::<_, Failure>((id, row.time("started_at")?)))
            .transpose()?,
        not_before: row.optional_time("not_before")?,
        created_at: row.time("created_at")?,
    })
}

fn pending_container(row: &SqliteRow) -> Result<PendingContainer, Failure> {
    let worker: Option<WorkerId> = row.optional_id("worker_id")?;
    let definition: Option<DefinitionId> = row.optional_id("definition_id")?;
    Ok(PendingContainer {
        id: row.id("id")?,
        origin: worker.zip(definition),
        web_ready_at: row.optional_time("web_ready_at")?,
        app_id: row.id("app_id")?,
        function_id: row.id("function_id")?,
        created_at: row.time("created_at")?,
    })
}
