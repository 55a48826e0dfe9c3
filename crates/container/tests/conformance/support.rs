//! A platform per test, a small root file system, and what must be gone at the end.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ionian_container::{
    ContainerConfig, GvisorRuntime, Launch, Network, NetworkMode, OutputStream, ProcessRuntime, Rootfs, RuncRuntime,
    RunningContainer, Runtime, StartError,
};
use ionian_domain::container::{ContainerExit, RuntimeKind};
use tokio::io::AsyncReadExt;

/// No single wait of a test is longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Programs of this machine that the containers use. They are copied with their libraries.
const PROGRAMS: [&str; 20] = [
    "sh", "bash", "cat", "ls", "id", "sleep", "true", "head", "tail", "env", "mkdir", "touch", "rm", "mount",
    "unshare", "setsid", "timeout", "mknod", "getent", "wc",
];

pub(crate) fn can_isolate() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        println!("skipped: needs root");
    }
    is_root
}

/// Whether the runtime with a kernel of its own can be tested here.
pub(crate) fn has_gvisor() -> bool {
    let found = Command::new("runsc")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped for gvisor: this machine has no runsc");
    }
    found
}

/// A directory with [`PROGRAMS`], made once and kept among the build's files.
pub(crate) fn rootfs() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("container-rootfs-2");
    if target.exists() {
        return target;
    }
    // Tests run in processes of their own; the first to finish wins.
    let own = tempfile::Builder::new()
        .prefix("rootfs-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap();
    let root = own.path().join("root");
    for directory in ["bin", "etc", "tmp", "root", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let mut files = libraries_of(&std::env::current_exe().unwrap());
    for program in PROGRAMS {
        let found = ["/usr/bin", "/bin", "/usr/sbin"].map(|directory| Path::new(directory).join(program));
        let source = found
            .iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| panic!("this machine has no {program}"));
        fs::copy(source, root.join("bin").join(program)).unwrap();
        files.extend(libraries_of(source));
    }
    for library in files {
        let copy = root.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(&library, copy).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000:web:/tmp:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:1000:\naudio:x:29:web\n").unwrap();
    // Lost to another process that made the same.
    let _ = fs::rename(&root, &target);
    assert!(target.exists());
    target
}

fn libraries_of(program: &Path) -> BTreeSet<PathBuf> {
    let libraries = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(libraries.stdout).unwrap();
    text.split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect()
}

pub(crate) struct Finished {
    pub(crate) exit: ContainerExit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A runtime under test, and how to ask it for a container that any of them can start.
pub(crate) enum Subject {
    Isolated(Box<Platform>),
    Process(ProcessRuntime),
}

impl Subject {
    /// Every runtime that can run here.
    pub(crate) async fn all(test: &str) -> Vec<Self> {
        let mut subjects = vec![Self::Process(ProcessRuntime::new())];
        if can_isolate() {
            for platform in Platform::all(test).await {
                subjects.push(Self::Isolated(Box::new(platform)));
            }
        }
        subjects
    }

    pub(crate) fn runtime(&self) -> &dyn Runtime {
        match self {
            Self::Isolated(platform) => &*platform.runtime,
            Self::Process(runtime) => runtime,
        }
    }

    pub(crate) fn launch(&self, name: &str, argv: &[&str]) -> Launch {
        match self {
            Self::Isolated(platform) => platform.launch(name, argv),
            Self::Process(_) => {
                let mut launch = Launch::new(
                    name,
                    Rootfs::host(),
                    argv.iter().map(|word| (*word).to_owned()).collect(),
                );
                launch.env = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
                launch.network = NetworkMode::Host;
                launch
            }
        }
    }

    /// Whether the container's processes, all of which have `word` in their command line, are on the host. A
    /// sandbox's are not to be seen there; it is, by the container's name.
    pub(crate) fn has_processes(&self, container: &str, word: &str, count: usize) -> bool {
        let found = match self.runtime().kind() {
            RuntimeKind::Gvisor => usize::from(sandboxes_of(container) > 0) * count,
            RuntimeKind::Runc | RuntimeKind::Process => processes_with(word),
        };
        found == count
    }

    pub(crate) async fn close(self) {
        if let Self::Isolated(platform) = self {
            platform.close().await;
        }
    }
}

/// A runtime whose containers have a network.
pub(crate) struct Isolated(Box<dyn Runtime>);

impl Isolated {
    pub(crate) fn bridge_network(&self) -> &Network {
        self.0.network().unwrap()
    }
}

impl Deref for Isolated {
    type Target = dyn Runtime;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// One instance of the platform with its own directory.
pub(crate) struct Platform {
    pub(crate) runtime: Isolated,
    pub(crate) config: ContainerConfig,
    closed: bool,
    directory: tempfile::TempDir,
}

impl Platform {
    pub(crate) async fn open(test: &str) -> Self {
        Self::open_kind(test, RuntimeKind::Runc).await
    }

    /// One for every isolated runtime that can run here.
    pub(crate) async fn all(test: &str) -> Vec<Self> {
        let mut platforms = vec![Self::open(test).await];
        if has_gvisor() {
            platforms.push(Self::open_kind(&format!("{test}-gvisor"), RuntimeKind::Gvisor).await);
        }
        platforms
    }

    pub(crate) async fn open_kind(test: &str, kind: RuntimeKind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = ContainerConfig::new(format!("{test}-{}", std::process::id()), directory.path().join("state"));
        config.warm_network_slots = 2;
        Self::open_on(config, directory, kind).await
    }

    /// On what another process may have left.
    pub(crate) async fn open_on(config: ContainerConfig, directory: tempfile::TempDir, kind: RuntimeKind) -> Self {
        let runtime: Box<dyn Runtime> = match kind {
            RuntimeKind::Runc => Box::new(RuncRuntime::open(config.clone()).await.unwrap()),
            RuntimeKind::Gvisor => Box::new(GvisorRuntime::open(config.clone()).await.unwrap()),
            RuntimeKind::Process => panic!("it is not isolated"),
        };
        Self {
            runtime: Isolated(runtime),
            config,
            closed: false,
            directory,
        }
    }

    #[expect(clippy::unused_self, reason = "reads as what it is: a launch for this platform")]
    pub(crate) fn launch(&self, name: &str, argv: &[&str]) -> Launch {
        let mut launch = Launch::new(
            name,
            Rootfs::scratch(vec![rootfs()]),
            argv.iter().map(|word| (*word).to_owned()).collect(),
        );
        launch.env = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
        launch.limits.memory_bytes = Some(256 << 20);
        launch.limits.pids = Some(64);
        launch
    }

    pub(crate) fn shell(&self, name: &str, script: &str) -> Launch {
        self.launch(name, &["sh", "-c", script])
    }

    pub(crate) async fn run(&self, launch: Launch) -> Finished {
        run(&*self.runtime, launch).await
    }

    /// Shuts down so that another one can go on. Returns the directory.
    pub(crate) async fn detach(mut self) -> tempfile::TempDir {
        self.closed = true;
        self.runtime.detach().await.unwrap();
        // Kept for the next one, and so is what is in it.
        std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap())
    }

    /// Shuts down and looks for what should be gone.
    pub(crate) async fn close(mut self) {
        self.closed = true;
        self.runtime.remove_all().await.unwrap();
        assert_eq!(self.traces(), Vec::<String>::new());
        assert!(matches!(
            self.runtime.start(self.launch("late", &["true"])).await,
            Err(StartError::ShutDown)
        ));
    }

    /// Everything on the host that belongs to this instance, bridge and firewall included.
    pub(crate) fn traces(&self) -> Vec<String> {
        let id = self.config.short_id();
        let mut found = self.container_traces();
        let interfaces = nix::net::if_::if_nameindex().unwrap();
        found.extend(
            (&interfaces)
                .into_iter()
                .map(|link| link.name().to_string_lossy().into_owned())
                .filter(|name| name.contains(&id)),
        );
        let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
        let tables = String::from_utf8(tables.stdout).unwrap();
        found.extend(tables.lines().filter(|line| line.contains(&id)).map(str::to_owned));
        found
    }

    /// What containers leave: mounts, control groups and directories.
    pub(crate) fn container_traces(&self) -> Vec<String> {
        let id = self.config.short_id();
        let state = self.config.state_dir.display().to_string();
        let volatile = self.config.volatile_dir.to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut found: Vec<_> = mounts
            .lines()
            .filter(|line| line.contains(&state) || line.contains(volatile))
            .map(str::to_owned)
            .collect();
        let hierarchies = fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .map(|entry| entry.unwrap().path());
        for hierarchy in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
            let group = hierarchy.join("ionian").join(&id);
            if let Ok(entries) = fs::read_dir(&group) {
                found.extend(
                    entries
                        .flatten()
                        .filter(|entry| entry.path().is_dir())
                        .map(|entry| entry.path().display().to_string()),
                );
            }
        }
        let volatile = &self.config.volatile_dir;
        let directories = [
            self.config.state_dir.join("containers"),
            volatile.join("stages"),
            volatile.join("bundles"),
            volatile.join("runc"),
        ];
        for directory in directories {
            // The one in memory goes away with the platform.
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            found.extend(entries.flatten().map(|entry| entry.path().display().to_string()));
        }
        // Claims of ids name who made them.
        let claims = fs::read_dir("/run/ionian-ids").into_iter().flatten().flatten();
        found.extend(
            claims
                .filter(|claim| fs::read_link(claim.path()).is_ok_and(|owner| owner.starts_with(&id)))
                .map(|claim| claim.path().display().to_string()),
        );
        found
    }

    /// Ends of containers' interfaces on the host.
    pub(crate) fn links(&self) -> usize {
        let prefix = format!("iv{}", self.config.short_id());
        let interfaces = nix::net::if_::if_nameindex().unwrap();
        (&interfaces)
            .into_iter()
            .filter(|link| link.name().to_string_lossy().starts_with(&prefix))
            .count()
    }
}

/// A test that failed does not leave its bridge and firewall on the machine.
impl Drop for Platform {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let removed = tokio::runtime::Runtime::new()
                    .unwrap()
                    .block_on(self.runtime.remove_all());
                println!("removed what the failed test left: {removed:?}");
            });
        });
    }
}

/// Runs to the end, reads everything, disposes.
pub(crate) async fn run(runtime: &dyn Runtime, launch: Launch) -> Finished {
    let container = runtime.start(launch).await.unwrap();
    finish(container).await
}

pub(crate) async fn finish(mut container: RunningContainer) -> Finished {
    let (stdout, stderr) = (container.stdout.take().unwrap(), container.stderr.take().unwrap());
    let all = async { tokio::join!(container.wait(), read_all(stdout), read_all(stderr)) };
    let (exit, stdout, stderr) = tokio::time::timeout(LIMIT, all)
        .await
        .expect("the container ends in time");
    container.dispose().await.unwrap();
    Finished { exit, stdout, stderr }
}

async fn read_all(mut stream: OutputStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Reads until the container has printed `word`.
pub(crate) async fn read_until(stream: &mut OutputStream, word: &str) -> String {
    let mut text = String::new();
    let reading = async {
        while !text.contains(word) {
            let mut buffer = [0; 4096];
            let length = stream.read(&mut buffer).await.unwrap();
            assert!(length > 0, "the output ended with {text:?}");
            text += std::str::from_utf8(&buffer[..length]).unwrap();
        }
    };
    tokio::time::timeout(LIMIT, reading)
        .await
        .expect("the container prints in time");
    text
}

/// How many processes of the host have this word in their command line.
pub(crate) fn processes_with(word: &str) -> usize {
    processes(|argument| argument == word.as_bytes())
}

/// How many of the host's processes are of this container's sandbox.
pub(crate) fn sandboxes_of(container: &str) -> usize {
    let ending = format!("-{container}");
    processes(|argument| argument.ends_with(ending.as_bytes()))
}

fn processes(has: impl Fn(&[u8]) -> bool) -> usize {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| line.split(|byte| *byte == 0).any(&has))
        .count()
}

/// Waits for a condition, with the limit of every wait.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
