//! API tokens. The secret half is stored as a hash; a revoked token stays, so that its name in old
//! logs keeps its meaning.

use std::time::Instant;

use ionian_domain::Timestamp;
use ionian_domain::ids::TokenId;
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, unreadable};

/// An API token. `Debug` does not show the hash.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenRecord {
    pub id: TokenId,
    pub name: String,
    /// SHA-256 of the secret half, which is random and long: a slow hash would add nothing.
    pub secret_hash: [u8; 32],
    pub created_at: Timestamp,
    pub revoked_at: Option<Timestamp>,
    pub last_used_at: Option<Timestamp>,
}

impl std::fmt::Debug for TokenRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenRecord")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("created_at", &self.created_at)
            .field("revoked_at", &self.revoked_at)
            .field("last_used_at", &self.last_used_at)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a>(pub(crate) &'a Store);

impl Tokens<'_> {
    pub async fn insert(&self, token: &TokenRecord) -> Result<(), StoreError> {
        query(
            "INSERT INTO tokens (id, name, secret_hash, created_at, revoked_at, last_used_at) \
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(token.id.to_string())
        .bind(&token.name)
        .bind(token.secret_hash.as_slice())
        .bind(token.created_at.micros())
        .bind(token.revoked_at.map(Timestamp::micros))
        .bind(token.last_used_at.map(Timestamp::micros))
        .execute(&self.0.writer)
        .await
        .during("insert a token")?;
        Ok(())
    }

    /// All tokens, revoked ones too, oldest first.
    pub async fn list(&self) -> Result<Vec<TokenRecord>, StoreError> {
        const OPERATION: &str = "list tokens";
        let rows = query("SELECT * FROM tokens ORDER BY created_at, id")
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(token).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Finds a token, also a revoked one.
    pub async fn find(&self, id: TokenId) -> Result<Option<TokenRecord>, StoreError> {
        const OPERATION: &str = "find a token";
        let row = query("SELECT * FROM tokens WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(token).transpose().during(OPERATION)
    }

    /// The same, but what another process changed in the last [`crate::TOKEN_LIFETIME`] may be missing: for
    /// requests, which come by the thousands.
    pub async fn find_recent(&self, id: TokenId) -> Result<Option<TokenRecord>, StoreError> {
        if let Some(token) = self.0.memory.tokens.find(id) {
            return Ok(Some(token));
        }
        let read_at = Instant::now();
        let found = self.find(id).await?;
        if let Some(token) = &found {
            self.0.memory.tokens.keep(token.clone(), read_at);
        }
        Ok(found)
    }

    /// Revokes a token; the time of a second revocation is not recorded.
    pub async fn revoke(&self, id: TokenId, at: Timestamp) -> Result<(), StoreError> {
        const OPERATION: &str = "revoke a token";
        let done = query("UPDATE tokens SET revoked_at = COALESCE(revoked_at, $1) WHERE id = $2")
            .bind(at.micros())
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("token", &id)).during(OPERATION);
        }
        self.0.memory.tokens.forget(id);
        Ok(())
    }

    /// Records a use. For a periodic sweep of the caller's, never per request: each call is a sync.
    pub async fn touch(&self, id: TokenId, at: Timestamp) -> Result<(), StoreError> {
        query("UPDATE tokens SET last_used_at = $1 WHERE id = $2")
            .bind(at.micros())
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during("record the use of a token")?;
        Ok(())
    }
}

fn token(row: &SqliteRow) -> Result<TokenRecord, Failure> {
    let hash = row.bytes("secret_hash")?;
    Ok(TokenRecord {
        id: row.id("id")?,
        name: row.text("name")?,
        secret_hash: hash
            .as_ref()
            .try_into()
            .map_err(|source| unreadable("secret_hash", Box::new(source)))?,
        created_at: row.time("created_at")?,
        revoked_at: row.optional_time("revoked_at")?,
        last_used_at: row.optional_time("last_used_at")?,
    })
}
