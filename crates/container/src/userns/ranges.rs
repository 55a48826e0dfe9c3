//! Which ids of the host a container's ids are.
//!
//! Each container has a range of its own, so that two of them are different users to the kernel: they cannot
//! signal or trace each other should they ever meet, and what the kernel counts by user (processes, keys, watches,
//! pending signals) is counted for each alone.
//!
//! The ranges lie from `0x7000_0000` to `0x7FFD_FFFF`: the part of the ids that systemd's list of assignments leaves
//! unused, above what `useradd` hands out to users and in `/etc/subuid`, and below 2^31, beyond which programs
//! take ids for negative. What `/etc/subuid`, `/etc/subgid`, `/etc/passwd` and `/etc/group` name all the same is
//! left out.
//!
//! Instances on a host share the ranges. A claim is a symbolic link named by the range, whose target names instance
//! and container: made by one system call that fails where there is one, it needs no lock, outlives the process
//! as the container does, and is gone after a reboot, as the container is.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// Ids in a range: what images may use, `nobody` (65,534) included.
pub(crate) const IDS_PER_CONTAINER: u32 = 65_536;

/// The first id of the first range.
const FIRST_ID: u32 = 0x7000_0000;

/// Four times what an instance has addresses for.
const MAX_RANGES: u32 = 4_094;

/// Shared by every instance on the host; in memory.
const CLAIMS: &str = "/run/ionian-ids";

/// The lists of ids that the host has given away: the fields, counted from 0, that hold the first id and, if it is
/// not one, how many.
const ASSIGNMENTS: [(&str, usize, Option<usize>); 4] = [
    ("/etc/subuid", 1, Some(2)),
    ("/etc/subgid", 1, Some(2)),
    ("/etc/passwd", 2, None),
    ("/etc/group", 2, None),
];

/// One container's ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct IdRange(u32);

impl IdRange {
    /// Beyond those of containers: for trying out what the host can do.
    pub(crate) const TRIAL: Self = Self(MAX_RANGES - 1);

    pub(crate) fn first(self) -> u32 {
        FIRST_ID + self.0 * IDS_PER_CONTAINER
    }

    /// Whether the container can be this user or group.
    pub(crate) fn has(id: u32) -> bool {
        id < IDS_PER_CONTAINER
    }
}

/// A range that belongs to one container.
#[derive(Debug)]
pub(crate) struct Claim {
    pub range: IdRange,
    link: PathBuf,
}

impl Claim {
    /// That of a container which an earlier process started.
    pub(crate) fn taken_over(number: u32) -> Self {
        Self {
            range: IdRange(number),
            link: Path::new(CLAIMS).join(number.to_string()),
        }
    }

    pub(crate) fn number(&self) -> u32 {
        self.range.0
    }

    /// Once no process with these ids is left.
    pub(crate) fn release(self) -> io::Result<()> {
        remove(&self.link)
    }
}

/// Gives ranges to an instance's containers.
#[derive(Debug)]
pub(crate) struct IdRanges {
    directory: PathBuf,
    instance: String,
    /// Assigned to others by the host's own lists.
    taken: BTreeSet<u32>,
    /// Where this instance begins to look, so that instances seldom meet.
    start: u32,
}

impl IdRanges {
    pub(crate) fn open(instance: &str) -> io::Result<Self> {
        Self::open_in(Path::new(CLAIMS), instance, assigned()?)
    }

    fn open_in(directory: &Path, instance: &str, taken: BTreeSet<u32>) -> io::Result<Self> {
        make_directory(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
            instance: instance.to_owned(),
            taken,
            start: u32::from_str_radix(instance, 16).unwrap_or(0) % IdRange::TRIAL.0,
        })
    }

    pub(crate) fn claim(&self, name: &str) -> io::Result<Claim> {
        let owner = format!("{}/{name}", self.instance);
        let numbers = (0..IdRange::TRIAL.0).map(|offset| (self.start + offset) % IdRange::TRIAL.0);
        for number in numbers.filter(|number| !self.taken.contains(number)) {
            let link = self.directory.join(number.to_string());
            let mut result = symlink(&owner, &link);
            if result
                .as_ref()
                .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
            {
                // Another instance left as the last one, and took the directory with it.
                make_directory(&self.directory)?;
                result = symlink(&owner, &link);
            }
            match result {
                Ok(()) => {
                    let range = IdRange(number);
                    return Ok(Claim { range, link });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!(
            "all ranges of ids are in use, see {}; run fewer containers on this machine",
            self.directory.display()
        )))
    }
}

/// Releases the claims of an instance's containers that are not to be kept.
pub(crate) fn reap(instance: &str, keep: &dyn Fn(&str) -> bool) -> io::Result<()> {
    reap_in(Path::new(CLAIMS), instance, keep)
}

fn reap_in(directory: &Path, instance: &str, keep: &dyn Fn(&str) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        // Gone in the meantime, or nothing of ours.
        let Ok(owner) = fs::read_link(&path) else { continue };
        let name = owner.strip_prefix(instance).ok().and_then(Path::to_str);
        if name.is_some_and(|name| !keep(name)) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Nothing of the platform stays on the host when its last instance ends.
pub(crate) fn remove_directory_if_empty() {
    // Mostly other instances are there, and that is well.
    let _ = fs::remove_dir(CLAIMS);
}

fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn remove(link: &Path) -> io::Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn assigned() -> io::Result<BTreeSet<u32>> {
    let mut taken = BTreeSet::new();
    for (path, first, count) in ASSIGNMENTS {
        match fs::read(path) {
            Ok(bytes) => collect_assigned(&String::from_utf8_lossy(&bytes), first, count, &mut taken),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("failed to read {path}: {error}"))),
        }
    }
    Ok(taken)
}

fn collect_assigned(text: &str, first_field: usize, count_field: Option<usize>, taken: &mut BTreeSet<u32>) {
    for line in text.lines() {
        let number = |field| line.split(':').nth(field)?.trim().parse::<u64>().ok();
        let Some(first) = number(first_field) else { continue };
        let count = count_field.map_or(Some(1), number).unwrap_or(1);
        let end = first.saturating_add(count);
        for index in 0..MAX_RANGES {
            let own = u64::from(IdRange(index).first());
            if first < own + u64::from(IDS_PER_CONTAINER) && own < end {
                taken.insert(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_stay_in_the_part_that_nobody_uses() {
        assert_eq!(IdRange(0).first(), 1_879_048_192);
        let end = u64::from(IdRange::TRIAL.first()) + u64::from(IDS_PER_CONTAINER);
        // Where systemd's foreign ids begin.
        assert_eq!(end, 0x7ffe_0000);
        assert!(IdRange::has(65_535) && !IdRange::has(65_536));
    }

    #[test]
    fn what_the_host_has_given_away_is_left_out() {
        let mut taken = BTreeSet::new();
        let base = IdRange(10).first();
        collect_assigned("a:100000:65536\nbroken\nb:x:y\n", 1, Some(2), &mut taken);
        assert!(taken.is_empty());
        collect_assigned(&format!("podman:{}:65537\n", base - 1), 1, Some(2), &mut taken);
        assert_eq!(taken, BTreeSet::from([9, 10]));
        collect_assigned(
            &format!("u:x:{}:0::/:/bin/sh\n", base + 3 * 65_536 + 7),
            2,
            None,
            &mut taken,
        );
        assert_eq!(taken, BTreeSet::from([9, 10, 13]));
        collect_assigned("all:0:4294967295", 1, Some(2), &mut taken);
        assert_eq!(taken.len(), MAX_RANGES as usize);
    }

    #[test]
    fn no_two_containers_have_one_range_also_of_two_instances() {
        let directory = tempfile::tempdir().unwrap();
        let claims = directory.path().join("claims");
        let open = |instance: &str| IdRanges::open_in(&claims, instance, BTreeSet::from([2])).unwrap();
        // Both begin at 1.
        let (one, other) = (open("00000001"), open(&format!("{MAX_RANGES:08x}")));
        assert_eq!(one.start, other.start);
        let first = one.claim("a").unwrap();
        let second = other.claim("a").unwrap();
        let third = one.claim("b").unwrap();
        assert_eq!([&first, &second, &third].map(Claim::number), [1, 3, 4]);
        first.release().unwrap();
        assert_eq!(other.claim("c").unwrap().number(), 1);

        reap_in(&claims, "00000001", &|_| true).unwrap();
        assert_eq!(fs::read_dir(&claims).unwrap().count(), 3);
        reap_in(&claims, "00000001", &|name| name != "b").unwrap();
        assert!(!claims.join("4").exists() && fs::read_link(claims.join("3")).is_ok());
        fs::remove_dir_all(&claims).unwrap();
        assert_eq!(one.claim("d").unwrap().number(), 1);
    }

    #[test]
    fn the_end_of_the_ranges_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let ranges = IdRanges::open_in(directory.path(), "0", (0..MAX_RANGES).collect()).unwrap();
        assert!(ranges.claim("a").unwrap_err().to_string().contains("fewer containers"));
    }
}
