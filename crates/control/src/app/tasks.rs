//! Containers, as people see them; those that have ended, too. The wire calls them tasks.

use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};

use crate::Control;
use crate::error::{Error, Result};

pub struct Tasks<'a>(pub(crate) &'a Control);

/// A container of any age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    pub id: ContainerId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub created_at: Timestamp,
    pub ended_at: Option<Timestamp>,
}

impl Tasks<'_> {
    pub async fn get(&self, id: ContainerId) -> Result<Task> {
        let found = self.0.store().containers().find(id).await?.ok_or_else(|| {
            Error::not_found(format!(
                "container {id} does not exist; `modal container list` shows the running ones"
            ))
        })?;
        Ok(Task {
            id: found.id,
            app_id: found.app_id,
            function_id: found.function_id,
            created_at: found.created_at,
            ended_at: found.ended.map(|(_, at)| at),
        })
    }
}
