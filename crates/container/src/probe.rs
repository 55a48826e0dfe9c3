//! What this host can do for containers, for `ionian doctor`.

use std::fs;
use std::path::Path;

use crate::cgroup::Hierarchies;
use crate::command::{self, Input};
use crate::network::{others, resolver};
use crate::overlay::{WritableLayer, mount_overlay};
use crate::runc::find_program;
use crate::userns;

/// One fact about the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub name: &'static str,
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// Empty if nothing is to be mended.
    pub how_to_mend: String,
}

impl Probe {
    fn new(name: &'static str, result: Result<String, String>, how_to_mend: &str) -> Self {
        match result {
            Ok(detail) => Self {
                name,
                ok: true,
                detail,
                how_to_mend: String::new(),
            },
            Err(detail) => Self {
                name,
                ok: false,
                detail,
                how_to_mend: how_to_mend.to_owned(),
            },
        }
    }
}

/// Asks the host; changes nothing that stays. `state_dir` is where containers would live: its file system must
/// serve overlayfs. It, or its nearest existing parent, is tried with a mount if this is root.
pub async fn probe(state_dir: &Path) -> Vec<Probe> {
    vec![
        Probe::new(
            "root",
            root(),
            "run the platform as root; without it only the process runtime works, which isolates nothing",
        ),
        Probe::new(
            "namespaces",
            namespaces(),
            "use a kernel with mount, pid, ipc, uts, network and cgroup namespaces",
        ),
        Probe::new("seccomp", seccomp(), "use a kernel with CONFIG_SECCOMP_FILTER"),
        Probe::new(
            "cgroups",
            Hierarchies::detect().map(|found| format!("version {}", if found.is_v2() { 2 } else { 1 })),
            "mount cgroup2 on /sys/fs/cgroup, with the cpu, memory and pids controllers",
        ),
        Probe::new(
            "runc",
            version("runc", &["--version"]).await,
            "install runc (Debian: apt-get install runc)",
        ),
        Probe::new(
            "runsc",
            version("runsc", &["--version"]).await,
            "only for the gvisor runtime: install runsc (Debian: apt-get install runsc, or from gvisor.dev)",
        ),
        Probe::new(
            "overlayfs",
            overlayfs(state_dir),
            "use Linux 5.11 or newer, and a data directory on ext4, xfs or btrfs that is not itself an overlay",
        ),
        Probe::new(
            "user namespaces",
            user_namespaces(state_dir),
            "containers of runc run without (root in one is root's id on this host); for them use Linux 6.3 or newer with user.max_user_namespaces above 0, data on ext4, xfs or btrfs, and /dev/shm that all users may enter",
        ),
        Probe::new(
            "nftables",
            nftables().await,
            "install nftables (Debian: apt-get install nftables)",
        ),
        Probe::new(
            "forwarding",
            forwarding().await,
            "let that firewall accept what comes from the interfaces ion*, and the answers (docs/guide.md, A host with other firewalls)",
        ),
        Probe::new(
            "ip_forward",
            ip_forward(),
            "run: sysctl net.ipv4.ip_forward=1 (as root, the platform does so itself)",
        ),
        Probe::new("name servers", name_servers(), "configure name servers for containers"),
    ]
}

fn root() -> Result<String, String> {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        Ok("running as root".to_owned())
    } else {
        Err(format!("running as user {user}"))
    }
}

fn namespaces() -> Result<String, String> {
    const NEEDED: [&str; 6] = ["mnt", "pid", "ipc", "uts", "net", "cgroup"];
    let missing: Vec<_> = NEEDED
        .into_iter()
        .filter(|name| !Path::new("/proc/self/ns").join(name).exists())
        .collect();
    if missing.is_empty() {
        Ok(NEEDED.join(", "))
    } else {
        Err(format!("the kernel lacks {}", missing.join(", ")))
    }
}

fn seccomp() -> Result<String, String> {
    const PATH: &str = "/proc/sys/kernel/seccomp/actions_avail";
    fs::read_to_string(PATH)
        .map(|actions| format!("actions: {}", actions.trim()))
        .map_err(|error| format!("{PATH}: {error}"))
}

async fn version(program: &'static str, arguments: &[&str]) -> Result<String, String> {
    let path = find_program(program).ok_or_else(|| format!("{program} was not found in PATH"))?;
    let path = path.to_string_lossy();
    let printed = command::run(&path, arguments, Input::None)
        .await
        .map_err(|error| crate::chain(&error))?;
    Ok(format!("{path}: {}", printed.lines().next().unwrap_or_default().trim()))
}

fn overlayfs(state_dir: &Path) -> Result<String, String> {
    if !nix::unistd::geteuid().is_root() {
        let listed = fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\toverlay"));
        return if listed {
            Ok("known to the kernel; not tried, since that needs root".to_owned())
        } else {
            Err("not in /proc/filesystems".to_owned())
        };
    }
    let existing = existing(state_dir);
    let trial = || -> Result<(), Box<dyn std::error::Error>> {
        let directory = tempfile::Builder::new().prefix(".ionian-probe").tempdir_in(existing)?;
        let part = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir(&path).map(|()| path)
        };
        let (lower, upper_dir, work_dir, target) = (part("lower")?, part("upper")?, part("work")?, part("target")?);
        let writable = WritableLayer {
            upper_dir: &upper_dir,
            work_dir: &work_dir,
            volatile: true,
        };
        mount_overlay(&[lower], Some(writable), &target)?.unmount()?;
        Ok(())
    };
    trial()
        .map(|()| format!("mounted one in {}", existing.display()))
        .map_err(|error| crate::chain(error.as_ref()))
}

fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"))
}

/// Tried as the platform does when it starts.
fn user_namespaces(state_dir: &Path) -> Result<String, String> {
    if !nix::unistd::geteuid().is_root() {
        return Ok("not tried, since that needs root".to_owned());
    }
    userns::trial(existing(state_dir), Path::new("/dev/shm")).map(|_| {
        format!(
            "root in a container is an id of its own, tried in {}",
            existing(state_dir).display()
        )
    })
}

async fn nftables() -> Result<String, String> {
    let found = version("nft", &["--version"]).await?;
    if nix::unistd::geteuid().is_root() {
        command::run("nft", &["list", "tables"], Input::None)
            .await
            .map_err(|error| crate::chain(&error))?;
    }
    Ok(found)
}

/// Every table must let a packet through, so accepting it in ours is not enough.
async fn forwarding() -> Result<String, String> {
    if !nix::unistd::geteuid().is_root() {
        return Ok("not looked at, since that needs root".to_owned());
    }
    let found = others::look().await;
    let join = |texts: std::collections::BTreeSet<String>| texts.into_iter().collect::<Vec<_>>().join("; ");
    if !found.problems.is_empty() {
        return Err(join(found.problems));
    }
    if found.open.is_empty() {
        return Ok("no other firewall found".to_owned());
    }
    Ok(join(found.open))
}

fn ip_forward() -> Result<String, String> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_forward";
    match fs::read_to_string(PATH) {
        Ok(value) if value.trim() == "1" => Ok("on".to_owned()),
        Ok(_) if nix::unistd::geteuid().is_root() => Ok("off; the platform turns it on when it starts".to_owned()),
        Ok(_) => Err("off".to_owned()),
        Err(error) => Err(format!("{PATH}: {error}")),
    }
}

fn name_servers() -> Result<String, String> {
    let found = resolver::resolv_conf(&[]);
    match found.problem {
        Some(problem) => Err(problem),
        None if found.nameservers.is_empty() => Ok(format!("{}, through a relay", listed(&found.relayed))),
        None => Ok(listed(&found.nameservers)),
    }
}

fn listed(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_fact_is_there_and_what_is_wrong_says_how_to_mend_it() {
        let directory = tempfile::tempdir().unwrap();
        let facts = probe(&directory.path().join("not/yet/there")).await;
        for name in [
            "root",
            "namespaces",
            "cgroups",
            "runc",
            "runsc",
            "overlayfs",
            "user namespaces",
            "nftables",
            "ip_forward",
        ] {
            let fact = facts
                .iter()
                .find(|fact| fact.name == name)
                .unwrap_or_else(|| panic!("no fact {name}"));
            assert_eq!(fact.ok, fact.how_to_mend.is_empty(), "{fact:?}");
            assert!(!fact.detail.is_empty(), "{fact:?}");
            println!("{fact:?}");
        }
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            0,
            "a probe leaves nothing behind"
        );
    }
}
