//! Environments: name spaces for apps, secrets and volumes.

use serde::{Deserialize, Serialize};

use crate::ids::EnvironmentId;
use crate::time::Timestamp;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    pub id: EnvironmentId,
    pub name: String,
    /// Comes between workspace and app in web URLs; empty for the default environment.
    pub web_suffix: String,
    pub is_default: bool,
    pub created_at: Timestamp,
}
