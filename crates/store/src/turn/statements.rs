//! Hands the statements of a turn to the connection, many at a time.
//!
//! Every statement that is sent on its own costs two changes of thread, there and back, which for one
//! row take longer than the statement. So statements are joined into one text and sent together.
//!
//! What stays prepared is chosen by size. A short text is the turn of a single call: there are few of
//! them, and they come again and again. A statement with [`BULK_ROWS`] rows comes in one size only and
//! is sent on its own. Anything between has its own text nearly every time, and to prepare it costs
//! little beside its rows.

use futures_util::TryStreamExt as _;
use ionian_domain::ids::{ContainerId, InputId};
use sqlx::sqlite::Sqlite;
use sqlx::{Either, QueryBuilder};

use crate::Connection;
use crate::error::Failure;
use crate::row::BULK_ROWS;

/// Texts up to this many bytes stay prepared. The turns of a `.remote()` call are below it; all of the
/// connection's [statement cache](crate::open) filled with such texts takes some megabytes.
const KEPT_TEXT: usize = 2_048;

/// No text grows beyond this many rows, which bounds what is bound at once: 16 parameters each at most.
const ROWS_PER_TEXT: usize = 512;

/// How many rows a statement has to affect.
pub(super) enum Expected {
    /// Fewer are no mistake.
    Any,
    Input(InputId),
    Inputs(Vec<InputId>),
    Container(ContainerId),
}

impl Expected {
    fn check(&self, affected: u64) -> Result<(), Failure> {
        match self {
            Self::Input(id) if affected != 1 => Err(Failure::missing("unfinished input", id)),
            Self::Inputs(ids) if affected != ids.len() as u64 => {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                Err(Failure::missing("unfinished input, one of", &ids.join(", ")))
            }
            Self::Container(id) if affected != 1 => Err(Failure::missing("running container", id)),
            Self::Any | Self::Input(_) | Self::Inputs(_) | Self::Container(_) => Ok(()),
        }
    }
}

/// The statements that have not been sent yet, in order.
pub(super) struct Statements<'a> {
    connection: &'a mut Connection,
    texts: QueryBuilder<Sqlite>,
    expected: Vec<Expected>,
    rows: usize,
}

impl<'a> Statements<'a> {
    pub(super) fn new(connection: &'a mut Connection) -> Self {
        Self {
            connection,
            texts: QueryBuilder::new(""),
            expected: Vec::new(),
            rows: 0,
        }
    }

    /// Adds one statement about so many rows. `write` pushes its text, with `?` parameters only: they
    /// are counted across the statements of a text.
    pub(super) async fn add(
        &mut self,
        rows: usize,
        expected: Expected,
        write: impl FnOnce(&mut QueryBuilder<Sqlite>),
    ) -> Result<(), Failure> {
        let is_bulk = rows >= BULK_ROWS;
        if is_bulk || self.rows + rows > ROWS_PER_TEXT {
            self.send(false).await?;
        }
        write(&mut self.texts);
        self.expected.push(expected);
        self.rows += rows;
        if is_bulk {
            self.send(true).await
        } else {
            self.texts.push(";");
            Ok(())
        }
    }

    /// Sends what is left. Without it nothing of that happens.
    pub(super) async fn finish(mut self) -> Result<(), Failure> {
        self.send(false).await
    }

    async fn send(&mut self, keep: bool) -> Result<(), Failure> {
        if self.expected.is_empty() {
            return Ok(());
        }
        let mut texts = std::mem::replace(&mut self.texts, QueryBuilder::new(""));
        let mut expected = std::mem::take(&mut self.expected).into_iter();
        self.rows = 0;
        let keep = keep || texts.sql().as_str().len() <= KEPT_TEXT;
        let query = texts.build().persistent(keep);
        let mut results = sqlx::Executor::fetch_many(&mut *self.connection, query);
        while let Some(result) = results.try_next().await? {
            let Either::Left(done) = result else { continue };
            let expected = expected.next().expect("no more results than statements");
            expected.check(done.rows_affected())?;
        }
        assert!(expected.next().is_none(), "every statement of a text was run");
        Ok(())
    }
}
