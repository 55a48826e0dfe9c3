//! Choosing addresses that nothing on the host uses.

use std::fmt;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::NetworkError;
use crate::config::AddressPool;

/// Instances that start together must not take the same range: the choice and the bridge are made under it.
const LOCK_PATH: &str = "/run/ionian-network.lock";
/// Held for some tens of milliseconds by each instance that starts.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    pub(crate) fn new(base: Ipv4Addr, prefix: u8) -> Self {
        assert!(
            (1..=30).contains(&prefix),
            "a network of containers has more than two addresses"
        );
        Self {
            base: Ipv4Addr::from(u32::from(base) & mask(prefix)),
            prefix,
        }
    }

    pub(crate) fn base(self) -> Ipv4Addr {
        self.base
    }

    pub fn prefix(self) -> u8 {
        self.prefix
    }

    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) + 1)
    }

    /// All but the network's, the gateway's and the broadcast address.
    pub fn container_count(self) -> u32 {
        (1 << (32 - self.prefix)) - 3
    }

    pub(crate) fn container(self, index: u32) -> Ipv4Addr {
        assert!(index < self.container_count(), "an address index comes from the count");
        Ipv4Addr::from(u32::from(self.base) + 2 + index)
    }

    pub(crate) fn index_of(self, address: Ipv4Addr) -> Option<u32> {
        let index = u32::from(address).checked_sub(u32::from(self.base) + 2)?;
        (index < self.container_count()).then_some(index)
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == u32::from(self.base)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// A destination that the host has a route to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub base: Ipv4Addr,
    pub prefix: u8,
}

/// Takes the lock that is held while an instance chooses its range and makes its bridge.
pub(super) fn lock_choice() -> Result<Flock<File>, NetworkError> {
    let path = PathBuf::from(LOCK_PATH);
    let io = |source| NetworkError::Io {
        what: format!("lock {LOCK_PATH}"),
        source,
    };
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io)?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, error)) if error != nix::errno::Errno::EWOULDBLOCK => return Err(io(error.into())),
            Err(_) if Instant::now() >= deadline => return Err(NetworkError::Locked { path }),
            Err((returned, _)) => file = returned,
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// The first range of the pool, counted from a place that the instance's id gives, which overlaps with no
/// route and is far from every name server (its own network may be reached through the default route alone).
/// `preferred`, of the same pool, comes before all others.
pub(super) fn choose(
    pool: AddressPool,
    seed: &str,
    preferred: Option<Subnet>,
    routes: &[Route],
    nameservers: &[IpAddr],
) -> Result<Subnet, NetworkError> {
    /// Networks of a site are seldom larger.
    const NAMESERVER_NETWORK: u8 = 16;
    let count = 1_u32 << (AddressPool::INSTANCE_PREFIX - pool.prefix());
    let start = u32::from_str_radix(seed, 16).unwrap_or(0) % count;
    let reserved = nameservers.iter().filter_map(|address| match address {
        IpAddr::V4(base) => Some(Route {
            base: *base,
            prefix: NAMESERVER_NETWORK,
        }),
        IpAddr::V6(_) => None,
    });
    let taken: Vec<Route> = routes
        .iter()
        .copied()
        .filter(|route| route.prefix > 0)
        .chain(reserved)
        .collect();
    let in_turn = (0..count).map(|offset| {
        let index = (start + offset) % count;
        let base = u32::from(pool.base()) + (index << (32 - AddressPool::INSTANCE_PREFIX));
        Subnet::new(Ipv4Addr::from(base), AddressPool::INSTANCE_PREFIX)
    });
    preferred
        .into_iter()
        .chain(in_turn)
        .find(|subnet| !taken.iter().any(|route| overlaps(*subnet, *route)))
        .ok_or_else(|| NetworkError::PoolExhausted { pool: pool.to_string() })
}

fn overlaps(subnet: Subnet, route: Route) -> bool {
    let shared = mask(subnet.prefix.min(route.prefix));
    u32::from(subnet.base) & shared == u32::from(route.base) & shared
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(text: &str) -> Route {
        let (base, prefix) = text.split_once('/').unwrap();
        Route {
            base: base.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
        }
    }

    fn chosen(routes: &[&str], nameservers: &[&str]) -> Result<String, NetworkError> {
        let routes: Vec<_> = routes.iter().map(|text| route(text)).collect();
        let nameservers: Vec<_> = nameservers.iter().map(|text| text.parse().unwrap()).collect();
        let pool = "10.255.240.0/20".parse().unwrap();
        choose(pool, "00000000", None, &routes, &nameservers).map(|subnet| subnet.to_string())
    }

    #[test]
    fn a_range_without_routes_is_chosen() {
        assert_eq!(chosen(&[], &[]).unwrap(), "10.255.240.0/22");
        assert_eq!(
            chosen(&["0.0.0.0/0", "192.168.0.0/16"], &[]).unwrap(),
            "10.255.240.0/22"
        );
        assert_eq!(
            chosen(&["10.255.240.7/32", "10.255.244.0/23"], &[]).unwrap(),
            "10.255.248.0/22"
        );
        assert!(chosen(&["10.0.0.0/8"], &[]).is_err());
        assert!(
            chosen(&[], &["10.255.1.53"]).is_err(),
            "a name server's network is left alone"
        );
    }

    #[test]
    fn the_last_choice_is_kept_while_it_is_free() {
        let last = Subnet::new(Ipv4Addr::new(10, 255, 248, 0), AddressPool::INSTANCE_PREFIX);
        let again = |routes: &[Route]| {
            let pool = "10.255.240.0/20".parse().unwrap();
            choose(pool, "00000000", Some(last), routes, &[]).unwrap().to_string()
        };
        assert_eq!(again(&[]), "10.255.248.0/22");
        assert_eq!(again(&[route("10.255.250.0/24")]), "10.255.240.0/22");
    }

    #[test]
    fn a_subnet_knows_its_addresses() {
        let subnet = Subnet::new(Ipv4Addr::new(172, 29, 4, 9), 22);
        assert_eq!(subnet.to_string(), "172.29.4.0/22");
        assert_eq!(subnet.gateway().to_string(), "172.29.4.1");
        let last = subnet.container(subnet.container_count() - 1);
        assert_eq!(last.to_string(), "172.29.7.254");
        assert_eq!(subnet.index_of(last), Some(1020));
        assert_eq!(subnet.index_of(subnet.gateway()), None);
        assert!(subnet.contains(last) && !subnet.contains(Ipv4Addr::new(172, 29, 8, 0)));
    }
}
