//! Interfaces, addresses and routes, through netlink.
//!
//! Everything here blocks, on a thread of its own where it enters another namespace: a thread that belongs to
//! the async runtime must never change its namespace, since other tasks would go on in it.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::subnet::Route;
use super::{NetworkError, Subnet};

/// Interface changes wait for a lock that the kernel holds for milliseconds, more while namespaces are torn down.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The kernel's default where there is no uplink to copy from.
const DEFAULT_MTU: u32 = 1500;

/// What of the host's network matters for choosing ours.
pub(super) struct HostFacts {
    pub routes: Vec<Route>,
    pub uplink_mtu: u32,
}

pub(super) struct SlotPlan {
    pub host_link: String,
    pub bridge: String,
    pub address: Ipv4Addr,
    pub subnet: Subnet,
    pub mtu: u32,
}

pub(super) fn host_facts() -> Result<HostFacts, NetworkError> {
    with_netlink("read the host's routes", async |handle| {
        let message = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut stream = std::pin::pin!(handle.route().get(message).execute());
        let mut routes = Vec::new();
        let mut uplink = None;
        while let Some(route) = stream.try_next().await? {
            let mut base = Ipv4Addr::UNSPECIFIED;
            let mut interface = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => base = *address,
                    RouteAttribute::Oif(index) => interface = Some(*index),
                    _ => {}
                }
            }
            let prefix = route.header.destination_prefix_length;
            if prefix == 0 {
                uplink = uplink.or(interface);
            }
            routes.push(Route { base, prefix });
        }
        let mut uplink_mtu = DEFAULT_MTU;
        if let Some(index) = uplink {
            let mut links = std::pin::pin!(handle.link().get().match_index(index).execute());
            while let Some(link) = links.try_next().await? {
                for attribute in link.attributes {
                    if let LinkAttribute::Mtu(mtu) = attribute {
                        uplink_mtu = mtu;
                    }
                }
            }
        }
        Ok(HostFacts { routes, uplink_mtu })
    })
    .and_then(|facts| {
        let routes = facts.routes.into_iter().chain(networks_of_interfaces()?).collect();
        Ok(HostFacts { routes, ..facts })
    })
}

/// An interface that is down has a network, and no route to it.
fn networks_of_interfaces() -> Result<Vec<Route>, NetworkError> {
    let v4 = |address: Option<nix::sys::socket::SockaddrStorage>| Some(address?.as_sockaddr_in()?.ip());
    Ok(addresses()?
        .filter_map(|found| {
            let netmask = v4(found.netmask)?;
            Some(Route {
                base: v4(found.address)?,
                prefix: u8::try_from(u32::from(netmask).leading_ones()).ok()?,
            })
        })
        .collect())
}

fn addresses() -> Result<nix::ifaddrs::InterfaceAddressIterator, NetworkError> {
    nix::ifaddrs::getifaddrs().map_err(|error| NetworkError::Io {
        what: "list addresses".to_owned(),
        source: error.into(),
    })
}

pub(super) fn create_bridge(name: &str, seed: &str, subnet: Subnet, mtu: u32) -> Result<(), NetworkError> {
    // Given by hand, since a bridge without an address takes those of its ports, and containers would have to
    // learn a new one whenever a port comes or goes. 02 is the first byte of a locally made address.
    let mut hardware_address = vec![0x02, 0x49];
    hardware_address.extend(u32::from_str_radix(seed, 16).unwrap_or(0).to_be_bytes());
    with_netlink(&format!("create bridge {name}"), async |handle| {
        let bridge = LinkBridge::new(name).mtu(mtu).address(hardware_address).build();
        handle.link().add(bridge).execute().await
    })?;
    // Containers have no IPv6, so the bridge needs no address that they could reach the host by.
    write_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    let index = index_of(name)?;
    with_netlink(&format!("configure bridge {name}"), async |handle| {
        handle
            .address()
            .add(index, IpAddr::V4(subnet.gateway()), subnet.prefix())
            .execute()
            .await?;
        handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await
    })
}

/// Whether the interface is there and has the address.
pub(super) fn has_address(name: &str, address: Ipv4Addr) -> Result<bool, NetworkError> {
    Ok(addresses()?.any(|found| {
        found.interface_name == name
            && found
                .address
                .as_ref()
                .and_then(|found| found.as_sockaddr_in())
                .is_some_and(|found| found.ip() == address)
    }))
}

/// Whether there was one.
pub(super) fn delete(name: &str) -> Result<bool, NetworkError> {
    let Some(index) = find_index(name)? else {
        return Ok(false);
    };
    let result = with_netlink(&format!("delete interface {name}"), async |handle| {
        handle.link().del(index).execute().await
    });
    match result {
        Ok(()) => Ok(true),
        // It went away together with its namespace.
        Err(NetworkError::Netlink {
            source: rtnetlink::Error::NetlinkError(message),
            ..
        }) if message.raw_code() == -nix::libc::ENODEV => Ok(false),
        Err(error) => Err(error),
    }
}

/// Names of the interfaces in this namespace that begin with `prefix`.
pub(super) fn with_prefix(prefix: &str) -> Result<Vec<String>, NetworkError> {
    let interfaces = nix::net::if_::if_nameindex().map_err(|error| NetworkError::Io {
        what: "list interfaces".to_owned(),
        source: error.into(),
    })?;
    Ok((&interfaces)
        .into_iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(prefix))
        .collect())
}

/// A new network namespace whose `eth0` is joined to the bridge.
pub(super) fn create_namespace(plan: SlotPlan) -> Result<OwnedFd, NetworkError> {
    let what = format!("create a network namespace for {}", plan.address);
    let spawn_failed = |source| NetworkError::Io {
        what: what.clone(),
        source,
    };
    std::thread::Builder::new()
        .name("ionian-netns".to_owned())
        .spawn(move || create_namespace_on_this_thread(&plan))
        .map_err(spawn_failed)?
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn create_namespace_on_this_thread(plan: &SlotPlan) -> Result<OwnedFd, NetworkError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| NetworkError::Io { what, source }
    };
    let runtime = single_thread_runtime()?;
    let bridge = index_of(&plan.bridge)?;

    // A socket stays in the namespace in which it was made.
    let host = runtime.block_on(async { connect() })?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| io("create a network namespace")(error.into()))?;
    let namespace = File::open("/proc/thread-self/ns/net").map_err(io("open a new network namespace"))?;
    configure_namespace()?;
    let inside = runtime.block_on(async { connect() })?;

    let what = format!("connect {} to {}", plan.host_link, plan.bridge);
    runtime.block_on(bounded(&what, async {
        // Made on the host's side, where the bridge is, with its other end already in the namespace.
        let peer = LinkMessageBuilder::<LinkUnspec>::default()
            .name("eth0")
            .mtu(plan.mtu)
            .address(hardware_address(plan.address))
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        let veth = LinkVeth::new(&plan.host_link, "eth0")
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .mtu(plan.mtu)
            .controller(bridge)
            .build();
        host.link().add(veth).execute().await?;
        let port = find_link(&host, &plan.host_link).await?;
        // Isolated before it comes up: an isolated port reaches the bridge's own address and no other port.
        host.link()
            .set_port(LinkBridgePort::new(port).isolated(true).build())
            .execute()
            .await?;
        host.link()
            .set(LinkUnspec::new_with_index(port).up().build())
            .execute()
            .await?;

        let loopback = find_link(&inside, "lo").await?;
        inside
            .link()
            .set(LinkUnspec::new_with_index(loopback).up().build())
            .execute()
            .await?;
        let eth0 = find_link(&inside, "eth0").await?;
        inside
            .link()
            .set(LinkUnspec::new_with_index(eth0).up().build())
            .execute()
            .await?;
        inside
            .address()
            .add(eth0, IpAddr::V4(plan.address), plan.subnet.prefix())
            .execute()
            .await?;
        let default = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(plan.subnet.gateway())
            .build();
        inside.route().add(default).execute().await
    }))?;
    Ok(namespace.into())
}

/// Made from the address, so that what the host remembers of an address stays true for its next container: the
/// bridge, and what is known of its neighbours, outlives them all. 02 marks it as locally made.
fn hardware_address(address: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![0x02, 0x4a];
    bytes.extend(address.octets());
    bytes
}

/// For the namespace of the calling thread.
fn configure_namespace() -> Result<(), NetworkError> {
    // Interfaces that are made from now on; loopback keeps `::1`, which programs bind to.
    write_sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    // Pings without the right to make raw packets, and port 80 for users other than root.
    write_sysctl("net/ipv4/ping_group_range", "0 2147483647")?;
    write_sysctl("net/ipv4/ip_unprivileged_port_start", "0")
}

/// Absent files are those of features that the kernel does not have.
fn write_sysctl(name: &str, value: &str) -> Result<(), NetworkError> {
    match fs::write(format!("/proc/sys/{name}"), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| NetworkError::Io {
            what: format!("set sysctl {name}"),
            source,
        }),
    }
}

fn find_index(name: &str) -> Result<Option<u32>, NetworkError> {
    match nix::net::if_::if_nametoindex(name) {
        Ok(index) => Ok(Some(index)),
        Err(nix::errno::Errno::ENODEV) => Ok(None),
        Err(error) => Err(NetworkError::Io {
            what: format!("find interface {name}"),
            source: error.into(),
        }),
    }
}

fn index_of(name: &str) -> Result<u32, NetworkError> {
    find_index(name)?.ok_or_else(|| NetworkError::Io {
        what: format!("find interface {name}"),
        source: io::Error::from(io::ErrorKind::NotFound),
    })
}

async fn find_link(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let mut links = std::pin::pin!(handle.link().get().match_name(name.to_owned()).execute());
    links
        .try_next()
        .await?
        .map(|link| link.header.index)
        .ok_or(rtnetlink::Error::RequestFailed)
}

/// Runs `work` with a connection of its own, in the namespace of the calling thread, which is blocked.
fn with_netlink<T>(
    what: &str,
    work: impl AsyncFnOnce(Handle) -> Result<T, rtnetlink::Error>,
) -> Result<T, NetworkError> {
    single_thread_runtime()?.block_on(async {
        let handle = connect()?;
        bounded(what, work(handle)).await
    })
}

async fn bounded<T>(what: &str, work: impl Future<Output = Result<T, rtnetlink::Error>>) -> Result<T, NetworkError> {
    match tokio::time::timeout(TIMEOUT, work).await {
        Ok(result) => result.map_err(|source| NetworkError::Netlink {
            what: what.to_owned(),
            source,
        }),
        Err(_) => Err(NetworkError::TimedOut { what: what.to_owned() }),
    }
}

/// Must be called within a runtime, which drives the connection.
fn connect() -> Result<Handle, NetworkError> {
    let (connection, handle, _messages) = rtnetlink::new_connection().map_err(|source| NetworkError::Io {
        what: "open a netlink socket".to_owned(),
        source,
    })?;
    tokio::spawn(connection);
    Ok(handle)
}

fn single_thread_runtime() -> Result<tokio::runtime::Runtime, NetworkError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| NetworkError::Io {
            what: "start a thread for netlink".to_owned(),
            source,
        })
}
