//! Mounts: lists of content-addressed files, and the few that have a global name.

use ionian_domain::ids::MountId;
use ionian_domain::mount::Mount;
use sqlx::query;
use sqlx::sqlite::SqliteRow;

use crate::Store;
use crate::error::{During as _, Failure, StoreError};
use crate::row::{RowExt as _, json};

#[derive(Debug, Clone, Copy)]
pub struct Mounts<'a>(pub(crate) &'a Store);

impl Mounts<'_> {
    pub async fn upsert(&self, mount: &Mount) -> Result<(), StoreError> {
        const OPERATION: &str = "write a mount";
        query(
            "INSERT INTO mounts (id, checksum_hex, files) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET checksum_hex = excluded.checksum_hex, files = excluded.files",
        )
        .bind(mount.id.to_string())
        .bind(&mount.checksum_hex)
        .bind(json("the mount's files", &mount.files).during(OPERATION)?)
        .execute(&self.0.writer)
        .await
        .during(OPERATION)?;
        Ok(())
    }

    pub async fn find(&self, id: MountId) -> Result<Option<Mount>, StoreError> {
        const OPERATION: &str = "find a mount";
        let row = query("SELECT * FROM mounts WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(mount).transpose().during(OPERATION)
    }

    /// Finds the mount with a global name, such as `modal-client-mount-1.6.4`.
    pub async fn find_named(&self, name: &str) -> Result<Option<Mount>, StoreError> {
        const OPERATION: &str = "find a mount by name";
        let row = query("SELECT m.* FROM named_mounts n JOIN mounts m ON m.id = n.mount_id WHERE n.name = $1")
            .bind(name)
            .fetch_optional(&self.0.readers)
            .await
            .during(OPERATION)?;
        row.as_ref().map(mount).transpose().during(OPERATION)
    }

    /// Gives a global name to a mount, taking it from the one that had it.
    pub async fn set_named(&self, name: &str, id: MountId) -> Result<(), StoreError> {
        query(
            "INSERT INTO named_mounts (name, mount_id) VALUES ($1, $2) \
             ON CONFLICT (name) DO UPDATE SET mount_id = excluded.mount_id",
        )
        .bind(name)
        .bind(id.to_string())
        .execute(&self.0.writer)
        .await
        .during("name a mount")?;
        Ok(())
    }
}

fn mount(row: &SqliteRow) -> Result<Mount, Failure> {
    Ok(Mount {
        id: row.id("id")?,
        checksum_hex: row.text("checksum_hex")?,
        files: row.json("files")?,
    })
}
