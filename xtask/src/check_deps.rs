//! `cargo xtask check-deps`: a crate of ours exists to forbid a dependency; this forbids it.
//!
//! Two tables decide: [`ARROWS`] between our crates, and [`KEPT_OUT`] for crates of others. Development dependencies
//! are not looked at: a test may drive a crate through its neighbours, and ships nothing.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::repository_root;

/// `from` may depend on `to`, because `why`.
struct Arrow {
    from: &'static str,
    to: &'static str,
    why: &'static str,
}

const fn arrow(from: &'static str, to: &'static str, why: &'static str) -> Arrow {
    Arrow { from, to, why }
}

/// Every dependency between our crates that is allowed. What is not here is forbidden; `domain` and `proto` know
/// nothing of ours.
const ARROWS: &[Arrow] = &[
    arrow(
        "ionian-scheduler",
        "ionian-domain",
        "decides about the domain's nouns, and about nothing else",
    ),
    arrow(
        "ionian-store",
        "ionian-domain",
        "turns the domain's nouns into rows and back",
    ),
    arrow(
        "ionian-blobs",
        "ionian-domain",
        "names contents by the domain's digests",
    ),
    arrow(
        "ionian-image",
        "ionian-domain",
        "plans and builds what an image specification says",
    ),
    arrow("ionian-image", "ionian-blobs", "keeps layers as contents"),
    arrow(
        "ionian-container",
        "ionian-domain",
        "starts what a container specification says",
    ),
    arrow(
        "ionian-control",
        "ionian-domain",
        "its methods speak the domain's language",
    ),
    arrow("ionian-control", "ionian-scheduler", "runs the turn loop"),
    arrow("ionian-control", "ionian-store", "commits what the scheduler decided"),
    arrow("ionian-control", "ionian-blobs", "checks and hands out contents"),
    arrow(
        "ionian-control",
        "ionian-image",
        "asks for build plans and their keys; it never builds",
    ),
    arrow("ionian-api", "ionian-proto", "decodes requests and encodes answers"),
    arrow("ionian-api", "ionian-domain", "what requests are decoded to"),
    arrow("ionian-api", "ionian-control", "a handler calls one of its methods"),
    arrow(
        "ionian-api",
        "ionian-blobs",
        "serves blob transfers over HTTP, by signed URLs",
    ),
    arrow(
        "ionian-ingress",
        "ionian-domain",
        "hosts, functions and slots are the domain's nouns",
    ),
    arrow(
        "ionian-ingress",
        "ionian-control",
        "asks for slots and for the table of hosts",
    ),
    arrow("ionian-worker", "ionian-proto", "speaks the worker protocol"),
    arrow(
        "ionian-worker",
        "ionian-domain",
        "what should run here is said in the domain's nouns",
    ),
    arrow(
        "ionian-worker",
        "ionian-blobs",
        "fetches contents for mounts and layers",
    ),
    arrow("ionian-worker", "ionian-image", "builds images"),
    arrow("ionian-worker", "ionian-container", "starts and stops containers"),
    // The binary wires everything together.
    arrow("ionian-server", "ionian-domain", "wiring"),
    arrow("ionian-server", "ionian-proto", "wiring"),
    arrow("ionian-server", "ionian-scheduler", "wiring"),
    arrow("ionian-server", "ionian-store", "wiring"),
    arrow("ionian-server", "ionian-blobs", "wiring"),
    arrow("ionian-server", "ionian-image", "wiring"),
    arrow("ionian-server", "ionian-container", "wiring"),
    arrow("ionian-server", "ionian-control", "wiring"),
    arrow("ionian-server", "ionian-api", "wiring"),
    arrow("ionian-server", "ionian-ingress", "wiring"),
    arrow("ionian-server", "ionian-worker", "wiring"),
    arrow("xtask", "ionian-proto", "writes its descriptors to a file"),
    // Programs that test the whole from outside; nobody ships them.
    arrow("ionian-loadgen", "ionian-proto", "speaks to a server as a client does"),
    arrow("ionian-powerloss", "ionian-domain", "names what it looks for"),
    arrow("ionian-powerloss", "ionian-store", "opens what a power cut left"),
    arrow("ionian-powerloss", "ionian-blobs", "opens what a power cut left"),
    // The fuzzers' library, which is no part of the binary.
    arrow("ionian-fuzz-harness", "ionian-domain", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-proto", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-scheduler", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-store", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-blobs", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-image", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-control", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-api", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-ingress", "drives its decoders"),
    arrow("ionian-fuzz-harness", "ionian-worker", "drives its decoders"),
];

/// Who may use some crates of others.
struct KeptOut {
    crates: &'static [&'static str],
    rule: Rule,
    why: &'static str,
}

enum Rule {
    /// These crates of ours, and no other.
    Only(&'static [&'static str]),
    /// All crates of ours but these.
    NotIn(&'static [&'static str]),
}

const KEPT_OUT: &[KeptOut] = &[
    KeptOut {
        crates: &["sqlx"],
        rule: Rule::Only(&["ionian-store"]),
        why: "SQL stops in the store",
    },
    KeptOut {
        crates: &["prost", "prost-types", "tonic", "tonic-prost"],
        rule: Rule::Only(&[
            "ionian-proto",
            "ionian-api",
            "ionian-worker",
            "ionian-server",
            "ionian-loadgen",
            "ionian-fuzz-harness",
        ]),
        why: "protobuf types stop in the API and in the worker",
    },
    KeptOut {
        crates: &["clap"],
        rule: Rule::Only(&["ionian-server", "xtask", "ionian-loadgen", "ionian-powerloss"]),
        why: "only the binary reads configuration",
    },
    KeptOut {
        crates: &["tokio", "tokio-stream", "tokio-util", "futures-util", "parking_lot"],
        rule: Rule::NotIn(&["ionian-domain", "ionian-scheduler"]),
        why: "nouns and decisions are pure: they wait for nothing and share nothing",
    },
    KeptOut {
        crates: &["rand", "getrandom"],
        rule: Rule::NotIn(&["ionian-scheduler"]),
        why: "the same events must lead to the same decisions",
    },
];

/// What `cargo metadata` says of the workspace, as far as it is needed here.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Absent for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
}

pub(crate) fn run() -> Result<()> {
    let packages = workspace_packages()?;
    let violations = violations(&packages);
    if !violations.is_empty() {
        bail!("forbidden dependencies:\n  {}", violations.join("\n  "));
    }
    writeln!(
        std::io::stdout(),
        "dependencies of {} crates are as they should be",
        packages.len()
    )
    .context("failed to print the result")
}

fn workspace_packages() -> Result<Vec<Package>> {
    // Cargo tells its children which cargo it is.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(repository_root()?)
        .output()
        .context("failed to run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("failed to understand the answer of cargo metadata")?;
    Ok(metadata.packages)
}

/// One sentence for each forbidden dependency, and for each row of a table that means no crate.
fn violations(packages: &[Package]) -> Vec<String> {
    let ours: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let mut found = unknown_names(&ours);
    for package in packages {
        let shipped = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind.as_deref() != Some("dev"));
        // A set, because a crate can be a normal and a build dependency at once.
        let names: BTreeSet<&str> = shipped.map(|dependency| dependency.name.as_str()).collect();
        for name in names {
            if ours.contains(name) {
                found.extend(forbidden_arrow(&package.name, name));
            } else {
                found.extend(kept_out(&package.name, name));
            }
        }
    }
    found
}

fn forbidden_arrow(from: &str, to: &str) -> Option<String> {
    if ARROWS.iter().any(|arrow| arrow.from == from && arrow.to == to) {
        return None;
    }
    let allowed: Vec<String> = ARROWS
        .iter()
        .filter(|arrow| arrow.from == from)
        .map(|arrow| format!("{} ({})", arrow.to, arrow.why))
        .collect();
    let allowed = if allowed.is_empty() {
        "nothing of ours".to_owned()
    } else {
        allowed.join(", ")
    };
    Some(format!("{from} depends on {to}; it may depend on {allowed}"))
}

fn kept_out(from: &str, external: &str) -> Option<String> {
    let row = KEPT_OUT.iter().find(|row| row.crates.contains(&external))?;
    let allowed = match row.rule {
        Rule::Only(crates) => crates.contains(&from),
        Rule::NotIn(crates) => !crates.contains(&from),
    };
    (!allowed).then(|| format!("{from} depends on {external}; {}", row.why))
}

/// Names in the tables that no crate has: after a rename, a rule would silently guard nothing.
fn unknown_names(ours: &BTreeSet<&str>) -> Vec<String> {
    let arrows = ARROWS.iter().flat_map(|arrow| [arrow.from, arrow.to]);
    let rules = KEPT_OUT.iter().flat_map(|row| match row.rule {
        Rule::Only(crates) | Rule::NotIn(crates) => crates.iter().copied(),
    });
    let unknown: BTreeSet<&str> = arrows.chain(rules).filter(|name| !ours.contains(name)).collect();
    unknown
        .into_iter()
        .map(|name| format!("the tables of check-deps name {name}, which is no crate here"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All crates that the tables name, without dependencies.
    fn workspace() -> Vec<Package> {
        let mut names: BTreeSet<&str> = ARROWS.iter().flat_map(|arrow| [arrow.from, arrow.to]).collect();
        names.insert("xtask");
        names
            .into_iter()
            .map(|name| Package {
                name: name.to_owned(),
                dependencies: Vec::new(),
            })
            .collect()
    }

    /// The violations once `from` depends on `to`, in the way that `kind` says.
    fn violations_with(from: &str, to: &str, kind: Option<&str>) -> Vec<String> {
        let mut packages = workspace();
        let package = packages.iter_mut().find(|package| package.name == from).unwrap();
        package.dependencies.push(Dependency {
            name: to.to_owned(),
            kind: kind.map(str::to_owned),
        });
        violations(&packages)
    }

    #[test]
    fn the_workspace_as_it_is_keeps_the_rules() {
        let found = violations(&workspace_packages().unwrap());
        assert!(found.is_empty(), "{found:#?}");
    }

    #[test]
    fn an_allowed_arrow_is_not_reported() {
        assert_eq!(
            violations_with("ionian-api", "ionian-control", None),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_forbidden_arrow_is_reported() {
        assert_eq!(
            violations_with("ionian-scheduler", "ionian-store", None),
            ["ionian-scheduler depends on ionian-store; it may depend on \
              ionian-domain (decides about the domain's nouns, and about nothing else)"]
        );
    }

    #[test]
    fn the_domain_depends_on_nothing_of_ours() {
        assert_eq!(
            violations_with("ionian-domain", "ionian-proto", None),
            ["ionian-domain depends on ionian-proto; it may depend on nothing of ours"]
        );
    }

    #[test]
    fn a_build_dependency_counts_and_a_development_dependency_does_not() {
        assert_eq!(violations_with("ionian-store", "ionian-proto", Some("build")).len(), 1);
        assert_eq!(
            violations_with("ionian-store", "ionian-proto", Some("dev")),
            Vec::<String>::new()
        );
    }

    #[test]
    fn sql_outside_of_the_store_is_reported() {
        assert_eq!(
            violations_with("ionian-control", "sqlx", None),
            ["ionian-control depends on sqlx; SQL stops in the store"]
        );
        assert_eq!(violations_with("ionian-store", "sqlx", None), Vec::<String>::new());
    }

    #[test]
    fn protobuf_in_the_ingress_is_reported() {
        for name in ["prost", "prost-types", "tonic", "tonic-prost"] {
            assert_eq!(violations_with("ionian-ingress", name, None).len(), 1, "{name}");
            assert_eq!(violations_with("ionian-worker", name, None).len(), 0, "{name}");
        }
    }

    #[test]
    fn a_scheduler_that_can_wait_or_guess_is_reported() {
        for name in ["tokio", "rand"] {
            assert_eq!(violations_with("ionian-scheduler", name, None).len(), 1, "{name}");
        }
    }

    #[test]
    fn a_rule_about_a_crate_that_is_gone_is_reported() {
        let mut packages = workspace();
        packages.retain(|package| package.name != "ionian-ingress");
        assert_eq!(
            violations(&packages),
            ["the tables of check-deps name ionian-ingress, which is no crate here"]
        );
    }
}
