//! Name servers for containers: the host's, where a container can reach them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};

const HOST_FILE: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the servers that its local stub asks.
const UPSTREAM_FILE: &str = "/run/systemd/resolve/resolv.conf";

/// The resolver of the C library reads no more than three.
const MAX_NAMESERVERS: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvConf {
    pub text: String,
    pub nameservers: Vec<IpAddr>,
    /// Why names may not resolve in containers, and how to mend it.
    pub problem: Option<String>,
}

/// `configured` wins over the host's files.
pub fn resolv_conf(configured: &[IpAddr]) -> ResolvConf {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    choose(configured, &read(HOST_FILE), &read(UPSTREAM_FILE))
}

fn choose(configured: &[IpAddr], host: &str, upstream: &str) -> ResolvConf {
    // Containers have no IPv6 route and a loopback of their own.
    let reachable =
        |address: &IpAddr| matches!(address, IpAddr::V4(v4) if !v4.is_loopback() && *v4 != Ipv4Addr::UNSPECIFIED);
    if !configured.is_empty() {
        let nameservers: Vec<_> = configured.iter().copied().filter(reachable).collect();
        let problem = (nameservers.len() < configured.len()).then(|| {
            "some of the configured name servers are loopback or IPv6 addresses, which containers cannot reach"
                .to_owned()
        });
        return render(nameservers, host, problem);
    }
    let from_host = parse_nameservers(host);
    let usable: Vec<_> = from_host.iter().copied().filter(reachable).collect();
    if !usable.is_empty() {
        return render(usable, host, None);
    }
    let from_upstream: Vec<_> = parse_nameservers(upstream).into_iter().filter(reachable).collect();
    if !from_upstream.is_empty() {
        return render(from_upstream, upstream, None);
    }
    let found = if from_host.is_empty() {
        "no name server"
    } else {
        "only name servers that containers cannot reach"
    };
    let problem =
        format!("{HOST_FILE} has {found}, so names will not resolve in containers; configure name servers for them");
    render(Vec::new(), host, Some(problem))
}

fn render(mut nameservers: Vec<IpAddr>, template: &str, problem: Option<String>) -> ResolvConf {
    nameservers.truncate(MAX_NAMESERVERS);
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
        problem,
    }
}

fn parse_nameservers(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .collect()
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
        let hopeless = choose(&[], "nameserver 127.0.0.53\n", "");
        assert!(hopeless.problem.unwrap().contains("cannot reach"));
        assert!(choose(&[], "", "").problem.unwrap().contains("no name server"));
    }

    #[test]
    fn configured_servers_win() {
        let chosen = choose(&["9.9.9.9".parse().unwrap()], "nameserver 10.0.0.53\n", "");
        assert_eq!(chosen.text, "nameserver 9.9.9.9\n");
        assert!(choose(&["::1".parse().unwrap()], "", "").problem.is_some());
    }
}
