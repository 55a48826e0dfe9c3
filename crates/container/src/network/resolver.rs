//! Name servers for containers: the host's, where a container can reach them, else a relay to them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

const HOST_FILE: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the servers that its local stub asks.
const UPSTREAM_FILE: &str = "/run/systemd/resolve/resolv.conf";

const PORT: u16 = 53;

/// The resolver of the C library reads no more than three.
const MAX_NAMESERVERS: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvConf {
    pub text: String,
    pub nameservers: Vec<IpAddr>,
    /// Where there are none of those: servers that the host reaches, and containers through a relay on the gateway
    /// address, which is their name server then.
    pub relayed: Vec<SocketAddr>,
    /// Why names may not resolve in containers, and how to mend it.
    pub problem: Option<String>,
}

/// `configured` wins over the host's files.
pub fn resolv_conf(configured: &[IpAddr]) -> ResolvConf {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    choose(configured, &read(HOST_FILE), &read(UPSTREAM_FILE))
}

/// The file of a container, whose gateway relays where that is needed.
pub(super) fn for_container(configured: &[IpAddr], gateway: Ipv4Addr) -> String {
    let chosen = resolv_conf(configured);
    if chosen.relayed.is_empty() {
        return chosen.text;
    }
    format!("nameserver {gateway}\n{}", chosen.text)
}

fn choose(configured: &[IpAddr], host: &str, upstream: &str) -> ResolvConf {
    // Containers have no IPv6 route and a loopback of their own.
    let reachable =
        |server: &SocketAddr| matches!(server.ip(), IpAddr::V4(v4) if !v4.is_loopback() && !v4.is_unspecified());
    let direct = |servers: &[SocketAddr]| -> Vec<IpAddr> {
        servers
            .iter()
            .filter(|server| reachable(server))
            .map(SocketAddr::ip)
            .collect()
    };
    if !configured.is_empty() {
        let servers: Vec<_> = configured
            .iter()
            .map(|address| SocketAddr::new(*address, PORT))
            .collect();
        return render(direct(&servers), servers, host, None);
    }
    let from_host = parse_nameservers(host);
    let usable = direct(&from_host);
    if !usable.is_empty() {
        return render(usable, Vec::new(), host, None);
    }
    let from_upstream = direct(&parse_nameservers(upstream));
    if !from_upstream.is_empty() {
        return render(from_upstream, Vec::new(), upstream, None);
    }
    let problem = from_host.is_empty().then(|| {
        format!(
            "{HOST_FILE} has no name server, so names will not resolve in containers; configure name servers for them"
        )
    });
    render(Vec::new(), from_host, host, problem)
}

/// `relayed` is for when there are no others.
fn render(
    mut nameservers: Vec<IpAddr>,
    mut relayed: Vec<SocketAddr>,
    template: &str,
    problem: Option<String>,
) -> ResolvConf {
    nameservers.truncate(MAX_NAMESERVERS);
    relayed.truncate(if nameservers.is_empty() { MAX_NAMESERVERS } else { 0 });
    let mut text = String::new();
    for address in &nameservers {
        text.push_str("nameserver ");
        text.push_str(&address.to_string());
        text.push('\n');
    }
    for line in template
        .lines()
        .filter(|line| line.starts_with("search ") || line.starts_with("options "))
    {
        text += line;
        text.push('\n');
    }
    ResolvConf {
        text,
        nameservers,
        relayed,
        problem,
    }
}

fn parse_nameservers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| parse_server(rest.split_whitespace().next()?))
        .collect()
}

/// An address; a link-local one has its interface behind a `%`.
fn parse_server(text: &str) -> Option<SocketAddr> {
    let Some((address, interface)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, PORT));
    };
    let scope = interface
        .parse()
        .ok()
        .or_else(|| nix::net::if_::if_nametoindex(interface).ok())?;
    Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_servers_are_copied_with_search_and_options() {
        let host = "# by hand\nnameserver 10.0.0.53\nnameserver fd00::1\nsearch example.com\noptions ndots:2\n";
        let chosen = choose(&[], host, "");
        assert_eq!(
            chosen.text,
            "nameserver 10.0.0.53\nsearch example.com\noptions ndots:2\n"
        );
        assert_eq!(chosen.problem, None);
    }

    #[test]
    fn a_local_stub_is_replaced_by_what_it_asks() {
        let chosen = choose(&[], "nameserver 127.0.0.53\n", "nameserver 192.168.1.1\n");
        assert_eq!(chosen.text, "nameserver 192.168.1.1\n");
        assert!(chosen.relayed.is_empty());
        assert!(choose(&[], "", "").problem.unwrap().contains("no name server"));
    }

    #[test]
    fn what_containers_cannot_reach_is_relayed() {
        let stub = choose(&[], "nameserver 127.0.0.53\noptions edns0\n", "");
        assert_eq!(
            (stub.relayed, stub.problem),
            (vec!["127.0.0.53:53".parse().unwrap()], None)
        );
        assert_eq!(stub.text, "options edns0\n");
        let six = choose(
            &[],
            "nameserver 2001:db8::53\nnameserver fe80::1%lo\n",
            "nameserver fd00::1\n",
        );
        let wanted = ["[2001:db8::53]:53", "[fe80::1%1]:53"];
        assert_eq!(six.relayed, wanted.map(|text| text.parse().unwrap()));
        assert_eq!(six.problem, None);
    }

    #[test]
    fn configured_servers_win() {
        let chosen = choose(&["9.9.9.9".parse().unwrap()], "nameserver 10.0.0.53\n", "");
        assert_eq!(chosen.text, "nameserver 9.9.9.9\n");
        let six = choose(&["::1".parse().unwrap()], "nameserver 10.0.0.53\n", "");
        assert_eq!(
            (six.text.as_str(), six.relayed),
            ("", vec!["[::1]:53".parse().unwrap()])
        );
    }
}
