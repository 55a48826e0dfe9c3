//! `ionian uninstall`: leaves the host as if this server had never been on it.
//!
//! Only what the platform is known to make is removed, by name: a data directory that holds anything else is kept
//! with that in it. Without `--yes` it says what would go.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::config::Config;
use crate::reap;

/// Everything that a server, a worker or a command of ours makes in a data directory.
const OURS: &[&str] = &[
    "blobs",
    "build-logs",
    "containers",
    "images",
    "ionian.db",
    "ionian.db-shm",
    "ionian.db-wal",
    "ionian.db.lock",
    "journal",
    "keys",
    "logs",
    "serve.lock",
    "server-url",
    "volumes",
    "worker",
];

#[expect(clippy::print_stdout, reason = "the output of a command")]
pub(crate) async fn run(config: &Config, yes: bool) -> anyhow::Result<()> {
    let data_dir = &config.data_dir;
    if !data_dir.join("ionian.db").exists() && !data_dir.join("serve.lock").exists() {
        bail!(
            "{} is not the data directory of a server; name the right one with --data-dir",
            data_dir.display()
        );
    }
    let elsewhere = config.images_dir.as_ref().filter(|dir| !dir.starts_with(data_dir));
    if !yes {
        println!("This would remove, for ever:");
        println!("  all containers, networks, firewall rules and control groups of this server");
        for path in present(data_dir)? {
            println!("  {}", path.display());
        }
        tell_about_images(elsewhere.map(PathBuf::as_path));
        println!("Run it again with --yes to do so.");
        return Ok(());
    }
    // Fails where a server still runs on the directory, before anything is gone.
    let lock = crate::serve::lock(data_dir)?;
    reap::run(config).await?;
    drop(lock);
    for path in present(data_dir)? {
        remove(&path)?;
    }
    match fs::remove_dir(data_dir) {
        Ok(()) => println!("removed {}", data_dir.display()),
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            println!("{} has files that are not ours; they were kept", data_dir.display());
        }
        // A mount point can be emptied and no more.
        Err(error) => println!("{} is empty and was kept: {error}", data_dir.display()),
    }
    tell_about_images(elsewhere.map(PathBuf::as_path));
    Ok(())
}

fn present(data_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in OURS {
        let path = data_dir.join(name);
        let exists = path
            .symlink_metadata()
            .map(|_| true)
            .or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(false),
                _ => Err(error),
            })
            .with_context(|| format!("cannot look at {}", path.display()))?;
        if exists {
            found.push(path);
        }
    }
    Ok(found)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.symlink_metadata()?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        // A link to a directory elsewhere: the operator's, and so is what it points to.
        fs::remove_file(path)
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

/// Layers that lie elsewhere may be shared with other servers.
#[expect(clippy::print_stdout, reason = "the output of a command")]
fn tell_about_images(elsewhere: Option<&Path>) {
    if let Some(dir) = elsewhere {
        println!(
            "{} has image layers, which other servers may use: it is kept",
            dir.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ours_is_found_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (data, other) = (directory.path().join("data"), directory.path().join("other"));
        fs::create_dir_all(data.join("keys")).unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("theirs"), b"x").unwrap();
        fs::write(data.join("ionian.db"), b"x").unwrap();
        fs::write(data.join("notes.txt"), b"x").unwrap();
        std::os::unix::fs::symlink(&other, data.join("logs")).unwrap();
        let found = present(&data).unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        for path in &found {
            remove(path).unwrap();
        }
        assert!(data.join("notes.txt").exists());
        assert!(other.join("theirs").exists());
        assert!(!data.join("logs").exists());
        assert_eq!(present(&data).unwrap(), Vec::<PathBuf>::new());
    }
}
