//! Watches what the network needs of the host: our table, what other firewalls let through, name servers.
//!
//! Administrators and their tools reload rules, and take ours with them. The kernel tells of every change of
//! nftables (iptables of today is one of its users); other things are looked at now and then.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::unix::AsyncFd;

use super::{Shared, blocking, lock, names, others, resolver};
use crate::descriptor;

/// How often everything is looked at where no change is told.
const INTERVAL: Duration = Duration::from_secs(30);
/// A reload is many changes; it is looked at when it has ended.
const SETTLE: Duration = Duration::from_millis(200);
/// Between two looks: changes that come all the time cost this much at most.
const SPACING: Duration = Duration::from_secs(1);
/// `NFNLGRP_NFTABLES`, as a bit.
const NFTABLES_GROUP: u32 = 1 << 6;

/// News of the host's firewall rules.
struct Changes(Option<AsyncFd<OwnedFd>>);

impl Changes {
    fn open() -> Self {
        let opened = || -> io::Result<AsyncFd<OwnedFd>> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let descriptor = socket(
                AddressFamily::Netlink,
                SockType::Raw,
                flags,
                SockProtocol::NetlinkNetFilter,
            )?;
            bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, NFTABLES_GROUP))?;
            descriptor::watch(descriptor)
        };
        match opened() {
            Ok(descriptor) => Self(Some(descriptor)),
            Err(error) => {
                tracing::warn!(%error, "changes of the host's firewall are not told; it is looked at every {INTERVAL:?}");
                Self(None)
            }
        }
    }

    /// Waits for one, and forgets all that have come.
    async fn next(&self) {
        let Some(descriptor) = &self.0 else {
            return std::future::pending().await;
        };
        loop {
            let Ok(mut ready) = descriptor.readable().await else {
                return std::future::pending().await;
            };
            let had_news = drain(descriptor.get_ref());
            ready.clear_ready();
            if had_news {
                return;
            }
        }
    }

    fn forget(&self) {
        if let Some(descriptor) = &self.0 {
            drain(descriptor.get_ref());
        }
    }
}

/// Whether there was something.
fn drain(descriptor: &OwnedFd) -> bool {
    let mut buffer = [0; 4096];
    let mut had_news = false;
    loop {
        match recv(descriptor.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // More came than the kernel keeps.
            Ok(_) | Err(Errno::ENOBUFS) => had_news = true,
            Err(Errno::EINTR) => {}
            Err(_) => return had_news,
        }
    }
}

/// Never ends.
pub(super) async fn watch(shared: Arc<Shared>) {
    let changes = Changes::open();
    loop {
        tokio::select! {
            () = changes.next() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        changes.forget();
        tend(&shared).await;
        tokio::time::sleep(SPACING).await;
    }
}

/// Puts right what is not as it should be, and tells of what cannot be.
pub(super) async fn tend(shared: &Arc<Shared>) {
    let firewall = Arc::clone(&shared.firewall);
    match blocking("look at the firewall", move || firewall.restore()).await {
        Ok(false) => {}
        Ok(true) => tracing::warn!(
            "somebody removed the containers' firewall rules; they are there again (does a service flush the host's \
             ruleset? let it replace its own tables only)"
        ),
        Err(error) => {
            tracing::error!(error = %crate::chain(&error), "the containers' firewall rules are gone and cannot be made again");
        }
    }
    relay_names(shared).await;
    admit(shared).await;
}

/// Lets containers through other firewalls. One at a time, since each compares and then changes.
pub(super) async fn admit(shared: &Arc<Shared>) {
    let mut last = shared.admitted.lock().await;
    if lock(&shared.pool).removed {
        return;
    }
    let needs = others::Needs {
        bridge: shared.bridge.clone(),
        gateway: shared.subnet.gateway(),
        ports: shared.firewall.open_ports(),
    };
    let found = others::admit(&needs).await;
    for open in found.open.difference(&last.open) {
        tracing::info!(firewall = %open, "containers are let through another firewall of this host");
    }
    for problem in found.problems.difference(&last.problems) {
        tracing::warn!("containers may not reach what they should: {problem}");
    }
    *last = found;
}

/// Starts the relay for names when the host has only name servers that containers cannot reach.
async fn relay_names(shared: &Arc<Shared>) {
    if resolver::resolv_conf(&shared.nameservers).relayed.is_empty() || lock(&shared.relay).is_some() {
        return;
    }
    let started = async {
        let relay = names::NameRelay::start(shared.subnet.gateway(), shared.nameservers.clone()).await?;
        let firewall = Arc::clone(&shared.firewall);
        let opened = blocking("open the port for names", move || firewall.allow_name_relay()).await;
        opened.map_err(io::Error::other)?;
        Ok::<_, io::Error>(relay)
    };
    match started.await {
        Ok(relay) => {
            tracing::info!(address = %shared.subnet.gateway(), "containers' questions for names are relayed to the host's name servers");
            *lock(&shared.relay) = Some(relay);
        }
        Err(error) => tracing::warn!(
            %error,
            "names will not resolve in containers: the host's name servers are out of their reach, and cannot be \
             relayed; configure name servers for containers"
        ),
    }
}
