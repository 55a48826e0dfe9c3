//! Functions and every definition that they ever had.
//!
//! A function points at two definitions: the newest one (a draft while its app is being deployed),
//! and the published one, which new work runs. Definitions are kept, so that a rollback can point
//! back at them. Bound variants of a function are functions too; the caller derives their ids.

use std::collections::HashMap;

use ionian_domain::function::{Binding, Function, FunctionSpec};
use ionian_domain::ids::{AppId, DefinitionId, FunctionId};
use sqlx::sqlite::{Sqlite, SqliteRow};
use sqlx::{QueryBuilder, query};

use crate::error::{During as _, Failure, StoreError};
use crate::row::{QueryBuilderExt as _, RowExt as _, bulk_slices, json};
use crate::{Connection, Store};

/// Functions joined with the definition that `$pointer` names.
macro_rules! select_functions {
    ($pointer:literal, $rest:literal) => {
        concat!(
            "SELECT f.id, f.app_id, f.binding_base, f.binding_params, f.created_at, ",
            "d.id AS definition_id, d.spec, d.definition ",
            "FROM functions f JOIN function_definitions d ON d.id = ",
            $pointer,
            " ",
            $rest
        )
    };
}

#[derive(Debug, Clone, Copy)]
pub struct Functions<'a>(pub(crate) &'a Store);

impl Functions<'_> {
    /// Writes a function and its definition, which becomes its newest one.
    ///
    /// An existing function keeps its `created_at` and its published definition. A definition that
    /// exists is overwritten: whoever changes what is published draws a new definition id.
    pub async fn upsert(&self, function: &Function) -> Result<(), StoreError> {
        const OPERATION: &str = "write a function";
        let mut tx = self.0.begin().await.during(OPERATION)?;
        write_function(&mut tx, function).await.during(OPERATION)?;
        tx.commit().await.during(OPERATION)
    }

    /// Finds a function with its newest definition.
    pub async fn find(&self, id: FunctionId) -> Result<Option<Function>, StoreError> {
        const OPERATION: &str = "find a function";
        let row = query(select_functions!("f.definition_id", "WHERE f.id = $1"))
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(function).transpose().during(OPERATION)
    }

    /// Finds a function with its published definition, or its newest one where none was published
    /// (bound variants never are).
    pub async fn find_published(&self, id: FunctionId) -> Result<Option<Function>, StoreError> {
        const OPERATION: &str = "find a published function";
        let row = query(select_functions!(
            "COALESCE(f.published_definition_id, f.definition_id)",
            "WHERE f.id = $1"
        ))
        .bind(id.to_string())
        .fetch_optional(&self.0.readers)
        .await
        .during(OPERATION)?;
        row.as_ref().map(function).transpose().during(OPERATION)
    }

    /// All functions of an app with their newest definitions, bound variants too, oldest first.
    pub async fn list_by_app(&self, app: AppId) -> Result<Vec<Function>, StoreError> {
        const OPERATION: &str = "list the functions of an app";
        let rows = query(select_functions!(
            "f.definition_id",
            "WHERE f.app_id = $1 ORDER BY f.created_at, f.id"
        ))
        .bind(app.to_string())
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter().map(function).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Like [`Self::list_by_app`], with published definitions: what recovery starts from.
    pub async fn list_published_by_app(&self, app: AppId) -> Result<Vec<Function>, StoreError> {
        const OPERATION: &str = "list the published functions of an app";
        let rows = query(select_functions!(
            "COALESCE(f.published_definition_id, f.definition_id)",
            "WHERE f.app_id = $1 ORDER BY f.created_at, f.id"
        ))
        .bind(app.to_string())
        .fetch_all(&self.0.readers)
        .await
        .during(OPERATION)?;
        rows.iter().map(function).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Functions with their newest definitions, in the order of `ids`; unknown ids are left out.
    pub async fn list(&self, ids: &[FunctionId]) -> Result<Vec<Function>, StoreError> {
        const OPERATION: &str = "list functions";
        let mut found = HashMap::with_capacity(ids.len());
        for slice in bulk_slices(ids) {
            let mut select = QueryBuilder::<Sqlite>::new(select_functions!("f.definition_id", "WHERE f.id IN "));
            select.push_ids(slice);
            for row in select.build().fetch_all(&self.0.readers).await.during(OPERATION)? {
                let function = function(&row).during(OPERATION)?;
                found.insert(function.id, function);
            }
        }
        Ok(ids.iter().filter_map(|id| found.get(id).cloned()).collect())
    }

    /// Finds a definition of any age, and the function that had it.
    pub async fn find_definition(&self, id: DefinitionId) -> Result<Option<(FunctionId, FunctionSpec)>, StoreError> {
        const OPERATION: &str = "find a definition";
        let row = query("SELECT function_id, spec, definition FROM function_definitions WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.map(|row| Ok::<_, Failure>((row.id("function_id")?, spec(&row)?)))
            .transpose()
            .during(OPERATION)
    }

    /// The newest definition of each of an app's functions, without reading any: what a publish
    /// records.
    pub async fn newest_definitions(
        &self,
        app: AppId,
    ) -> Result<std::collections::BTreeMap<FunctionId, DefinitionId>, StoreError> {
        const OPERATION: &str = "list the newest definitions of an app";
        let rows = query("SELECT id, definition_id FROM functions WHERE app_id = $1")
            .bind(app.to_string())
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter()
            .map(|row| Ok::<_, Failure>((row.id("id")?, row.id("definition_id")?)))
            .collect::<Result<_, _>>()
            .during(OPERATION)
    }
}

async fn write_function(tx: &mut Connection, function: &Function) -> Result<(), Failure> {
    // JSON has no such numbers: they would be written as null, and the function could not be read again.
    if !function.spec.retry.backoff_coefficient.is_finite() {
        return Err(Failure::Unwritable {
            what: "the function",
            source: "the backoff coefficient of its retry policy is not a finite number".into(),
        });
    }
    query(
        "INSERT INTO functions (id, app_id, definition_id, binding_base, binding_params, created_at) \
         VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (id) DO UPDATE SET app_id = excluded.app_id, definition_id = excluded.definition_id, \
             binding_base = excluded.binding_base, binding_params = excluded.binding_params",
    )
    .bind(function.id.to_string())
    .bind(function.app_id.to_string())
    .bind(function.definition_id.to_string())
    .bind(function.binding.as_ref().map(|binding| binding.base.to_string()))
    .bind(
        function
            .binding
            .as_ref()
            .map(|binding| binding.serialized_params.to_vec()),
    )
    .bind(function.created_at.micros())
    .execute(&mut *tx)
    .await?;
    let done = query(
        "INSERT INTO function_definitions (id, function_id, spec, created_at, definition) \
         VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (id) DO UPDATE SET spec = excluded.spec, definition = excluded.definition \
         WHERE function_definitions.function_id = excluded.function_id",
    )
    .bind(function.definition_id.to_string())
    .bind(function.id.to_string())
    .bind(json("the function's spec", &function.spec)?)
    .bind(function.created_at.micros())
    .bind(function.spec.definition.to_vec())
    .execute(&mut *tx)
    .await?;
    if done.rows_affected() == 0 {
        return Err(Failure::Refused(format!(
            "definition {} belongs to another function than {}",
            function.definition_id, function.id
        )));
    }
    Ok(())
}

fn function(row: &SqliteRow) -> Result<Function, Failure> {
    let base = row.optional_id("binding_base")?;
    let serialized_params = row.optional_bytes("binding_params")?.unwrap_or_default();
    Ok(Function {
        id: row.id("id")?,
        app_id: row.id("app_id")?,
        definition_id: row.id("definition_id")?,
        spec: spec(row)?,
        binding: base.map(|base| Binding {
            base,
            serialized_params,
        }),
        created_at: row.time("created_at")?,
    })
}

fn spec(row: &SqliteRow) -> Result<FunctionSpec, Failure> {
    let mut spec: FunctionSpec = row.json("spec")?;
    spec.definition = row.bytes("definition")?;
    Ok(spec)
}
