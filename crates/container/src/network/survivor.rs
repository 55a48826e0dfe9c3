//! What of the network outlives a process: the choice of a subnet, bridge and firewall.
//!
//! The choice is written into the state directory and kept for good, since containers and their users know the
//! gateway's address. Bridge and firewall are taken over only as a whole and only for containers that live on;
//! otherwise they are made anew. What is not as this version would make it is not taken over: containers must
//! not go on behind a wall that has holes.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::subnet::Subnet;
use super::{Names, NetworkError, blocking, firewall, link};
use crate::config::{AddressPool, ContainerConfig};
use crate::keeper::record::{read_json, replace};

/// Of the file's form; another one counts as no choice.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Choice {
    version: u32,
    base: Ipv4Addr,
    prefix: u8,
    /// Stands for the firewall's rules as they were written.
    rules: String,
}

/// An earlier process's network, ready to be used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Survivor {
    pub subnet: Subnet,
}

impl Survivor {
    /// `None` where something is missing or different. What an earlier process opened of the host's ports is
    /// closed by this.
    pub(crate) async fn find(config: &ContainerConfig) -> Result<Option<Self>, NetworkError> {
        let names = Names::of(config);
        let Some((subnet, rules)) = read(config) else {
            return Ok(None);
        };
        if rules != firewall::digest(&names.table, &names.bridge, subnet) {
            tracing::info!("the firewall's rules have changed since the last run; they are made anew");
            return Ok(None);
        }
        let bridge = names.bridge.clone();
        if !blocking("look for the bridge", move || {
            link::has_address(&bridge, subnet.gateway())
        })
        .await?
        {
            return Ok(None);
        }
        match blocking("take the firewall over", move || firewall::take_over(&names.table)).await {
            Ok(()) => Ok(Some(Self { subnet })),
            Err(error) => {
                tracing::warn!(error = %crate::chain(&error), "the firewall of the last run is not there any more");
                Ok(None)
            }
        }
    }
}

fn path(config: &ContainerConfig) -> PathBuf {
    config.state_dir.join("network.json")
}

/// The last choice, if it is one of the configured pool.
pub(super) fn last_choice(config: &ContainerConfig) -> Option<Subnet> {
    read(config).map(|(subnet, _)| subnet)
}

fn read(config: &ContainerConfig) -> Option<(Subnet, String)> {
    let choice: Choice = read_json(&path(config))?;
    if choice.version != VERSION || choice.prefix != AddressPool::INSTANCE_PREFIX {
        return None;
    }
    let pool = Subnet::new(config.address_pool.base(), config.address_pool.prefix());
    let subnet = Subnet::new(choice.base, choice.prefix);
    pool.contains(subnet.gateway()).then_some((subnet, choice.rules))
}

pub(super) fn remember(config: &ContainerConfig, subnet: Subnet, rules: String) -> Result<(), NetworkError> {
    let path = path(config);
    let choice = Choice {
        version: VERSION,
        base: subnet.base(),
        prefix: subnet.prefix(),
        rules,
    };
    serde_json::to_vec(&choice)
        .map_err(std::io::Error::from)
        .and_then(|bytes| replace(&path, &bytes))
        .map_err(|source| NetworkError::Io {
            what: format!("write {}", path.display()),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_kept_while_the_pool_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = ContainerConfig::new("survivor", directory.path());
        assert!(last_choice(&config).is_none());
        let subnet = Subnet::new(Ipv4Addr::new(172, 29, 8, 0), AddressPool::INSTANCE_PREFIX);
        remember(&config, subnet, "rules".to_owned()).unwrap();
        assert_eq!(read(&config), Some((subnet, "rules".to_owned())));
        config.address_pool = "10.8.0.0/16".parse().unwrap();
        assert!(last_choice(&config).is_none());
    }
}
