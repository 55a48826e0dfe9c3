//! Facts about this installation: the workspace's id, the instance's id, the check of the sealing key.

use bytes::Bytes;
use sqlx::query;

use crate::Store;
use crate::error::{During as _, StoreError};
use crate::row::RowExt as _;

#[derive(Debug, Clone, Copy)]
pub struct Meta<'a>(pub(crate) &'a Store);

impl Meta<'_> {
    pub async fn find(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        const OPERATION: &str = "find a fact of the installation";
        let row = query("SELECT value FROM meta WHERE key = $1")
            .bind(key)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.map(|row| row.bytes("value")).transpose().during(OPERATION)
    }

    pub async fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value")
            .bind(key)
            .bind(value)
            .execute(&self.0.writer)
            .await
            .during("set a fact of the installation")?;
        Ok(())
    }

    /// Reads the whole database and says what is damaged in it; nothing if it is whole. Takes as long as
    /// the database is large.
    pub async fn check_integrity(&self) -> Result<Vec<String>, StoreError> {
        const OPERATION: &str = "check the database";
        let rows = query("PRAGMA integrity_check")
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        let problems: Result<Vec<String>, _> = rows.iter().map(|row| row.text("integrity_check")).collect();
        let problems = problems.during(OPERATION)?;
        Ok(problems.into_iter().filter(|line| line != "ok").collect())
    }

    /// Writes the value if there is none, and returns the one that is there: two processes that
    /// start at once agree on the first one's.
    pub async fn ensure(&self, key: &str, value: &[u8]) -> Result<Bytes, StoreError> {
        const OPERATION: &str = "ensure a fact of the installation";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        query("INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING")
            .bind(key)
            .bind(value)
            .execute(&mut *tx)
            .await
            .during(OPERATION)?;
        let row = query("SELECT value FROM meta WHERE key = $1")
            .bind(key)
            .fetch_one(&mut *tx)
            .await
            .during(OPERATION)?;
        tx.commit().await.during(OPERATION)?;
        row.bytes("value").during(OPERATION)
    }
}
