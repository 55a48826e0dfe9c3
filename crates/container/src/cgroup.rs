//! Control groups, both versions: where they are, who is in them, and their removal.
//!
//! runc creates a container's groups and sets their limits; for a sandbox, this module does. It reads what became
//! of them and removes them, since runc's own removal would take the count of out-of-memory kills with it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::mounts;
use crate::running::{KILL_TIMEOUT, open_pidfd};
use crate::runtime::Limits;

/// Without these, limits would be silently absent.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// The period of the CPU quota, in microseconds. What has used up its quota stands still until the next one: with
/// the kernel's default of 100 ms, a container of several threads has its neighbours wait longer, and its own callers.
const CPU_PERIOD: u64 = 20_000;
/// The period of quotas that would be too small otherwise.
const LONG_CPU_PERIOD: u64 = 100_000;
/// The kernel refuses a smaller quota.
pub(crate) const MIN_CPU_QUOTA: i64 = 1_000;

/// A group stays busy for a moment after its last process was seen to end.
const REMOVE_RETRIES: usize = 100;
const REMOVE_RETRY_DELAY: Duration = Duration::from_millis(10);

/// A fork may race with a kill; each round kills who is there.
const KILL_ROUNDS: usize = 100;

/// The mounted hierarchies of this host.
#[derive(Debug, Clone)]
pub(crate) struct Hierarchies {
    /// Every mount point: one in all with version 2, one per set of controllers with version 1, and both on
    /// hybrid hosts, where version 1 has the controllers.
    mounts: Vec<PathBuf>,
    /// Those of `mounts` that have one of the [`NEEDED`] controllers.
    limiting: Vec<PathBuf>,
    memory: MemoryGroup,
}

#[derive(Debug, Clone)]
enum MemoryGroup {
    V1(PathBuf),
    V2(PathBuf),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("failed to read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("failed to remove {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("process {pid} of {cgroup} did not end")]
    StillRunning { pid: i32, cgroup: String },
}

impl Hierarchies {
    pub(crate) fn detect() -> Result<Self, String> {
        let table = mounts::read().map_err(|error| format!("failed to read the mount table: {error}"))?;
        let mut points = Vec::new();
        let mut limiting = Vec::new();
        let mut available = BTreeSet::new();
        let mut v1_memory = None;
        let mut v2_memory = None;
        for mount in table
            .into_iter()
            .filter(|mount| mount.target.starts_with("/sys/fs/cgroup"))
        {
            match mount.kind.as_str() {
                "cgroup2" => {
                    let path = mount.target.join("cgroup.controllers");
                    let controllers = fs::read_to_string(&path)
                        .map_err(|error| format!("failed to read {}: {error}", path.display()))?;
                    if controllers.split_whitespace().any(|name| name == "memory") {
                        v2_memory = Some(mount.target.clone());
                    }
                    if controllers.split_whitespace().any(|name| NEEDED.contains(&name)) {
                        limiting.push(mount.target.clone());
                    }
                    available.extend(controllers.split_whitespace().map(str::to_owned));
                }
                "cgroup" => {
                    if mount.options.iter().any(|option| option == "memory") {
                        v1_memory = Some(mount.target.clone());
                    }
                    if mount.options.iter().any(|option| NEEDED.contains(&option.as_str())) {
                        limiting.push(mount.target.clone());
                    }
                    available.extend(mount.options);
                }
                _ => continue,
            }
            points.push(mount.target);
        }
        let missing: Vec<_> = NEEDED.into_iter().filter(|name| !available.contains(*name)).collect();
        if !missing.is_empty() {
            return Err(format!(
                "the {} controllers are not mounted under /sys/fs/cgroup; mount cgroup2 there, or start the kernel without cgroup_disable",
                missing.join(", ")
            ));
        }
        let memory = match (v1_memory, v2_memory) {
            (Some(path), _) => MemoryGroup::V1(path),
            (None, Some(path)) => MemoryGroup::V2(path),
            (None, None) => return Err("the memory controller is not mounted".to_owned()),
        };
        for list in [&mut points, &mut limiting] {
            list.sort();
            list.dedup();
        }
        Ok(Self {
            mounts: points,
            limiting,
            memory,
        })
    }

    pub(crate) fn is_v2(&self) -> bool {
        matches!(self.memory, MemoryGroup::V2(_))
    }

    fn directories<'a>(&'a self, cgroup: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
        self.mounts
            .iter()
            .map(|mount| mount.join(cgroup.trim_start_matches('/')))
            .filter(|path| path.exists())
    }

    /// How many processes of the group the kernel has killed for lack of memory.
    pub(crate) fn oom_kills(&self, cgroup: &str) -> u64 {
        let (mount, file) = match &self.memory {
            MemoryGroup::V1(mount) => (mount, "memory.oom_control"),
            MemoryGroup::V2(mount) => (mount, "memory.events"),
        };
        let path = mount.join(cgroup.trim_start_matches('/')).join(file);
        match fs::read_to_string(&path) {
            Ok(text) => parse_oom_kills(&text),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot tell whether a container ran out of memory");
                0
            }
        }
    }

    /// The names of the groups directly under `cgroup`, in any hierarchy.
    pub(crate) fn children(&self, cgroup: &str) -> Result<BTreeSet<String>, CgroupError> {
        let mut names = BTreeSet::new();
        for directory in self.directories(cgroup) {
            for child in subdirectories(&directory)? {
                names.extend(child.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        Ok(names)
    }

    /// Makes the group with its limits, for a runtime that does not do so itself. Returns the files that a
    /// process writes `0` to in order to join.
    pub(crate) fn create(&self, cgroup: &str, limits: Limits) -> io::Result<Vec<PathBuf>> {
        let mut join = Vec::new();
        for mount in &self.limiting {
            let directory = mount.join(cgroup.trim_start_matches('/'));
            fs::create_dir_all(&directory)?;
            if self.is_v2() {
                delegate(mount, &directory)?;
            }
            for (file, value) in settings(limits) {
                // Each is there in one version, and in one hierarchy of it.
                let path = directory.join(file);
                if path.exists() {
                    fs::write(&path, value).map_err(|error| {
                        io::Error::new(error.kind(), format!("writing {}: {error}", path.display()))
                    })?;
                }
            }
            join.push(directory.join("cgroup.procs"));
        }
        Ok(join)
    }

    /// Kills every process of the group and waits for their ends. Returns how many there were.
    pub(crate) fn kill_all(&self, cgroup: &str) -> Result<usize, CgroupError> {
        let deadline = Instant::now() + KILL_TIMEOUT;
        let mut killed = BTreeSet::new();
        let mut last = 0;
        for _ in 0..KILL_ROUNDS {
            let processes = self.processes(cgroup)?;
            let Some(first) = processes.first() else {
                return Ok(killed.len());
            };
            last = *first;
            killed.extend(processes.iter().copied());
            if !kill_and_wait(&processes, deadline) {
                break;
            }
        }
        Err(CgroupError::StillRunning {
            pid: last,
            cgroup: cgroup.to_owned(),
        })
    }

    /// Removes the group and the groups in it, in every hierarchy. Returns how many directories there were.
    pub(crate) fn remove(&self, cgroup: &str) -> Result<usize, CgroupError> {
        let mut removed = 0;
        for directory in self.directories(cgroup) {
            removed += remove_tree(&directory)?;
        }
        Ok(removed)
    }

    fn processes(&self, cgroup: &str) -> Result<BTreeSet<i32>, CgroupError> {
        let mut processes = BTreeSet::new();
        for directory in self.directories(cgroup) {
            collect_processes(&directory, &mut processes)?;
        }
        Ok(processes)
    }
}

/// With version 2, a group has the controllers that each group above it hands down.
fn delegate(mount: &Path, directory: &Path) -> io::Result<()> {
    for above in directory
        .ancestors()
        .skip(1)
        .take_while(|above| above.starts_with(mount))
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
    {
        fs::write(above.join("cgroup.subtree_control"), "+cpu +memory +pids")?;
    }
    Ok(())
}

/// In the order to write them: swap is never below memory.
fn settings(limits: Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if let Some(bytes) = limits.memory_bytes {
        settings.push(("memory.limit_in_bytes", bytes.to_string()));
        settings.push(("memory.memsw.limit_in_bytes", bytes.to_string()));
        settings.push(("memory.max", bytes.to_string()));
        settings.push(("memory.swap.max", "0".to_owned()));
    }
    if let Some(millis) = limits.cpu_millis {
        let (quota, period) = cpu_quota(millis);
        settings.push(("cpu.cfs_period_us", period.to_string()));
        settings.push(("cpu.cfs_quota_us", quota.to_string()));
        settings.push(("cpu.max", format!("{quota} {period}")));
    }
    if let Some(pids) = limits.pids {
        settings.push(("pids.max", pids.to_string()));
    }
    settings
}

/// Microseconds of CPU in each period, and the period in microseconds.
pub(crate) fn cpu_quota(millis: u32) -> (i64, u64) {
    let quota = |period: u64| i64::from(millis) * period as i64 / 1000;
    if quota(CPU_PERIOD) < MIN_CPU_QUOTA {
        (quota(LONG_CPU_PERIOD).max(MIN_CPU_QUOTA), LONG_CPU_PERIOD)
    } else {
        (quota(CPU_PERIOD), CPU_PERIOD)
    }
}

/// Whether all ended before the deadline.
fn kill_and_wait(processes: &BTreeSet<i32>, deadline: Instant) -> bool {
    for pid in processes {
        let pidfd = match open_pidfd(*pid) {
            Ok(Some(pidfd)) => pidfd,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(pid, %error, "failed to open a process in order to kill it");
                return false;
            }
        };
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                tracing::error!(pid, %error, "failed to kill a process");
                return false;
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut descriptors = [PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), PollFlags::POLLIN)];
        match poll(&mut descriptors, timeout) {
            Ok(0) => return false,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(pid, %error, "failed to wait for a killed process");
                return false;
            }
        }
    }
    Instant::now() < deadline
}

fn parse_oom_kills(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == "oom_kill")
        .and_then(|(_, count)| count.trim().parse().ok())
        .unwrap_or(0)
}

fn subdirectories(directory: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let read = |source| CgroupError::Read {
        path: directory.to_owned(),
        source,
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(read)?;
        if entry.file_type().map_err(read)?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn collect_processes(directory: &Path, processes: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    let path = directory.join("cgroup.procs");
    match fs::read_to_string(&path) {
        Ok(text) => processes.extend(
            text.lines()
                .filter_map(|line| line.parse::<i32>().ok())
                .filter(|pid| *pid > 0),
        ),
        // The group went away, or is a threaded one, whose processes its parent lists.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {}
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => {}
        Err(source) => return Err(CgroupError::Read { path, source }),
    }
    for child in subdirectories(directory)? {
        collect_processes(&child, processes)?;
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> Result<usize, CgroupError> {
    let mut removed = 0;
    for child in subdirectories(directory)? {
        removed += remove_tree(&child)?;
    }
    for retry in 0.. {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(removed + 1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && retry < REMOVE_RETRIES => {
                std::thread::sleep(REMOVE_RETRY_DELAY);
            }
            Err(source) => {
                return Err(CgroupError::Remove {
                    path: directory.to_owned(),
                    source,
                });
            }
        }
    }
    unreachable!("the loop above returns")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kills_are_counted_in_both_versions() {
        assert_eq!(parse_oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(
            parse_oom_kills("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n"),
            1
        );
        assert_eq!(parse_oom_kills(""), 0);
    }
}
