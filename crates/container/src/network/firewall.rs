//! The instance's nftables table: what containers may reach.
//!
//! Refusals are sent back rather than dropped, so that a program which tries a closed way (cloud SDKs look for
//! a metadata service) fails at once. Only packets with a forged source are dropped in silence.

use sha2::{Digest, Sha256};

use super::{NetworkError, Subnet};
use crate::command::{self, Input};

/// Replaces the table, also one of an earlier run, in one transaction.
pub(super) async fn create(table: &str, bridge: &str, subnet: Subnet) -> Result<(), NetworkError> {
    apply(&rules(table, bridge, subnet)).await
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
