//! Builds a disk in a real directory, so that the store can open it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

/// By path; `None` is a directory. Parents come before what is in them.
pub(crate) type Files = BTreeMap<String, Option<Arc<Vec<u8>>>>;

/// A directory that holds one disk after the other. Files that are the same in the next are left alone.
pub(crate) struct Scratch {
    path: PathBuf,
    held: Files,
}

impl Scratch {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            held: Files::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn build(&mut self, files: &Files) -> anyhow::Result<()> {
        self.build_in(files)
            .with_context(|| format!("cannot build a disk in {}", self.path.display()))
    }

    fn build_in(&mut self, files: &Files) -> anyhow::Result<()> {
        if self.held.is_empty() {
            if self.path.exists() {
                std::fs::remove_dir_all(&self.path)?;
            }
            std::fs::create_dir_all(&self.path)?;
        }
        // What opening it changes: the database and its companions, and what blobs has in the making.
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::remove_file(entry.path())?;
            }
        }
        for made in ["blobs/staging", "blobs/kept/.temporary"] {
            let path = self.path.join(made);
            if path.exists() {
                std::fs::remove_dir_all(path)?;
            }
        }
        for (path, content) in self.held.iter().rev() {
            if !files.contains_key(path) {
                let path = self.path.join(path);
                let gone = match content {
                    Some(_) => std::fs::remove_file(&path),
                    // Opening may have made something in it.
                    None => std::fs::remove_dir_all(&path),
                };
                if let Err(error) = gone
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    return Err(error).with_context(|| path.display().to_string());
                }
            }
        }
        for (path, content) in files {
            let target = self.path.join(path);
            match content {
                None => std::fs::create_dir_all(&target)?,
                Some(content) => {
                    let same = matches!(self.held.get(path), Some(Some(held)) if Arc::ptr_eq(held, content));
                    if !(same && target.exists()) {
                        std::fs::write(&target, content.as_slice())?;
                    }
                }
            }
        }
        self.held = files.clone();
        // As the server makes them: it refuses keys that others could read.
        let keys = self.path.join("keys");
        if keys.exists() {
            for entry in std::fs::read_dir(keys)? {
                use std::os::unix::fs::PermissionsExt as _;
                std::fs::set_permissions(entry?.path(), std::fs::Permissions::from_mode(0o600))?;
            }
        }
        Ok(())
    }
}
