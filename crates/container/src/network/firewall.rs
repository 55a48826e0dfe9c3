//! The instance's nftables table: what containers may reach.
//!
//! Refusals are sent back rather than dropped, so that a program which tries a closed way (cloud SDKs look for
//! a metadata service) fails at once. Only packets with a forged source are dropped in silence.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use super::egress::{Egress, Policy};
use super::{NetworkError, Subnet};
use crate::command::{self, Input};

/// Rules of one container, until this is dropped.
#[derive(Debug)]
pub(super) struct ContainerRules {
    table: String,
    policy: Policy,
    removed: bool,
}

impl ContainerRules {
    /// Limits what the address reaches. Nothing to do, and no rules, where everything is open.
    pub(super) async fn apply(table: &str, policy: Policy) -> Result<Option<Self>, NetworkError> {
        if policy.egress == Egress::Open {
            return Ok(None);
        }
        // First, so that a start which is abandoned here takes the rules back.
        let rules = Self::of(table, policy);
        apply(&container_rules(table, &rules.policy)).await?;
        Ok(Some(rules))
    }

    /// Of rules that are there already.
    pub(super) fn of(table: &str, policy: Policy) -> Self {
        Self {
            table: table.to_owned(),
            policy,
            removed: false,
        }
    }

    pub(super) fn egress(&self) -> &Egress {
        &self.policy.egress
    }

    /// Blocks, for the few milliseconds that `nft` takes.
    pub(super) fn remove(mut self) -> Result<(), NetworkError> {
        self.removed = true;
        remove_container_rules(&self.table, self.policy.address)
    }
}

impl Drop for ContainerRules {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = remove_container_rules(&self.table, self.policy.address)
        {
            tracing::error!(address = %self.policy.address, error = %crate::chain(&error), "failed to remove a container's firewall rules");
        }
    }
}

/// The chain of one container; its address in hexadecimal digits.
fn chain_of(address: Ipv4Addr) -> String {
    format!("egress_{:08x}", u32::from(address))
}

fn container_rules(table: &str, policy: &Policy) -> String {
    let Policy { address, egress } = policy;
    let chain = chain_of(*address);
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
    let _ = writeln!(script, "add element inet {table} egress {{ {address} : goto {chain} }}");
    script
}

fn remove_container_rules(table: &str, address: Ipv4Addr) -> Result<(), NetworkError> {
    let chain = chain_of(address);
    let script = format!(
        "delete element inet {table} egress {{ {address} }}\nflush chain inet {table} {chain}\ndelete chain inet {table} {chain}\n"
    );
    match apply_blocking(&script) {
        // The whole table went before its containers: a shutdown.
        Err(message) if message.contains("No such file or directory") => Ok(()),
        result => result.map_err(|message| NetworkError::Firewall { message }),
    }
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

/// Replaces the table, also one of an earlier run, in one transaction. `policies` are of containers that live.
pub(super) async fn create(table: &str, bridge: &str, subnet: Subnet, policies: &[Policy]) -> Result<(), NetworkError> {
    let mut script = rules(table, bridge, subnet);
    for policy in policies {
        script += &container_rules(table, policy);
    }
    apply(&script).await
}

/// Stands for the rules that [`create`] would write.
pub(super) fn digest(table: &str, bridge: &str, subnet: Subnet) -> String {
    hex::encode(Sha256::digest(rules(table, bridge, subnet)))
}

/// Fails if an earlier process has left no such table. Closes the ports that it had opened, which may belong
/// to someone else by now.
pub(super) async fn take_over(table: &str) -> Result<(), NetworkError> {
    apply(&format!("flush set inet {table} host_ports\n")).await
}

pub(super) async fn allow_host_port(table: &str, port: u16) -> Result<(), NetworkError> {
    apply(&format!("add element inet {table} host_ports {{ {port} }}\n")).await
}

/// Also when there is none.
pub(super) async fn remove(table: &str) -> Result<(), NetworkError> {
    apply(&format!("add table inet {table}\ndelete table inet {table}\n")).await
}

async fn apply(script: &str) -> Result<(), NetworkError> {
    command::run("nft", &["-f", "-"], Input::Text(script))
        .await
        .map(|_| ())
        .map_err(|error| NetworkError::Firewall {
            message: crate::chain(&error),
        })
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
        let policy = |egress| Policy {
            address: Ipv4Addr::new(172, 29, 0, 2),
            egress,
        };
        assert_eq!(container_rules("t", &policy(Egress::Open)), "");
        let blocked = container_rules("t", &policy(Egress::Blocked));
        assert!(!blocked.contains("accept"), "{blocked}");
        let ranges = ["10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"];
        let allowed = container_rules(
            "t",
            &policy(Egress::Allow(ranges.map(|text| text.parse().unwrap()).into())),
        );
        let lines: Vec<_> = allowed.lines().collect();
        assert_eq!(
            lines[2..],
            [
                "add rule inet t egress_ac1d0002 ip daddr 10.0.0.0/8 accept",
                "add rule inet t egress_ac1d0002 ip daddr 10.1.0.0/16 accept",
                "add rule inet t egress_ac1d0002 reject with icmpx type admin-prohibited",
                "add element inet t egress { 172.29.0.2 : goto egress_ac1d0002 }",
            ]
        );
    }
}
