//! Containers that outlive the process that started them, and the process that comes after it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ionian_container::{
    Bind, ContainerConfig, DisposeError, Feature, Launch, NetworkMode, OpenError, ProcessRuntime, Rootfs, RuncRuntime,
    RunningContainer, Runtime, Signal, StartError,
};
use ionian_domain::container::{ContainerExit, RuntimeKind};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::network::listen_inside;
use crate::support::{LIMIT, Platform, can_isolate, eventually, finish, processes_with, read_until, rootfs};

const DIRECTORY: &str = "IONIAN_TEST_OWNER_DIRECTORY";
const CONTAINERS: &str = "IONIAN_TEST_OWNER_CONTAINERS";

/// Waits until the test has made the file `go`.
const WAIT_FOR_GO: &str = "while [ ! -e /shared/go ]; do sleep 0.02; done";

/// What the other process is to start.
#[derive(Clone, Serialize, Deserialize)]
struct Wanted {
    name: String,
    script: String,
    outlives_us: bool,
}

fn wanted(name: &str, script: &str) -> Wanted {
    Wanted {
        name: name.to_owned(),
        script: script.to_owned(),
        outlives_us: true,
    }
}

/// What it says about them.
#[derive(Debug, Serialize, Deserialize)]
struct Up {
    gateway: IpAddr,
    containers: BTreeMap<String, (i32, IpAddr)>,
}

fn config(directory: &Path) -> ContainerConfig {
    let mut config = ContainerConfig::new(format!("owner-{}", directory.display()), directory.join("state"));
    config.warm_network_slots = 1;
    config
}

fn launch(directory: &Path, wanted: &Wanted) -> Launch {
    let argv = ["sh", "-c", &wanted.script].map(str::to_owned).to_vec();
    let mut launch = Launch::new(&wanted.name, Rootfs::scratch(vec![rootfs()]), argv);
    launch.env = vec![("PATH".to_owned(), "/bin".to_owned())];
    launch.network = NetworkMode::Bridge;
    launch.limits.memory_bytes = Some(64 << 20);
    launch.outlives_us = wanted.outlives_us;
    launch.binds = vec![Bind {
        source: directory.join("shared"),
        target: "/shared".to_owned(),
        read_only: true,
    }];
    launch
}

/// Not a test of its own: the process whose containers the tests below adopt.
#[tokio::test(flavor = "multi_thread")]
async fn owning_process() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let runtime = RuncRuntime::open(config(&directory)).await.unwrap();
    let all: Vec<Wanted> = serde_json::from_str(&std::env::var(CONTAINERS).unwrap()).unwrap();
    let mut containers = BTreeMap::new();
    for wanted in &all {
        let container = runtime.start(launch(&directory, wanted)).await.unwrap();
        containers.insert(wanted.name.clone(), (container.pid, container.address.unwrap()));
        std::mem::forget(container);
    }
    let gateway = runtime.bridge_network().gateway();
    println!("\nup {}", serde_json::to_string(&Up { gateway, containers }).unwrap());
    std::future::pending::<()>().await;
}

/// Another process with its containers.
struct Owner {
    process: Child,
    directory: Option<tempfile::TempDir>,
    up: Up,
}

impl Owner {
    fn start(containers: &[Wanted]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("shared")).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["adoption::owning_process", "--exact", "--nocapture"])
            .env(DIRECTORY, directory.path())
            .env(CONTAINERS, serde_json::to_string(containers).unwrap())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let up = BufReader::new(process.stdout.take().unwrap())
            .lines()
            .find_map(|line| line.unwrap().strip_prefix("up ").map(str::to_owned))
            .expect("the containers start");
        Self {
            process,
            directory: Some(directory),
            up: serde_json::from_str(&up).unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.directory.as_ref().unwrap().path()
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn go(&self) {
        std::fs::write(self.path().join("shared/go"), "").unwrap();
    }

    fn pids(&self) -> BTreeMap<String, i32> {
        let containers = self.up.containers.iter();
        containers.map(|(name, (pid, _))| (name.clone(), *pid)).collect()
    }

    fn record(&self, name: &str) -> PathBuf {
        record(&config(self.path()), name)
    }

    /// The process that comes after it.
    async fn successor(&mut self) -> Platform {
        let directory = self.directory.take().unwrap();
        Platform::open_on(config(directory.path()), directory, RuntimeKind::Runc).await
    }
}

/// A test that failed early does not leave containers on the machine.
impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let Some(directory) = self.directory.take() else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tokio::runtime::Runtime::new().unwrap().block_on(async {
                    let runtime = RuncRuntime::open(config(directory.path())).await.unwrap();
                    println!("removed what the failed test left: {:?}", runtime.remove_all().await);
                });
            });
        });
    }
}

fn record(config: &ContainerConfig, name: &str) -> PathBuf {
    config.volatile_dir.join("bundles").join(name).join("container.json")
}

fn keeper_of(record: &Path) -> i32 {
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    i32::try_from(record["keeper"]["pid"].as_i64().unwrap()).unwrap()
}

/// As the host sees them, whatever is written down.
fn keepers_of(directory: &Path) -> Vec<i32> {
    let bundles = config(directory).volatile_dir.join("bundles");
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("\0ionian-keeper\0") && line.contains(&bundles.display().to_string())
        })
        .collect()
}

/// Whether it has not ended; who is to reap it may take its time.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

fn kill_9(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

async fn exit_of(container: &mut RunningContainer) -> ContainerExit {
    tokio::time::timeout(LIMIT, container.wait())
        .await
        .expect("the container ends in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_outlives_its_owner_and_goes_on_with_the_next() {
    if !can_isolate() {
        return;
    }
    let step = Wanted {
        outlives_us: false,
        ..wanted("step", &format!("sleep 87654.{}", std::process::id()))
    };
    let hungry = format!("{WAIT_FOR_GO}; tail /dev/zero");
    let mut owner = Owner::start(&[
        wanted("main", &format!("echo before; {WAIT_FOR_GO}; echo after; exit 7")),
        wanted("hungry", &hungry),
        step,
    ]);
    assert!(matches!(
        RuncRuntime::open(config(owner.path())).await,
        Err(OpenError::StateDirInUse { .. })
    ));
    owner.kill();
    let (pid, address) = owner.up.containers["main"];
    assert!(runs(pid), "it runs on");
    let keeper = keeper_of(&owner.record("main"));

    let platform = owner.successor().await;
    let network = platform.runtime.bridge_network();
    assert_eq!(network.gateway(), owner.up.gateway);
    assert_eq!(platform.runtime.adoptable(), ["hungry", "main"]);
    assert_eq!(processes_with(&format!("87654.{}", std::process::id())), 0);
    assert!(matches!(
        platform.runtime.start(platform.shell("main", "true")).await,
        Err(StartError::NameTaken { .. })
    ));
    let mut container = platform.runtime.adopt("main").await.unwrap();
    let mut hungry = platform.runtime.adopt("hungry").await.unwrap();
    assert!(platform.runtime.adopt("main").await.is_none(), "handed out once");
    assert!(platform.runtime.adopt("step").await.is_none());
    assert_eq!((container.pid, container.address), (pid, Some(address)));
    let mut stdout = container.stdout.take().unwrap();
    assert_eq!(read_until(&mut stdout, "before").await, "before\n");

    // The network is the one it had: the host reaches it, and its address is not given away.
    listen_inside(pid, 7071);
    let connected = tokio::time::timeout(LIMIT, TcpStream::connect((address, 7071)));
    assert_eq!(connected.await.unwrap().unwrap().read_u8().await.unwrap(), b'x');
    let mut launch = platform.shell("newcomer", "true");
    launch.network = NetworkMode::Bridge;
    let newcomer = platform.runtime.start(launch).await.unwrap();
    assert!(![container.address, hungry.address].contains(&newcomer.address));
    finish(newcomer).await;
    assert!(
        platform.runtime.reap().await.unwrap().is_empty(),
        "what is adopted is left alone"
    );

    std::fs::write(platform.config.state_dir.with_file_name("shared").join("go"), "").unwrap();
    assert_eq!(read_until(&mut stdout, "after").await, "after\n");
    assert_eq!(exit_of(&mut container).await, ContainerExit::Exited { code: 7 });
    assert_eq!(exit_of(&mut hungry).await, ContainerExit::OutOfMemory);
    container.dispose().await.unwrap();
    hungry.dispose().await.unwrap();
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    eventually("the keeper is gone", || !runs(keeper)).await;
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_while_nobody_looked_is_known_to_who_comes_later() {
    if !can_isolate() {
        return;
    }
    let mut owner = Owner::start(&[
        wanted("coded", &format!("{WAIT_FOR_GO}; echo out; echo err >&2; exit 3")),
        wanted("hungry", &format!("{WAIT_FOR_GO}; tail /dev/zero")),
        wanted("killed", "sleep 1000"),
        wanted("unwanted", &format!("{WAIT_FOR_GO}; echo nobody reads this")),
    ]);
    owner.kill();
    owner.go();
    kill_9(owner.up.containers["killed"].0);
    let pids: Vec<_> = owner.up.containers.values().map(|(pid, _)| *pid).collect();
    eventually("all have ended", || !pids.iter().any(|pid| runs(*pid))).await;
    let unwanted = keeper_of(&owner.record("unwanted"));

    let platform = owner.successor().await;
    assert_eq!(platform.runtime.adoptable(), ["coded", "hungry", "killed", "unwanted"]);
    let coded = finish(platform.runtime.adopt("coded").await.unwrap()).await;
    assert_eq!(coded.exit, ContainerExit::Exited { code: 3 });
    assert_eq!((coded.stdout.as_str(), coded.stderr.as_str()), ("out\n", "err\n"));
    let hungry = finish(platform.runtime.adopt("hungry").await.unwrap()).await;
    assert_eq!(hungry.exit, ContainerExit::OutOfMemory);
    let killed = finish(platform.runtime.adopt("killed").await.unwrap()).await;
    assert_eq!(killed.exit, ContainerExit::Signaled { signal: 9 });

    assert!(runs(unwanted), "its keeper waits for a reader");
    platform.runtime.discard_unadopted().await.unwrap();
    assert_eq!(platform.runtime.adoptable(), Vec::<String>::new());
    assert!(platform.runtime.adopt("unwanted").await.is_none());
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    eventually("the keeper is gone", || !runs(unwanted)).await;
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_containers_are_signalled_killed_and_discarded_like_others() {
    if !can_isolate() {
        return;
    }
    let endless = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.02; done";
    let names = ["interrupted", "killed", "dropped", "flooding", "discarded", "reaped"];
    let containers: Vec<_> = names
        .iter()
        .map(|name| match *name {
            "flooding" => wanted(name, "while :; do echo much of the same and nobody reads it; done"),
            name => wanted(name, endless),
        })
        .collect();
    let mut owner = Owner::start(&containers);
    owner.kill();
    let pids = owner.pids();
    let platform = owner.successor().await;
    let adopt = async |name: &str| platform.runtime.adopt(name).await.unwrap();

    let mut interrupted = adopt("interrupted").await;
    read_until(interrupted.stdout.as_mut().unwrap(), "ready").await;
    interrupted.signal(Signal::SIGINT).unwrap();
    let interrupted = finish(interrupted).await;
    assert_eq!(interrupted.exit, ContainerExit::Exited { code: 5 });
    assert_eq!(interrupted.stdout, "interrupted\n");

    let killed = adopt("killed").await;
    killed.handle().kill();
    assert_eq!(finish(killed).await.exit, ContainerExit::Signaled { signal: 9 });

    drop(adopt("dropped").await);
    eventually("the dropped one is gone", || !runs(pids["dropped"])).await;
    // With both pipes full and never read.
    adopt("flooding").await.dispose().await.unwrap();

    assert_eq!(platform.runtime.adoptable(), ["discarded", "reaped"]);
    platform.runtime.discard_unadopted().await.unwrap();
    eventually("no traces", || platform.container_traces().is_empty()).await;
    assert!(!pids.values().any(|pid| runs(*pid)));
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_adopted_is_reaped() {
    if !can_isolate() {
        return;
    }
    let mut owner = Owner::start(&[wanted("one", "sleep 1000"), wanted("other", "exit 1")]);
    owner.kill();
    let pids = owner.pids();
    let platform = owner.successor().await;
    assert_eq!(platform.runtime.adoptable().len(), 2);
    let report = platform.runtime.reap().await.unwrap();
    // With user namespaces a container has several.
    assert!(report.mounts >= 2 && report.killed_processes >= 1, "{report:?}");
    assert_eq!(platform.runtime.adoptable(), Vec::<String>::new());
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    assert!(!pids.values().any(|pid| runs(*pid)));
    platform.close().await;
}

/// A number that was given away again, another run of the machine, half a record.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_certainly_ours_is_not_adopted() {
    if !can_isolate() {
        return;
    }
    let names = ["reused", "rebooted", "torn", "good"];
    let mut owner = Owner::start(&names.map(|name| wanted(name, "sleep 1000")));
    owner.kill();
    let mut innocent = Command::new("setsid").args(["sleep", "1000"]).spawn().unwrap();
    let edit = |name: &str, edit: &dyn Fn(&mut serde_json::Value)| {
        let path = owner.record(name);
        let mut record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut record);
        std::fs::write(&path, record.to_string()).unwrap();
    };
    edit("reused", &|record| record["keeper"]["pid"] = innocent.id().into());
    edit("rebooted", &|record| record["boot_id"] = "another".into());
    std::fs::write(owner.record("torn"), "{\"version\":1").unwrap();
    let pids = owner.pids();
    let keepers = keepers_of(owner.path());
    assert_eq!(keepers.len(), 4);

    let platform = owner.successor().await;
    assert_eq!(platform.runtime.adoptable(), ["good"]);
    eventually("keepers end that nobody knows of", || {
        keepers.iter().filter(|keeper| runs(**keeper)).count() == 1
    })
    .await;
    assert!(runs(pids["good"]));
    assert!(!["reused", "rebooted", "torn"].iter().any(|name| runs(pids[*name])));
    assert!(
        innocent.try_wait().unwrap().is_none(),
        "the other process is left alone"
    );
    innocent.kill().unwrap();
    innocent.wait().unwrap();

    // Shutting down for good ends also what has been let go of.
    platform.runtime.adopt("good").await.unwrap().release();
    platform.close().await;
    assert!(!runs(pids["good"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_firewall_a_container_is_not_adopted() {
    if !can_isolate() {
        return;
    }
    let mut owner = Owner::start(&[wanted("bare", "sleep 1000")]);
    owner.kill();
    let table = format!("ionian_{}", config(owner.path()).short_id());
    let deleted = Command::new("nft")
        .args(["delete", "table", "inet", &table])
        .status()
        .unwrap();
    assert!(deleted.success());
    let (pid, gateway) = (owner.up.containers["bare"].0, owner.up.gateway);
    let platform = owner.successor().await;
    assert_eq!(platform.runtime.adoptable(), Vec::<String>::new());
    assert!(!runs(pid));
    assert_eq!(
        platform.runtime.bridge_network().gateway(),
        gateway,
        "the choice is kept"
    );
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_does_not_outlive_its_keeper() {
    if !can_isolate() {
        return;
    }
    let mut owner = Owner::start(&[wanted("adopted", "sleep 1000"), wanted("unseen", "sleep 1000")]);
    owner.kill();
    let unseen = keeper_of(&owner.record("unseen"));
    kill_9(unseen);
    eventually("it ends", || !runs(unseen)).await;
    let pids = owner.pids();
    let platform = owner.successor().await;
    assert_eq!(platform.runtime.adoptable(), ["adopted"]);
    assert!(!runs(pids["unseen"]));

    let mut launch = platform.launch("started", &["sleep", "1000"]);
    launch.outlives_us = true;
    let started = platform.runtime.start(launch).await.unwrap();
    let adopted = platform.runtime.adopt("adopted").await.unwrap();
    for mut container in [started, adopted] {
        let keeper = keeper_of(&record(&platform.config, &container.name));
        kill_9(keeper);
        assert_eq!(exit_of(&mut container).await, ContainerExit::Lost);
        eventually("the container is gone", || !runs(container.pid)).await;
        container.dispose().await.unwrap();
        eventually("no zombie is left", || !Path::new(&format!("/proc/{keeper}")).exists()).await;
    }
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_handed_over_in_an_orderly_way() {
    if !can_isolate() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    std::fs::create_dir(directory.path().join("shared")).unwrap();
    let first = RuncRuntime::open(config.clone()).await.unwrap();
    let gateway = first.bridge_network().gateway();
    let mut kept = first
        .start(launch(
            directory.path(),
            &wanted("kept", &format!("echo one; {WAIT_FOR_GO}; echo two")),
        ))
        .await
        .unwrap();
    let step = Wanted {
        outlives_us: false,
        ..wanted("step", "sleep 1000")
    };
    let step = first.start(launch(directory.path(), &step)).await.unwrap();
    let (pid, address, step_pid) = (kept.pid, kept.address, step.pid);
    let keeper = keeper_of(&record(&config, "kept"));
    // What was read stays read.
    read_until(kept.stdout.as_mut().unwrap(), "one").await;
    kept.release();
    step.release();
    eventually("what cannot be handed over is ended", || !runs(step_pid)).await;
    first.detach().await.unwrap();
    assert!(matches!(
        first.start(launch(directory.path(), &wanted("late", "true"))).await,
        Err(StartError::ShutDown)
    ));
    assert!(matches!(
        RuncRuntime::open(config.clone()).await,
        Err(OpenError::StateDirInUse { .. })
    ));
    drop(first);
    // The step's removal in the background holds the directory until it is done.
    let deadline = std::time::Instant::now() + LIMIT;
    let second = loop {
        match RuncRuntime::open(config.clone()).await {
            Ok(runtime) => break runtime,
            Err(OpenError::StateDirInUse { .. }) if std::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => panic!("{error:?}"),
        }
    };
    assert_eq!(second.bridge_network().gateway(), gateway);
    assert_eq!(second.adoptable(), ["kept"]);
    let again = second.adopt("kept").await.unwrap();
    assert_eq!((again.pid, again.address), (pid, address));
    std::fs::write(directory.path().join("shared/go"), "").unwrap();
    let finished = finish(again).await;
    assert_eq!(finished.exit, ContainerExit::Exited { code: 0 });
    assert_eq!(finished.stdout, "two\n");
    assert!(
        !Path::new(&format!("/proc/{keeper}")).exists(),
        "no zombie of our child is left"
    );
    second.remove_all().await.unwrap();
}

#[tokio::test]
async fn a_runtime_that_cannot_leave_containers_behind_says_so() {
    let runtime = ProcessRuntime::new();
    assert!(!runtime.capabilities().has(Feature::Adoption));
    let mut launch = Launch::new("outliving", Rootfs::host(), vec!["true".to_owned()]);
    launch.network = NetworkMode::Host;
    launch.outlives_us = true;
    assert!(matches!(
        runtime.start(launch).await,
        Err(StartError::Unsupported { .. })
    ));
    assert_eq!(runtime.adoptable(), Vec::<String>::new());
    assert!(runtime.adopt("outliving").await.is_none());
    let discarded: Result<(), DisposeError> = runtime.discard_unadopted().await;
    discarded.unwrap();
}
