//! Containers: when each began and how it ended, and where the web endpoints of the live ones are. Their
//! rows are written by turns (`turn.rs`).

use std::collections::HashMap;

use ionian_domain::Timestamp;
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{AppId, ContainerId, FunctionId};
use ionian_domain::web::AnnouncedEndpoint;
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, json};

pub(crate) const LIVE_WEB_ENDPOINTS: &str =
    "SELECT id, web_endpoints FROM containers WHERE ended_at IS NULL AND web_endpoints IS NOT NULL";

/// A container of any age.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSummary {
    pub id: ContainerId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub created_at: Timestamp,
    /// How and when it ended; `None` while it has not.
    pub ended: Option<(ContainerExit, Timestamp)>,
}

#[derive(Debug, Clone, Copy)]
pub struct Containers<'a>(pub(crate) &'a Store);

impl Containers<'_> {
    pub async fn find(&self, id: ContainerId) -> Result<Option<ContainerSummary>, StoreError> {
        const OPERATION: &str = "find a container";
        let row = query("SELECT * FROM containers WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(container).transpose().during(OPERATION)
    }

    /// Containers of an app, newest first.
    pub async fn list_by_app(&self, app: AppId, limit: u32) -> Result<Vec<ContainerSummary>, StoreError> {
        const OPERATION: &str = "list the containers of an app";
        let rows = query("SELECT * FROM containers WHERE app_id = $1 ORDER BY position DESC LIMIT $2")
            .bind(app.to_string())
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(container).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Notes where a live container serves its web endpoints. Nothing happens to one that has ended.
    pub async fn note_web_endpoints(
        &self,
        id: ContainerId,
        endpoints: &[AnnouncedEndpoint],
        at: Timestamp,
    ) -> Result<(), StoreError> {
        const OPERATION: &str = "note the web endpoints of a container";
        query("UPDATE containers SET web_endpoints = $2, web_ready_at = $3 WHERE id = $1 AND ended_at IS NULL")
            .bind(id.to_string())
            .bind(json("web endpoints", &endpoints).during(OPERATION)?)
            .bind(at.micros())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        Ok(())
    }

    /// Where the live containers serve their web endpoints, as far as they have announced it.
    pub async fn live_web_endpoints(&self) -> Result<HashMap<ContainerId, Vec<AnnouncedEndpoint>>, StoreError> {
        const OPERATION: &str = "read the web endpoints of live containers";
        let rows = query(LIVE_WEB_ENDPOINTS)
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(|row| Ok((row.id("id")?, row.json("web_endpoints")?)))
            .collect::<Result<_, Failure>>()
            .during(OPERATION)
    }

    /// Forgets up to `limit` containers that ended before a time; returns how many.
    pub async fn sweep(&self, before: Timestamp, limit: u32) -> Result<u64, StoreError> {
        let done = query(
            "DELETE FROM containers WHERE position IN \
             (SELECT position FROM containers WHERE ended_at IS NOT NULL AND ended_at < $1 ORDER BY ended_at LIMIT $2)",
        )
        .bind(before.micros())
        .bind(i64::from(limit))
        .execute(&self.0.writer)
        .await
        .during("forget old containers")?;
        Ok(done.rows_affected())
    }
}

fn container(row: &SqliteRow) -> Result<ContainerSummary, Failure> {
    let ended_at = row.optional_time("ended_at")?;
    Ok(ContainerSummary {
        id: row.id("id")?,
        app_id: row.id("app_id")?,
        function_id: row.id("function_id")?,
        created_at: row.time("created_at")?,
        ended: ended_at
            .map(|at| Ok::<_, Failure>((row.json("exit")?, at)))
            .transpose()?,
    })
}
