//! The containers' network: one bridge per instance, a namespace with `eth0` per container, and a firewall.
//!
//! ```text
//!   container          host
//!   eth0 ──── veth ─┐
//!                   ├─ ion<id> (gateway address) ── forwarding, masquerade ── the outside
//!   eth0 ──── veth ─┘
//! ```
//!
//! A container reaches the outside and the ports that [`Network::allow_host_port`] opened on the gateway
//! address, and nothing else: ports of the bridge are isolated from each other, and the firewall refuses the
//! host's addresses, other instances and link-local metadata services. The host reaches every port of a
//! container.
//!
//! A namespace is held by a descriptor of this process and by the processes in it, never by a file. So a crash
//! leaves only those of containers that live on: the kernel removes a namespace, its `eth0` and the host's end
//! with the last holder. Such containers keep their addresses: the next process takes bridge, firewall and
//! subnet over ([`survivor`]).

mod egress;
mod firewall;
mod guard;
mod link;
mod names;
pub(crate) mod others;
pub mod resolver;
mod subnet;
mod survivor;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::config::ContainerConfig;
use crate::keeper::record::NetworkRecord;
pub(crate) use egress::Policy;
pub use egress::{Cidr, CidrError, Egress, MAX_CIDRS};
use firewall::{ContainerRules, Firewall};
pub use subnet::Subnet;
pub(crate) use survivor::Survivor;

/// How many hexadecimal digits number a host's end.
const LINK_DIGITS: usize = 5;

/// After a namespace could not be made, the pool waits this long; starts make their own and see the error.
const REFILL_BACKOFF: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("failed to {what}")]
    Netlink { what: String, source: rtnetlink::Error },
    #[error("failed to {what}")]
    Io { what: String, source: io::Error },
    #[error("timed out trying to {what}")]
    TimedOut { what: String },
    #[error("every /22 of the address pool {pool} overlaps with a route of this host; configure another pool")]
    PoolExhausted { pool: String },
    #[error("all {addresses} addresses of {subnet} are in use; run fewer containers on this machine")]
    AddressesExhausted { subnet: Subnet, addresses: usize },
    #[error("nft refused the firewall rules: {message}")]
    Firewall { message: String },
    #[error("another instance of the platform held {path} for too long")]
    Locked { path: PathBuf },
    #[error("the network has been removed")]
    Removed,
}

/// One instance's bridge, addresses and firewall. Stays until [`Network::remove`].
pub struct Network {
    shared: Arc<Shared>,
    refill: AbortHandle,
    guard: AbortHandle,
}

struct Shared {
    bridge: String,
    subnet: Subnet,
    mtu: u32,
    firewall: Arc<Firewall>,
    /// What was found of other firewalls, the last time.
    admitted: tokio::sync::Mutex<others::Found>,
    relay: Mutex<Option<names::NameRelay>>,
    warm_slots: usize,
    nameservers: Vec<IpAddr>,
    addresses: Arc<Mutex<Addresses>>,
    /// Ready for a container.
    pool: Mutex<Pool>,
    wanted: Notify,
}

#[derive(Default)]
struct Pool {
    slots: VecDeque<Slot>,
    closed: bool,
    /// The bridge goes, or has gone.
    removed: bool,
}

/// A network namespace with an address. Dropping it closes the namespace, and with the last process in it the
/// kernel removes the rest a little later; [`Slot::release`] does so before it returns.
pub(crate) struct Slot {
    /// `None` for a container of an earlier process, whose own processes hold it.
    namespace: Option<OwnedFd>,
    claim: Claim,
    /// `None` while the outside is open.
    rules: Option<ContainerRules>,
    addresses: Arc<Mutex<Addresses>>,
}

impl Slot {
    pub(crate) fn address(&self) -> IpAddr {
        IpAddr::V4(self.claim.address)
    }

    /// What a later process needs to know of it.
    pub(crate) fn record(&self) -> NetworkRecord {
        NetworkRecord {
            address: self.claim.address,
            host_link: self.claim.host_link.clone(),
            egress: self.rules.as_ref().map_or(Egress::Open, |rules| rules.egress().clone()),
        }
    }

    /// Where another process finds the namespace while this slot lives; `None` if only its processes have it.
    pub(crate) fn namespace_path(&self) -> Option<PathBuf> {
        let descriptor = self.namespace.as_ref()?.as_raw_fd();
        Some(PathBuf::from(format!("/proc/{}/fd/{descriptor}", std::process::id())))
    }

    /// Removes the host's end, and with it `eth0`. Blocks.
    pub(crate) fn release(mut self) -> Result<(), NetworkError> {
        let link = link::delete(&self.claim.host_link).map(|_| ());
        // After the interface, so that the rules are there as long as a packet may come.
        let rules = self.rules.take().map_or(Ok(()), ContainerRules::remove);
        link.and(rules)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.rules = None;
        lock(&self.addresses).release(&self.claim);
    }
}

impl Network {
    /// The bridge's and the firewall table's names are made from the instance's id, so what is left of an
    /// earlier run is found and replaced, or taken over if its containers still use it. The pool is empty until
    /// [`Self::fill_pool`], so that such containers get their addresses first.
    ///
    /// `policies` are of the containers that live on.
    pub(crate) async fn open(
        config: &ContainerConfig,
        survivor: Option<Survivor>,
        policies: &[Policy],
    ) -> Result<Self, NetworkError> {
        let names = Names::of(config);
        let resolver = resolver::resolv_conf(&config.nameservers);
        if let Some(problem) = &resolver.problem {
            tracing::warn!("{problem}");
        }
        let pool = config.address_pool;
        let seed = config.short_id();
        let bridge = names.bridge.clone();
        let last_choice = survivor::last_choice(config);
        let (subnet, mtu) = blocking("set up the bridge", move || {
            let _lock = subnet::lock_choice()?;
            if let Some(survivor) = survivor {
                return Ok((survivor.subnet, link::host_facts()?.uplink_mtu));
            }
            link::delete(&bridge)?;
            let facts = link::host_facts()?;
            let subnet = subnet::choose(pool, &seed, last_choice, &facts.routes, &resolver.nameservers)?;
            link::create_bridge(&bridge, &seed, subnet, facts.uplink_mtu)?;
            Ok((subnet, facts.uplink_mtu))
        })
        .await?;
        enable_forwarding()?;
        // Also where it is taken over, so that rules of containers that have ended go: it is replaced at once.
        let firewall = {
            let (names, policies) = (Names::of(config), policies.to_vec());
            blocking("write the firewall's rules", move || {
                Firewall::create(&names.table, &names.bridge, subnet, &policies)
            })
            .await?
        };
        if survivor.is_none() {
            let rules = firewall::digest(&names.table, &names.bridge, subnet);
            survivor::remember(config, subnet, rules)?;
        }
        tracing::info!(bridge = %names.bridge, %subnet, mtu, taken_over = survivor.is_some(), "the containers' network is up");

        let shared = Arc::new(Shared {
            bridge: names.bridge,
            subnet,
            mtu,
            firewall,
            admitted: tokio::sync::Mutex::default(),
            relay: Mutex::default(),
            warm_slots: config.warm_network_slots,
            nameservers: config.nameservers.clone(),
            addresses: Arc::new(Mutex::new(Addresses::new(subnet, names.link_prefix))),
            pool: Mutex::new(Pool::default()),
            wanted: Notify::new(),
        });
        guard::tend(&shared).await;
        let refill = tokio::spawn(keep_filled(Arc::clone(&shared))).abort_handle();
        let guard = tokio::spawn(guard::watch(Arc::clone(&shared))).abort_handle();
        Ok(Self { shared, refill, guard })
    }

    /// The host's address as containers see it, where the platform's container listener binds.
    pub fn gateway(&self) -> IpAddr {
        IpAddr::V4(self.shared.subnet.gateway())
    }

    pub fn subnet(&self) -> Subnet {
        self.shared.subnet
    }

    pub fn bridge(&self) -> &str {
        &self.shared.bridge
    }

    /// Lets containers connect to this TCP port of the gateway address.
    pub async fn allow_host_port(&self, port: u16) -> Result<(), NetworkError> {
        let firewall = Arc::clone(&self.shared.firewall);
        blocking("open a port", move || firewall.allow_host_port(port)).await?;
        guard::admit(&self.shared).await;
        Ok(())
    }

    /// The text of a container's `/etc/resolv.conf`.
    pub(crate) fn resolv_conf(&self) -> String {
        resolver::for_container(&self.shared.nameservers, self.shared.subnet.gateway())
    }

    /// A namespace from the pool, else a new one.
    pub(crate) async fn take_slot(&self) -> Result<Slot, NetworkError> {
        let ready = {
            let mut pool = lock(&self.shared.pool);
            if pool.closed {
                return Err(NetworkError::Removed);
            }
            pool.slots.pop_front()
        };
        self.shared.wanted.notify_one();
        match ready {
            Some(slot) => Ok(slot),
            None => create_slot(&self.shared).await,
        }
    }

    /// Begins to keep namespaces ready.
    pub(crate) fn fill_pool(&self) {
        self.shared.wanted.notify_one();
    }

    /// The network of a container of an earlier process, over whose network this one was opened. `None` if it
    /// is not of this network, or somebody has it already.
    pub(crate) fn take_over_slot(&self, record: &NetworkRecord) -> Option<Slot> {
        let claim = lock(&self.shared.addresses).claim_again(record)?;
        Some(Slot {
            namespace: None,
            claim,
            rules: record.policy().map(|policy| self.shared.firewall.rules_of(policy)),
            addresses: Arc::clone(&self.shared.addresses),
        })
    }

    /// Limits what the slot's container reaches, before it is started.
    pub(crate) async fn limit_egress(&self, slot: &mut Slot, egress: &Egress) -> Result<(), NetworkError> {
        if *egress == Egress::Open {
            return Ok(());
        }
        let policy = Policy {
            address: slot.claim.address,
            egress: egress.clone(),
        };
        let firewall = Arc::clone(&self.shared.firewall);
        slot.rules = blocking("limit a container's network", move || firewall.limit(policy)).await?;
        Ok(())
    }

    /// Waits until the pool is as full as it should be: for tests and measurements.
    pub async fn wait_until_warm(&self) {
        /// The pool is filled by another task; this is not on any start's path.
        const INTERVAL: Duration = Duration::from_millis(5);
        while lock(&self.shared.pool).slots.len() < self.shared.warm_slots {
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Removes bridge and firewall. Containers that still run are cut off.
    pub(crate) async fn remove(&self) -> Result<(), NetworkError> {
        self.close().await?;
        lock(&self.shared.pool).removed = true;
        {
            // Whoever adds rules just now is waited for, and nobody does after.
            let _admitted = self.shared.admitted.lock().await;
            for error in others::withdraw(&self.shared.bridge).await {
                tracing::warn!(error = %crate::chain(&error), "failed to take back what let containers through another firewall");
            }
        }
        lock(&self.shared.relay).take();
        let (bridge, firewall) = (self.shared.bridge.clone(), Arc::clone(&self.shared.firewall));
        blocking("remove the bridge", move || {
            link::delete(&bridge)?;
            firewall.remove()
        })
        .await
    }

    /// Gives no namespaces any more and removes the idle ones; the others go on.
    pub(crate) async fn close(&self) -> Result<(), NetworkError> {
        self.refill.abort();
        self.guard.abort();
        let idle = {
            let mut pool = lock(&self.shared.pool);
            pool.closed = true;
            std::mem::take(&mut pool.slots)
        };
        blocking("remove idle network namespaces", move || {
            idle.into_iter().try_for_each(Slot::release)
        })
        .await
    }

    /// The host's ends that belong to namespaces of this process, which a reap must leave alone.
    pub(crate) fn links(&self) -> BTreeSet<String> {
        lock(&self.shared.addresses).links.clone()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.refill.abort();
        self.guard.abort();
        let mut pool = lock(&self.shared.pool);
        pool.closed = true;
        pool.slots.clear();
    }
}

/// What an instance's interfaces and table are called.
pub(crate) struct Names {
    pub bridge: String,
    pub table: String,
    pub link_prefix: String,
}

impl Names {
    pub(crate) fn of(config: &ContainerConfig) -> Self {
        let id = config.short_id();
        Self {
            bridge: format!("ion{id}"),
            table: format!("ionian_{id}"),
            link_prefix: format!("iv{id}"),
        }
    }
}

/// Removes host ends of earlier runs' containers, except those in `keep`, which is asked for after they have
/// been listed. Blocks.
pub(crate) fn reap_links(names: &Names, keep: &dyn Fn() -> BTreeSet<String>) -> Result<usize, NetworkError> {
    let mut removed = 0;
    let found = link::with_prefix(&names.link_prefix)?;
    let keep = keep();
    for name in found {
        if !keep.contains(&name) && link::delete(&name)? {
            removed += 1;
        }
    }
    Ok(removed)
}

/// Which addresses containers have. Handed out in turn, so that one is not given to another container while
/// something may still remember the last.
struct Addresses {
    subnet: Subnet,
    next: u32,
    used: BTreeSet<u32>,
    /// The host's ends of all namespaces that are being made, wait or are in use.
    links: BTreeSet<String>,
    link_prefix: String,
    /// Numbers the host's ends; [`LINK_DIGITS`] hexadecimal digits.
    next_link: u32,
}

struct Claim {
    address: Ipv4Addr,
    host_link: String,
}

impl Addresses {
    fn new(subnet: Subnet, link_prefix: String) -> Self {
        Self {
            subnet,
            next: 0,
            used: BTreeSet::new(),
            links: BTreeSet::new(),
            link_prefix,
            next_link: 0,
        }
    }

    fn claim(&mut self) -> Result<Claim, NetworkError> {
        let count = self.subnet.container_count();
        let free = (0..count)
            .map(|offset| (self.next + offset) % count)
            .find(|index| !self.used.contains(index));
        let Some(index) = free else {
            return Err(NetworkError::AddressesExhausted {
                subnet: self.subnet,
                addresses: count as usize,
            });
        };
        self.used.insert(index);
        self.next = (index + 1) % count;
        // Links are never more than addresses, which are far fewer than numbers.
        let host_link = loop {
            self.next_link = (self.next_link + 1) & 0xf_ffff;
            let name = format!("{}{:05x}", self.link_prefix, self.next_link);
            if self.links.insert(name.clone()) {
                break name;
            }
        };
        Ok(Claim {
            address: self.subnet.container(index),
            host_link,
        })
    }

    /// One that an earlier process gave away. Others are given from behind the last of them.
    fn claim_again(&mut self, record: &NetworkRecord) -> Option<Claim> {
        let index = self.subnet.index_of(record.address)?;
        let is_ours = record.host_link.strip_prefix(&self.link_prefix)?.len() == LINK_DIGITS;
        if !is_ours || self.used.contains(&index) || !self.links.insert(record.host_link.clone()) {
            return None;
        }
        self.used.insert(index);
        self.next = self.next.max((index + 1) % self.subnet.container_count());
        Some(Claim {
            address: record.address,
            host_link: record.host_link.clone(),
        })
    }

    fn release(&mut self, claim: &Claim) {
        self.links.remove(&claim.host_link);
        if let Some(index) = self.subnet.index_of(claim.address) {
            self.used.remove(&index);
        }
    }
}

async fn keep_filled(shared: Arc<Shared>) {
    loop {
        shared.wanted.notified().await;
        while lock(&shared.pool).slots.len() < shared.warm_slots {
            match create_slot(&shared).await {
                Ok(slot) => {
                    let mut pool = lock(&shared.pool);
                    if pool.closed {
                        return;
                    }
                    pool.slots.push_back(slot);
                }
                Err(error) => {
                    tracing::warn!(error = %crate::chain(&error), "failed to prepare a network namespace");
                    tokio::time::sleep(REFILL_BACKOFF).await;
                }
            }
        }
    }
}

async fn create_slot(shared: &Arc<Shared>) -> Result<Slot, NetworkError> {
    let shared = Arc::clone(shared);
    // The claim is made and given back inside, so that a caller who stops waiting leaks no address.
    blocking("create a network namespace", move || {
        let claim = lock(&shared.addresses).claim()?;
        let plan = link::SlotPlan {
            host_link: claim.host_link.clone(),
            bridge: shared.bridge.clone(),
            address: claim.address,
            subnet: shared.subnet,
            mtu: shared.mtu,
        };
        match link::create_namespace(plan) {
            Ok(namespace) => Ok(Slot {
                namespace: Some(namespace),
                claim,
                rules: None,
                addresses: Arc::clone(&shared.addresses),
            }),
            Err(error) => {
                lock(&shared.addresses).release(&claim);
                Err(error)
            }
        }
    })
    .await
}

/// Containers reach the outside through this host, which must forward packets for that.
fn enable_forwarding() -> Result<(), NetworkError> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_forward";
    let failed = |source| NetworkError::Io {
        what: format!("enable forwarding in {PATH}"),
        source,
    };
    if std::fs::read_to_string(PATH).map_err(failed)?.trim() != "1" {
        std::fs::write(PATH, "1").map_err(failed)?;
        tracing::info!("set net.ipv4.ip_forward=1, so that containers reach the outside");
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(NetworkError::Io {
            what: what.to_owned(),
            source: io::Error::other(error),
        }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_an_interface_name() {
        /// The kernel's `IFNAMSIZ` without the end.
        const LIMIT: usize = 15;
        let names = Names::of(&ContainerConfig::new("any instance", "/tmp/x"));
        assert!(names.bridge.len() <= LIMIT);
        assert_eq!(format!("{}{:05x}", names.link_prefix, 0xf_ffff).len(), LIMIT);
    }

    #[test]
    fn addresses_are_handed_out_in_turn_and_run_out() {
        let subnet = Subnet::new(Ipv4Addr::new(172, 29, 0, 0), 22);
        let mut addresses = Addresses::new(subnet, "iv".to_owned());
        let first = addresses.claim().unwrap();
        assert_eq!(first.address, Ipv4Addr::new(172, 29, 0, 2));
        addresses.release(&first);
        assert!(addresses.links.is_empty());
        assert_ne!(addresses.claim().unwrap().address, first.address);
        for _ in 1..subnet.container_count() {
            addresses.claim().unwrap();
        }
        assert!(matches!(
            addresses.claim(),
            Err(NetworkError::AddressesExhausted { addresses: 1021, .. })
        ));
        addresses.release(&first);
        assert_eq!(addresses.claim().unwrap().address, first.address);
    }

    #[test]
    fn what_an_earlier_process_gave_away_is_not_given_again() {
        let subnet = Subnet::new(Ipv4Addr::new(172, 29, 0, 0), 22);
        let mut addresses = Addresses::new(subnet, "iv".to_owned());
        let record = |last, link: &str| NetworkRecord {
            address: Ipv4Addr::new(172, 29, 0, last),
            host_link: link.to_owned(),
            egress: Egress::Open,
        };
        let taken = addresses.claim_again(&record(9, "iv00002")).unwrap();
        for bad in [
            record(9, "iv00003"),
            record(10, "iv00002"),
            record(1, "iv00003"),
            record(10, "eth0"),
            record(10, "iv3"),
        ] {
            assert!(addresses.claim_again(&bad).is_none(), "{bad:?}");
        }
        let mut links = vec![taken.host_link.clone()];
        for _ in 1..subnet.container_count() {
            let claim = addresses.claim().unwrap();
            assert_ne!(claim.address, taken.address);
            links.push(claim.host_link);
        }
        links.sort();
        links.dedup();
        assert_eq!(links.len(), subnet.container_count() as usize);
        addresses.release(&taken);
        assert_eq!(addresses.claim().unwrap().address, taken.address);
    }
}
