//! What is written down about a container for the process that comes after this one.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use ionian_domain::container::RuntimeKind;
use serde::{Deserialize, Serialize};

use crate::network::{Egress, Policy};
use crate::running::open_pidfd;

/// Of the file's form; another one is not adopted.
const VERSION: u32 = 1;

/// A record takes some 300 bytes, and 50 for each range that its container may reach; what is longer is none.
const MAX_BYTES: u64 = 32 << 10;

const FILE: &str = "container.json";

/// A process, and never another that got its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    pub pid: i32,
    /// In ticks of the kernel's clock since the machine's start.
    start_time: u64,
}

impl ProcessIdentity {
    /// Of a process that is held (by its parent, or by a pidfd) while this is asked.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = parse_start_time(&text).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat has no start time"),
            )
        })?;
        Ok(Self { pid, start_time })
    }

    /// Of one that had ended before it could be looked at.
    pub(crate) fn ended(pid: i32) -> Self {
        // Nothing starts together with the machine's clock.
        Self { pid, start_time: 0 }
    }

    /// `None` if it has ended. Checked once the process is held, so that what is returned is it.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        if self.pid <= 0 {
            return Ok(None);
        }
        Ok(open_pidfd(self.pid)?.filter(|_| self.is_current()))
    }

    /// Whether the process that has the number now is this one.
    pub(crate) fn is_current(&self) -> bool {
        Self::of(self.pid).is_ok_and(|current| current == *self)
    }
}

/// The 22nd field. The second is the program's name in parentheses, and may contain anything.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

/// Names this run of the machine: numbers and start times of another one mean nothing.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    boot_id: String,
    pub keeper: ProcessIdentity,
    /// `None` until the first process runs.
    pub started: Option<StartedRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StartedRecord {
    pub outlives_us: bool,
    /// Only the same program may adopt it.
    pub runtime: RuntimeKind,
    pub first_process: ProcessIdentity,
    pub network: Option<NetworkRecord>,
    /// The number of its range of ids, with a user namespace.
    #[serde(default)]
    pub id_range: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkRecord {
    pub address: Ipv4Addr,
    pub host_link: String,
    #[serde(default)]
    pub egress: Egress,
}

impl NetworkRecord {
    /// `None` while the outside is open.
    pub(crate) fn policy(&self) -> Option<Policy> {
        (self.egress != Egress::Open).then(|| Policy {
            address: self.address,
            egress: self.egress.clone(),
        })
    }
}

impl Record {
    pub(crate) fn new(boot_id: &str, keeper: ProcessIdentity) -> Self {
        Self {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            keeper,
            started: None,
        }
    }

    /// Replaces the file at once, so that a crash leaves the old or the new one.
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        replace(&directory.join(FILE), &serde_json::to_vec(self)?)
    }

    /// `None` if there is none that means something on this run of the machine.
    pub(crate) fn read(directory: &Path, boot_id: &str) -> Option<Self> {
        let record: Self = read_json(&directory.join(FILE))?;
        (record.version == VERSION && record.boot_id == boot_id).then_some(record)
    }
}

/// Writes a small file beside `path` and renames it into place. Not synced: what it describes does not
/// survive the machine's restart either.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = PathBuf::from(path).into_os_string();
    temporary.push(".new");
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, path)
}

/// `None` if the file is absent, too long or something else.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(parse_start_time(&format!("42 (a b) c)) {rest}")), Some(777));
        assert_eq!(parse_start_time("42 (a) S 1"), None);
    }

    #[test]
    fn a_number_that_another_process_has_is_not_the_process() {
        let own = ProcessIdentity::of(std::process::id().cast_signed()).unwrap();
        assert!(own.open().unwrap().is_some());
        let earlier = ProcessIdentity {
            start_time: own.start_time - 1,
            ..own
        };
        assert!(earlier.open().unwrap().is_none());
    }

    #[test]
    fn only_a_record_of_this_run_and_this_form_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let keeper = ProcessIdentity { pid: 7, start_time: 8 };
        assert_eq!(Record::read(directory.path(), "boot"), None);
        let record = Record::new("boot", keeper);
        record.write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path(), "boot"), Some(record.clone()));
        assert_eq!(Record::read(directory.path(), "another boot"), None);
        let newer = Record { version: 2, ..record };
        newer.write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path(), "boot"), None);
        fs::write(directory.path().join(FILE), "{").unwrap();
        assert_eq!(Record::read(directory.path(), "boot"), None);
    }
}
