//! Images: what was asked for and what came of it. The layers themselves are files.

use ionian_domain::ids::ImageId;
use ionian_domain::image::{Image, ImageState};
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, json};

#[derive(Debug, Clone, Copy)]
pub struct Images<'a>(pub(crate) &'a Store);

impl Images<'_> {
    /// Writes an image; an existing one keeps its `created_at`.
    pub async fn upsert(&self, image: &Image) -> Result<(), StoreError> {
        const OPERATION: &str = "write an image";
        query(
            "INSERT INTO images (id, app_id, spec, state, state_detail, created_at) VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (id) DO UPDATE SET app_id = excluded.app_id, spec = excluded.spec, state = excluded.state, \
                 state_detail = excluded.state_detail",
        )
        .bind(image.id.to_string())
        .bind(image.app_id.map(|id| id.to_string()))
        .bind(json("the image's spec", &image.spec).during(OPERATION)?)
        .bind(state_name(&image.state))
        .bind(json("the image's state", &image.state).during(OPERATION)?)
        .bind(image.created_at.micros())
        .execute(&self.0.writer)
        .await
        .during(OPERATION)?;
        Ok(())
    }

    pub async fn find(&self, id: ImageId) -> Result<Option<Image>, StoreError> {
        const OPERATION: &str = "find an image";
        let row = query("SELECT * FROM images WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(image).transpose().during(OPERATION)
    }

    pub async fn set_state(&self, id: ImageId, state: &ImageState) -> Result<(), StoreError> {
        const OPERATION: &str = "set the state of an image";
        let done = query("UPDATE images SET state = $1, state_detail = $2 WHERE id = $3")
            .bind(state_name(state))
            .bind(json("the image's state", state).during(OPERATION)?)
            .bind(id.to_string())
            .execute(&self.0.writer)
            .await
            .during(OPERATION)?;
        if done.rows_affected() == 0 {
            return Err(Failure::missing("image", &id)).during(OPERATION);
        }
        Ok(())
    }

    /// Newest first.
    pub async fn list(&self, limit: u32) -> Result<Vec<Image>, StoreError> {
        const OPERATION: &str = "list images";
        let rows = query("SELECT * FROM images ORDER BY created_at DESC, id LIMIT $1")
            .bind(i64::from(limit))
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(image).collect::<Result<_, _>>().during(OPERATION)
    }

    /// Builds that were under way, oldest first. After a restart nobody works on them.
    pub async fn list_building(&self) -> Result<Vec<Image>, StoreError> {
        const OPERATION: &str = "list images being built";
        let rows = query("SELECT * FROM images WHERE state = 'building' ORDER BY created_at, id")
            .fetch_all(&self.0.readers)
            .await
            .during(OPERATION)?;
        rows.iter().map(image).collect::<Result<_, _>>().during(OPERATION)
    }
}

/// The column by which images are found; a partial index names `building`.
fn state_name(state: &ImageState) -> &'static str {
    match state {
        ImageState::Building => "building",
        ImageState::Ready { .. } => "ready",
        ImageState::Failed { .. } => "failed",
    }
}

fn image(row: &SqliteRow) -> Result<Image, Failure> {
    Ok(Image {
        id: row.id("id")?,
        app_id: row.optional_id("app_id")?,
        spec: row.json("spec")?,
        state: row.json("state_detail")?,
        created_at: row.time("created_at")?,
    })
}
