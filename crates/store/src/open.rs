//! Opens the database file: permissions, pragmas, migrations.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::Connection as _;
use sqlx::SqliteConnection;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

use crate::error::Failure;

/// Steps from the first schema to the newest, in order. A step that was released never changes.
pub(crate) static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

/// Reads are short, and a small machine has few cores: more connections would only cost memory (each
/// has a page cache of 2 MiB).
const READERS: u32 = 4;

/// How long to wait for a writer in another process (`ionian token new`), whose writes take
/// milliseconds: past this something is wrong.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for one of our own connections. Longer than [`BUSY_TIMEOUT`], so that whoever
/// waits behind a waiting writer learns the cause and not only that it waited.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait for another process that brings the tables up to date.
const MIGRATION_LOCK_TIMEOUT: Duration = Duration::from_mins(1);

/// How often to ask for that lock. Only a start of two processes at once waits here at all.
const MIGRATION_LOCK_PERIOD: Duration = Duration::from_millis(20);

/// The write-ahead log is folded into the database after this many pages (64 MiB). The turn that triggers
/// it pays for it, and pages that many turns change (the ends of tables, all of a small index) are folded
/// once for all of them, so that rare is cheap. A start reads the log once: a tenth of a second.
const CHECKPOINT_PAGES: u32 = 16_000;

/// A long read can make the write-ahead log grow; afterwards it is cut back to this size.
const LOG_SIZE_LIMIT: u32 = 96 << 20;

/// The writer's page cache. Ids are random, and each new one touches another page of an index: a turn of
/// 500 calls changes 2,000 pages, and those that do not fit are written to the log before the commit and
/// read back again.
const WRITER_CACHE_KIB: u32 = 16 << 10;

/// Every statement text of this crate, and the bulk inserts in each of their sizes, stay prepared.
const STATEMENT_CACHE: usize = 256;

/// The database holds hashes, sealed secrets and users' arguments: its owner only.
const FILE_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// Opens the writer's and the readers' connections.
pub(crate) async fn open(path: &Path) -> Result<(SqlitePool, SqlitePool), Failure> {
    create_private(path)?;
    let base = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true)
        .statement_cache_capacity(STATEMENT_CACHE);

    // Two processes that start at once would both find no tables and both create them.
    let lock = lock_migrations(path).await?;
    let writer = pool_options(1)
        // Opened now, and kept: closing the last connection removes the write-ahead log.
        .min_connections(1)
        .after_release(|connection, _| Box::pin(is_usable(connection)))
        .connect_with(
            base.clone()
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
                .pragma("journal_size_limit", LOG_SIZE_LIMIT.to_string())
                // What undoes a single statement with many rows, should it fail half-way: a file, else.
                .pragma("temp_store", "MEMORY")
                // Negative for KiB; positive would be pages.
                .pragma("cache_size", format!("-{WRITER_CACHE_KIB}")),
        )
        .await?;
    MIGRATOR.run(&writer).await.map_err(|source| match source {
        MigrateError::VersionMissing(schema) => Failure::Newer {
            path: path.to_owned(),
            schema,
        },
        source => Failure::Migration {
            path: path.to_owned(),
            source,
        },
    })?;
    sync_names(path)?;
    drop(lock);

    let readers = pool_options(READERS).connect_lazy_with(base.pragma("query_only", "ON"));
    Ok((writer, readers))
}

/// Whether a connection can begin another transaction. `SQLite` rolls back by itself on some errors, a full disk
/// among them; sqlx then cannot, and believes for ever that it is in a transaction.
async fn is_usable(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    if !connection.is_in_transaction() {
        return Ok(true);
    }
    // A rollback that was asked for when the transaction was dropped comes before this.
    connection.ping().await?;
    Ok(!connection.is_in_transaction())
}

fn pool_options(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A local file does not go away, and reconnecting forgets prepared statements.
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
}

/// Makes sure that the file exists and that only its owner can read it. `SQLite` gives its companions
/// (`-wal`, `-shm`) the mode of the database.
fn create_private(path: &Path) -> Result<(), Failure> {
    let failed = |source: io::Error| Failure::File {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(parent)
            .map_err(failed)?;
    }
    // `create_new`, so that a file which another `Store` of this process has open is never opened
    // and closed here: closing any descriptor of a file drops all POSIX locks that SQLite holds on it.
    match OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)
    {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::set_permissions(path, Permissions::from_mode(FILE_MODE)).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Makes the names of the database and its log, and of the directory that holds them, survive a power
/// cut. `SQLite` syncs the directory for a log that it created, but not for one that a process created
/// which was killed before its first commit.
fn sync_names(path: &Path) -> Result<(), Failure> {
    for directory in path.ancestors().skip(1).take(2) {
        // A relative path of one name lies in the current directory.
        let directory = if directory.as_os_str().is_empty() {
            Path::new(".")
        } else {
            directory
        };
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        match synced {
            // One may pass through a directory that one may not list; then it is not ours, nor new.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            synced => synced.map_err(|source| Failure::File {
                path: directory.to_owned(),
                source,
            })?,
        }
    }
    Ok(())
}

/// Holds the lock beside the database until the returned file is dropped.
async fn lock_migrations(path: &Path) -> Result<File, Failure> {
    let lock_path = lock_path(path);
    let failed = |source: io::Error| Failure::File {
        path: lock_path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(&lock_path)
        .map_err(failed)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= MIGRATION_LOCK_TIMEOUT => {
                return Err(Failure::Locked {
                    path: path.to_owned(),
                    waited_seconds: MIGRATION_LOCK_TIMEOUT.as_secs(),
                });
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(MIGRATION_LOCK_PERIOD).await,
        }
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}
