//! Prints `docs/limits.md`.

use std::fmt::Write as _;

use super::scan::Code;
use super::table::{Limit, Table, UnitName};
use super::value::Unit;

const HEAD: &str = "\
# Limits

Everything that can grow, wait or be repeated stops somewhere. This page lists where, and what one gets beyond it. The
numbers are read from the code; the words are in [limits.toml](limits.toml). It is made by `cargo xtask limits`, and a
test fails when it is behind the code. Where an operator can change a limit, the setting is named (`ionian config`
prints all settings). A limit \"shown by\" a test is exceeded there on purpose.
";

pub(super) fn markdown(code: &Code, table: &Table) -> String {
    let mut page = HEAD.to_owned();
    let shown = table.limits().filter(|(_, _, limit)| !limit.tests.is_empty()).count();
    // Writing to a String cannot fail.
    let _ = writeln!(
        page,
        "\n{} limits, {shown} of them shown by tests; {} other numbers.",
        table.limits().count(),
        table.none.len()
    );
    for (topic, limits) in &table.topics {
        let _ = writeln!(
            page,
            "\n## {}\n\n| What | Limit | Kind | Beyond it | In the code | Shown by |\n|---|---|---|---|---|---|",
            topic.title()
        );
        for (key, limit) in limits {
            let _ = writeln!(page, "{}", row(code, key, limit));
        }
    }
    page.push_str("\n## What no number bounds\n\n| What | What bounds it |\n|---|---|\n");
    for (what, bound) in &table.unlimited {
        let _ = writeln!(page, "| {} | {} |", cell(what), cell(bound));
    }
    page.push_str("\n## Numbers that limit nothing\n\n| In the code | Value | What it is |\n|---|---|---|\n");
    for (key, reason) in &table.none {
        let value = code.constants.get(key).map(|constant| {
            let unit = Unit::of_name(name_of(key));
            constant.value_of.printed(unit)
        });
        let _ = writeln!(page, "| `{key}` | {} | {} |", value.unwrap_or_default(), cell(reason));
    }
    page
}

fn row(code: &Code, key: &str, limit: &Limit) -> String {
    let unit = match limit.unit {
        Some(UnitName::Bytes) => Unit::Bytes,
        Some(UnitName::Seconds) => Unit::Seconds,
        Some(UnitName::Number) => Unit::Plain,
        None => Unit::of_name(name_of(key)),
    };
    let mut value = code
        .constants
        .get(key)
        .map(|constant| constant.value_of.printed(unit))
        .unwrap_or_default();
    if let Some(setting) = &limit.setting {
        let _ = write!(value, "; setting `{setting}`");
    }
    let tests: Vec<String> = limit
        .tests
        .iter()
        .map(|test| match code.tests.get(test) {
            Some(file) => format!("`{file}::{test}`"),
            None => format!("`{test}`"),
        })
        .collect();
    format!(
        "| {} | {value} | {} | {} | `{key}` | {} |",
        cell(&limit.what),
        limit.kind.title(),
        cell(&limit.beyond),
        tests.join(", ")
    )
}

fn name_of(key: &str) -> &str {
    key.rsplit_once("::").map_or(key, |(_, name)| name)
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
