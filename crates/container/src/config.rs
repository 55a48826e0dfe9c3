//! What an instance of the platform has of its own on a host that it may share with other instances.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::userns::UserNamespaces;

/// Where one instance of the platform keeps its containers. Two instances on a host must differ in
/// `instance_id` and `state_dir`; everything else may be the same.
#[derive(Debug, Clone)]
pub struct ContainerConfig {
    /// Names bridge, firewall table and control groups. Any text; its hash is used where names are short.
    pub instance_id: String,
    /// Owned by this crate as a whole: mounted roots and scratch layers. On a file system that
    /// overlayfs accepts as an upper layer (not itself an overlay).
    pub state_dir: PathBuf,
    /// On a file system in memory: specifications of containers and runc's own state, both of which repeat
    /// the containers' environments, secrets included. With user namespaces also where containers are put
    /// together, for which other users must be able to enter the directories above it.
    pub volatile_dir: PathBuf,
    /// `None` looks for `runc` in `PATH`.
    pub runc_path: Option<PathBuf>,
    /// `None` looks for `runsc` in `PATH`, when the gvisor runtime is opened.
    pub runsc_path: Option<PathBuf>,
    /// The control group under which each instance has one of its own.
    pub cgroup_parent: String,
    /// From where this instance takes one /22 that nothing on the host uses.
    pub address_pool: AddressPool,
    /// Network namespaces kept ready, so that a start does not wait for one.
    pub warm_network_slots: usize,
    /// Name servers for containers; empty copies the host's.
    pub nameservers: Vec<IpAddr>,
    /// For containers of runc.
    pub user_namespaces: UserNamespaces,
}

impl ContainerConfig {
    /// Enough for a burst of a few starts; each costs the kernel some 100 KiB.
    pub const DEFAULT_WARM_NETWORK_SLOTS: usize = 4;

    pub fn new(instance_id: impl Into<String>, state_dir: impl Into<PathBuf>) -> Self {
        let instance_id = instance_id.into();
        Self {
            volatile_dir: PathBuf::from(format!("/dev/shm/ionian-{}", short_id(&instance_id))),
            instance_id,
            state_dir: state_dir.into(),
            runc_path: None,
            runsc_path: None,
            cgroup_parent: "/ionian".to_owned(),
            address_pool: AddressPool::default(),
            warm_network_slots: Self::DEFAULT_WARM_NETWORK_SLOTS,
            nameservers: Vec::new(),
            user_namespaces: UserNamespaces::default(),
        }
    }

    /// Eight hexadecimal digits that stand for the instance where names are short (interfaces have 15
    /// characters).
    pub fn short_id(&self) -> String {
        short_id(&self.instance_id)
    }

    /// `<cgroup_parent>/<short id>`, absolute in each hierarchy.
    pub(crate) fn cgroup_path(&self) -> String {
        format!("/{}/{}", self.cgroup_parent.trim_matches('/'), self.short_id())
    }

    pub(crate) fn containers_dir(&self) -> PathBuf {
        self.state_dir.join("containers")
    }

    pub(crate) fn runc_root(&self) -> PathBuf {
        self.volatile_dir.join("runc")
    }

    pub(crate) fn specifications_dir(&self) -> PathBuf {
        self.volatile_dir.join("bundles")
    }

    pub(crate) fn stages_dir(&self) -> PathBuf {
        self.volatile_dir.join("stages")
    }
}

fn short_id(instance_id: &str) -> String {
    let digest = Sha256::digest(instance_id.as_bytes());
    hex::encode(&digest[..4])
}

/// A range of private IPv4 addresses, at least a /22.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPool {
    base: Ipv4Addr,
    prefix: u8,
}

impl AddressPool {
    /// The size of what one instance takes: 1,021 containers and the gateway.
    pub const INSTANCE_PREFIX: u8 = 22;

    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    pub fn prefix(self) -> u8 {
        self.prefix
    }
}

impl Default for AddressPool {
    /// The part of 172.16.0.0/12 that other container engines reach last.
    fn default() -> Self {
        Self {
            base: Ipv4Addr::new(172, 29, 0, 0),
            prefix: 16,
        }
    }
}

impl fmt::Display for AddressPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AddressPoolError {
    #[error("{text:?} is not an address pool; write it as in 172.29.0.0/16")]
    Syntax { text: String },
    #[error(
        "address pool {text} must have a prefix from 8 to {}, and no host bits",
        AddressPool::INSTANCE_PREFIX
    )]
    Prefix { text: String },
    #[error("address pool {text} is not private; take one from 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")]
    Public { text: String },
}

impl FromStr for AddressPool {
    type Err = AddressPoolError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || AddressPoolError::Syntax { text: text.to_owned() };
        let (base, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let base: Ipv4Addr = base.parse().map_err(|_| syntax())?;
        let prefix: u8 = prefix.parse().map_err(|_| syntax())?;
        let host_bits = |prefix: u8| u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        if !(8..=Self::INSTANCE_PREFIX).contains(&prefix) || u32::from(base) & host_bits(prefix) != 0 {
            return Err(AddressPoolError::Prefix { text: text.to_owned() });
        }
        if !base.is_private() {
            return Err(AddressPoolError::Public { text: text.to_owned() });
        }
        Ok(Self { base, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_pools_are_private_aligned_and_large_enough() {
        assert_eq!("172.29.0.0/16".parse::<AddressPool>().unwrap(), AddressPool::default());
        assert_eq!("10.8.0.0/22".parse::<AddressPool>().unwrap().to_string(), "10.8.0.0/22");
        for bad in [
            "",
            "172.29.0.0",
            "172.29.0.0/x",
            "172.29.0.1/16",
            "172.29.0.0/23",
            "172.29.0.0/33",
            "8.8.0.0/16",
        ] {
            assert!(bad.parse::<AddressPool>().is_err(), "{bad}");
        }
    }

    #[test]
    fn instances_have_names_of_their_own() {
        let a = ContainerConfig::new("a", "/tmp/a");
        let b = ContainerConfig::new("b", "/tmp/b");
        assert_eq!(a.short_id().len(), 8);
        assert_ne!(a.cgroup_path(), b.cgroup_path());
        assert!(a.cgroup_path().starts_with("/ionian/"));
    }
}
