//! Answers of requests that clients may send twice. An answer is recorded in the transaction of what
//! it answers ([`crate::calls::Calls::commit`]) wherever that is a turn.

use bytes::Bytes;
use ionian_domain::Timestamp;
use sqlx::query;

use crate::error::{During as _, Failure, StoreError};
use crate::row::RowExt as _;
use crate::{Connection, Store};

/// The answer to a request, by the key that the client gave to all attempts of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyRecord {
    pub key: String,
    pub rpc: String,
    pub response: Bytes,
    pub at: Timestamp,
}

#[derive(Debug, Clone, Copy)]
pub struct Idempotency<'a>(pub(crate) &'a Store);

impl Idempotency<'_> {
    /// Records an answer. The first one stays: a client may have seen it.
    pub async fn remember(&self, record: &IdempotencyRecord) -> Result<(), StoreError> {
        const OPERATION: &str = "remember an answer";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        insert(&mut tx, record).await.during(OPERATION)?;
        tx.commit().await.during(OPERATION)
    }

    pub async fn recall(&self, key: &str, rpc: &str) -> Result<Option<Bytes>, StoreError> {
        const OPERATION: &str = "recall an answer";
        let row = query("SELECT response FROM idempotency WHERE key = $1 AND rpc = $2")
            .bind(key)
            .bind(rpc)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.map(|row| row.bytes("response")).transpose().during(OPERATION)
    }

    /// Forgets up to `limit` answers from before a time, oldest first; returns how many.
    pub async fn sweep(&self, before: Timestamp, limit: u32) -> Result<u64, StoreError> {
        let done = query(
            "DELETE FROM idempotency WHERE (key, rpc) IN \
             (SELECT key, rpc FROM idempotency WHERE at < $1 ORDER BY at LIMIT $2)",
        )
        .bind(before.micros())
        .bind(i64::from(limit))
        .execute(&self.0.writer)
        .await
        .during("forget old answers")?;
        Ok(done.rows_affected())
    }
}

pub(crate) async fn insert(tx: &mut Connection, record: &IdempotencyRecord) -> Result<(), Failure> {
    query("INSERT INTO idempotency (key, rpc, at, response) VALUES ($1, $2, $3, $4) ON CONFLICT (key, rpc) DO NOTHING")
        .bind(&record.key)
        .bind(&record.rpc)
        .bind(record.at.micros())
        .bind(record.response.to_vec())
        .execute(tx)
        .await?;
    Ok(())
}
