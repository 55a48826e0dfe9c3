//! The reviewed table of every RPC of the client's service: implemented, refused on purpose, not yet.

use std::collections::HashMap;

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
    implemented: Vec<String>,
}

impl Coverage {
    pub(crate) fn load() -> Self {
        let table: Table = toml::from_str(TABLE).expect("rpc-coverage.toml is part of the program and a test reads it");
        let mut refusals = HashMap::new();
        let mut implemented = Vec::new();
        for (name, row) in table.rpc {
            match row.status {
                RpcStatus::Implemented => implemented.push(name),
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
        let known = self.implemented.iter().any(|name| name == rpc);
        (!known).then(|| {
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
}
