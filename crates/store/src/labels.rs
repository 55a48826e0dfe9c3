//! Web labels: which function answers at `<workspace>--<label>`. One holder per environment and label.

use ionian_domain::ids::{AppId, EnvironmentId, FunctionId};
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::error::{During as _, Failure, StoreError};
use crate::row::RowExt as _;
use crate::{Connection, Store};

/// A label and who holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebLabel {
    pub environment_id: EnvironmentId,
    pub label: String,
    pub app_id: AppId,
    pub function_id: FunctionId,
    /// The web method, for endpoints on classes.
    pub method: Option<String>,
}

/// What came of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelClaim {
    /// It was free, or held by the same app.
    Granted,
    /// Another app holds it, and keeps it.
    Held(WebLabel),
    /// Another app held it, and lost it.
    Stolen(WebLabel),
}

/// What to do about a label that another app holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnHeld {
    Keep,
    Steal,
}

#[derive(Debug, Clone, Copy)]
pub struct Labels<'a>(pub(crate) &'a Store);

impl Labels<'_> {
    /// Claims a label. Within an app the newest claim wins: a redeploy moves labels between functions.
    pub async fn claim(&self, label: &WebLabel, on_held: OnHeld) -> Result<LabelClaim, StoreError> {
        const OPERATION: &str = "claim a web label";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        let claim = claim(&mut tx, label, on_held).await.during(OPERATION)?;
        tx.commit().await.during(OPERATION)?;
        Ok(claim)
    }

    /// Releases all labels of an app; returns how many it held.
    pub async fn release_app(&self, app: AppId) -> Result<u64, StoreError> {
        let done = query("DELETE FROM web_labels WHERE app_id = $1")
            .bind(app.to_string())
            .execute(&self.0.writer)
            .await
            .during("release the web labels of an app")?;
        Ok(done.rows_affected())
    }

    /// Releases one label if this app holds it: a redeploy dropped the endpoint.
    pub async fn release(&self, environment: EnvironmentId, label: &str, app: AppId) -> Result<bool, StoreError> {
        let done = query("DELETE FROM web_labels WHERE environment_id = $1 AND label = $2 AND app_id = $3")
            .bind(environment.to_string())
            .bind(label)
            .bind(app.to_string())
            .execute(&self.0.writer)
            .await
            .during("release a web label")?;
        Ok(done.rows_affected() > 0)
    }

    pub async fn find(&self, environment: EnvironmentId, label: &str) -> Result<Option<WebLabel>, StoreError> {
        const OPERATION: &str = "find a web label";
        let row = query("SELECT * FROM web_labels WHERE environment_id = $1 AND label = $2")
            .bind(environment.to_string())
            .bind(label)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(web_label).transpose().during(OPERATION)
    }

    /// All labels of all environments: the ingress keeps its table in memory.
    pub async fn list(&self) -> Result<Vec<WebLabel>, StoreError> {
        const OPERATION: &str = "list web labels";
        let rows = query("SELECT * FROM web_labels ORDER BY environment_id, label")
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(web_label).collect::<Result<_, _>>().during(OPERATION)
    }
}

async fn claim(tx: &mut Connection, label: &WebLabel, on_held: OnHeld) -> Result<LabelClaim, Failure> {
    let row = query("SELECT * FROM web_labels WHERE environment_id = $1 AND label = $2")
        .bind(label.environment_id.to_string())
        .bind(&label.label)
        .fetch_optional(&mut *tx)
        .await?;
    let other = row
        .as_ref()
        .map(web_label)
        .transpose()?
        .filter(|holder| holder.app_id != label.app_id);
    let claim = match (other, on_held) {
        (Some(holder), OnHeld::Keep) => return Ok(LabelClaim::Held(holder)),
        (Some(holder), OnHeld::Steal) => LabelClaim::Stolen(holder),
        (None, OnHeld::Keep | OnHeld::Steal) => LabelClaim::Granted,
    };
    query(
        "INSERT INTO web_labels (environment_id, label, app_id, function_id, method) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (environment_id, label) DO UPDATE SET app_id = excluded.app_id, \
             function_id = excluded.function_id, method = excluded.method",
    )
    .bind(label.environment_id.to_string())
    .bind(&label.label)
    .bind(label.app_id.to_string())
    .bind(label.function_id.to_string())
    .bind(&label.method)
    .execute(tx)
    .await?;
    Ok(claim)
}

fn web_label(row: &SqliteRow) -> Result<WebLabel, Failure> {
    Ok(WebLabel {
        environment_id: row.id("environment_id")?,
        label: row.text("label")?,
        app_id: row.id("app_id")?,
        function_id: row.id("function_id")?,
        method: row.optional_text("method")?,
    })
}
