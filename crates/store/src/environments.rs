//! Environments. Exactly one is the default from the first start on, and it cannot be deleted.

use ionian_domain::app::AppState;
use ionian_domain::environment::Environment;
use ionian_domain::ids::EnvironmentId;
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, tag};
use crate::{Connection, Store};

#[derive(Debug, Clone, Copy)]
pub struct Environments<'a>(pub(crate) &'a Store);

impl Environments<'_> {
    /// Fails with `AlreadyExists` where the name is taken, or where this is a second default.
    pub async fn insert(&self, environment: &Environment) -> Result<(), StoreError> {
        query(
            "INSERT INTO environments (id, name, web_suffix, is_default, created_at) \
             VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(environment.id.to_string())
        .bind(&environment.name)
        .bind(&environment.web_suffix)
        .bind(environment.is_default)
        .bind(environment.created_at.micros())
        .execute(&self.0.writer)
        .await
        .during("insert an environment")?;
        Ok(())
    }

    /// All environments, by name.
    pub async fn list(&self) -> Result<Vec<Environment>, StoreError> {
        const OPERATION: &str = "list environments";
        let rows = query("SELECT * FROM environments ORDER BY name")
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(environment).collect::<Result<_, _>>().during(OPERATION)
    }

    pub async fn find(&self, id: EnvironmentId) -> Result<Option<Environment>, StoreError> {
        const OPERATION: &str = "find an environment";
        let row = query("SELECT * FROM environments WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(environment).transpose().during(OPERATION)
    }

    pub async fn find_by_name(&self, name: &str) -> Result<Option<Environment>, StoreError> {
        const OPERATION: &str = "find an environment by name";
        let row = query("SELECT * FROM environments WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(environment).transpose().during(OPERATION)
    }

    pub async fn find_default(&self) -> Result<Option<Environment>, StoreError> {
        const OPERATION: &str = "find the default environment";
        let row = query("SELECT * FROM environments WHERE is_default")
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(environment).transpose().during(OPERATION)
    }

    /// Writes the name and the web suffix. Which environment is the default never changes.
    pub async fn update(&self, environment: &Environment) -> Result<(), StoreError> {
        const OPERATION: &str = "update an environment";
        let done = query("UPDATE environments SET name = $1, web_suffix = $2 WHERE id = $3")
            .bind(&environment.name)
            .bind(&environment.web_suffix)
            .bind(environment.id.to_string())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("environment", &environment.id)).during(OPERATION);
        }
        Ok(())
    }

    /// Deletes an environment with its secrets, labels and stopped apps. Refused for the default
    /// one and while an app in it has not stopped.
    pub async fn delete(&self, id: EnvironmentId) -> Result<(), StoreError> {
        const OPERATION: &str = "delete an environment";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        delete(&mut tx, id).await.during(OPERATION)?;
        tx.commit().await.during(OPERATION)
    }
}

async fn delete(tx: &mut Connection, id: EnvironmentId) -> Result<(), Failure> {
    let row = query("SELECT * FROM environments WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await?;
    let Some(environment) = row.as_ref().map(environment).transpose()? else {
        return Err(Failure::missing("environment", &id));
    };
    if environment.is_default {
        return Err(Failure::Refused(format!(
            "'{}' is the default environment",
            environment.name
        )));
    }
    let live = query("SELECT COALESCE(name, id) AS name FROM apps WHERE environment_id = $1 AND state <> $2 LIMIT 1")
        .bind(id.to_string())
        .bind(tag(AppState::Stopped))
        .fetch_optional(&mut *tx)
        .await?;
    if let Some(row) = live {
        let app = row.text("name")?;
        return Err(Failure::Refused(format!(
            "app '{app}' in environment '{}' is not stopped",
            environment.name
        )));
    }
    query("DELETE FROM environments WHERE id = $1")
        .bind(id.to_string())
        .execute(tx)
        .await?;
    Ok(())
}

fn environment(row: &SqliteRow) -> Result<Environment, Failure> {
    Ok(Environment {
        id: row.id("id")?,
        name: row.text("name")?,
        web_suffix: row.text("web_suffix")?,
        is_default: row.flag("is_default")?,
        created_at: row.time("created_at")?,
    })
}
