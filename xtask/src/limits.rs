//! `cargo xtask limits`: the page of all limits, `docs/limits.md`.
//!
//! Every number of the code that bounds something is a named constant, or a field of a `Default`. The numbers are read
//! from the code; what each one means to a user, and what happens beyond it, is said in `docs/limits.toml`, which
//! people write. A test of this crate fails when the two do not name the same things, and when a duration or the size
//! of a channel stands in the code without a name.
//!
//! `scan` reads the code, `value` computes and prints numbers, `table` reads what people wrote, `page` joins the two.

mod page;
mod scan;
mod table;
mod value;

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::repository_root;
use scan::Code;
use table::Table;

const TABLE: &str = "docs/limits.toml";
const PAGE: &str = "docs/limits.md";

pub(crate) fn run(check_only: bool) -> Result<()> {
    let root = repository_root()?;
    let page = generate(root)?;
    let path = root.join(PAGE);
    if check_only {
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        ensure!(
            written == page,
            "{PAGE} is not what the code and {TABLE} say; run: cargo xtask limits"
        );
        return Ok(());
    }
    std::fs::write(&path, page).with_context(|| format!("failed to write {}", path.display()))
}

/// The page as it should be, or everything that keeps it from being made.
fn generate(root: &Path) -> Result<String> {
    let code = Code::read(root)?;
    let path = root.join(TABLE);
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let table = Table::parse(&text).with_context(|| format!("{TABLE} is not a table of limits"))?;
    let problems = problems(&code, &table);
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(page::markdown(&code, &table))
}

/// What is wrong, one sentence each, with what to do about it.
fn problems(code: &Code, table: &Table) -> Vec<String> {
    let mut problems = Vec::new();
    for (key, constant) in &code.constants {
        if !table.names(key) {
            problems.push(format!(
                "{TABLE} does not name {key} ({}); say there what it limits and what happens beyond it:\n\n\
                 [<topic>.\"{key}\"]\nkind = \"\"\nwhat = \"\"\nbeyond = \"\"\n\n\
                 or why it is no limit, under [none]:\n\n\"{key}\" = \"\"\n\n  the code says: {}\n",
                constant.value, constant.comment
            ));
        }
    }
    for key in table.keys() {
        if !code.constants.contains_key(key) {
            problems.push(format!(
                "{TABLE} names {key}, which the code does not have any more; remove or rename its entry"
            ));
        }
    }
    for (topic, key, limit) in table.limits() {
        for test in &limit.tests {
            if !code.tests.contains_key(test) {
                problems.push(format!(
                    "{TABLE} says of {key} (under {topic}) that the test {test} shows it, and there is no such test"
                ));
            }
        }
        if let Some(setting) = &limit.setting
            && !code.settings.contains(setting)
        {
            problems.push(format!(
                "{TABLE} says of {key} that the setting {setting} changes it, and crates/server/src/settings.rs has \
                 no such setting"
            ));
        }
    }
    for place in &code.nameless {
        problems.push(format!(
            "{place} has no name; make it a constant with a comment that says why so much"
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `make test` runs in place of `cargo xtask limits --check`.
    #[test]
    fn the_page_of_limits_is_what_the_code_says() {
        if let Err(error) = run(true) {
            panic!("{error:#}");
        }
    }

    fn code(text: &str) -> Code {
        let mut code = Code::default();
        code.read_rust("crates/one/src/lib.rs", text).unwrap();
        code
    }

    #[test]
    fn a_constant_that_the_table_does_not_name_is_a_problem() {
        let code = code("/// Enough.\nconst QUEUE: usize = 2;");
        let problems = problems(&code, &Table::parse("[none]").unwrap());
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("does not name one/lib.rs::QUEUE (2)"),
            "{}",
            problems[0]
        );
        assert!(problems[0].contains("Enough."), "{}", problems[0]);
    }

    #[test]
    fn an_entry_without_its_constant_test_or_setting_is_a_problem() {
        let table = Table::parse(
            "[calls.\"one/lib.rs::GONE\"]\nkind = \"queue\"\nwhat = \"a\"\nbeyond = \"b\"\ntests = [\"no_such\"]\n\
             setting = \"no.such\"\n",
        )
        .unwrap();
        let problems = problems(&code(""), &table);
        assert_eq!(problems.len(), 3, "{problems:?}");
    }

    #[test]
    fn a_number_without_a_name_is_a_problem() {
        let code = code(
            "fn f() { let pause = Duration::from_secs(5); let (a, b) = mpsc::channel(16); let c = unbounded_channel(); }",
        );
        let problems = problems(&code, &Table::parse("[none]").unwrap());
        assert_eq!(problems.len(), 3, "{problems:?}");
    }
}
