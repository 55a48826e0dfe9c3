//! Apps and their published versions.

use std::collections::BTreeMap;

use ionian_domain::Timestamp;
use ionian_domain::app::{App, AppState, AppVersion};
use ionian_domain::ids::{AppId, DefinitionId, EnvironmentId, FunctionId};
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, json, tag};
use crate::{Connection, Store};

/// One publish (or rollback) of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishRecord {
    /// `None` leaves the state as it is.
    pub state: Option<AppState>,
    /// `None` leaves the name as it is.
    pub name: Option<String>,
    /// Carries the app's id, its new version number and its new layout.
    pub version: AppVersion,
    /// The definition that each function of the layout has from now on.
    pub definitions: BTreeMap<FunctionId, DefinitionId>,
}

/// A version from the history, with what a rollback to it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedVersion {
    pub version: AppVersion,
    pub definitions: BTreeMap<FunctionId, DefinitionId>,
}

#[derive(Debug, Clone, Copy)]
pub struct Apps<'a>(pub(crate) &'a Store);

impl Apps<'_> {
    pub async fn insert(&self, app: &App) -> Result<(), StoreError> {
        const OPERATION: &str = "insert an app";
        query(
            "INSERT INTO apps (id, environment_id, name, description, state, created_at, deployed_at, stopped_at, \
                               version, layout, tags) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(app.id.to_string())
        .bind(app.environment_id.to_string())
        .bind(&app.name)
        .bind(&app.description)
        .bind(tag(app.state))
        .bind(app.created_at.micros())
        .bind(app.deployed_at.map(Timestamp::micros))
        .bind(app.stopped_at.map(Timestamp::micros))
        .bind(i64::from(app.version))
        .bind(json("the app's layout", &app.layout).during(OPERATION)?)
        .bind(json("the app's tags", &app.tags).during(OPERATION)?)
        .execute(&self.0.writer)
        .await
        .during(OPERATION)?;
        Ok(())
    }

    pub async fn find(&self, id: AppId) -> Result<Option<App>, StoreError> {
        const OPERATION: &str = "find an app";
        let row = query("SELECT * FROM apps WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(app).transpose().during(OPERATION)
    }

    /// The newest app of this name that has not stopped (it may be stopping).
    pub async fn find_by_name(&self, environment: EnvironmentId, name: &str) -> Result<Option<App>, StoreError> {
        const OPERATION: &str = "find an app by name";
        let row = query(
            "SELECT * FROM apps WHERE environment_id = $1 AND name = $2 AND state <> $3 \
             ORDER BY created_at DESC, id DESC LIMIT 1",
        )
        .bind(environment.to_string())
        .bind(name)
        .bind(tag(AppState::Stopped))
        .fetch_optional(&self.0.readers)
        .await
        .during(OPERATION)?;
        row.as_ref().map(app).transpose().during(OPERATION)
    }

    /// The newest app that ever had this name.
    pub async fn find_last_by_name(&self, environment: EnvironmentId, name: &str) -> Result<Option<App>, StoreError> {
        const OPERATION: &str = "find the last app of a name";
        let row = query(
            "SELECT * FROM apps WHERE environment_id = $1 AND name = $2 \
             ORDER BY created_at DESC, id DESC LIMIT 1",
        )
        .bind(environment.to_string())
        .bind(name)
        .fetch_optional(&self.0.readers)
        .await
        .during(OPERATION)?;
        row.as_ref().map(app).transpose().during(OPERATION)
    }

    /// Apps of an environment: those that have not stopped first, then the stopped ones, each newest
    /// first. Every `modal run` leaves a stopped app, hence the limit.
    pub async fn list(&self, environment: EnvironmentId, limit: u32) -> Result<Vec<App>, StoreError> {
        const OPERATION: &str = "list apps";
        let rows = query(
            "SELECT * FROM apps WHERE environment_id = $1 \
             ORDER BY CASE WHEN state = $2 THEN 1 ELSE 0 END, created_at DESC, id DESC LIMIT $3",
        )
        .bind(environment.to_string())
        .bind(tag(AppState::Stopped))
        .bind(i64::from(limit))
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter().map(app).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Every app that has not stopped, oldest first: what recovery starts from.
    pub async fn list_all_live(&self) -> Result<Vec<App>, StoreError> {
        const OPERATION: &str = "list live apps";
        let rows = query("SELECT * FROM apps WHERE state <> $1 ORDER BY created_at, id")
            .bind(tag(AppState::Stopped))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(app).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Writes the state; `at` becomes the time of the stop or of the deployment where it is one.
    pub async fn set_state(&self, id: AppId, state: AppState, at: Timestamp) -> Result<(), StoreError> {
        const OPERATION: &str = "set the state of an app";
        let (deployed_at, stopped_at) = match state {
            AppState::Deployed => (Some(at), None),
            AppState::Stopped => (None, Some(at)),
            AppState::Initializing | AppState::Ephemeral | AppState::Detached | AppState::Stopping => (None, None),
        };
        let done = query(
            "UPDATE apps SET state = $1, deployed_at = COALESCE($2, deployed_at), \
                             stopped_at = COALESCE(stopped_at, $3) \
             WHERE id = $4",
        )
        .bind(tag(state))
        .bind(deployed_at.map(Timestamp::micros))
        .bind(stopped_at.map(Timestamp::micros))
        .bind(id.to_string())
        .execute(&self.0.writer)
        .await
        .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("app", &id)).during(OPERATION);
        }
        Ok(())
    }

    pub async fn set_tags(&self, id: AppId, tags: &BTreeMap<String, String>) -> Result<(), StoreError> {
        const OPERATION: &str = "set the tags of an app";
        let done = query("UPDATE apps SET tags = $1 WHERE id = $2")
            .bind(json("the app's tags", tags).during(OPERATION)?)
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("app", &id)).during(OPERATION);
        }
        Ok(())
    }

    /// Points the app at a new set of functions, in one transaction: the app's row, its history, and
    /// the published definition of each function.
    ///
    /// Fails with `AlreadyExists` where another publish took the version number, is refused for an
    /// app that is stopping or stopped, and fails where a definition is not one of its function.
    pub async fn publish(&self, publish: &PublishRecord) -> Result<(), StoreError> {
        const OPERATION: &str = "publish an app";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        write_publish(&mut tx, publish).await.during(OPERATION)?;
        tx.commit().await.during(OPERATION)
    }

    /// The history of an app, newest first.
    pub async fn versions(&self, id: AppId) -> Result<Vec<PublishedVersion>, StoreError> {
        const OPERATION: &str = "list the versions of an app";
        let rows = query("SELECT * FROM app_versions WHERE app_id = $1 ORDER BY version DESC")
            .bind(id.to_string())
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(published_version)
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    pub async fn find_version(&self, id: AppId, version: u32) -> Result<Option<PublishedVersion>, StoreError> {
        const OPERATION: &str = "find a version of an app";
        let row = query("SELECT * FROM app_versions WHERE app_id = $1 AND version = $2")
            .bind(id.to_string())
            .bind(i64::from(version))
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(published_version).transpose().during(OPERATION)
    }
}

async fn write_publish(tx: &mut Connection, publish: &PublishRecord) -> Result<(), Failure> {
    let version = &publish.version;
    let app_id = version.app_id.to_string();
    let layout = json("the app's layout", &version.layout)?;

    let row = query("SELECT state FROM apps WHERE id = $1")
        .bind(&app_id)
        .fetch_optional(&mut *tx)
        .await?;
    let state: AppState = row
        .ok_or_else(|| Failure::missing("app", &version.app_id))?
        .tag("state")?;
    if !state.accepts_work() {
        return Err(Failure::Refused(format!(
            "app {app_id} was stopped while it was being published"
        )));
    }

    query(
        "INSERT INTO app_versions (app_id, version, layout, definitions, deployed_at, deployed_by, client_version, tag) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(&app_id)
    .bind(i64::from(version.version))
    .bind(&layout)
    .bind(json("the app's definitions", &publish.definitions)?)
    .bind(version.deployed_at.micros())
    .bind(&version.deployed_by)
    .bind(&version.client_version)
    .bind(&version.tag)
    .execute(&mut *tx)
    .await?;

    let state = publish.state.unwrap_or(state);
    let deployed_at = (state == AppState::Deployed).then_some(version.deployed_at.micros());
    query(
        "UPDATE apps SET state = $1, name = COALESCE($2, name), version = $3, layout = $4, \
                         deployed_at = COALESCE($5, deployed_at) \
         WHERE id = $6",
    )
    .bind(tag(state))
    .bind(&publish.name)
    .bind(i64::from(version.version))
    .bind(&layout)
    .bind(deployed_at)
    .bind(&app_id)
    .execute(&mut *tx)
    .await?;

    for (function_id, definition_id) in &publish.definitions {
        let done = query(
            "UPDATE functions SET definition_id = $1, published_definition_id = $1 \
             WHERE id = $2 AND app_id = $3 \
               AND EXISTS (SELECT 1 FROM function_definitions WHERE id = $1 AND function_id = $2)",
        )
        .bind(definition_id.to_string())
        .bind(function_id.to_string())
        .bind(&app_id)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing(
                "definition",
                &format!("{definition_id} of function {function_id}"),
            ));
        }
    }
    Ok(())
}

fn app(row: &SqliteRow) -> Result<App, Failure> {
    Ok(App {
        id: row.id("id")?,
        environment_id: row.id("environment_id")?,
        name: row.optional_text("name")?,
        description: row.text("description")?,
        state: row.tag("state")?,
        created_at: row.time("created_at")?,
        deployed_at: row.optional_time("deployed_at")?,
        stopped_at: row.optional_time("stopped_at")?,
        version: row.number("version")?,
        layout: row.json("layout")?,
        tags: row.json("tags")?,
    })
}

fn published_version(row: &SqliteRow) -> Result<PublishedVersion, Failure> {
    Ok(PublishedVersion {
        version: AppVersion {
            app_id: row.id("app_id")?,
            version: row.number("version")?,
            layout: row.json("layout")?,
            deployed_at: row.time("deployed_at")?,
            deployed_by: row.text("deployed_by")?,
            client_version: row.text("client_version")?,
            tag: row.text("tag")?,
        },
        definitions: row.json("definitions")?,
    })
}
