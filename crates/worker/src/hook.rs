//! The platform's own Python (the launcher and the web hook), put where containers find it.
//!
//! It travels inside the binary, so that what starts containers always fits the worker. The directory is named
//! after its content: a newer worker never changes files under a running container.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../python/ionian_container/", $name)))),*]
    };
}

/// Every module of the package; a test compares the list with the directory.
const FILES: [(&str, &str); 10] = embedded![
    "__init__.py",
    "announcement.py",
    "launcher.py",
    "own_address.py",
    "paths.py",
    "platform_scope.py",
    "report.py",
    "resilience.py",
    "web_hook.py",
    "web_server.py",
];

const PACKAGE: &str = "ionian_container";

/// The launcher, below the directory that [`extract`] gives.
pub(crate) const LAUNCHER: &str = "ionian_container/launcher.py";

/// Makes the files exist below `root` and gives the directory that holds the package. Removes other versions
/// where no container may run on them.
pub(crate) fn extract(root: &Path, others_are_used: bool) -> io::Result<PathBuf> {
    let mut hasher = Sha256::new();
    for (name, text) in FILES {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    let name = hex::encode(&hasher.finalize()[..12]);
    let target = root.join(&name);
    fs::create_dir_all(root)?;
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_name() != name.as_str() && !others_are_used {
            fs::remove_dir_all(entry.path())?;
        }
    }
    // Looked at each time: a crash may have left half of it, and it is a few kilobytes. What is whole is left
    // alone, since containers of an earlier process may be reading it.
    let package = target.join(PACKAGE);
    fs::create_dir_all(&package)?;
    for (name, text) in FILES {
        let path = package.join(name);
        if fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
            fs::write(&path, text)?;
        }
    }
    // Read by whatever user the container has; the state directory above keeps others out.
    for path in [&target, &package] {
        set_mode(path, 0o755)?;
    }
    for (name, _) in FILES {
        set_mode(&package.join(name), 0o644)?;
    }
    Ok(target)
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_module_of_the_package_is_embedded() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python").join(PACKAGE);
        let modules: BTreeSet<String> = fs::read_dir(source)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "py"))
            .collect();
        assert_eq!(modules, FILES.iter().map(|(name, _)| (*name).to_owned()).collect());
    }

    #[test]
    fn extraction_mends_what_is_there_and_removes_other_versions() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("older/ionian_container")).unwrap();
        let directory = extract(root.path(), false).unwrap();
        let launcher = directory.join(LAUNCHER);
        fs::write(&launcher, "half").unwrap();
        assert_eq!(extract(root.path(), false).unwrap(), directory);
        assert!(fs::read_to_string(&launcher).unwrap().contains("def main()"));
        assert!(!root.path().join("older").exists());
    }
}
