//! Secrets, sealed. This crate never sees a value in the clear, nor the key.

use std::collections::HashMap;

use ionian_domain::Timestamp;
use ionian_domain::ids::{EnvironmentId, SecretId};
use ionian_domain::secret::Secret;
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{QueryBuilder, query};

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::{QueryBuilderExt as _, RowExt as _, bulk_slices, json};

#[derive(Debug, Clone, Copy)]
pub struct Secrets<'a>(pub(crate) &'a Store);

impl Secrets<'_> {
    /// Fails with `AlreadyExists` where the environment has a secret of this name.
    pub async fn insert(&self, secret: &Secret) -> Result<(), StoreError> {
        const OPERATION: &str = "insert a secret";
        query(
            "INSERT INTO secrets (id, environment_id, name, app_id, keys, sealed, created_at, updated_at, last_used_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(secret.id.to_string())
        .bind(secret.environment_id.to_string())
        .bind(&secret.name)
        .bind(secret.app_id.map(|id| id.to_string()))
        .bind(json("the secret's keys", &secret.keys).during(OPERATION)?)
        .bind(&secret.sealed)
        .bind(secret.created_at.micros())
        .bind(secret.updated_at.micros())
        .bind(secret.last_used_at.map(Timestamp::micros))
        .execute(&self.0.writer)
        .await
        .during(OPERATION)?;
        Ok(())
    }

    pub async fn find(&self, id: SecretId) -> Result<Option<Secret>, StoreError> {
        const OPERATION: &str = "find a secret";
        let row = query("SELECT * FROM secrets WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(secret).transpose().during(OPERATION)
    }

    pub async fn find_by_name(&self, environment: EnvironmentId, name: &str) -> Result<Option<Secret>, StoreError> {
        const OPERATION: &str = "find a secret by name";
        let row = query("SELECT * FROM secrets WHERE environment_id = $1 AND name = $2")
            .bind(environment.to_string())
            .bind(name)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(secret).transpose().during(OPERATION)
    }

    /// Secrets in the order of `ids`. Fails with `NotFound` where one is missing: a container must
    /// not start without a secret that it asked for.
    pub async fn get_many(&self, ids: &[SecretId]) -> Result<Vec<Secret>, StoreError> {
        const OPERATION: &str = "get secrets";
        let mut found = HashMap::with_capacity(ids.len());
        for slice in bulk_slices(ids) {
            let mut select = QueryBuilder::<Sqlite>::new("SELECT * FROM secrets WHERE id IN ");
            select.push_ids(slice);
            for row in select.build().fetch_all(&self.0.readers).await.during(OPERATION)? {
                let secret = secret(&row).during(OPERATION)?;
                found.insert(secret.id, secret);
            }
        }
        ids.iter()
            .map(|id| found.get(id).cloned().ok_or_else(|| Failure::missing("secret", &id)))
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }

    /// Replaces the variables of a secret.
    pub async fn update_sealed(
        &self,
        id: SecretId,
        keys: &[String],
        sealed: &[u8],
        at: Timestamp,
    ) -> Result<(), StoreError> {
        const OPERATION: &str = "update a secret";
        let done = query("UPDATE secrets SET keys = $1, sealed = $2, updated_at = $3 WHERE id = $4")
            .bind(json("the secret's keys", &keys).during(OPERATION)?)
            .bind(sealed)
            .bind(at.micros())
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("secret", &id)).during(OPERATION);
        }
        Ok(())
    }

    /// Named secrets that were created before a time, newest first: the client pages by that time.
    pub async fn list(
        &self,
        environment: EnvironmentId,
        created_before: Timestamp,
        limit: u32,
    ) -> Result<Vec<Secret>, StoreError> {
        const OPERATION: &str = "list secrets";
        let rows = query(
            "SELECT * FROM secrets WHERE environment_id = $1 AND name IS NOT NULL AND created_at < $2 \
             ORDER BY created_at DESC, id DESC LIMIT $3",
        )
        .bind(environment.to_string())
        .bind(created_before.micros())
        .bind(i64::from(limit))
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter().map(secret).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Returns whether there was one.
    pub async fn delete(&self, id: SecretId) -> Result<bool, StoreError> {
        let done = query("DELETE FROM secrets WHERE id = $1")
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during("delete a secret")?;
        Ok(done.rows_affected() > 0)
    }

    /// Records that containers started with these secrets.
    pub async fn touch(&self, ids: &[SecretId], at: Timestamp) -> Result<(), StoreError> {
        const OPERATION: &str = "record the use of secrets";
        if ids.is_empty() {
            return Ok(());
        }
        let mut tx = self.0.begin().await.during(OPERATION)?;
        for slice in bulk_slices(ids) {
            let mut update = QueryBuilder::<Sqlite>::new("UPDATE secrets SET last_used_at = ");
            update.push_bind(at.micros()).push(" WHERE id IN ");
            update.push_ids(slice);
            update.build().execute(&mut *tx).await.during(OPERATION)?;
        }
        tx.commit().await.during(OPERATION)
    }
}

fn secret(row: &SqliteRow) -> Result<Secret, Failure> {
    Ok(Secret {
        id: row.id("id")?,
        environment_id: row.id("environment_id")?,
        name: row.optional_text("name")?,
        app_id: row.optional_id("app_id")?,
        keys: row.json("keys")?,
        sealed: row.bytes("sealed")?.into(),
        created_at: row.time("created_at")?,
        updated_at: row.time("updated_at")?,
        last_used_at: row.optional_time("last_used_at")?,
    })
}
