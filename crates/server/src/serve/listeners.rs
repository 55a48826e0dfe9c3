//! The sockets that the server listens on, which outlive it: given by systemd, or bound to the same address
//! again.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use ionian_store::Store;
use listenfd::ListenFd;
use tokio::net::TcpListener;

/// In the database's table of facts: the port that containers were told.
const CONTAINERS_PORT: &str = "containers-port";
/// How often the port that containers know is tried while something else holds it, and the pause between two
/// tries: two seconds, in which a process that is about to end ends. The containers wait for longer than that.
const PORT_TRIES: u32 = 20;
const PORT_PAUSE: Duration = Duration::from_millis(100);

/// The public listeners: those that systemd holds for us, so that no connection is refused while the server
/// restarts, or our own.
pub(super) async fn public(addresses: &[SocketAddr]) -> anyhow::Result<Vec<TcpListener>> {
    let mut given = ListenFd::from_env();
    if given.len() == 0 {
        return bind(addresses).await;
    }
    let mut listeners = Vec::with_capacity(given.len());
    for index in 0..given.len() {
        let listener = given
            .take_tcp_listener(index)
            .with_context(|| format!("socket {index} that was passed to the server (LISTEN_FDS) is no TCP listener"))?
            .with_context(|| format!("socket {index} that was passed to the server (LISTEN_FDS) is not there"))?;
        // Not for the programs that we start: the port would stay taken for as long as one of them lives.
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        tracing::info!(address = %listener.local_addr()?, "listening on a socket that was passed to the server");
        listeners.push(listener);
    }
    Ok(listeners)
}

/// With port 0, the first address decides which port all of them get.
async fn bind(addresses: &[SocketAddr]) -> anyhow::Result<Vec<TcpListener>> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    for address in addresses {
        let mut wanted = *address;
        if wanted.port() == 0
            && let Some(first) = listeners.first()
        {
            wanted.set_port(first.local_addr()?.port());
        }
        match TcpListener::bind(wanted).await {
            Ok(listener) => listeners.push(listener),
            // A machine without IPv6 has one loopback address.
            Err(error) if !listeners.is_empty() && address.is_ipv6() => {
                tracing::warn!(%wanted, %error, "not listening here");
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("cannot listen on {wanted}; another server may run there: choose another with --listen")
                });
            }
        }
    }
    if listeners.is_empty() {
        bail!("no address to listen on");
    }
    Ok(listeners)
}

/// The listener for containers, on the port that running ones know. Where that is taken, on another: control
/// sees that the address has changed, and gives up the containers that know the old one.
pub(super) async fn for_containers(store: &Store, gateway: Option<IpAddr>) -> anyhow::Result<TcpListener> {
    let ip = gateway.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let known = store.meta().find(CONTAINERS_PORT).await?;
    let known: Option<u16> = known.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok());
    if let Some(port) = known
        && let Some(listener) = bind_again(SocketAddr::new(ip, port)).await?
    {
        return Ok(listener);
    }
    let listener = TcpListener::bind((ip, 0))
        .await
        .context("cannot listen for containers")?;
    let port = listener.local_addr()?.port();
    store.meta().set(CONTAINERS_PORT, port.to_string().as_bytes()).await?;
    Ok(listener)
}

/// `None` where something else has taken the address for good.
async fn bind_again(address: SocketAddr) -> anyhow::Result<Option<TcpListener>> {
    for tried in 1.. {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if tried == PORT_TRIES {
                    tracing::warn!(%address, "another program listens where containers reach the server; choosing another port");
                    break;
                }
                tokio::time::sleep(PORT_PAUSE).await;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot listen for containers on {address}"));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("ionian.db")).await.unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn containers_find_the_server_where_it_was() {
        let (_dir, store) = store().await;
        let first = for_containers(&store, None).await.unwrap().local_addr().unwrap();
        let second = for_containers(&store, None).await.unwrap();
        assert_eq!(second.local_addr().unwrap(), first);
    }

    #[tokio::test]
    async fn a_port_that_somebody_else_has_taken_is_replaced() {
        let (_dir, store) = store().await;
        let taken = for_containers(&store, None).await.unwrap();
        let other = for_containers(&store, None).await.unwrap().local_addr().unwrap();
        assert_ne!(other, taken.local_addr().unwrap());
        let kept = for_containers(&store, None).await.unwrap();
        assert_eq!(kept.local_addr().unwrap(), other);
    }

    #[tokio::test]
    async fn with_port_0_all_addresses_share_one_port() {
        let both = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2])].map(|ip| SocketAddr::new(ip, 0));
        let listeners = bind(&both).await.unwrap();
        let ports: Vec<u16> = listeners.iter().map(|l| l.local_addr().unwrap().port()).collect();
        assert_eq!(ports[0], ports[1]);
    }
}
