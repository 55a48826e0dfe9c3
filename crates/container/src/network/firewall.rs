//! The instance's nftables table: what containers may reach.
//!
//! Refusals are sent back rather than dropped, so that a program which tries a closed way (cloud SDKs look for
//! a metadata service) fails at once. Only packets with a forged source are dropped in silence.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use super::egress::{Egress, Policy};
use super::{NetworkError, Subnet};

/// What is in every table of ours. Somebody's `nft flush ruleset` takes all of it at once.
const MARKS: [&str; 5] = [
    "hook input",
    "jump from_container_to_host",
    "jump from_container",
    "vmap @egress",
    "masquerade",
];

/// The table, and what is to be in it, so that it can be made again when somebody has removed it. Its methods
/// block for the milliseconds that `nft` takes.
#[derive(Debug)]
pub(super) struct Firewall {
    table: String,
    bridge: String,
    subnet: Subnet,
    /// Held while `nft` runs, so that a table which is made again lacks nothing that was added meanwhile.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ports: BTreeSet<u16>,
    relays_names: bool,
    policies: BTreeMap<Ipv4Addr, Egress>,
    removed: bool,
}

impl Firewall {
    /// Replaces the table, also one of an earlier run, in one transaction. `policies` are of containers that live.
    pub(super) fn create(
        table: &str,
        bridge: &str,
        subnet: Subnet,
        policies: &[Policy],
    ) -> Result<Arc<Self>, NetworkError> {
        let firewall = Self {
            table: table.to_owned(),
            bridge: bridge.to_owned(),
            subnet,
            state: Mutex::default(),
        };
        {
            let mut state = firewall.state();
            let limited = policies.iter().filter(|policy| policy.egress != Egress::Open);
            state.policies = limited.map(|policy| (policy.address, policy.egress.clone())).collect();
            apply(&firewall.script(&state))?;
        }
        Ok(Arc::new(firewall))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn script(&self, state: &State) -> String {
        let mut script = rules(&self.table, &self.bridge, self.subnet);
        for port in &state.ports {
            script += &port_rule(&self.table, *port);
        }
        if state.relays_names {
            script += &relay_rules(&self.table);
        }
        for (address, egress) in &state.policies {
            script += &container_rules(&self.table, *address, egress);
        }
        script
    }

    pub(super) fn allow_host_port(&self, port: u16) -> Result<(), NetworkError> {
        let mut state = self.state();
        state.ports.insert(port);
        apply(&port_rule(&self.table, port))
    }

    pub(super) fn allow_name_relay(&self) -> Result<(), NetworkError> {
        let mut state = self.state();
        state.relays_names = true;
        apply(&relay_rules(&self.table))
    }

    /// What containers may connect to on the gateway address.
    pub(super) fn open_ports(&self) -> OpenPorts {
        let state = self.state();
        OpenPorts {
            tcp: state.ports.clone(),
            relays_names: state.relays_names,
        }
    }

    /// Limits what the address reaches. Nothing to do, and no rules, where everything is open.
    pub(super) fn limit(self: &Arc<Self>, policy: Policy) -> Result<Option<ContainerRules>, NetworkError> {
        if policy.egress == Egress::Open {
            return Ok(None);
        }
        let mut state = self.state();
        apply(&container_rules(&self.table, policy.address, &policy.egress))?;
        state.policies.insert(policy.address, policy.egress.clone());
        drop(state);
        Ok(Some(self.rules_of(policy)))
    }

    /// Of rules that are there already.
    pub(super) fn rules_of(self: &Arc<Self>, policy: Policy) -> ContainerRules {
        ContainerRules {
            firewall: Arc::clone(self),
            policy,
            removed: false,
        }
    }

    fn lift(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        let mut state = self.state();
        state.policies.remove(&address);
        remove_container_rules(&self.table, address)
    }

    /// Makes the table again if somebody has removed it; whether it was so. Containers were without their wall
    /// until then.
    pub(super) fn restore(&self) -> Result<bool, NetworkError> {
        let state = self.state();
        if state.removed || self.is_there() {
            return Ok(false);
        }
        apply(&self.script(&state)).map(|()| true)
    }

    fn is_there(&self) -> bool {
        let listed = Command::new("nft")
            .args(["list", "table", "inet", &self.table])
            .stdin(Stdio::null())
            .output();
        listed.is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stdout);
            output.status.success() && MARKS.iter().all(|mark| text.contains(mark))
        })
    }

    /// Also when there is none.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        let mut state = self.state();
        state.removed = true;
        let table = &self.table;
        apply(&format!("add table inet {table}\ndelete table inet {table}\n"))
    }
}

/// What containers may connect to on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenPorts {
    pub tcp: BTreeSet<u16>,
    /// Port 53, over both protocols.
    pub relays_names: bool,
}

/// Rules of one container, until this is dropped.
#[derive(Debug)]
pub(super) struct ContainerRules {
    firewall: Arc<Firewall>,
    policy: Policy,
    removed: bool,
}

impl ContainerRules {
    pub(super) fn egress(&self) -> &Egress {
        &self.policy.egress
    }

    /// Blocks, for the few milliseconds that `nft` takes.
    pub(super) fn remove(mut self) -> Result<(), NetworkError> {
        self.removed = true;
        self.firewall.lift(self.policy.address)
    }
}

impl Drop for ContainerRules {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = self.firewall.lift(self.policy.address)
        {
            tracing::error!(address = %self.policy.address, error = %crate::chain(&error), "failed to remove a container's firewall rules");
        }
    }
}

fn port_rule(table: &str, port: u16) -> String {
    format!("add element inet {table} host_ports {{ {port} }}\n")
}

/// Containers whose outside is limited get no names: a question can carry anything out.
fn relay_rules(table: &str) -> String {
    format!("add element inet {table} name_ports {{ tcp . 53, udp . 53 }}\n")
}

/// The chain of one container; its address in hexadecimal digits.
fn chain_of(address: Ipv4Addr) -> String {
    format!("egress_{:08x}", u32::from(address))
}

fn container_rules(table: &str, address: Ipv4Addr, egress: &Egress) -> String {
    let chain = chain_of(address);
    let ranges = match egress {
        Egress::Open => return String::new(),
        Egress::Blocked => &[][..],
        Egress::Allow(ranges) => ranges,
    };
    let mut script = format!("add chain inet {table} {chain}\nflush chain inet {table} {chain}\n");
    // A rule for each, since a set refuses ranges that overlap.
    for range in ranges.iter().filter(|range| range.is_ipv4()) {
        let _ = writeln!(script, "add rule inet {table} {chain} ip daddr {range} accept");
    }
    let _ = writeln!(
        script,
        "add rule inet {table} {chain} reject with icmpx type admin-prohibited"
    );
    let _ = writeln!(script, "add element inet {table} limited {{ {address} }}");
    let _ = writeln!(script, "add element inet {table} egress {{ {address} : goto {chain} }}");
    script
}

fn remove_container_rules(table: &str, address: Ipv4Addr) -> Result<(), NetworkError> {
    let chain = chain_of(address);
    let script = format!(
        "delete element inet {table} egress {{ {address} }}\ndelete element inet {table} limited {{ {address} }}\nflush chain inet {table} {chain}\ndelete chain inet {table} {chain}\n"
    );
    match apply_blocking(&script) {
        // The whole table went before its containers: a shutdown.
        Err(message) if message.contains("No such file or directory") => Ok(()),
        result => result.map_err(|message| NetworkError::Firewall { message }),
    }
}

fn apply(script: &str) -> Result<(), NetworkError> {
    apply_blocking(script).map_err(|message| NetworkError::Firewall { message })
}

fn apply_blocking(script: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("failed to run nft: {error}");
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// Stands for the rules that [`create`] would write.
pub(super) fn digest(table: &str, bridge: &str, subnet: Subnet) -> String {
    hex::encode(Sha256::digest(rules(table, bridge, subnet)))
}

/// Fails if an earlier process has left no such table. Closes the ports that it had opened, which may belong
/// to someone else by now.
pub(super) fn take_over(table: &str) -> Result<(), NetworkError> {
    apply(&format!("flush set inet {table} host_ports\n"))
}

fn rules(table: &str, bridge: &str, subnet: Subnet) -> String {
    let gateway = subnet.gateway();
    format!(
        r#"add table inet {table}
delete table inet {table}
table inet {table} {{
    set host_ports {{
        type inet_service
    }}

    set name_ports {{
        type inet_proto . inet_service
    }}

    set limited {{
        type ipv4_addr
    }}

    map egress {{
        type ipv4_addr : verdict
    }}

    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "{bridge}" jump from_container_to_host
    }}

    chain from_container_to_host {{
        meta nfproto != ipv4 drop
        ip saddr != {subnet} drop
        ip saddr {gateway} drop
        ct state established,related accept
        ip daddr {gateway} tcp dport @host_ports accept
        ip saddr != @limited ip daddr {gateway} meta l4proto . th dport @name_ports accept
        ip daddr {gateway} icmp type echo-request accept
        reject with icmpx type admin-prohibited
    }}

    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" jump from_container
        oifname "{bridge}" jump to_container
    }}

    chain from_container {{
        meta nfproto != ipv4 drop
        ip saddr != {subnet} drop
        oifname "{bridge}" reject with icmpx type admin-prohibited
        ip daddr 169.254.0.0/16 reject with icmpx type admin-prohibited
        ip saddr vmap @egress
        accept
    }}

    chain to_container {{
        ct state established,related accept
        reject with icmpx type admin-prohibited
    }}

    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_becomes_a_chain_that_ends_with_a_refusal() {
        let address = Ipv4Addr::new(172, 29, 0, 2);
        assert_eq!(container_rules("t", address, &Egress::Open), "");
        let blocked = container_rules("t", address, &Egress::Blocked);
        assert!(!blocked.contains("accept"), "{blocked}");
        let ranges = ["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"];
        let allowed = container_rules(
            "t",
            address,
            &Egress::Allow(ranges.map(|text| text.parse().unwrap()).into()),
        );
        let lines: Vec<_> = allowed.lines().collect();
        assert_eq!(
            lines[2..],
            [
                "add rule inet t egress_ac1d0002 ip daddr 10.0.0.0/8 accept",
                "add rule inet t egress_ac1d0002 ip daddr 10.1.0.0/16 accept",
                "add rule inet t egress_ac1d0002 reject with icmpx type admin-prohibited",
                "add element inet t limited { 172.29.0.2 }",
                "add element inet t egress { 172.29.0.2 : goto egress_ac1d0002 }",
            ]
        );
    }
}
