//! Class objects of apps. What a class can do is declared by its service function.

use ionian_domain::ids::{AppId, ClassId};
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::RowExt as _;

/// A class object of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class {
    pub id: ClassId,
    pub app_id: AppId,
    pub name: String,
}

#[derive(Debug, Clone, Copy)]
pub struct Classes<'a>(pub(crate) &'a Store);

impl Classes<'_> {
    /// Fails with `AlreadyExists` where another class of the app has the name.
    pub async fn upsert(&self, class: &Class) -> Result<(), StoreError> {
        query(
            "INSERT INTO classes (id, app_id, name) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET app_id = excluded.app_id, name = excluded.name",
        )
        .bind(class.id.to_string())
        .bind(class.app_id.to_string())
        .bind(&class.name)
        .execute(&self.0.writer)
        .await
        .during("write a class")?;
        Ok(())
    }

    /// The classes of an app, by name.
    pub async fn list_by_app(&self, app: AppId) -> Result<Vec<Class>, StoreError> {
        const OPERATION: &str = "list the classes of an app";
        let rows = query("SELECT * FROM classes WHERE app_id = $1 ORDER BY name")
            .bind(app.to_string())
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(class).collect::<Result<_, _>>().during(OPERATION)
    }

    pub async fn find(&self, id: ClassId) -> Result<Option<Class>, StoreError> {
        const OPERATION: &str = "find a class";
        let row = query("SELECT * FROM classes WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(class).transpose().during(OPERATION)
    }

    pub async fn find_by_name(&self, app: AppId, name: &str) -> Result<Option<Class>, StoreError> {
        const OPERATION: &str = "find a class by name";
        let row = query("SELECT * FROM classes WHERE app_id = $1 AND name = $2")
            .bind(app.to_string())
            .bind(name)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(class).transpose().during(OPERATION)
    }
}

fn class(row: &SqliteRow) -> Result<Class, Failure> {
    Ok(Class {
        id: row.id("id")?,
        app_id: row.id("app_id")?,
        name: row.text("name")?,
    })
}
