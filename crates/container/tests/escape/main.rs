//! Ways out of a container, tried from inside on both isolated runtimes, and the table of them in
//! `docs/escape-suite.md`.
//!
//! Each attempt must fail, or be answered by the sandbox's own kernel with nothing of the host in it. A canary
//! that lies outside (in a file, an environment, a server's answer) must never be seen inside.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helpers")]
#![expect(clippy::print_stdout, reason = "tests say what they skip and what they measured")]
#![expect(dead_code, reason = "helpers of the conformance suite, of which this needs some")]

#[path = "../conformance/outside.rs"]
mod outside;
#[path = "../conformance/probe.rs"]
mod probe;
#[path = "../conformance/support.rs"]
mod support;

use std::fmt::Write as _;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use ionian_container::{Bind, Launch, NetworkMode};
use ionian_domain::container::{ContainerExit, RuntimeKind};

use crate::outside::{METADATA, Outside, PORT, serve_on_host};
use crate::probe::{Answer, answer, probing};
use crate::support::{Platform, can_isolate, finish, has_gvisor, read_until, rootfs};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/escape-suite.md");

/// In each thing outside that an attempt may reach; see also [`outside::CANARY`].
const CANARY: &str = "canary-of-the-host";

/// What is tried, and whether a sandbox may answer it itself: its own kernel then did it, to itself.
struct Attempt {
    name: &'static str,
    probe: String,
    own_kernel: bool,
}

fn attempt(name: &'static str, probe: impl Into<String>) -> Attempt {
    Attempt {
        name,
        probe: probe.into(),
        own_kernel: false,
    }
}

/// For what a kernel of its own may do without the host's taking part.
fn within(name: &'static str, probe: impl Into<String>) -> Attempt {
    Attempt {
        own_kernel: true,
        ..attempt(name, probe)
    }
}

fn attempts(secret: &Path, abstract_name: &str) -> Vec<Attempt> {
    let secret = secret.display();
    let own = std::process::id();
    vec![
        attempt("mount a file system", "mount"),
        attempt("unmount `/proc`", "umount"),
        within("ptrace another process", "ptrace"),
        attempt("enter the namespaces of process 1", "setns"),
        within("make a user namespace", "unshare_user"),
        within("become a user beyond the container's ids", "become 65536"),
        within("give a file to a user beyond them", "chown /tmp 65536"),
        attempt("widen the container's ids", "write /proc/self/uid_map 0 0 1"),
        attempt(
            "write `/proc/sys/kernel/core_pattern`",
            "write /proc/sys/kernel/core_pattern |/x",
        ),
        within(
            "write `/proc/sys/net/ipv4/ip_forward`",
            "write /proc/sys/net/ipv4/ip_forward 0",
        ),
        attempt("write `/proc/sysrq-trigger`", "write /proc/sysrq-trigger h"),
        attempt("cgroup `release_agent`", "release_agent"),
        attempt("add a kernel key", "add_key"),
        attempt("join a keyring", "keyctl"),
        attempt("userfaultfd", "userfaultfd"),
        within("io_uring", "io_uring_setup"),
        attempt("bpf", "bpf"),
        attempt("perf_event_open", "perf_event_open"),
        attempt("kexec_load", "kexec_load"),
        attempt("init_module", "init_module"),
        attempt("finit_module", "finit_module"),
        attempt("reboot", "reboot"),
        attempt("set the clock", "clock_settime"),
        within("read the kernel's log", "kernel_log"),
        attempt("open a file of the host by its handle", "open_by_handle_at"),
        attempt("raw socket", "raw_socket"),
        attempt("packet socket", "packet_socket"),
        attempt("vsock", "vsock"),
        attempt("an abstract socket of the host", format!("abstract {abstract_name}")),
        attempt("make and read the disk's device node (254:0)", "device 254 0"),
        attempt("make and read the disk's device node (8:0)", "device 8 0"),
        attempt("read `/dev/mem`", "read /dev/mem"),
        attempt("read `/dev/kmsg`", "read /dev/kmsg"),
        attempt("read `/proc/kcore`", "read /proc/kcore"),
        attempt("a file of the host by its path", format!("read {secret}")),
        attempt("the same through `/proc/1/root`", format!("read /proc/1/root{secret}")),
        attempt(
            "the same through `/proc/self/cwd/../..`",
            format!("read /proc/self/cwd/../../../..{secret}"),
        ),
        attempt("the same out of a `chroot`", format!("chroot {secret}")),
        attempt(
            "the environment of the platform's process",
            format!("read /proc/{own}/environ"),
        ),
    ]
}

/// Tried with a network.
fn connections(
    neighbour: &str,
    gateway: &str,
    bridge_port: u16,
    loopback_port: u16,
    uplink: Option<String>,
) -> Vec<Attempt> {
    let mut attempts = vec![
        attempt("another container's port", format!("connect {neighbour}:{PORT}")),
        attempt(
            "a service of the host on the bridge",
            format!("connect {gateway}:{bridge_port}"),
        ),
        attempt(
            "a service of the host on 127.0.0.1",
            format!("connect 127.0.0.1:{loopback_port}"),
        ),
        attempt("the metadata address", format!("connect {METADATA}:{PORT}")),
        attempt("another link-local address", format!("connect 169.254.170.2:{PORT}")),
    ];
    if let Some(uplink) = uplink {
        attempts.push(attempt(
            "a service of the host on its own address",
            format!("connect {uplink}:{bridge_port}"),
        ));
    }
    attempts
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_out_is_closed() {
    if !can_isolate() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, CANARY).unwrap();
    let abstract_name = format!("ionian-escape-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&abstract_name).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let kernel = kernel_state();
    let outside = Outside::open();

    let mut kinds = vec![RuntimeKind::Runc];
    kinds.extend(has_gvisor().then_some(RuntimeKind::Gvisor));
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    for (column, kind) in kinds.iter().enumerate() {
        let platform = Platform::open_kind(&format!("escape-{kind}"), *kind).await;
        let mut results = Vec::new();
        for attempt in attempts(&secret, &abstract_name) {
            let launch = platform.launch("prisoner", &[]);
            let result = judge(&platform, *kind, &attempt, launch).await;
            results.push((attempt.name, result));
        }
        results.extend(over_the_network(&platform, *kind, &outside).await);
        results.extend(through_the_image(&platform, directory.path(), &secret).await);
        for (name, result) in results {
            match rows.iter_mut().find(|(known, _)| known == name) {
                Some((_, cells)) => cells.push(result),
                None => rows.push((
                    name.to_owned(),
                    [vec!["not tried".to_owned(); column], vec![result]].concat(),
                )),
            }
        }
        platform.close().await;
    }
    assert_eq!(kernel_state(), kernel, "the host's kernel is as before");
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), CANARY);
    drop(outside);

    let table = table(&rows, kinds.len());
    println!("{table}");
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("escape-suite.md"), &table).unwrap();
    assert!(!table.contains("ESCAPED"), "see the table above");
    if kinds.len() == 2 && !table.contains("not tried") {
        keep_document(DOCUMENT, &table);
    }
}

/// One attempt in a container of its own. The word for the table.
async fn judge(platform: &Platform, kind: RuntimeKind, attempt: &Attempt, launch: Launch) -> String {
    let finished = platform.run(probing(launch, &attempt.probe)).await;
    let all = format!("{}{}", finished.stdout, finished.stderr);
    if all.contains(CANARY) || all.contains(outside::CANARY) {
        return format!("ESCAPED: saw the canary: {all}");
    }
    match answer(&finished.stdout) {
        Some(Answer::Failed(_)) => "denied".to_owned(),
        Some(Answer::Worked(_)) if attempt.own_kernel && kind == RuntimeKind::Gvisor => "own kernel".to_owned(),
        Some(Answer::Worked(detail)) => format!("ESCAPED: {detail}"),
        // A system call may also end the process.
        None if matches!(finished.exit, ContainerExit::Signaled { .. }) => "denied".to_owned(),
        None => format!("ESCAPED? no answer: {:?} {all}", finished.exit),
    }
}

async fn over_the_network(platform: &Platform, kind: RuntimeKind, outside: &Outside) -> Vec<(&'static str, String)> {
    let gateway = platform.runtime.bridge_network().gateway();
    let bridge_port = serve_on_host([0, 0, 0, 0].into(), CANARY);
    let loopback_port = serve_on_host([127, 0, 0, 1].into(), CANARY);
    let mut server = probing(platform.launch("neighbour", &[]), &format!("serve 0.0.0.0:{PORT}"));
    server.network = NetworkMode::Bridge;
    let mut server = platform.runtime.start(server).await.unwrap();
    read_until(server.stdout.as_mut().unwrap(), "PROBE-SERVES").await;

    // That the stand-in can be reached at all.
    let mut control = probing(
        platform.launch("control", &[]),
        &format!("connect {}:{PORT}", outside.first),
    );
    control.network = NetworkMode::Bridge;
    let control = platform.run(control).await;
    assert_eq!(
        answer(&control.stdout),
        Some(Answer::Worked(outside::CANARY.to_owned()))
    );

    let own = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let uplink = own
        .connect("192.0.2.255:9")
        .ok()
        .map(|()| own.local_addr().unwrap().ip().to_string());
    let neighbour = server.address.unwrap().to_string();
    let mut results = Vec::new();
    for attempt in connections(&neighbour, &gateway.to_string(), bridge_port, loopback_port, uplink) {
        let mut launch = platform.launch("prisoner", &[]);
        launch.network = NetworkMode::Bridge;
        results.push((attempt.name, judge(platform, kind, &attempt, launch).await));
    }
    server.kill();
    finish(server).await;
    results
}

/// Images are not trusted either: their symbolic links lie where the platform makes mount points and directories.
async fn through_the_image(platform: &Platform, directory: &Path, secret: &Path) -> Vec<(&'static str, String)> {
    let precious = directory.join("precious");
    let _ = std::fs::remove_dir_all(&precious);
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("file"), CANARY).unwrap();
    let untouched = || {
        let names: Vec<_> = std::fs::read_dir(&precious)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let is_mounted = std::fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .any(|line| line.contains(precious.to_str().unwrap()));
        names == ["file"] && std::fs::read_to_string(precious.join("file")).unwrap() == CANARY && !is_mounted
    };
    let given = directory.join("given");
    let _ = std::fs::create_dir(&given);
    std::fs::write(given.join("file"), "given").unwrap();
    let up = format!("../../../../../../../..{}", precious.display());
    let absolute = precious.display().to_string();
    let bind = |source: &Path, target: &str| Bind {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only: false,
    };

    let mut results = Vec::new();
    let cases: [(&'static str, &str, &str, Option<Bind>, &str); 6] = [
        (
            "a bind below a link to a directory of the host",
            "trap",
            &absolute,
            Some(bind(&given, "/trap/new")),
            "/",
        ),
        (
            "a bind below a link that climbs out",
            "trap",
            &up,
            Some(bind(&given, "/trap/new")),
            "/",
        ),
        (
            "a bind onto a link to a directory of the host",
            "trap",
            &absolute,
            Some(bind(&given, "/trap")),
            "/",
        ),
        (
            "a working directory below a link to the host",
            "trap",
            &absolute,
            None,
            "/trap/new",
        ),
        (
            "`/etc/resolv.conf` as a link to a file of the host",
            "etc/resolv.conf",
            &format!("{absolute}/file"),
            None,
            "/",
        ),
        (
            "`/tmp` as a link to a directory of the host",
            "tmp",
            &absolute,
            None,
            "/",
        ),
    ];
    for (index, (name, link, target, bind, workdir)) in cases.into_iter().enumerate() {
        let layer = directory.join(format!("layer-{}-{index}", platform.runtime.kind()));
        let place = layer.join(link);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink(target, &place).unwrap();
        let script = format!(
            "cat {} /trap/file /trap/new/file /etc/resolv.conf /tmp/file; echo x > {absolute}/mine; echo x > /tmp/mine; echo x >> /etc/resolv.conf; echo x > /trap/mine; true",
            secret.display()
        );
        let mut launch = platform.shell("prisoner", &script);
        launch.rootfs.lower_dirs = vec![rootfs(), layer];
        launch.binds.extend(bind);
        workdir.clone_into(&mut launch.workdir);
        let result = match platform.runtime.start(launch).await {
            // Said no, which is as good.
            Err(_) => "denied".to_owned(),
            Ok(container) => {
                let finished = finish(container).await;
                if finished.stdout.contains(CANARY) {
                    format!("ESCAPED: saw the canary: {}", finished.stdout)
                } else {
                    "stays inside".to_owned()
                }
            }
        };
        results.push((
            name,
            if untouched() {
                result
            } else {
                "ESCAPED: changed the host".to_owned()
            },
        ));
    }
    results
}

/// What an attempt could have changed.
fn kernel_state() -> Vec<String> {
    [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/kernel/hostname",
    ]
    .map(|path| std::fs::read_to_string(path).unwrap())
    .into()
}

fn table(rows: &[(String, Vec<String>)], columns: usize) -> String {
    let mut table = "| | `runc` | `gvisor` |\n|---|---|---|\n".to_owned();
    for (name, cells) in rows {
        let mut cells = cells.clone();
        cells.resize(columns.max(2), "not tried".to_owned());
        let _ = writeln!(table, "| {name} | {} |", cells.join(" | "));
    }
    table
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
