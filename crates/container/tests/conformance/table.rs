//! One list of cases over every runtime, and the table of it in `docs/conformance.md`.
//!
//! What a runtime lacks by its capabilities is asserted to be refused, and is in the table as such.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use ionian_container::{
    Bind, ContainerConfig, Egress, Feature, Launch, NetworkMode, ProcessRuntime, Rootfs, Signal, StartError, Upper,
};
use ionian_domain::container::{ContainerExit, RuntimeKind};
use tokio::io::AsyncReadExt;

use crate::outside::{CANARY, METADATA, Outside, PORT, serve_on_host};
use crate::probe::{Answer, answer, probing};
use crate::support::{
    LIMIT, Platform, Subject, can_isolate, eventually, finish, has_gvisor, processes_with, read_until, rootfs, run,
    sandboxes_of,
};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance.md");

const RUNTIMES: [RuntimeKind; 3] = [RuntimeKind::Runc, RuntimeKind::Gvisor, RuntimeKind::Process];

struct Case {
    name: &'static str,
    /// Without any of these, the case is that they are refused.
    needs: &'static [Feature],
    run: fn(Arc<Subject>) -> BoxFuture<'static, ()>,
}

macro_rules! cases {
    ($($name:literal, $needs:expr, $run:path;)*) => {
        &[$(Case { name: $name, needs: &$needs, run: |subject| Box::pin($run(subject)) }),*]
    };
}

const CASES: &[Case] = cases! {
    "exit codes", [], exit_codes;
    "death by a signal is told from an exit", [], death_by_signal;
    "SIGINT reaches the first process", [], interrupt;
    "order of output on one stream", [], order_of_output;
    "a reader that does not read stops the writer, and nothing is lost", [], back_pressure;
    "environment and working directory", [], environment;
    "a missing command is an error that names it", [], missing_command;
    "a name is taken while in use, and free afterwards", [], names;
    "removal leaves nothing, and a second one finds nothing", [], removal;
    "detached processes end with the container", [Feature::EndsAllProcesses], detached;
    "found and removed after a crash of the platform", [Feature::Layers], after_a_crash;
    "layers below stay as they are, writes are kept", [Feature::Layers], layers;
    "users, and the owners of what they write", [Feature::Users, Feature::Binds], users;
    "root becomes another user and gives files away", [Feature::Users, Feature::Binds], other_users;
    "binds, read-only and writable", [Feature::Binds], binds;
    "memory limit, seen as out of memory", [Feature::Limits], memory_limit;
    "process limit", [Feature::Limits], process_limit;
    "CPU limit", [Feature::Limits], cpu_limit;
    "`eth0` with the container's address", [Feature::OwnNetwork], eth0;
    "name servers and host names", [Feature::OwnNetwork], name_servers;
    "other containers are out of reach", [Feature::OwnNetwork], other_containers;
    "of the host, only the allowed port is in reach", [Feature::OwnNetwork], host_ports;
    "the metadata address is out of reach", [Feature::OwnNetwork], metadata;
    "a blocked network reaches the platform alone", [Feature::Egress], blocked;
    "an allow list reaches what is on it", [Feature::Egress], allow_list;
};

#[tokio::test(flavor = "multi_thread")]
async fn every_runtime_behaves_alike() {
    let mut columns = Vec::new();
    for kind in RUNTIMES {
        let here = match kind {
            RuntimeKind::Process => true,
            RuntimeKind::Runc => can_isolate(),
            RuntimeKind::Gvisor => can_isolate() && has_gvisor(),
        };
        if !here {
            columns.push(vec!["not tested".to_owned(); CASES.len()]);
            continue;
        }
        let subject = Arc::new(match kind {
            RuntimeKind::Process => Subject::Process(ProcessRuntime::new()),
            _ => Subject::Isolated(Box::new(Platform::open_kind(&format!("table-{kind}"), kind).await)),
        });
        let mut column = Vec::new();
        for case in CASES {
            column.push(outcome(case, &subject).await);
        }
        columns.push(column);
        let Some(subject) = Arc::into_inner(subject) else {
            panic!("a case kept the runtime")
        };
        subject.close().await;
    }

    let table = table(&columns);
    println!("{table}");
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance.md"), &table).unwrap();
    assert!(!table.contains("FAILED"), "see the table above");
    if !table.contains("not tested") {
        keep_document(DOCUMENT, &table);
    }
}

/// The document's table is this run's: written when asked, else compared.
fn keep_document(path: &str, table: &str) {
    const MARK: &str = "<!-- The table below is written by the tests. -->\n";
    let document = std::fs::read_to_string(path).unwrap_or_default();
    let (head, kept) = document.split_once(MARK).unwrap_or((document.as_str(), ""));
    if std::env::var_os("IONIAN_WRITE_TABLES").is_some() {
        std::fs::write(path, format!("{head}{MARK}{table}")).unwrap();
    } else {
        assert_eq!(kept, table, "run with IONIAN_WRITE_TABLES=1 to write {path}");
    }
}

async fn outcome(case: &Case, subject: &Arc<Subject>) -> String {
    let capabilities = subject.runtime().capabilities();
    if let Some(missing) = case.needs.iter().find(|feature| !capabilities.has(**feature)) {
        return match subject.runtime().start(asking_for(subject, *missing)).await {
            Err(StartError::Unsupported { .. }) => format!("refused: {missing}"),
            other => format!("FAILED: {missing} was not refused: {other:?}"),
        };
    }
    match tokio::spawn((case.run)(Arc::clone(subject))).await {
        Ok(()) => "yes".to_owned(),
        Err(error) => format!("FAILED: {error}"),
    }
}

fn asking_for(subject: &Subject, feature: Feature) -> Launch {
    let mut launch = subject.launch("refused", &["true"]);
    match feature {
        Feature::Isolation | Feature::Layers | Feature::EndsAllProcesses => {
            launch.rootfs = Rootfs::scratch(vec![PathBuf::from("/")]);
        }
        Feature::Limits => launch.limits.memory_bytes = Some(64 << 20),
        Feature::Binds => launch.binds.push(bind(Path::new("/tmp"), "/mnt", true)),
        Feature::OwnNetwork => launch.network = NetworkMode::Bridge,
        Feature::Egress => launch.egress = Egress::Blocked,
        Feature::Users => launch.user = Some("1000".to_owned()),
        Feature::Adoption => launch.outlives_us = true,
    }
    launch
}

fn table(columns: &[Vec<String>]) -> String {
    let mut table = "| | `runc` | `gvisor` | `process` |\n|---|---|---|---|\n".to_owned();
    for (row, case) in CASES.iter().enumerate() {
        let cells: Vec<_> = columns.iter().map(|column| column[row].as_str()).collect();
        let _ = writeln!(table, "| {} | {} |", case.name, cells.join(" | "));
    }
    table
}

fn bind(source: &Path, target: &str, read_only: bool) -> Bind {
    Bind {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only,
    }
}

fn platform(subject: &Subject) -> &Platform {
    match subject {
        Subject::Isolated(platform) => platform,
        Subject::Process(_) => panic!("it has no network, no layers and no limits"),
    }
}

async fn shell(subject: &Subject, name: &str, script: &str) -> crate::support::Finished {
    run(subject.runtime(), subject.launch(name, &["sh", "-c", script])).await
}

async fn exit_codes(subject: Arc<Subject>) {
    for code in [0, 1, 7, 127, 255] {
        let finished = shell(&subject, "code", &format!("exit {code}")).await;
        assert_eq!(finished.exit, ContainerExit::Exited { code });
    }
}

async fn death_by_signal(subject: Arc<Subject>) {
    let name = format!("signal-{}", std::process::id());
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let script = "trap 'trap - TERM; exit 143' TERM; echo ready; while :; do sleep 0.02; done";
        let mut container = subject
            .runtime()
            .start(subject.launch(&name, &["sh", "-c", script]))
            .await
            .unwrap();
        read_until(container.stdout.as_mut().unwrap(), "ready").await;
        container.signal(signal).unwrap();
        let exit = finish(container).await.exit;
        match (signal, exit) {
            (Signal::SIGKILL, exit) => assert_eq!(exit, ContainerExit::Signaled { signal: 9 }),
            // The first process of a pid namespace cannot die of it, so a shell says so by its exit code.
            (_, exit) => assert!(
                matches!(
                    exit,
                    ContainerExit::Signaled { signal: 15 } | ContainerExit::Exited { code: 143 }
                ),
                "{exit:?}"
            ),
        }
    }
}

async fn interrupt(subject: Arc<Subject>) {
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.02; done";
    let mut container = subject
        .runtime()
        .start(subject.launch("interrupted", &["sh", "-c", script]))
        .await
        .unwrap();
    read_until(container.stdout.as_mut().unwrap(), "ready").await;
    container.signal(Signal::SIGINT).unwrap();
    let finished = finish(container).await;
    assert_eq!(finished.exit, ContainerExit::Exited { code: 3 });
    assert_eq!(finished.stdout, "interrupted\n");
}

async fn order_of_output(subject: Arc<Subject>) {
    // Lines of the shell and of its children in turn.
    let script =
        "i=0; while [ $i -lt 200 ]; do echo shell $i; [ $((i % 20)) -ne 0 ] || env echo child $i; i=$((i+1)); done";
    let mut expected = String::new();
    for index in 0..200 {
        let _ = writeln!(expected, "shell {index}");
        if index % 20 == 0 {
            let _ = writeln!(expected, "child {index}");
        }
    }
    let script = script.replace("env echo", "bash -c 'echo $0 $1'");
    assert_eq!(shell(&subject, "order", &script).await.stdout, expected);
}

async fn back_pressure(subject: Arc<Subject>) {
    const BYTES: usize = 24 << 20;
    /// A writer that nothing stops is done long before.
    const PAUSE: Duration = Duration::from_millis(300);
    let count = BYTES.to_string();
    let mut container = subject
        .runtime()
        .start(subject.launch("flood", &["head", "-c", &count, "/dev/zero"]))
        .await
        .unwrap();
    assert!(
        tokio::time::timeout(PAUSE, container.wait()).await.is_err(),
        "it ended though nobody read"
    );
    let mut stream = container.stdout.take().unwrap();
    let mut total = 0;
    let mut buffer = vec![0; 1 << 16];
    let reading = async {
        loop {
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                length => total += length,
            }
        }
    };
    tokio::time::timeout(LIMIT, reading).await.unwrap();
    assert_eq!(total, BYTES);
    assert_eq!(container.wait().await, ContainerExit::Exited { code: 0 });
    container.dispose().await.unwrap();
}

async fn environment(subject: Arc<Subject>) {
    let mut launch = subject.launch("environment", &["sh", "-c", "echo \"$GREETING|$NOT_ASKED|$(pwd)\""]);
    launch
        .env
        .push(("GREETING".to_owned(), "hello = 'world'\nagain".to_owned()));
    "/tmp".clone_into(&mut launch.workdir);
    let finished = run(subject.runtime(), launch).await;
    assert_eq!(finished.stdout, "hello = 'world'\nagain||/tmp\n");
}

async fn missing_command(subject: Arc<Subject>) {
    let error = subject
        .runtime()
        .start(subject.launch("missing", &["no-such-program-here"]))
        .await
        .unwrap_err();
    match error {
        StartError::Refused { message, .. } => assert!(message.contains("no-such-program-here"), "{message}"),
        StartError::Spawn { program, .. } => assert_eq!(program.to_str(), Some("no-such-program-here")),
        other => panic!("{other:?}"),
    }
    no_traces(&subject);
}

fn no_traces(subject: &Subject) {
    if let Subject::Isolated(platform) = subject {
        assert_eq!(platform.container_traces(), Vec::<String>::new());
    }
}

async fn names(subject: Arc<Subject>) {
    let first = subject
        .runtime()
        .start(subject.launch("same", &["sleep", "1000"]))
        .await
        .unwrap();
    let error = subject
        .runtime()
        .start(subject.launch("same", &["true"]))
        .await
        .unwrap_err();
    assert!(matches!(error, StartError::NameTaken { .. }), "{error:?}");
    first.dispose().await.unwrap();
    let again = run(subject.runtime(), subject.launch("same", &["true"])).await;
    assert_eq!(again.exit, ContainerExit::Exited { code: 0 });
}

async fn removal(subject: Arc<Subject>) {
    let name = format!("removed-{}", std::process::id());
    let container = subject
        .runtime()
        .start(subject.launch(&name, &["sleep", "1000"]))
        .await
        .unwrap();
    let handle = container.handle();
    container.dispose().await.unwrap();
    handle.kill();
    assert!(subject.runtime().reap().await.unwrap().is_empty());
    assert!(subject.runtime().reap().await.unwrap().is_empty());
    assert_eq!((processes_with(&name), sandboxes_of(&name)), (0, 0));
    no_traces(&subject);
}

async fn detached(subject: Arc<Subject>) {
    let name = format!("detached-{}", std::process::id());
    let duration = format!("65432.{}", std::process::id());
    let script = format!("setsid sleep {duration} & setsid setsid sleep {duration} & echo ready; sleep 1000");
    let mut container = subject
        .runtime()
        .start(subject.launch(&name, &["sh", "-c", &script]))
        .await
        .unwrap();
    read_until(container.stdout.as_mut().unwrap(), "ready").await;
    eventually("they run", || subject.has_processes(&name, &duration, 2)).await;
    container.dispose().await.unwrap();
    assert_eq!((processes_with(&duration), sandboxes_of(&name)), (0, 0));
}

/// Not a test of its own: the process that [`after_a_crash`] lets crash.
#[tokio::test(flavor = "multi_thread")]
async fn crashing_process() {
    let Ok(state_dir) = std::env::var("IONIAN_TEST_CRASH_TABLE") else {
        return;
    };
    let (kind, state_dir) = state_dir.split_once(' ').unwrap();
    let kind = if kind == "gvisor" {
        RuntimeKind::Gvisor
    } else {
        RuntimeKind::Runc
    };
    let runtime = ionian_container::open(kind, crash_config(state_dir)).await.unwrap();
    let argv = vec!["sleep".to_owned(), "1000".to_owned()];
    let mut launch = Launch::new(crash_name(state_dir), Rootfs::scratch(vec![rootfs()]), argv);
    launch.env = vec![("PATH".to_owned(), "/bin".to_owned())];
    launch.network = NetworkMode::Bridge;
    launch.egress = Egress::Blocked;
    std::mem::forget(runtime.start(launch).await.unwrap());
    println!("containers are up");
    std::future::pending::<()>().await;
}

fn crash_config(state_dir: &str) -> ContainerConfig {
    let mut config = ContainerConfig::new(format!("crash-{state_dir}"), state_dir);
    config.warm_network_slots = 0;
    config
}

fn crash_name(state_dir: &str) -> String {
    let digits: String = state_dir.chars().filter(char::is_ascii_alphanumeric).collect();
    format!("c{}", &digits[digits.len().saturating_sub(20)..])
}

async fn after_a_crash(subject: Arc<Subject>) {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let directory = tempfile::tempdir().unwrap();
    let state_dir = directory.path().join("state").display().to_string();
    let kind = subject.runtime().kind();
    let mut crashing = Command::new(std::env::current_exe().unwrap())
        .args(["table::crashing_process", "--exact", "--nocapture"])
        .env("IONIAN_TEST_CRASH_TABLE", format!("{kind} {state_dir}"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(crashing.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("containers are up")));
    crashing.kill().unwrap();
    crashing.wait().unwrap();
    let config = crash_config(&state_dir);
    let runtime = ionian_container::open(kind, config.clone()).await.unwrap();
    runtime.reap().await.unwrap();
    let name = crash_name(&state_dir);
    assert_eq!((processes_with(&name), sandboxes_of(&name)), (0, 0));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&state_dir), "{mounts}");
    assert!(runtime.reap().await.unwrap().is_empty());
    let rules = std::process::Command::new("nft")
        .args(["list", "table", "inet", &format!("ionian_{}", config.short_id())])
        .output()
        .unwrap();
    let rules = String::from_utf8(rules.stdout).unwrap();
    assert!(rules.contains("map egress") && !rules.contains("goto"), "{rules}");
    runtime.remove_all().await.unwrap();
}

async fn layers(subject: Arc<Subject>) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (middle, upper_dir, work_dir) = (path("middle"), path("upper"), path("work"));
    std::fs::write(middle.join("from-middle"), "middle").unwrap();
    let mut launch = subject.launch(
        "build",
        &["sh", "-c", "cat /from-middle && echo new > /tmp/new && rm /from-middle"],
    );
    launch.rootfs.lower_dirs = vec![rootfs(), middle.clone()];
    launch.rootfs.upper = Upper::Keep {
        upper_dir: upper_dir.clone(),
        work_dir,
    };
    let finished = run(subject.runtime(), launch).await;
    assert_eq!(
        (finished.exit, finished.stdout.as_str()),
        (ContainerExit::Exited { code: 0 }, "middle"),
        "{}",
        finished.stderr
    );
    let written = std::fs::metadata(upper_dir.join("tmp/new")).unwrap();
    assert_eq!((written.uid(), written.gid(), written.len()), (0, 0, 4));
    assert!(middle.join("from-middle").exists(), "a layer below is never written");
    let mut launch = subject.launch("next", &["sh", "-c", "cat /tmp/new; test ! -e /from-middle; echo $?"]);
    launch.rootfs = Rootfs::scratch(vec![rootfs(), middle, upper_dir]);
    assert_eq!(run(subject.runtime(), launch).await.stdout, "new\n0\n");
}

async fn users(subject: Arc<Subject>) {
    let shared = tempfile::tempdir().unwrap();
    std::fs::set_permissions(shared.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    for (user, expected) in [
        (None, (0, 0)),
        (Some("web"), (1000, 1000)),
        (Some("1000:29"), (1000, 29)),
        (Some("4242"), (4242, 0)),
    ] {
        let script =
            "echo $(id -u):$(id -g); : > /shared/file && [ -O /shared/file ] && [ -G /shared/file ] && echo mine";
        let mut launch = subject.launch("user", &["sh", "-c", script]);
        launch.user = user.map(str::to_owned);
        launch.binds = vec![bind(shared.path(), "/shared", false)];
        let finished = run(subject.runtime(), launch).await;
        let (uid, gid) = expected;
        assert!(
            finished.stdout == format!("{uid}:{gid}\nmine\n"),
            "{user:?}: {}{}",
            finished.stdout,
            finished.stderr
        );
        let written = std::fs::metadata(shared.path().join("file")).unwrap();
        assert_eq!((written.uid(), written.gid()), expected, "on the host");
        std::fs::remove_file(shared.path().join("file")).unwrap();
    }
}

async fn other_users(subject: Arc<Subject>) {
    for id in [1000, 65_534] {
        for what in [format!("become {id}"), format!("chown /tmp {id}")] {
            let finished = run(subject.runtime(), probing(subject.launch("other", &[]), &what)).await;
            let found = answer(&finished.stdout);
            assert!(matches!(found, Some(Answer::Worked(_))), "{what}: {found:?}");
        }
    }
}

async fn binds(subject: Arc<Subject>) {
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "from the host").unwrap();
    let script = "cat /fixed/file /not/there/yet/file /one; echo inside > /not/there/yet/new; echo no > /fixed/no; echo no > /one";
    let mut launch = subject.launch("binds", &["sh", "-c", script]);
    launch.binds = vec![
        bind(shared.path(), "/fixed", true),
        bind(shared.path(), "/not/there/yet", false),
        bind(&shared.path().join("file"), "/one", true),
    ];
    let finished = run(subject.runtime(), launch).await;
    assert_eq!(finished.stdout, "from the host".repeat(3));
    assert!(finished.stderr.contains("Read-only"), "{}", finished.stderr);
    assert_eq!(std::fs::read_to_string(shared.path().join("new")).unwrap(), "inside\n");
    assert_eq!(
        std::fs::read_to_string(shared.path().join("file")).unwrap(),
        "from the host"
    );
    assert!(!shared.path().join("no").exists());
}

async fn memory_limit(subject: Arc<Subject>) {
    for argv in [&["tail", "/dev/zero"][..], &["sh", "-c", "tail /dev/zero; exit $?"]] {
        let mut launch = subject.launch("hungry", argv);
        launch.limits.memory_bytes = Some(96 << 20);
        assert_eq!(run(subject.runtime(), launch).await.exit, ContainerExit::OutOfMemory);
    }
}

/// With runc a fork fails; a sandbox, of which several host tasks serve each process, ends as a whole.
async fn process_limit(subject: Arc<Subject>) {
    let script = "i=0; while [ $i -lt 80 ]; do sleep 20 & i=$((i+1)); done; echo all";
    let mut launch = subject.launch("many", &["sh", "-c", script]);
    launch.limits.pids = Some(8);
    let finished = run(subject.runtime(), launch).await;
    assert!(!finished.stdout.contains("all"), "{}", finished.stdout);
    assert_ne!(finished.exit, ContainerExit::Exited { code: 0 });
    // The platform goes on.
    assert_eq!(
        shell(&subject, "after", "exit 0").await.exit,
        ContainerExit::Exited { code: 0 }
    );
}

async fn cpu_limit(subject: Arc<Subject>) {
    let mut launch = subject.launch("slow", &["sleep", "1000"]);
    launch.limits.cpu_millis = Some(500);
    let container = subject.runtime().start(launch).await.unwrap();
    let group = format!("ionian/{}/slow", platform(&subject).config.short_id());
    let read = |path: String| std::fs::read_to_string(format!("/sys/fs/cgroup/{path}")).ok();
    let quota_and_period = read(format!("{group}/cpu.max"))
        .or_else(|| {
            ["cpu", "cpu,cpuacct"].iter().find_map(|hierarchy| {
                let of = |name| read(format!("{hierarchy}/{group}/cpu.cfs_{name}_us"));
                Some(format!("{} {}", of("quota")?, of("period")?))
            })
        })
        .unwrap();
    let numbers: Vec<u64> = quota_and_period
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert!(
        matches!(numbers[..], [quota, period] if quota * 2 == period),
        "{quota_and_period}"
    );
    let members = ["cpu", "cpu,cpuacct", "."]
        .iter()
        .find_map(|path| std::fs::read_to_string(format!("/sys/fs/cgroup/{path}/{group}/cgroup.procs")).ok())
        .unwrap();
    assert!(members.lines().any(|pid| pid == container.pid.to_string()), "{members}");
    container.dispose().await.unwrap();
}

/// A container that answers every connection on [`PORT`], its address, and whatever else it does.
async fn serving(subject: &Subject, name: &str) -> ionian_container::RunningContainer {
    let mut launch = probing(subject.launch(name, &[]), &format!("serve 0.0.0.0:{PORT}"));
    launch.network = NetworkMode::Bridge;
    let mut container = subject.runtime().start(launch).await.unwrap();
    read_until(container.stdout.as_mut().unwrap(), "PROBE-SERVES").await;
    container
}

async fn connect(subject: &Subject, egress: Egress, to: &str) -> Answer {
    let mut launch = probing(subject.launch("client", &[]), &format!("connect {to}"));
    launch.network = NetworkMode::Bridge;
    launch.egress = egress;
    let finished = run(subject.runtime(), launch).await;
    answer(&finished.stdout).unwrap_or_else(|| panic!("no answer: {}{}", finished.stdout, finished.stderr))
}

fn is_refused(answer: &Answer) -> bool {
    matches!(answer, Answer::Failed(code) if ["EHOSTUNREACH", "ECONNREFUSED", "EACCES", "EPERM", "ENETUNREACH"].contains(&code.as_str()))
}

async fn eth0(subject: Arc<Subject>) {
    let container = serving(&subject, "server").await;
    let address = container.address.unwrap();
    let mut stream = tokio::net::TcpStream::connect((address, PORT)).await.unwrap();
    let mut text = [0; 11];
    stream.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"from inside");
    container.dispose().await.unwrap();

    let mut launch = subject.launch(
        "interfaces",
        &["sh", "-c", "cat /proc/net/dev /proc/net/route /proc/net/if_inet6"],
    );
    launch.network = NetworkMode::Bridge;
    let finished = run(subject.runtime(), launch).await;
    assert!(finished.stdout.contains("eth0:"), "{}", finished.stdout);
    assert!(
        finished.stdout.lines().any(|line| line.starts_with("eth0\t00000000\t")),
        "a default route: {}",
        finished.stdout
    );
    assert!(!finished.stdout.contains("fe80"), "{}", finished.stdout);
}

async fn name_servers(subject: Arc<Subject>) {
    let mut launch = subject.launch(
        "names",
        &[
            "sh",
            "-c",
            "cat /etc/resolv.conf; getent hosts localhost; cat /etc/hosts; cat /etc/hostname",
        ],
    );
    launch.network = NetworkMode::Bridge;
    let container = subject.runtime().start(launch).await.unwrap();
    let address = container.address.unwrap();
    let finished = finish(container).await;
    assert!(
        finished.stdout.starts_with("nameserver") || finished.stdout.contains("\nnameserver"),
        "{}",
        finished.stdout
    );
    assert!(
        finished.stdout.contains(&format!("{address}\tnames\n")),
        "{}",
        finished.stdout
    );
    assert!(finished.stdout.contains("localhost"), "{}", finished.stdout);
    assert!(finished.stdout.ends_with("names\n"), "{}", finished.stdout);
}

async fn other_containers(subject: Arc<Subject>) {
    let container = serving(&subject, "neighbour").await;
    let found = connect(
        &subject,
        Egress::Open,
        &format!("{}:{PORT}", container.address.unwrap()),
    )
    .await;
    assert!(matches!(found, Answer::Failed(_)), "{found:?}");
    container.dispose().await.unwrap();
}

async fn host_ports(subject: Arc<Subject>) {
    let network = platform(&subject).runtime.bridge_network();
    let gateway = network.gateway();
    let (allowed, closed) = (serve_on_host(gateway, "allowed"), serve_on_host(gateway, "closed"));
    let everywhere = serve_on_host([0, 0, 0, 0].into(), "everywhere");
    network.allow_host_port(allowed).await.unwrap();
    let found = connect(&subject, Egress::Open, &format!("{gateway}:{allowed}")).await;
    assert_eq!(found, Answer::Worked("allowed".to_owned()));
    for port in [closed, everywhere] {
        let found = connect(&subject, Egress::Open, &format!("{gateway}:{port}")).await;
        assert!(is_refused(&found), "{found:?}");
    }
    // Its loopback is its own.
    let found = connect(&subject, Egress::Open, &format!("127.0.0.1:{everywhere}")).await;
    assert!(is_refused(&found), "{found:?}");
}

async fn metadata(subject: Arc<Subject>) {
    let outside = Outside::open();
    let found = connect(&subject, Egress::Open, &format!("{}:{PORT}", outside.first)).await;
    assert_eq!(found, Answer::Worked(CANARY.to_owned()), "the stand-in answers");
    let found = connect(&subject, Egress::Open, &format!("{METADATA}:{PORT}")).await;
    assert!(is_refused(&found), "{found:?}");
}

async fn blocked(subject: Arc<Subject>) {
    let outside = Outside::open();
    let network = platform(&subject).runtime.bridge_network();
    let port = serve_on_host(network.gateway(), "the platform");
    network.allow_host_port(port).await.unwrap();
    let found = connect(&subject, Egress::Blocked, &format!("{}:{PORT}", outside.first)).await;
    assert!(is_refused(&found), "{found:?}");
    let found = connect(&subject, Egress::Blocked, &format!("{}:{port}", network.gateway())).await;
    assert_eq!(found, Answer::Worked("the platform".to_owned()));
    // The next container has nothing of it, even with the same address.
    let found = connect(&subject, Egress::Open, &format!("{}:{PORT}", outside.first)).await;
    assert_eq!(found, Answer::Worked(CANARY.to_owned()));
    let rules = std::process::Command::new("nft")
        .args(["list", "ruleset"])
        .output()
        .unwrap();
    let table = format!("table inet ionian_{}", platform(&subject).config.short_id());
    let rules = String::from_utf8(rules.stdout).unwrap();
    let own = rules
        .split("\ntable ")
        .find(|text| table.ends_with(text.lines().next().unwrap().trim_end_matches(" {")))
        .unwrap();
    assert!(!own.contains("egress_"), "the rules go with the container: {own}");
}

async fn allow_list(subject: Arc<Subject>) {
    let outside = Outside::open();
    let list = |ranges: &[String]| Egress::Allow(ranges.iter().map(|range| range.parse().unwrap()).collect());
    let (first, second) = (
        format!("{}:{PORT}", outside.first),
        format!("{}:{PORT}", outside.second),
    );
    let only_first = list(&[format!("{}/32", outside.first), "2001:db8::/32".to_owned()]);
    let found = connect(&subject, only_first.clone(), &first).await;
    assert_eq!(found, Answer::Worked(CANARY.to_owned()));
    let found = connect(&subject, only_first, &second).await;
    assert!(is_refused(&found), "{found:?}");
    let found = connect(&subject, list(&[]), &first).await;
    assert!(is_refused(&found), "{found:?}");
    // A list does not open what is closed to all, and may overlap itself.
    let everything = list(&["0.0.0.0/0".to_owned(), format!("{}/29", outside.first)]);
    let found = connect(&subject, everything.clone(), &second).await;
    assert_eq!(found, Answer::Worked(CANARY.to_owned()));
    let found = connect(&subject, everything, &format!("{METADATA}:{PORT}")).await;
    assert!(is_refused(&found), "{found:?}");
}

/// Prints what a start costs on each isolated runtime; nothing is asserted, since tests share the machine.
#[tokio::test(flavor = "multi_thread")]
async fn starts_are_measured_side_by_side() {
    const ROUNDS: usize = 9;
    if !can_isolate() {
        return;
    }
    for platform in Platform::all("side-by-side").await {
        let mut starts = Vec::new();
        for egress in [Egress::Open, Egress::Blocked] {
            let mut totals = Vec::new();
            for round in 0..ROUNDS {
                platform.runtime.bridge_network().wait_until_warm().await;
                let mut launch = platform.launch(&format!("m{round}"), &["sleep", "1000"]);
                launch.network = NetworkMode::Bridge;
                launch.egress = egress.clone();
                let container = platform.runtime.start(launch).await.unwrap();
                totals.push(
                    container
                        .timings
                        .steps
                        .iter()
                        .map(|(_, duration)| *duration)
                        .sum::<Duration>(),
                );
                container.dispose().await.unwrap();
            }
            totals.sort();
            starts.push((egress, totals[ROUNDS / 2]));
        }
        println!("{}: medians of {ROUNDS} starts: {starts:?}", platform.runtime.kind());
        platform.close().await;
    }
}
