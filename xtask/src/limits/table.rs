//! `docs/limits.toml`: what people say about each limit.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Deserialize;

#[derive(Debug)]
pub(super) struct Table {
    /// Numbers that limit nothing, each with the reason.
    pub none: BTreeMap<String, String>,
    /// What no number bounds, each with what bounds it instead.
    pub unlimited: BTreeMap<String, String>,
    /// In the order of the file: a limit may speak of the one above it.
    pub topics: BTreeMap<Topic, Vec<(String, Limit)>>,
}

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    none: BTreeMap<String, String>,
    #[serde(default)]
    unlimited: BTreeMap<String, String>,
    #[serde(flatten)]
    topics: BTreeMap<Topic, BTreeMap<String, Limit>>,
}

/// What a reader of the page looks for, in the page's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Topic {
    Calls,
    Http,
    Blobs,
    Images,
    Containers,
    Logs,
    Names,
    Connections,
    Internal,
}

impl Topic {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Calls => "Calls and inputs",
            Self::Http => "HTTP requests",
            Self::Blobs => "Blobs and files",
            Self::Images => "Images and builds",
            Self::Containers => "Containers",
            Self::Logs => "Logs",
            Self::Names => "Secrets and names",
            Self::Connections => "Connections",
            Self::Internal => "Inside the platform",
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limit {
    pub kind: Kind,
    /// What is limited, in the words of whoever meets it.
    pub what: String,
    /// What happens beyond it.
    pub beyond: String,
    /// The names of tests that go beyond it.
    #[serde(default)]
    pub tests: Vec<String>,
    /// `section.key` of the operator's setting that changes it.
    pub setting: Option<String>,
    /// Where the constant's name does not say the unit.
    pub unit: Option<UnitName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Queue,
    Body,
    Header,
    Message,
    Batch,
    Retry,
    Wait,
    Table,
    File,
    Name,
}

impl Kind {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Body => "body",
            Self::Header => "header",
            Self::Message => "message",
            Self::Batch => "batch",
            Self::Retry => "retry",
            Self::Wait => "wait",
            Self::Table => "table",
            Self::File => "file",
            Self::Name => "name",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum UnitName {
    Bytes,
    Seconds,
    Number,
}

impl Table {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let written: Written = toml::from_str(text)?;
        let in_order = |limits: BTreeMap<String, Limit>| {
            let mut limits: Vec<(String, Limit)> = limits.into_iter().collect();
            limits.sort_by_cached_key(|(key, _)| text.find(&format!("\"{key}\"]")));
            limits
        };
        let table = Self {
            none: written.none,
            unlimited: written.unlimited,
            topics: written
                .topics
                .into_iter()
                .map(|(topic, limits)| (topic, in_order(limits)))
                .collect(),
        };
        let mut seen = BTreeMap::new();
        for (topic, key, limit) in table.limits() {
            ensure!(
                !limit.what.trim().is_empty() && !limit.beyond.trim().is_empty(),
                "{key} needs words: what it limits, and what happens beyond it"
            );
            if let Some(other) = seen.insert(key, topic) {
                anyhow::bail!("{key} stands under {other} and under {topic}");
            }
        }
        for (key, reason) in &table.none {
            ensure!(!reason.trim().is_empty(), "{key} needs the reason why it is no limit");
            ensure!(!seen.contains_key(key.as_str()), "{key} is a limit and none");
        }
        Ok(table)
    }

    pub(super) fn names(&self, key: &str) -> bool {
        self.keys().any(|known| known == key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        let limits = self.limits().map(|(_, key, _)| key);
        limits.chain(self.none.keys().map(String::as_str))
    }

    /// The topic's title, the constant and what is said about it.
    pub(super) fn limits(&self) -> impl Iterator<Item = (&'static str, &str, &Limit)> {
        self.topics
            .iter()
            .flat_map(|(topic, limits)| limits.iter().map(|(key, limit)| (topic.title(), key.as_str(), limit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = "[calls.\"a/b.rs::C\"]\nkind = \"queue\"\nwhat = \"a\"\nbeyond = \"b\"\n";

    #[test]
    fn a_constant_is_named_once() {
        assert!(Table::parse(ENTRY).unwrap().names("a/b.rs::C"));
        let twice = format!("{ENTRY}{}", ENTRY.replace("calls", "http"));
        assert!(Table::parse(&twice).unwrap_err().to_string().contains("stands under"));
        let both = format!("[none]\n\"a/b.rs::C\" = \"a format\"\n{ENTRY}");
        assert!(
            Table::parse(&both)
                .unwrap_err()
                .to_string()
                .contains("a limit and none")
        );
    }

    #[test]
    fn limits_keep_their_order() {
        let text = format!("{}{ENTRY}", ENTRY.replace("::C", "::Z"));
        let table = Table::parse(&text).unwrap();
        let keys: Vec<&str> = table.keys().collect();
        assert_eq!(keys, ["a/b.rs::Z", "a/b.rs::C"]);
    }

    #[test]
    fn words_are_needed() {
        assert!(Table::parse(&ENTRY.replace("\"b\"", "\" \"")).is_err());
        assert!(Table::parse("[none]\n\"a/b.rs::C\" = \"\"\n").is_err());
        assert!(Table::parse(&ENTRY.replace("calls", "weather")).is_err());
        assert!(Table::parse(&ENTRY.replace("queue", "feeling")).is_err());
    }
}
