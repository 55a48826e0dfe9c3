//! Reads what was acknowledged, and when.

use std::path::PathBuf;

use anyhow::Context;
use serde::Deserialize;

/// One acknowledgement. The programs that write them have the fields' meaning.
#[derive(Debug, Deserialize)]
pub(crate) struct Line {
    pub monotonic_ns: u64,
    #[serde(flatten)]
    pub acknowledged: Acknowledged,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Acknowledged {
    Inputs {
        call_id: String,
        input_ids: Vec<String>,
        /// In hex, or the id of the blob that holds them.
        arguments: String,
    },
    Secret {
        secret_id: String,
    },
    Deployed {
        app_id: String,
        function_id: String,
    },
    Blob {
        blob_id: String,
        sha256_hex: String,
    },
    Content {
        sha256_hex: String,
    },
    Mount {
        mount_id: String,
    },
    Token {
        token_id: String,
    },
}

/// All lines, in the order of time.
pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        for line in text.lines() {
            let line = serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
            lines.push(line);
        }
    }
    lines.sort_by_key(|line: &Line| line.monotonic_ns);
    Ok(lines)
}
