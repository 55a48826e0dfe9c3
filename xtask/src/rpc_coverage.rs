//! `cargo xtask rpc-coverage`: the table of all RPCs, for people.
//!
//! The table itself is `crates/api/rpc-coverage.toml`, which the server reads too. That it lists exactly the RPCs of
//! the client's service is checked in `e2e/test_rpc_coverage.py`, where the client is installed.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::Write as _;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::repository_root;

const TABLE: &str = "crates/api/rpc-coverage.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Coverage {
    rpc: BTreeMap<String, Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    status: RpcStatus,
    /// What a user is told who needs this RPC. Present exactly when the RPC is not implemented.
    sentence: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RpcStatus {
    /// Answered as the client expects.
    Implemented,
    /// Not answered on purpose.
    Refused,
    /// Not answered, but it should be one day.
    NotYet,
}

impl fmt::Display for RpcStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Implemented => "implemented",
            Self::Refused => "refused",
            Self::NotYet => "not yet",
        })
    }
}

pub(crate) fn run() -> Result<()> {
    let path = repository_root()?.join(TABLE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let coverage = parse(&text).with_context(|| format!("{} is not a coverage table", path.display()))?;
    std::io::stdout()
        .write_all(markdown(&coverage).as_bytes())
        .context("failed to print the table")
}

fn parse(text: &str) -> Result<Coverage> {
    let coverage: Coverage = toml::from_str(text)?;
    for (name, row) in &coverage.rpc {
        let implemented = row.status == RpcStatus::Implemented;
        ensure!(
            implemented == row.sentence.is_none(),
            "{name} is {}, so it {} a sentence",
            row.status,
            if implemented { "must not have" } else { "needs" }
        );
    }
    Ok(coverage)
}

fn markdown(coverage: &Coverage) -> String {
    let mut counts: BTreeMap<RpcStatus, usize> = BTreeMap::new();
    let mut rows = String::new();
    for (name, row) in &coverage.rpc {
        *counts.entry(row.status).or_default() += 1;
        // Writing to a String cannot fail.
        let _ = writeln!(
            rows,
            "| `{name}` | {} | {} |",
            row.status,
            row.sentence.as_deref().unwrap_or_default()
        );
    }
    let counted: Vec<String> = counts
        .iter()
        .map(|(status, count)| format!("{count} {status}"))
        .collect();
    format!(
        "{} RPCs: {}.\n\n| RPC | Status | What a user is told |\n|---|---|---|\n{rows}",
        coverage.rpc.len(),
        counted.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_rows_are_printed() {
        let coverage = parse(
            r#"
            [rpc]
            AppCreate = { status = "implemented" }
            AppLookup = { status = "refused", sentence = "too old" }
            DictGet = { status = "not-yet", sentence = "no dicts yet" }
            DictPop = { status = "not-yet", sentence = "no dicts yet" }
            "#,
        )
        .unwrap();
        let printed = markdown(&coverage);
        assert!(
            printed.starts_with("4 RPCs: 1 implemented, 1 refused, 2 not yet.\n"),
            "{printed}"
        );
        assert!(printed.contains("| `AppLookup` | refused | too old |"), "{printed}");
    }

    #[test]
    fn a_refusal_needs_a_sentence() {
        let error = parse("[rpc]\nAppLookup = { status = \"refused\" }").err().unwrap();
        assert_eq!(error.to_string(), "AppLookup is refused, so it needs a sentence");
    }

    #[test]
    fn an_implemented_rpc_has_no_sentence() {
        let error = parse("[rpc]\nAppCreate = { status = \"implemented\", sentence = \"left over\" }")
            .err()
            .unwrap();
        assert_eq!(
            error.to_string(),
            "AppCreate is implemented, so it must not have a sentence"
        );
    }

    #[test]
    fn an_unknown_status_is_refused() {
        assert!(parse("[rpc]\nAppCreate = { status = \"done\" }").is_err());
    }
}
