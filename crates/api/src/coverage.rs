//! The reviewed table of every RPC of the client's service: implemented, refused on purpose, not yet.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

/// Checked against the installed client by `e2e/test_rpc_coverage.py`.
const TABLE: &str = include_str!("../rpc-coverage.toml");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RpcStatus {
    Implemented,
    Refused,
    NotYet,
}

#[derive(Debug, Deserialize)]
struct Row {
    status: RpcStatus,
    #[serde(default)]
    sentence: String,
}

#[derive(Debug, Deserialize)]
struct Table {
    rpc: HashMap<String, Row>,
}

/// What is not implemented, with the sentence that its caller gets.
#[derive(Debug)]
pub(crate) struct Coverage {
    refusals: HashMap<String, String>,
    implemented: HashSet<String>,
}

impl Coverage {
    pub(crate) fn load() -> Self {
        let table: Table = toml::from_str(TABLE).expect("rpc-coverage.toml is part of the program and a test reads it");
        let mut refusals = HashMap::new();
        let mut implemented = HashSet::new();
        for (name, row) in table.rpc {
            match row.status {
                RpcStatus::Implemented => {
                    implemented.insert(name);
                }
                RpcStatus::Refused | RpcStatus::NotYet => {
                    refusals.insert(name, row.sentence);
                }
            }
        }
        Self { refusals, implemented }
    }

    /// Why this RPC is not answered; `None` where it is.
    pub(crate) fn refusal(&self, rpc: &str) -> Option<String> {
        if let Some(sentence) = self.refusals.get(rpc) {
            return Some(format!("{rpc}: {sentence}"));
        }
        (!self.implemented.contains(rpc)).then(|| {
            let name: String = rpc.chars().take(80).collect();
            format!("{name} is not known to this server; it may be newer than the server supports")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_sentence() {
        let coverage = Coverage::load();
        for (name, sentence) in &coverage.refusals {
            assert!(!sentence.trim().is_empty(), "{name} has no sentence");
        }
        assert!(coverage.refusal("FunctionMap").is_none());
        assert!(coverage.refusal("AttemptStart").is_some());
        assert!(coverage.refusal("NoSuchRpc").is_some());
    }

    /// `function_put_outputs` is `FunctionPutOutputs` on the wire.
    fn wire_name(rust_name: &str) -> String {
        let capitalized = |word: &str| {
            let (first, rest) = word.split_at(1);
            first.to_uppercase() + rest
        };
        rust_name.split('_').map(capitalized).collect()
    }

    #[test]
    fn the_table_says_what_is_implemented() {
        let mut handled: Vec<String> = crate::service::HANDLED.iter().map(|name| wire_name(name)).collect();
        let mut implemented: Vec<String> = Coverage::load().implemented.into_iter().collect();
        handled.sort();
        implemented.sort();
        assert_eq!(implemented, handled);
    }

    #[test]
    fn whoever_wants_a_token_is_told_how_to_get_one() {
        let coverage = Coverage::load();
        for rpc in ["TokenFlowCreate", "TokenFlowWait"] {
            assert!(coverage.refusal(rpc).unwrap().contains("`ionian token new`"));
        }
    }
}
