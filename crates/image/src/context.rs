//! The build context: files by name, whose content lies in the content-addressed store.
//!
//! It is an idea, not a directory: nothing is written anywhere until a step needs the files.

use std::collections::BTreeMap;

use crate::patterns;

/// One file of the build context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextEntry {
    /// With or without a leading slash, which means the root of the context.
    pub path: String,
    pub sha256_hex: String,
    /// Permission bits; `None` for the usual ones.
    pub mode: Option<u32>,
}

/// The mode of files whose sender did not say.
const DEFAULT_MODE: u32 = 0o644;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ContextFile {
    /// Relative to whatever the file is part of; never absolute, never with `..`.
    pub path: String,
    pub sha256_hex: String,
    pub mode: u32,
}

/// A file or a directory that a `COPY` source names.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub enum ContextItem {
    /// `path` is the file's own name.
    File(ContextFile),
    /// Paths are relative to the directory.
    Directory(Vec<ContextFile>),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ContextTree {
    files: BTreeMap<String, (String, u32)>,
}

impl ContextTree {
    pub(crate) fn new<'a>(entries: impl IntoIterator<Item = &'a ContextEntry>) -> Result<Self, String> {
        let mut files = BTreeMap::new();
        for entry in entries {
            let path = normalize(&entry.path)?;
            if path.is_empty() {
                return Err(format!("the build context has a file without a name: '{}'", entry.path));
            }
            if entry.sha256_hex.len() != 64 || !entry.sha256_hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(format!("the file '{path}' of the build context has no SHA-256 digest"));
            }
            files.insert(
                path,
                (
                    entry.sha256_hex.to_ascii_lowercase(),
                    entry.mode.unwrap_or(DEFAULT_MODE) & 0o7777,
                ),
            );
        }
        for path in files.keys() {
            if let Some(parent) = parents(path).find(|parent| files.contains_key(*parent)) {
                return Err(format!("the build context has '{parent}' as a file and as a directory"));
            }
        }
        Ok(Self { files })
    }

    /// What a `COPY` source names. Empty where nothing matches.
    pub(crate) fn select(&self, source: &str) -> Result<Vec<ContextItem>, String> {
        let source = normalize(source)?;
        if source.is_empty() {
            return Ok(vec![ContextItem::Directory(self.below(""))]);
        }
        let wanted: Vec<&str> = source.split('/').collect();
        let mut found: Vec<&str> = Vec::new();
        for path in self.files.keys() {
            let Some(end) = prefix_end(path, &wanted) else { continue };
            // Files of one directory are neighbours in the order of the map.
            if found.last() != Some(&&path[..end]) {
                found.push(&path[..end]);
            }
        }
        Ok(found
            .into_iter()
            .map(|path| match self.files.get(path) {
                Some((sha256_hex, mode)) => {
                    let name = path.rsplit('/').next().unwrap_or(path);
                    ContextItem::File(file(name, sha256_hex, *mode))
                }
                None => ContextItem::Directory(self.below(path)),
            })
            .collect())
    }

    fn below(&self, dir: &str) -> Vec<ContextFile> {
        let prefix = if dir.is_empty() {
            String::new()
        } else {
            format!("{dir}/")
        };
        self.files
            .range(prefix.clone()..)
            .map_while(|(path, content)| path.strip_prefix(&prefix).map(|path| (path, content)))
            .map(|(path, (sha256_hex, mode))| file(path, sha256_hex, *mode))
            .collect()
    }
}

fn file(path: &str, sha256_hex: &str, mode: u32) -> ContextFile {
    ContextFile {
        path: path.to_owned(),
        sha256_hex: sha256_hex.to_owned(),
        mode,
    }
}

/// Without empty and `.` components and slashes at the ends; `..` is refused.
pub(crate) fn normalize(path: &str) -> Result<String, String> {
    let mut out: Vec<&str> = Vec::new();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => return Err(format!("'{path}' leaves the build context: '..' is not allowed")),
            name if name.contains('\0') => return Err("a path of the build context has a zero byte".to_owned()),
            name => out.push(name),
        }
    }
    Ok(out.join("/"))
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// Where the part of `path` ends that the pattern components match.
fn prefix_end(path: &str, wanted: &[&str]) -> Option<usize> {
    let mut components = path.split('/');
    let mut end = 0;
    for (at, pattern) in wanted.iter().enumerate() {
        let component = components.next()?;
        let matches = if patterns::is_pattern(pattern) {
            patterns::matches(pattern, component)
        } else {
            *pattern == component
        };
        if !matches {
            return None;
        }
        end += component.len() + usize::from(at > 0);
    }
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(paths: &[&str]) -> ContextTree {
        let entries: Vec<_> = paths
            .iter()
            .map(|path| ContextEntry {
                path: (*path).to_owned(),
                sha256_hex: "0".repeat(64),
                mode: None,
            })
            .collect();
        ContextTree::new(&entries).unwrap()
    }

    fn select(tree: &ContextTree, source: &str) -> Vec<String> {
        tree.select(source)
            .unwrap()
            .into_iter()
            .map(|item| match item {
                ContextItem::File(file) => file.path,
                ContextItem::Directory(files) => {
                    format!(
                        "[{}]",
                        files
                            .iter()
                            .map(|file| file.path.as_str())
                            .collect::<Vec<_>>()
                            .join(" ")
                    )
                }
            })
            .collect()
    }

    #[test]
    fn sources_name_files_and_directories() {
        let tree = tree(&[
            "/.0_req.txt",
            "/python/bin/python",
            "/python/lib/a.py",
            "/python.txt",
            "b/c.txt",
        ]);
        assert_eq!(select(&tree, "/.0_req.txt"), [".0_req.txt"]);
        assert_eq!(select(&tree, "python/."), ["[bin/python lib/a.py]"]);
        assert_eq!(select(&tree, "*.txt"), [".0_req.txt", "python.txt"]);
        assert_eq!(select(&tree, "*/*.txt"), ["c.txt"]);
        assert_eq!(select(&tree, "p*"), ["python.txt", "[bin/python lib/a.py]"]);
        assert_eq!(
            select(&tree, "."),
            ["[.0_req.txt b/c.txt python.txt python/bin/python python/lib/a.py]"]
        );
        assert_eq!(select(&tree, "none"), Vec::<String>::new());
        assert_eq!(select(&tree, "pyth"), Vec::<String>::new());
    }

    #[test]
    fn a_context_cannot_leave_itself_or_contradict_itself() {
        let entry = |path: &str| ContextEntry {
            path: path.to_owned(),
            sha256_hex: "0".repeat(64),
            mode: None,
        };
        assert!(ContextTree::new(&[entry("/../x")]).is_err());
        assert!(ContextTree::new(&[entry("/")]).is_err());
        assert!(ContextTree::new(&[entry("a"), entry("a/b")]).is_err());
        assert!(
            ContextTree::new(&[ContextEntry {
                sha256_hex: "../x".to_owned(),
                ..entry("a")
            }])
            .is_err()
        );
        assert!(tree(&["a"]).select("../a").is_err());
    }
}
