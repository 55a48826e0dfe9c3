//! Apps and their published versions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{AppId, ClassId, EnvironmentId, FunctionId};
use crate::time::Timestamp;

/// Where an app is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppState {
    /// Created by a deploy that has not published yet.
    Initializing,
    /// Lives as long as its client sends heartbeats (`modal run`, `modal serve`).
    Ephemeral,
    /// Like ephemeral, but outlives its client (`modal run --detach`).
    Detached,
    Deployed,
    /// Takes no new work; its containers are being stopped.
    Stopping,
    Stopped,
}

impl AppState {
    /// Whether the app's functions may start containers.
    pub fn accepts_work(self) -> bool {
        match self {
            Self::Initializing | Self::Ephemeral | Self::Detached | Self::Deployed => true,
            Self::Stopping | Self::Stopped => false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct App {
    pub id: AppId,
    pub environment_id: EnvironmentId,
    /// The deployment name; `None` for apps that were never deployed.
    pub name: Option<String>,
    pub description: String,
    pub state: AppState,
    pub created_at: Timestamp,
    pub deployed_at: Option<Timestamp>,
    pub stopped_at: Option<Timestamp>,
    /// Counts publishes; 0 before the first.
    pub version: u32,
    pub layout: AppLayout,
    pub tags: BTreeMap<String, String>,
}

/// What an app consists of, as its client published it: tag to id.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AppLayout {
    /// `"f"` for functions, `"C.*"` for the service function of class `C`.
    pub functions: BTreeMap<String, FunctionId>,
    pub classes: BTreeMap<String, ClassId>,
}

/// One publish of an app, kept for its history and for rollbacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppVersion {
    pub app_id: AppId,
    pub version: u32,
    pub layout: AppLayout,
    pub deployed_at: Timestamp,
    pub deployed_by: String,
    pub client_version: String,
    pub tag: String,
}
