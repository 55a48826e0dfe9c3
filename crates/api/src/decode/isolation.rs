//! How a function asks to be kept apart: its runtime, and what it may reach outside.
//!
//! Some of it has no place in the client's decorators and comes as an experimental option. Whatever of this is not
//! understood is refused: left out, it would make the function less safe than its author believes.

use ionian_domain::container::RuntimeKind;
use ionian_domain::network::{Cidr, Egress, MAX_CIDRS};
use ionian_proto::client as pb;
use pb::network_access::NetworkAccessType;
use tonic::Status;

use crate::status::invalid;

/// Options that are for this platform begin with this.
const OURS: &str = "ionian.";
const RUNTIME: &str = "ionian.runtime";
const CIDR_ALLOWLIST: &str = "ionian.outbound_cidr_allowlist";

/// Of a list in an error, no more is repeated.
const SHOWN_CHARS: usize = 100;

/// The runtime that the function asks for, if it does.
pub(super) fn runtime(function: &pb::Function) -> Result<Option<RuntimeKind>, Status> {
    let name = &function.function_name;
    let unknown = function
        .experimental_options
        .keys()
        .find(|key| key.starts_with(OURS) && ![RUNTIME, CIDR_ALLOWLIST].contains(&key.as_str()));
    if let Some(unknown) = unknown {
        return Err(invalid(format!(
            "{name}: there is no experimental option '{}'; this server has '{RUNTIME}' and '{CIDR_ALLOWLIST}'",
            shown(unknown)
        )));
    }
    match function.experimental_options.get(RUNTIME).map(String::as_str) {
        None => Ok(None),
        Some("runc") => Ok(Some(RuntimeKind::Runc)),
        Some("gvisor") => Ok(Some(RuntimeKind::Gvisor)),
        Some("process") => Err(invalid(format!(
            "{name}: the process runtime isolates nothing, and no function can choose it; the runtimes are runc and gvisor"
        ))),
        Some(other) => Err(invalid(format!(
            "{name}: there is no runtime '{}'; the runtimes are runc and gvisor",
            shown(other)
        ))),
    }
}

/// What the function may reach outside. The newer field wins over `block_network`, as it does for the hosted
/// product; two lists, or a list for what is blocked, are a contradiction.
pub(super) fn egress(function: &pb::Function) -> Result<Egress, Status> {
    let name = &function.function_name;
    let access = function.network_access.as_ref();
    let kind = match access {
        None => NetworkAccessType::Unspecified,
        Some(access) => NetworkAccessType::try_from(access.network_access_type).map_err(|_| {
            invalid(format!(
                "{name}: the network access is of a kind that this server does not know"
            ))
        })?,
    };
    if access.is_some_and(|access| !access.allowed_domains.is_empty()) {
        return Err(Status::unimplemented(format!(
            "{name}: allow lists of domains are not available on this server; allow ranges of addresses"
        )));
    }
    let egress = match kind {
        NetworkAccessType::Unspecified if function.block_network => Egress::Blocked,
        NetworkAccessType::Unspecified | NetworkAccessType::Open => Egress::Open,
        NetworkAccessType::Blocked => Egress::Blocked,
        NetworkAccessType::Allowlist => {
            let ranges = access.map(|access| access.allowed_cidrs.as_slice()).unwrap_or_default();
            allow(name, ranges.iter().map(String::as_str))?
        }
    };
    let Some(list) = function.experimental_options.get(CIDR_ALLOWLIST) else {
        return Ok(egress);
    };
    if egress != Egress::Open || kind == NetworkAccessType::Open {
        return Err(invalid(format!(
            "{name}: '{CIDR_ALLOWLIST}' contradicts what the function says of its network elsewhere (`block_network`); use one of them"
        )));
    }
    allow(name, list.split(',').map(str::trim).filter(|text| !text.is_empty()))
}

fn allow<'a>(name: &str, texts: impl Iterator<Item = &'a str>) -> Result<Egress, Status> {
    let mut ranges: Vec<Cidr> = Vec::new();
    for text in texts {
        if ranges.len() == MAX_CIDRS {
            return Err(invalid(format!(
                "{name}: the allow list has more than {MAX_CIDRS} ranges of addresses; merge some"
            )));
        }
        let range = text.parse().map_err(|_| {
            invalid(format!(
                "{name}: '{}' on the allow list is not a range of addresses; write it as in 10.0.0.0/8, with commas between",
                shown(text)
            ))
        })?;
        ranges.push(range);
    }
    if ranges.is_empty() {
        return Err(invalid(format!(
            "{name}: the allow list is empty; use `block_network=True` to allow nothing"
        )));
    }
    Ok(Egress::Allow(ranges))
}

/// Ranges that are taken and have no effect.
pub(crate) fn has_ipv6_ranges(function: &pb::Function) -> bool {
    match egress(function) {
        Ok(Egress::Allow(ranges)) => ranges.iter().any(|range| !range.is_ipv4()),
        Ok(Egress::Open | Egress::Blocked) | Err(_) => false,
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(options: &[(&str, &str)]) -> pb::Function {
        let options = options
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        pb::Function {
            function_name: "f".to_owned(),
            experimental_options: options.collect(),
            ..pb::Function::default()
        }
    }

    fn with_access(kind: NetworkAccessType, cidrs: &[&str], domains: &[&str]) -> pb::Function {
        let mut function = with(&[]);
        function.network_access = Some(pb::NetworkAccess {
            network_access_type: kind.into(),
            allowed_cidrs: cidrs.iter().map(|text| (*text).to_owned()).collect(),
            allowed_domains: domains.iter().map(|text| (*text).to_owned()).collect(),
        });
        function
    }

    fn ranges(texts: &[&str]) -> Egress {
        Egress::Allow(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn runtimes_by_name() {
        assert_eq!(runtime(&with(&[])).unwrap(), None);
        assert_eq!(runtime(&with(&[("flash", "1")])).unwrap(), None);
        assert_eq!(
            runtime(&with(&[(RUNTIME, "gvisor")])).unwrap(),
            Some(RuntimeKind::Gvisor)
        );
        assert_eq!(runtime(&with(&[(RUNTIME, "runc")])).unwrap(), Some(RuntimeKind::Runc));
        for (key, value, said) in [
            (RUNTIME, "kata", "no runtime 'kata'; the runtimes are runc and gvisor"),
            (RUNTIME, "process", "isolates nothing"),
            (RUNTIME, "", "no runtime ''"),
            ("ionian.runtine", "gvisor", "no experimental option 'ionian.runtine'"),
        ] {
            let status = runtime(&with(&[(key, value)])).unwrap_err();
            assert!(status.message().contains(said), "{}", status.message());
        }
    }

    #[test]
    fn the_newer_field_wins_over_the_older() {
        let mut function = with(&[]);
        assert_eq!(egress(&function).unwrap(), Egress::Open);
        function.block_network = true;
        assert_eq!(egress(&function).unwrap(), Egress::Blocked);
        for (kind, expected) in [
            (NetworkAccessType::Unspecified, Egress::Blocked),
            (NetworkAccessType::Open, Egress::Open),
            (NetworkAccessType::Blocked, Egress::Blocked),
        ] {
            let mut function = with_access(kind, &[], &[]);
            function.block_network = true;
            assert_eq!(egress(&function).unwrap(), expected);
        }
        let listed = with_access(NetworkAccessType::Allowlist, &["10.0.0.0/8"], &[]);
        assert_eq!(egress(&listed).unwrap(), ranges(&["10.0.0.0/8"]));
    }

    #[test]
    fn a_list_of_ranges() {
        let function = with(&[(CIDR_ALLOWLIST, "10.0.0.0/8, 203.0.113.7/32,\n2001:db8::/32,")]);
        assert_eq!(
            egress(&function).unwrap(),
            ranges(&["10.0.0.0/8", "203.0.113.7", "2001:db8::/32"])
        );
        assert!(has_ipv6_ranges(&function));
        assert!(!has_ipv6_ranges(&with(&[(CIDR_ALLOWLIST, "10.0.0.0/8")])));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let many = vec!["10.0.0.1"; MAX_CIDRS + 1].join(",");
        for (list, said) in [
            ("10.0.0.0/8,10.0.0.0/33", "'10.0.0.0/33' on the allow list"),
            ("example.com", "'example.com' on the allow list"),
            ("", "the allow list is empty"),
            (" , ", "the allow list is empty"),
            (many.as_str(), "more than 256 ranges"),
        ] {
            let status = egress(&with(&[(CIDR_ALLOWLIST, list)])).unwrap_err();
            assert!(status.message().contains(said), "{}", status.message());
        }
        for function in [
            with_access(NetworkAccessType::Allowlist, &[], &[]),
            with_access(NetworkAccessType::Allowlist, &["10.0.0.0/8"], &["example.com"]),
            with_access(NetworkAccessType::Open, &[], &["example.com"]),
        ] {
            assert!(egress(&function).is_err(), "{function:?}");
        }
    }

    #[test]
    fn a_list_for_what_is_blocked_is_a_contradiction() {
        let mut function = with(&[(CIDR_ALLOWLIST, "10.0.0.0/8")]);
        function.block_network = true;
        assert!(egress(&function).unwrap_err().message().contains("contradicts"));
        for kind in [NetworkAccessType::Open, NetworkAccessType::Blocked] {
            let mut function = with_access(kind, &[], &[]);
            function.experimental_options = with(&[(CIDR_ALLOWLIST, "10.0.0.0/8")]).experimental_options;
            assert!(egress(&function).is_err());
        }
    }
}
