//! Who is asking.

use std::sync::Arc;

use ionian_domain::TokenId;

use crate::containers::ContainerEntry;

/// The authenticated sender of a request.
#[derive(Debug, Clone)]
pub enum Caller {
    /// Somebody with an API token.
    Client {
        token_id: TokenId,
        token_name: String,
        client_version: String,
    },
    /// A container, with the credential that it was started with.
    Container {
        entry: Arc<ContainerEntry>,
        client_version: String,
    },
}

impl Caller {
    pub fn client_version(&self) -> &str {
        match self {
            Self::Client { client_version, .. } | Self::Container { client_version, .. } => client_version,
        }
    }

    /// A name for histories and logs.
    pub fn name(&self) -> String {
        match self {
            Self::Client {
                token_name, token_id, ..
            } if token_name.is_empty() => token_id.to_string(),
            Self::Client { token_name, .. } => token_name.clone(),
            Self::Container { entry, .. } => entry.id.to_string(),
        }
    }
}
