//! Secrets. Values never appear here in the clear; `control` seals and opens them.

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, EnvironmentId, SecretId};
use crate::time::Timestamp;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    pub id: SecretId,
    pub environment_id: EnvironmentId,
    /// `None` for anonymous ones (`Secret.from_dict`, `env=`).
    pub name: Option<String>,
    /// The app that an anonymous secret belongs to.
    pub app_id: Option<AppId>,
    /// Names of the variables, which are not secret.
    pub keys: Vec<String>,
    /// The variables, sealed.
    pub sealed: Vec<u8>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub last_used_at: Option<Timestamp>,
}
