//! The only SQL of the platform: `SQLite` in WAL mode, one file per noun.
//!
//! `control` calls it. It records and reads back; it never decides. The one rule that it knows by
//! itself is when a call is finished (see `turn.rs`), because sweeping and recovery both ask for it.
//!
//! # Durability
//!
//! A method that returned `Ok` has its write on disk: `synchronous=FULL` makes every commit one sync
//! of the write-ahead log. Group commit is the caller's business: the turn loop collects what it
//! can and calls [`calls::Calls::commit`] once.
//!
//! # One writer
//!
//! `SQLite` has one writer at a time. Writes therefore go through a pool that holds exactly one
//! connection: acquiring it is a fair asynchronous mutex, and sqlx runs each connection on a thread
//! of its own, so that a writer task of ours would add a queue and nothing else. Another process
//! (`ionian token new` beside a running server) is waited for by `SQLite`'s busy handler; transactions
//! begin as writers (`BEGIN IMMEDIATE`), because one that is upgraded half-way cannot wait.
//!
//! Readers have connections of their own (`query_only`, so that a write among the reads fails in
//! every test) and never wait for the writer: each sees the last commit before it began.
//!
//! # Cancellation
//!
//! Dropping the future of a write rolls it back, unless the commit itself had been handed to the
//! connection's thread: then it may have happened. The turn loop does not cancel commits.
//!
//! # Portability
//!
//! Statements use `$1` parameters, `ON CONFLICT`, partial indexes and nothing that `PostgreSQL` lacks.

pub mod apps;
pub mod calls;
pub mod classes;
pub mod containers;
pub mod environments;
mod error;
pub mod functions;
pub mod idempotency;
pub mod images;
pub mod labels;
mod memory;
pub mod meta;
pub mod mounts;
mod open;
mod recovery;
mod row;
pub mod secrets;
pub mod tokens;
mod turn;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use sqlx::sqlite::{Sqlite, SqlitePool};
use sqlx::{SqliteConnection, Transaction};

pub use error::{Failure, StoreError};
pub use memory::TOKEN_LIFETIME;

use error::During as _;

/// Handle on the database. Cheap to clone; all clones share the same connections.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    memory: Arc<memory::Memory>,
}

impl Store {
    /// Opens the database file, creating it (readable by its owner only) and bringing its tables up
    /// to date where needed. A file from a newer version of the program is refused.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let (writer, readers) = open::open(path).await.during("open the database")?;
        Ok(Self {
            writer,
            readers,
            memory: Arc::default(),
        })
    }

    /// Waits for running statements, folds the write-ahead log into the database file and closes it.
    /// Not needed for durability.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    pub fn apps(&self) -> apps::Apps<'_> {
        apps::Apps(self)
    }

    pub fn calls(&self) -> calls::Calls<'_> {
        calls::Calls(self)
    }

    pub fn classes(&self) -> classes::Classes<'_> {
        classes::Classes(self)
    }

    pub fn containers(&self) -> containers::Containers<'_> {
        containers::Containers(self)
    }

    pub fn environments(&self) -> environments::Environments<'_> {
        environments::Environments(self)
    }

    pub fn functions(&self) -> functions::Functions<'_> {
        functions::Functions(self)
    }

    pub fn idempotency(&self) -> idempotency::Idempotency<'_> {
        idempotency::Idempotency(self)
    }

    pub fn images(&self) -> images::Images<'_> {
        images::Images(self)
    }

    pub fn labels(&self) -> labels::Labels<'_> {
        labels::Labels(self)
    }

    pub fn meta(&self) -> meta::Meta<'_> {
        meta::Meta(self)
    }

    pub fn mounts(&self) -> mounts::Mounts<'_> {
        mounts::Mounts(self)
    }

    pub fn secrets(&self) -> secrets::Secrets<'_> {
        secrets::Secrets(self)
    }

    pub fn tokens(&self) -> tokens::Tokens<'_> {
        tokens::Tokens(self)
    }

    /// Begins a transaction that may write, waiting for other writers first.
    async fn begin(&self) -> Result<WriteTransaction, sqlx::Error> {
        self.writer.begin_with("BEGIN IMMEDIATE").await
    }
}

type WriteTransaction = Transaction<'static, Sqlite>;
/// What statements inside a transaction run on.
type Connection = SqliteConnection;
