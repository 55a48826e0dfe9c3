//! How the store fails, in terms that `control` can act on.

use std::error::Error;
use std::path::PathBuf;

use ionian_domain::ErrorKind;

/// A failed operation of the store. The chain of sources says why.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
pub struct StoreError {
    /// What was being done, such as `insert an app`.
    pub operation: &'static str,
    pub source: Failure,
}

/// Why an operation of the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("it exists already")]
    AlreadyExists(#[source] sqlx::Error),
    #[error("it names something that does not exist, or is still named by something that does")]
    Reference(#[source] sqlx::Error),
    #[error("{what} {id} does not exist")]
    Missing { what: &'static str, id: String },
    /// The operation is not allowed on a thing in this state.
    #[error("{0}")]
    Refused(String),
    #[error("column '{column}' holds a value that this version cannot read")]
    Unreadable {
        column: &'static str,
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{what} cannot be stored")]
    Unwritable {
        what: &'static str,
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("cannot use {}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("another process has been preparing {} for {waited_seconds} s; end it and try again", path.display())]
    Locked { path: PathBuf, waited_seconds: u64 },
    #[error(
        "{} was written by a newer version of ionian (its schema {schema} is unknown here): install that version, \
         or restore a backup",
        path.display()
    )]
    Newer { path: PathBuf, schema: i64 },
    #[error("cannot bring the tables of {} up to date", path.display())]
    Migration {
        path: PathBuf,
        source: sqlx::migrate::MigrateError,
    },
    /// Nothing was written. It works again as soon as there is room.
    #[error("the disk that holds the database is full")]
    Full(#[source] sqlx::Error),
    #[error("the database failed")]
    Database(#[source] sqlx::Error),
}

/// `SQLite`'s result codes for a disk without room: in a file of the database, and in the shared memory
/// beside it (`SQLITE_FULL` and `SQLITE_IOERR_SHMSIZE`).
const FULL_CODES: [&str; 2] = ["13", "4874"];

impl StoreError {
    /// The kind of failure in the caller's terms.
    pub fn kind(&self) -> ErrorKind {
        match &self.source {
            Failure::AlreadyExists(_) => ErrorKind::AlreadyExists,
            Failure::Missing { .. } => ErrorKind::NotFound,
            Failure::Reference(_) | Failure::Refused(_) => ErrorKind::PreconditionFailed,
            Failure::Unwritable { .. } => ErrorKind::InvalidArgument,
            Failure::Database(sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) | Failure::Locked { .. } => {
                ErrorKind::Unavailable
            }
            Failure::Full(_) => ErrorKind::Exhausted,
            Failure::Database(_)
            | Failure::Unreadable { .. }
            | Failure::File { .. }
            | Failure::Newer { .. }
            | Failure::Migration { .. } => ErrorKind::Internal,
        }
    }
}

impl Failure {
    pub(crate) fn missing(what: &'static str, id: &impl ToString) -> Self {
        Self::Missing {
            what,
            id: id.to_string(),
        }
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if database.is_unique_violation() => Self::AlreadyExists(error),
            sqlx::Error::Database(database) if database.is_foreign_key_violation() => Self::Reference(error),
            sqlx::Error::Database(database)
                if database.code().is_some_and(|code| FULL_CODES.contains(&code.as_ref())) =>
            {
                Self::Full(error)
            }
            _ => Self::Database(error),
        }
    }
}

/// Says what was being done when something failed.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, StoreError>;
}

impl<T, E: Into<Failure>> During<T> for Result<T, E> {
    fn during(self, operation: &'static str) -> Result<T, StoreError> {
        self.map_err(|error| StoreError {
            operation,
            source: error.into(),
        })
    }
}
