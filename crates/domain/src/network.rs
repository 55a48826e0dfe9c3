//! What a container may reach outside: everything, nothing, or a list.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Each is a rule that every packet of the container may have to pass.
pub const MAX_CIDRS: usize = 256;

/// Connections that a container opens to the outside. The platform's listener is reachable in each case, and
/// other containers, the host and link-local addresses are in none.
///
/// Name servers are part of the outside: a container with a list has them only if they are on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    #[default]
    Open,
    /// As the client's `block_network=True`.
    Blocked,
    /// As the client's `outbound_cidr_allowlist`; at most [`MAX_CIDRS`]. Containers have no IPv6, so its ranges
    /// allow nothing.
    Allow(Vec<Cidr>),
}

/// A range of addresses. Bits beyond the prefix are cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    base: IpAddr,
    prefix: u8,
}

impl Cidr {
    pub fn is_ipv4(self) -> bool {
        self.base.is_ipv4()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a range of addresses; write it as in 10.0.0.0/8")]
pub struct CidrError {
    text: String,
}

impl FromStr for Cidr {
    type Err = CidrError;

    /// An address alone is a range of one.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || CidrError { text: text.to_owned() };
        let (base, prefix) = match text.split_once('/') {
            Some((base, prefix)) if prefix.bytes().all(|byte| byte.is_ascii_digit()) => {
                (base, Some(prefix.parse::<u8>().map_err(|_| wrong())?))
            }
            Some(_) => return Err(wrong()),
            None => (text, None),
        };
        let base: IpAddr = base.parse().map_err(|_| wrong())?;
        let bits = if base.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(bits);
        if prefix > bits {
            return Err(wrong());
        }
        let base = match base {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(u32::from(bits - prefix)).unwrap_or(0);
                IpAddr::from((u32::from(address) & mask).to_be_bytes())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(u32::from(bits - prefix)).unwrap_or(0);
                IpAddr::from((u128::from(address) & mask).to_be_bytes())
            }
        };
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_cleaned() {
        for (text, expected) in [
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), expected);
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "::/129",
            "example.com",
            "1.2.3/8",
            "1.2.3.4/8/8",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }
}
