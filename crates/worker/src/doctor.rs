//! What an operator should know about this host's storage, for `ionian doctor`.
//!
//! What the host can do for containers is said by `ionian_container::probe`, in the same form.

use std::path::Path;

use ionian_container::{Probe, probe};

/// Below this a build of an ordinary image is likely to fail: Python, a few packages, and their copies.
const MIN_FREE_BYTES: u64 = 2 << 30;

/// Everything the worker needs of this host. Changes nothing that stays.
pub async fn examine(state_dir: &Path, layers_dir: &Path) -> Vec<Probe> {
    let mut facts = probe(state_dir).await;
    for (writable, space, dir) in [
        ("state directory", "state disk space", state_dir),
        ("layers directory", "layers disk space", layers_dir),
    ] {
        facts.push(fact(
            writable,
            is_writable(dir),
            &format!(
                "make {} writable for the user who runs the platform, or choose another data directory",
                dir.display()
            ),
        ));
        facts.push(fact(
            space,
            has_space(dir),
            &format!(
                "free some space on the file system of {}, or choose another data directory",
                dir.display()
            ),
        ));
    }
    facts
}

fn fact(name: &'static str, result: Result<String, String>, how_to_mend: &str) -> Probe {
    match result {
        Ok(detail) => Probe {
            name,
            ok: true,
            detail,
            how_to_mend: String::new(),
        },
        Err(detail) => Probe {
            name,
            ok: false,
            detail,
            how_to_mend: how_to_mend.to_owned(),
        },
    }
}

/// The directory, or the nearest one above that exists: it is created at the first start.
fn existing(dir: &Path) -> &Path {
    dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"))
}

fn is_writable(dir: &Path) -> Result<String, String> {
    let dir = existing(dir);
    match tempfile::Builder::new().prefix(".ionian-doctor").tempfile_in(dir) {
        Ok(_) => Ok(format!("{} is writable", dir.display())),
        Err(error) => Err(format!("{} is not writable: {error}", dir.display())),
    }
}

fn has_space(dir: &Path) -> Result<String, String> {
    let dir = existing(dir);
    let figures = nix::sys::statvfs::statvfs(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let free = figures.blocks_available() * figures.fragment_size();
    let shown = format!("{:.1} GiB free at {}", free as f64 / f64::from(1 << 30), dir.display());
    if free < MIN_FREE_BYTES { Err(shown) } else { Ok(shown) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn storage_is_examined_where_it_would_be() {
        let root = tempfile::tempdir().unwrap();
        let facts = examine(&root.path().join("state"), &root.path().join("layers")).await;
        let detail = |name: &str| facts.iter().find(|fact| fact.name == name).unwrap().detail.clone();
        assert!(detail("layers directory").contains("is writable"));
        assert!(detail("state disk space").contains("GiB free"));
        assert!(facts.iter().all(|fact| fact.ok == fact.how_to_mend.is_empty()));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(is_writable(Path::new("/proc")).is_err());
    }
}
