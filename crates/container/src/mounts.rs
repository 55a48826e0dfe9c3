//! The mount table of this process.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub target: PathBuf,
    pub kind: String,
    /// Of the file system, not of the mount point.
    pub options: Vec<String>,
}

/// Every mount, in the order in which they were made.
pub(crate) fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// Mount points at or below `directory`, innermost first, which is the order to unmount them in.
pub(crate) fn below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    below_any(&[directory])
}

/// The same for several directories.
pub(crate) fn below_any(directories: &[&Path]) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<_> = read()?
        .into_iter()
        .map(|mount| mount.target)
        .filter(|target| directories.iter().any(|directory| target.starts_with(directory)))
        .collect();
    found.reverse();
    Ok(found)
}

fn parse(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let target = unescape(mount.split(' ').nth(4)?);
            let mut file_system = file_system.split(' ');
            let kind = file_system.next()?.to_owned();
            let options = file_system.nth(1)?.split(',').map(str::to_owned).collect();
            Some(Mount { target, kind, options })
        })
        .collect()
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    while let [first, rest @ ..] = bytes {
        bytes = rest;
        let code = match (first, rest) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                bytes = after;
                (a - b'0') * 64 + (b - b'0') * 8 + (c - b'0')
            }
            (other, _) => *other,
        };
        plain.push(code);
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let text = "36 35 98:0 / /mnt/with\\040space rw,noatime master:1 - cgroup cgroup rw,cpu,cpuacct\nnonsense\n";
        let expected = Mount {
            target: PathBuf::from("/mnt/with space"),
            kind: "cgroup".to_owned(),
            options: vec!["rw".to_owned(), "cpu".to_owned(), "cpuacct".to_owned()],
        };
        assert_eq!(parse(text), vec![expected]);
    }
}
