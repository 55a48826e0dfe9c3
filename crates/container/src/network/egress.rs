//! What one container may reach outside.
//!
//! The choice is part of a [`crate::Launch`]; the rules are the firewall's. It is also noted in the container's
//! record, so that the next process, which replaces the firewall's table while the container lives, keeps it.

use std::net::Ipv4Addr;

pub use ionian_domain::network::{Cidr, CidrError, Egress, MAX_CIDRS};
use serde::{Deserialize, Serialize};

/// One container's address and what it may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Policy {
    pub address: Ipv4Addr,
    pub egress: Egress,
}
