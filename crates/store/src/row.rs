//! Between columns and domain types. A value that does not fit is an error that names its column.

use std::error::Error;
use std::str::FromStr;

use bytes::Bytes;
use ionian_domain::Timestamp;
use ionian_domain::call::Payload;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{QueryBuilder, Row as _};

use crate::error::Failure;

/// Largest number of rows in one multi-row statement. Enough to make the cost of a statement small
/// against that of its rows, and 64 rows of the widest table stay far below `SQLite`'s limit on
/// parameters (32,766).
pub(crate) const BULK_ROWS: usize = 64;

/// Cuts rows into slices whose lengths are powers of two, so that a multi-row statement comes in few
/// sizes and each of them stays prepared.
pub(crate) fn bulk_slices<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let length = 1 << rows.len().min(BULK_ROWS).checked_ilog2()?;
        let (slice, rest) = rows.split_at(length);
        rows = rest;
        Some(slice)
    })
}

/// A limit or count for SQL, which has no unsigned numbers.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The text of an enum without data, as serde names it.
pub(crate) fn tag<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        other => panic!("only enums without data are stored as text, not {other:?}"),
    }
}

pub(crate) fn json<T: Serialize>(what: &'static str, value: &T) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|source| Failure::Unwritable {
        what,
        source: source.into(),
    })
}

/// The columns `blob_id` and `inline` of a payload.
pub(crate) fn payload_columns(payload: Payload) -> (Option<String>, Option<Vec<u8>>) {
    match payload {
        Payload::Inline(bytes) => (None, Some(bytes.into())),
        Payload::Blob(id) => (Some(id), None),
    }
}

/// Reads typed columns by name.
pub(crate) trait RowExt {
    fn text(&self, column: &'static str) -> Result<String, Failure>;
    fn optional_text(&self, column: &'static str) -> Result<Option<String>, Failure>;
    fn bytes(&self, column: &'static str) -> Result<Bytes, Failure>;
    fn optional_bytes(&self, column: &'static str) -> Result<Option<Bytes>, Failure>;
    fn flag(&self, column: &'static str) -> Result<bool, Failure>;
    fn optional_number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<Option<T>, Failure>
    where
        T::Error: Error + Send + Sync + 'static;
    fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, Failure>
    where
        T::Error: Error + Send + Sync + 'static;

    fn id<T: FromStr>(&self, column: &'static str) -> Result<T, Failure>
    where
        T::Err: Error + Send + Sync + 'static,
    {
        self.text(column)?.parse().map_err(|source| unreadable(column, source))
    }

    fn optional_id<T: FromStr>(&self, column: &'static str) -> Result<Option<T>, Failure>
    where
        T::Err: Error + Send + Sync + 'static,
    {
        let text = self.optional_text(column)?;
        text.map(|text| text.parse())
            .transpose()
            .map_err(|source| unreadable(column, source))
    }

    fn time(&self, column: &'static str) -> Result<Timestamp, Failure> {
        self.number(column).map(Timestamp)
    }

    fn optional_time(&self, column: &'static str) -> Result<Option<Timestamp>, Failure> {
        Ok(self.optional_number(column)?.map(Timestamp))
    }

    fn json<T: DeserializeOwned>(&self, column: &'static str) -> Result<T, Failure> {
        serde_json::from_str(&self.text(column)?).map_err(|source| unreadable(column, source))
    }

    /// The inverse of [`tag`].
    fn tag<T: DeserializeOwned>(&self, column: &'static str) -> Result<T, Failure> {
        serde_json::from_value(serde_json::Value::String(self.text(column)?))
            .map_err(|source| unreadable(column, source))
    }

    /// The inverse of [`payload_columns`].
    fn payload(&self) -> Result<Payload, Failure> {
        match (self.optional_text("blob_id")?, self.optional_bytes("inline")?) {
            (Some(id), None) => Ok(Payload::Blob(id)),
            (None, Some(bytes)) => Ok(Payload::Inline(bytes)),
            (Some(_), Some(_)) | (None, None) => Err(Failure::Unreadable {
                column: "inline",
                source: "exactly one of blob_id and inline is set".into(),
            }),
        }
    }
}

pub(crate) fn unreadable(column: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
    Failure::Unreadable {
        column,
        source: source.into(),
    }
}

impl RowExt for SqliteRow {
    fn text(&self, column: &'static str) -> Result<String, Failure> {
        self.try_get(column).map_err(|source| unreadable(column, source))
    }

    fn optional_text(&self, column: &'static str) -> Result<Option<String>, Failure> {
        self.try_get(column).map_err(|source| unreadable(column, source))
    }

    fn bytes(&self, column: &'static str) -> Result<Bytes, Failure> {
        let bytes: Vec<u8> = self.try_get(column).map_err(|source| unreadable(column, source))?;
        Ok(bytes.into())
    }

    fn optional_bytes(&self, column: &'static str) -> Result<Option<Bytes>, Failure> {
        let bytes: Option<Vec<u8>> = self.try_get(column).map_err(|source| unreadable(column, source))?;
        Ok(bytes.map(Bytes::from))
    }

    fn flag(&self, column: &'static str) -> Result<bool, Failure> {
        self.try_get(column).map_err(|source| unreadable(column, source))
    }

    fn optional_number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<Option<T>, Failure>
    where
        T::Error: Error + Send + Sync + 'static,
    {
        let number: Option<i64> = self.try_get(column).map_err(|source| unreadable(column, source))?;
        number
            .map(T::try_from)
            .transpose()
            .map_err(|source| unreadable(column, source))
    }

    fn number<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, Failure>
    where
        T::Error: Error + Send + Sync + 'static,
    {
        let number: i64 = self.try_get(column).map_err(|source| unreadable(column, source))?;
        T::try_from(number).map_err(|source| unreadable(column, source))
    }
}

/// Appends `($1, $2, …)` with ids.
pub(crate) trait QueryBuilderExt {
    fn push_ids<T: ToString>(&mut self, ids: &[T]);
}

impl QueryBuilderExt for QueryBuilder<Sqlite> {
    fn push_ids<T: ToString>(&mut self, ids: &[T]) {
        self.push("(");
        let mut list = self.separated(", ");
        for id in ids {
            list.push_bind(id.to_string());
        }
        self.push(")");
    }
}
