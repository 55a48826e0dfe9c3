//! The OCI bundle that a container is started from.
//!
//! Pure but for [`write`]: what a [`Launch`] means as a runtime specification. In a user namespace, the sources of
//! its binds are those on the container's [`stage`](crate::userns::stage).
//!
//! **Capabilities.** Root in a container installs packages (`apt`, `dpkg`, `pip`), so it may change owners and
//! modes, become other users, signal them, call `chroot`, bind low ports and give file capabilities away.
//! Of Docker's default set it has not: `NET_RAW` (forging packets on the bridge), `MKNOD` (devices could not be
//! opened anyway) and `SETPCAP`. Programs can send pings, by a sysctl; Debian's `ping` cannot be run, since its
//! file asks for `NET_RAW`, and the kernel refuses a file that asks for what is not there. `AUDIT_WRITE` stays, since PAM answers root's
//! `su` and `chpasswd` with "system error" without it.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder,
    LinuxIdMappingBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder,
    LinuxResources, LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType,
    Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use rustix::process::{Resource, getrlimit};

use crate::cgroup::cpu_quota;
use crate::oci::OciProgram;
use crate::passwd::Identity;
use crate::runtime::{Bind, Launch, Limits};
use crate::seccomp;
use crate::userns::ranges::{IDS_PER_CONTAINER, IdRange};

/// The version of the specification that runc 1.1 implements.
const OCI_VERSION: &str = "1.0.2";

const CAPABILITIES: [Capability; 11] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Kill,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::AuditWrite,
];

/// Soft and hard limit of open files. The soft one is moderate, since some programs (`apt` among them) close
/// every possible descriptor one by one before they start another. Neither is above the platform's own hard
/// limit, which not even every root may raise.
const OPEN_FILES: (u64, u64) = (65_536, 524_288);

/// Tell about the host, or change it.
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// The last is the directory of version 1's hierarchies: runc leaves it writable, though not what is in it.
const READ_ONLY_PATHS: [&str; 6] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/sys/fs/cgroup",
];

const MIN_CPU_SHARES: u64 = 2;
const MAX_CPU_SHARES: u64 = 262_144;

/// Where the parts of one container's bundle are.
#[derive(Debug, Clone)]
pub(crate) struct BundlePaths {
    /// On disk: the mounted root, the scratch layer and small files.
    pub directory: PathBuf,
    /// In memory: the specification, whose environment may hold secrets.
    pub specification: PathBuf,
    /// What the container's own root must be able to reach: the mounted root and small files. The same as
    /// `directory`, or its stage.
    pub seen: PathBuf,
}

impl BundlePaths {
    pub(crate) fn root(&self) -> PathBuf {
        self.seen.join("root")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.directory.join("pid")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("runc.log")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.directory.join("upper")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    fn config(&self) -> PathBuf {
        self.specification.join("config.json")
    }

    fn hosts(&self) -> PathBuf {
        self.seen.join("hosts")
    }

    fn hostname(&self) -> PathBuf {
        self.seen.join("hostname")
    }

    fn resolv_conf(&self) -> PathBuf {
        self.seen.join("resolv.conf")
    }
}

/// What the specification needs besides the launch.
pub(crate) struct BundleFacts<'a> {
    pub paths: &'a BundlePaths,
    pub identity: &'a Identity,
    pub cgroup: &'a str,
    /// `None` gives the container an empty network namespace.
    pub network: Option<BundleNetwork>,
    /// `None` runs the container with the host's ids.
    pub user_namespace: Option<BundleUserNamespace>,
    pub program: &'a OciProgram,
}

pub(crate) struct BundleNetwork {
    pub namespace: PathBuf,
    pub address: IpAddr,
    pub resolv_conf: String,
}

pub(crate) struct BundleUserNamespace {
    pub range: IdRange,
    /// `/sys` of the network namespace, mounted.
    pub sys: PathBuf,
    /// Made by the host, also where it is empty.
    pub network_namespace: PathBuf,
}

/// Writes the specification and the files that it mounts.
pub(crate) fn write(launch: &Launch, facts: &BundleFacts<'_>) -> io::Result<()> {
    let paths = facts.paths;
    let own_line = facts
        .network
        .as_ref()
        .map(|network| format!("{}\t{}\n", network.address, launch.name));
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{}",
        own_line.unwrap_or_default()
    );
    std::fs::write(paths.hosts(), hosts)?;
    std::fs::write(paths.hostname(), format!("{}\n", launch.name))?;
    let resolv_conf = facts
        .network
        .as_ref()
        .map_or("", |network| network.resolv_conf.as_str());
    std::fs::write(paths.resolv_conf(), resolv_conf)?;
    if let Some(user_namespace) = &facts.user_namespace {
        let owner = Some(user_namespace.range.first());
        for path in [paths.hosts(), paths.hostname(), paths.resolv_conf()] {
            chown(path, owner, owner)?;
        }
    }
    let spec = facts.program.adapt(spec(launch, facts).map_err(io::Error::other)?)?;
    std::fs::write(paths.config(), serde_json::to_vec(&spec)?)
}

fn spec(launch: &Launch, facts: &BundleFacts<'_>) -> Result<Spec, OciSpecError> {
    let mut mounts = system_mounts(launch.limits, facts.user_namespace.as_ref())?;
    for (source, target) in [
        (facts.paths.hosts(), "/etc/hosts"),
        (facts.paths.hostname(), "/etc/hostname"),
        (facts.paths.resolv_conf(), "/etc/resolv.conf"),
    ] {
        // Writable: some packages insist, and the files are the container's own.
        mounts.push(bind(&Bind {
            source,
            target: target.to_owned(),
            read_only: false,
        })?);
    }
    for wanted in &launch.binds {
        mounts.push(bind(wanted)?);
    }
    SpecBuilder::default()
        .version(OCI_VERSION)
        .hostname(launch.name.clone())
        .root(
            RootBuilder::default()
                .path(facts.paths.root())
                .readonly(false)
                .build()?,
        )
        .process(process(launch, facts.identity)?)
        .mounts(mounts)
        .linux(linux(launch, facts)?)
        .build()
}

fn process(launch: &Launch, identity: &Identity) -> Result<Process, OciSpecError> {
    let bounding: HashSet<Capability> = HashSet::from(CAPABILITIES);
    // As with a set-uid change: who is not root has none, but a program with file capabilities would.
    let effective = if identity.uid == 0 {
        bounding.clone()
    } else {
        HashSet::new()
    };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(bounding)
        .effective(effective.clone())
        .permitted(effective)
        .inheritable(HashSet::new())
        .ambient(HashSet::new())
        .build()?;
    let user = UserBuilder::default()
        .uid(identity.uid)
        .gid(identity.gid)
        .additional_gids(identity.additional_gids.clone())
        .build()?;
    ProcessBuilder::default()
        .terminal(false)
        .user(user)
        .args(launch.argv.clone())
        .env(
            launch
                .env
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect::<Vec<_>>(),
        )
        .cwd(launch.workdir.clone())
        .capabilities(capabilities)
        .rlimits(vec![
            rlimit(PosixRlimitType::RlimitNofile, open_files())?,
            // A core file would be written into the scratch layer, or piped to a program of the host.
            rlimit(PosixRlimitType::RlimitCore, (0, 0))?,
        ])
        .no_new_privileges(true)
        .build()
}

fn open_files() -> (u64, u64) {
    let own = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    (OPEN_FILES.0.min(own), OPEN_FILES.1.min(own))
}

fn rlimit(kind: PosixRlimitType, (soft, hard): (u64, u64)) -> Result<PosixRlimit, OciSpecError> {
    PosixRlimitBuilder::default().typ(kind).soft(soft).hard(hard).build()
}

fn linux(launch: &Launch, facts: &BundleFacts<'_>) -> Result<Linux, OciSpecError> {
    let own = [
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Cgroup,
    ];
    let mut namespaces = own
        .into_iter()
        .map(|kind| LinuxNamespaceBuilder::default().typ(kind).build())
        .collect::<Result<Vec<_>, _>>()?;
    let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    namespaces.push(match (&facts.user_namespace, &facts.network) {
        (Some(user_namespace), _) => network.path(user_namespace.network_namespace.clone()).build()?,
        (None, Some(prepared)) => network.path(prepared.namespace.clone()).build()?,
        (None, None) => network.build()?,
    });
    let mut linux = LinuxBuilder::default();
    if let Some(user_namespace) = &facts.user_namespace {
        let user = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::User);
        namespaces.push(user.build()?);
        let ids = LinuxIdMappingBuilder::default()
            .container_id(0_u32)
            .host_id(user_namespace.range.first())
            .size(IDS_PER_CONTAINER)
            .build()?;
        linux = linux.uid_mappings(vec![ids]).gid_mappings(vec![ids]);
    }
    linux
        .namespaces(namespaces)
        .cgroups_path(facts.cgroup)
        .resources(resources(launch.limits)?)
        .seccomp(seccomp::profile()?)
        .masked_paths(MASKED_PATHS.map(str::to_owned).to_vec())
        .readonly_paths(READ_ONLY_PATHS.map(str::to_owned).to_vec())
        .build()
}

fn resources(limits: Limits) -> Result<LinuxResources, OciSpecError> {
    // runc adds the devices that every container has (null, zero, random, tty, pts).
    let no_devices = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
    let mut resources = LinuxResourcesBuilder::default().devices(vec![no_devices]);
    if let Some(bytes) = limits.memory_bytes {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        // Memory and swap together: a container does not spill into the machine's swap.
        resources = resources.memory(LinuxMemoryBuilder::default().limit(bytes).swap(bytes).build()?);
    }
    if let Some(millis) = limits.cpu_millis {
        let (quota, period) = cpu_quota(millis);
        let shares = (u64::from(millis) * 1024 / 1000).clamp(MIN_CPU_SHARES, MAX_CPU_SHARES);
        resources = resources.cpu(
            LinuxCpuBuilder::default()
                .quota(quota)
                .period(period)
                .shares(shares)
                .build()?,
        );
    }
    if let Some(pids) = limits.pids {
        resources = resources.pids(LinuxPidsBuilder::default().limit(i64::from(pids)).build()?);
    }
    resources.build()
}

fn system_mounts(limits: Limits, user_namespace: Option<&BundleUserNamespace>) -> Result<Vec<Mount>, OciSpecError> {
    // Frameworks that pass tensors between processes need much. Half of the memory, as the kernel's own default is: who
    // fills it gets "no space left", where a larger one would have the container killed for lack of memory.
    let shm_size = limits.memory_bytes.map(|bytes| format!("size={}", bytes / 2));
    let (sys_kind, sys_source) = match user_namespace {
        // Not to be mounted by who does not own the network namespace.
        Some(user_namespace) => ("bind", user_namespace.sys.as_path()),
        None => ("sysfs", Path::new("sysfs")),
    };
    let mut sys = vec!["nosuid", "noexec", "nodev", "ro"];
    sys.extend(user_namespace.map(|_| "bind"));
    let mut shm = vec!["nosuid", "noexec", "nodev", "mode=1777"];
    shm.extend(shm_size.as_deref());
    [
        ("/proc", "proc", Path::new("proc"), vec!["nosuid", "noexec", "nodev"]),
        (
            "/dev",
            "tmpfs",
            Path::new("tmpfs"),
            vec!["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        (
            "/dev/pts",
            "devpts",
            Path::new("devpts"),
            vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/dev/shm", "tmpfs", Path::new("shm"), shm),
        (
            "/dev/mqueue",
            "mqueue",
            Path::new("mqueue"),
            vec!["nosuid", "noexec", "nodev"],
        ),
        ("/sys", sys_kind, sys_source, sys),
        // Its own part only, by the cgroup namespace: libraries size their pools by the limits they read here.
        (
            "/sys/fs/cgroup",
            "cgroup",
            Path::new("cgroup"),
            vec!["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ]
    .into_iter()
    .map(|(target, kind, source, options)| {
        MountBuilder::default()
            .destination(target)
            .typ(kind)
            .source(source)
            .options(options.into_iter().map(str::to_owned).collect::<Vec<_>>())
            .build()
    })
    .collect()
}

fn bind(wanted: &Bind) -> Result<Mount, OciSpecError> {
    // Read-only binds are not recursive: "ro" would not hold for a mount inside the source.
    let options = if wanted.read_only {
        ["bind", "ro", "nosuid", "nodev", "rprivate"]
    } else {
        ["rbind", "rw", "nosuid", "nodev", "rprivate"]
    };
    MountBuilder::default()
        .destination(Path::new(&wanted.target))
        .typ("bind")
        .source(wanted.source.clone())
        .options(options.map(str::to_owned).to_vec())
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::MIN_CPU_QUOTA;
    use crate::runtime::Rootfs;

    fn json(launch: &Launch, identity: &Identity) -> serde_json::Value {
        json_with(launch, identity, false)
    }

    fn json_with(launch: &Launch, identity: &Identity, mapped: bool) -> serde_json::Value {
        let paths = BundlePaths {
            directory: PathBuf::from("/bundle"),
            specification: PathBuf::from("/memory/bundle"),
            seen: PathBuf::from("/bundle"),
        };
        let facts = BundleFacts {
            paths: &paths,
            identity,
            cgroup: "/ionian/x/y",
            network: None,
            user_namespace: mapped.then(|| BundleUserNamespace {
                range: IdRange::TRIAL,
                sys: PathBuf::from("/stage/sys"),
                network_namespace: PathBuf::from("/proc/1/fd/9"),
            }),
            program: &OciProgram::runc(PathBuf::from("runc")),
        };
        serde_json::to_value(spec(launch, &facts).unwrap()).unwrap()
    }

    #[test]
    fn limits_become_resources() {
        let mut launch = Launch::new("c1", Rootfs::host(), vec!["true".to_owned()]);
        launch.limits = Limits {
            memory_bytes: Some(1 << 30),
            cpu_millis: Some(2500),
            pids: Some(64),
        };
        let resources = json(&launch, &Identity::ROOT)["linux"]["resources"].clone();
        assert_eq!(resources["memory"]["limit"], 1 << 30);
        assert_eq!(resources["memory"]["swap"], 1 << 30);
        assert_eq!(resources["cpu"]["quota"], 50_000);
        assert_eq!(resources["cpu"]["period"], 20_000);
        assert_eq!(resources["pids"]["limit"], 64);
        for (millis, quota, period) in [
            (50, MIN_CPU_QUOTA, 20_000),
            (49, 4_900, 100_000),
            (1, MIN_CPU_QUOTA, 100_000),
        ] {
            launch.limits.cpu_millis = Some(millis);
            let cpu = json(&launch, &Identity::ROOT)["linux"]["resources"]["cpu"].clone();
            assert_eq!(cpu["quota"], quota, "of {millis}");
            assert_eq!(cpu["period"], period, "of {millis}");
        }
    }

    #[test]
    fn a_user_namespace_has_ids_of_its_own_and_neither_makes_networks_nor_mounts_sys() {
        let launch = Launch::new("c1", Rootfs::host(), vec!["true".to_owned()]);
        let plain = json(&launch, &Identity::ROOT);
        assert!(plain["linux"]["uidMappings"].is_null());
        let spec = json_with(&launch, &Identity::ROOT, true);
        for ids in ["uidMappings", "gidMappings"] {
            let lines = spec["linux"][ids].as_array().unwrap();
            assert_eq!(lines.len(), 1, "a second one could reach ids of the host");
            assert_eq!(lines[0]["containerID"], 0);
            assert_eq!(lines[0]["hostID"], IdRange::TRIAL.first());
            assert_eq!(lines[0]["size"], 65_536);
        }
        let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.iter().any(|namespace| namespace["type"] == "user"));
        let network = namespaces
            .iter()
            .find(|namespace| namespace["type"] == "network")
            .unwrap();
        assert_eq!(network["path"], "/proc/1/fd/9");
        let mounts = spec["mounts"].as_array().unwrap();
        let sys = mounts.iter().find(|mount| mount["destination"] == "/sys").unwrap();
        assert_eq!((&sys["type"], &sys["source"]), (&"bind".into(), &"/stage/sys".into()));
        let options = sys["options"].as_array().unwrap();
        assert!(options.contains(&"ro".into()) && options.contains(&"bind".into()));
    }

    #[test]
    fn other_users_have_no_effective_capabilities() {
        let launch = Launch::new("c1", Rootfs::host(), vec!["true".to_owned()]);
        let identity = Identity {
            uid: 1000,
            gid: 1000,
            additional_gids: vec![29],
        };
        let process = json(&launch, &identity)["process"].clone();
        assert_eq!(process["capabilities"]["effective"].as_array().map_or(0, Vec::len), 0);
        assert_eq!(
            process["capabilities"]["bounding"].as_array().unwrap().len(),
            CAPABILITIES.len()
        );
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["user"]["additionalGids"][0], 29);
    }
}
