//! A good guest: other firewalls, name servers out of containers' reach, networks in use, hosts with IPv6, and what
//! an earlier version or another run of the machine has left.
//!
//! Each test runs again in a process with network and mount namespaces of its own, where it plays the host: no rule
//! of the machine is touched, and all of it goes with the process.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use ionian_container::{Cidr, ContainerConfig, Egress, NetworkMode};
use ionian_domain::container::{ContainerExit, RuntimeKind};

use crate::outside::{Outside, PORT, serve_on_host};
use crate::support::{Platform, can_isolate, eventually};

/// Set in the process that plays the host.
const INSIDE: &str = "IONIAN_TEST_GUEST";

/// What Docker 27 writes on a host where nothing runs; with iptables, as it does.
const DOCKER: &str = "*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
COMMIT
";

/// `ufw enable` with its defaults (deny incoming, deny routed): the built-in chains, and its own files.
const UFW_FILES: [&str; 3] = ["/etc/ufw/before.rules", "/etc/ufw/user.rules", "/etc/ufw/after.rules"];
const UFW: &str = "*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:ufw-before-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-after-input - [0:0]
:ufw-after-forward - [0:0]
:ufw-logging-deny - [0:0]
:ufw-logging-allow - [0:0]
:ufw-skip-to-policy-input - [0:0]
:ufw-skip-to-policy-output - [0:0]
:ufw-skip-to-policy-forward - [0:0]
-A ufw-skip-to-policy-input -j DROP
-A ufw-skip-to-policy-output -j ACCEPT
-A ufw-skip-to-policy-forward -j DROP
-A INPUT -i lo -j ACCEPT
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
COMMIT
";

/// Runs a test in a process that has a host's network to itself. Whether this is that process.
fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        run("ip", &["link", "set", "lo", "up"]);
        return true;
    }
    if !can_isolate() {
        return false;
    }
    let executable = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--net", "--mount", "timeout", "100"])
        .arg(executable)
        .args([&format!("guest::{test}"), "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{text}");
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} failed on a host of its own"
    );
    false
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} refused:\n{input}");
}

/// Whether this machine has a program that a test needs; tests say what they leave out.
fn has(program: &str) -> bool {
    let found = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .any(|directory| std::path::Path::new(directory).join(program).exists());
    if !found {
        println!("skipped: this machine has no {program}");
    }
    found
}

async fn reaches_with(platform: &Platform, host: IpAddr, port: u16, egress: Egress) -> bool {
    let target = match host {
        IpAddr::V4(host) => host.to_string(),
        IpAddr::V6(host) => host.to_string(),
    };
    let script = format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{target}/{port}'");
    let mut launch = platform.launch("client", &["bash", "-c", &script]);
    launch.network = NetworkMode::Bridge;
    launch.egress = egress;
    platform.run(launch).await.exit == ContainerExit::Exited { code: 0 }
}

async fn reaches(platform: &Platform, host: IpAddr, port: u16) -> bool {
    reaches_with(platform, host, port, Egress::Open).await
}

/// What must hold on every host: the platform and the outside are reached, and nothing else is.
async fn is_at_home(platform: &Platform, outside: &Outside) {
    let network = platform.runtime.bridge_network();
    let server = serve_on_host(network.gateway(), "the platform");
    let other = serve_on_host(network.gateway(), "another service");
    network.allow_host_port(server).await.unwrap();
    check_walls(platform, outside, server, other).await;
}

async fn check_walls(platform: &Platform, outside: &Outside, server: u16, other: u16) {
    let gateway = platform.runtime.bridge_network().gateway();
    assert!(reaches(platform, gateway, server).await, "the platform");
    assert!(reaches(platform, outside.first, PORT).await, "the outside");
    assert!(!reaches(platform, gateway, other).await, "other services of the host");
    assert!(!reaches_with(platform, outside.first, PORT, Egress::Blocked).await);
    let allowed: Cidr = outside.first.to_string().parse().unwrap();
    let list = Egress::Allow(vec![allowed]);
    assert!(
        reaches_with(platform, outside.first, PORT, list.clone()).await,
        "what is on the list"
    );
    assert!(
        !reaches_with(platform, outside.second, PORT, list).await,
        "what is not on the list"
    );
}

fn rules_of_ours(program: &str) -> usize {
    run(program, &["-S"]).matches("ionian-").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_live_beside_docker() {
    if !is_inside("containers_live_beside_docker") || !has("iptables-nft") {
        return;
    }
    let outside = Outside::open();
    feed("iptables-nft-restore", &[], DOCKER);
    let before = run("iptables-nft", &["-S"]);
    let platform = Platform::open("docker").await;
    is_at_home(&platform, &outside).await;
    assert!(run("iptables-nft", &["-S", "DOCKER-USER"]).contains("ionian-ion"));

    // Docker starts again, and its chains are new.
    feed("iptables-nft-restore", &[], DOCKER);
    eventually("the rules are there again", || rules_of_ours("iptables-nft") == 2).await;
    is_at_home(&platform, &outside).await;
    platform.close().await;
    assert_eq!(
        run("iptables-nft", &["-S"]),
        before,
        "nothing is left in another's rules"
    );
}

/// ufw's own files log, limit and look up addresses, which small kernels cannot. None of that lets more through.
fn without_rare_matches(rules: &str) -> String {
    let rare = [
        "-m limit",
        "-m addrtype",
        "-j LOG",
        "ufw-not-local -j",
        "-j ufw-not-local",
        "-m recent",
        "-m hl",
    ];
    rules
        .lines()
        .filter(|line| !rare.iter().any(|word| line.contains(word)))
        .fold(String::new(), |text, line| text + line + "\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_live_beside_ufw() {
    if !is_inside("containers_live_beside_ufw") || !has("iptables-nft") {
        return;
    }
    let outside = Outside::open();
    let enable = || {
        feed("iptables-nft-restore", &["--noflush"], UFW);
        for file in UFW_FILES {
            // Without the program, what counts are the policies below.
            if let Ok(rules) = std::fs::read_to_string(file) {
                feed("iptables-nft-restore", &["--noflush"], &without_rare_matches(&rules));
            }
        }
    };
    enable();
    let platform = Platform::open("ufw").await;
    is_at_home(&platform, &outside).await;

    // As somebody who clears the built-in chains and enables it again.
    run("iptables-nft", &["-F"]);
    enable();
    eventually("the rules are there again", || rules_of_ours("iptables-nft") >= 4).await;
    is_at_home(&platform, &outside).await;
    platform.close().await;
    assert_eq!(rules_of_ours("iptables-nft"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_live_beside_older_iptables() {
    if !is_inside("containers_live_beside_older_iptables") || !has("iptables-legacy") {
        return;
    }
    let tried = Command::new("iptables-legacy").args(["-P", "FORWARD", "DROP"]).status();
    if !tried.unwrap().success() {
        println!("the kernel has no such tables; only their programs are here");
        return;
    }
    run("iptables-legacy", &["-P", "INPUT", "DROP"]);
    let outside = Outside::open();
    let platform = Platform::open("legacy").await;
    is_at_home(&platform, &outside).await;
    platform.close().await;
    assert_eq!(rules_of_ours("iptables-legacy"), 0);
}

/// A bus and the daemon, ended with the test.
struct Firewalld {
    bus: std::process::Child,
    daemon: std::process::Child,
    _directory: tempfile::TempDir,
}

impl Firewalld {
    /// On a bus of its own, where the runtime's `firewall-cmd` finds it: both are the system's in this namespace.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Nothing of the machine's own bus or configuration is seen or written.
        for target in ["/run", "/etc/firewalld"] {
            run("mount", &["-t", "tmpfs", "tmpfs", target]);
        }
        std::fs::create_dir_all("/run/dbus").unwrap();
        let file = directory.path().join("bus.conf");
        std::fs::write(
            &file,
            "<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen>\
             <policy context=\"default\"><allow user=\"*\"/><allow own=\"*\"/><allow send_type=\"*\"/>\
             <allow receive_type=\"*\"/><allow send_destination=\"*\"/></policy></busconfig>",
        )
        .unwrap();
        let bus = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", file.display()))
            .args(["--nofork", "--nopidfile"])
            .spawn()
            .unwrap();
        let daemon = Command::new("sh")
            .args([
                "-c",
                "while [ ! -S /run/dbus/system_bus_socket ]; do sleep 0.05; done; exec firewalld --nofork --nopid",
            ])
            .spawn()
            .unwrap();
        Self {
            bus,
            daemon,
            _directory: directory,
        }
    }

    fn is_up() -> bool {
        let state = Command::new("firewall-cmd").arg("--state").output().unwrap();
        state.status.success()
    }
}

impl Drop for Firewalld {
    fn drop(&mut self) {
        for child in [&mut self.daemon, &mut self.bus] {
            let _ended = child.kill().and_then(|()| child.wait());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_live_beside_firewalld() {
    if !is_inside("containers_live_beside_firewalld") || !has("firewalld") || !has("dbus-daemon") {
        return;
    }
    let daemon = Firewalld::start();
    eventually("firewalld is up", Firewalld::is_up).await;
    let outside = Outside::open();
    let platform = Platform::open("firewalld").await;
    is_at_home(&platform, &outside).await;

    run("firewall-cmd", &["--reload"]);
    let bridge = platform.runtime.bridge_network().bridge().to_owned();
    let is_bound = || run("nft", &["list", "table", "inet", "firewalld"]).contains(&bridge);
    eventually("the bridge is bound again", is_bound).await;
    is_at_home(&platform, &outside).await;
    platform.close().await;
    assert!(!run("nft", &["list", "ruleset"]).contains(&bridge));
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_ruleset_is_made_again() {
    if !is_inside("a_flushed_ruleset_is_made_again") {
        return;
    }
    let outside = Outside::open();
    let platform = Platform::open("flushed").await;
    let network = platform.runtime.bridge_network();
    let server = serve_on_host(network.gateway(), "the platform");
    let other = serve_on_host(network.gateway(), "another service");
    network.allow_host_port(server).await.unwrap();
    // A container that runs on meanwhile keeps its limits.
    let mut launch = platform.launch("limited", &["sleep", "1000"]);
    launch.network = NetworkMode::Bridge;
    launch.egress = Egress::Blocked;
    let limited = platform.runtime.start(launch).await.unwrap();

    run("nft", &["flush", "ruleset"]);
    let table = format!("ionian_{}", platform.config.short_id());
    let chain = match limited.address.unwrap() {
        IpAddr::V4(address) => format!("egress_{:08x}", u32::from(address)),
        IpAddr::V6(_) => panic!("containers have IPv4"),
    };
    eventually("the table is there again", || {
        let listed = Command::new("nft")
            .args(["list", "table", "inet", &table])
            .output()
            .unwrap();
        String::from_utf8(listed.stdout).unwrap().contains(&chain)
    })
    .await;
    check_walls(&platform, &outside, server, other).await;
    limited.dispose().await.unwrap();
    platform.close().await;
}

/// Answers every question with 192.0.2.77.
fn serve_names(address: IpAddr) {
    let socket = std::net::UdpSocket::bind((address, 53)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, sender)) = socket.recv_from(&mut buffer) {
            let question = &buffer[12..length];
            let name_end = question.iter().position(|byte| *byte == 0).unwrap();
            let asked = &question[..name_end + 5];
            let is_a = asked[name_end + 2] == 1;
            let mut answer = buffer[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            answer.extend(asked);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            socket.send_to(&answer, sender).unwrap();
        }
    });
}

/// Mounts a file over the host's, in the namespace of the test.
fn set_resolv_conf(text: &str) {
    let file = std::env::temp_dir().join(format!("resolv-{}", std::process::id()));
    std::fs::write(&file, text).unwrap();
    let target = std::fs::canonicalize("/etc/resolv.conf").unwrap();
    run("mount", &["--bind", file.to_str().unwrap(), target.to_str().unwrap()]);
    std::fs::remove_file(file).unwrap();
}

async fn resolves(platform: &Platform, egress: Egress) -> bool {
    let script = "timeout 8 getent ahostsv4 a-name.example";
    let mut launch = platform.launch("asks", &["bash", "-c", script]);
    launch.network = NetworkMode::Bridge;
    launch.egress = egress;
    platform.run(launch).await.stdout.contains("192.0.2.77")
}

async fn names_resolve_through(platform_name: &str, address: IpAddr) {
    serve_names(address);
    set_resolv_conf(&format!("nameserver {address}\n"));
    // Denied by what the host itself drops, too.
    if has("iptables-nft") {
        feed(
            "iptables-nft-restore",
            &[],
            "*filter\n:INPUT DROP [0:0]\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n",
        );
    }
    let platform = Platform::open(platform_name).await;
    assert!(resolves(&platform, Egress::Open).await);
    // A question can carry anything out.
    assert!(!resolves(&platform, Egress::Blocked).await);
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_resolve_where_the_hosts_resolver_is_a_stub() {
    if is_inside("names_resolve_where_the_hosts_resolver_is_a_stub") {
        names_resolve_through("stub", Ipv4Addr::new(127, 0, 0, 53).into()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_resolve_where_the_hosts_resolver_is_on_ipv6() {
    if is_inside("names_resolve_where_the_hosts_resolver_is_on_ipv6") {
        run("ip", &["addr", "add", "fd00:53::1/128", "dev", "lo", "nodad"]);
        names_resolve_through("six", "fd00:53::1".parse().unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_ipv6_opens_no_way_around_the_walls() {
    if !is_inside("a_host_with_ipv6_opens_no_way_around_the_walls") {
        return;
    }
    run("ip", &["link", "add", "uplink", "type", "bridge"]);
    run("ip", &["addr", "add", "2001:db8:1::1/64", "dev", "uplink", "nodad"]);
    run("ip", &["link", "set", "uplink", "up"]);
    run("ip", &["-6", "route", "add", "default", "via", "2001:db8:1::2"]);
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
    let host: IpAddr = "2001:db8:1::1".parse().unwrap();
    let port = serve_on_host(host, "the host on IPv6");
    assert!(
        std::net::TcpStream::connect((host, port)).is_ok(),
        "the host itself reaches it"
    );
    for kind in [RuntimeKind::Runc] {
        let platform = Platform::open_kind("ipv6", kind).await;
        assert!(!reaches(&platform, host, port).await);
        let script = "cat /proc/net/if_inet6; cat /proc/net/ipv6_route; echo end";
        let mut launch = platform.launch("looks", &["bash", "-c", script]);
        launch.network = NetworkMode::Bridge;
        let seen = platform.run(launch).await.stdout;
        assert!(
            seen.contains("end") && !seen.contains("eth0"),
            "no address and no route: {seen}"
        );
        // One that it gave itself would be dropped: the bridge has no IPv6, and the firewall lets none through.
        let bridge = platform.runtime.bridge_network().bridge().to_owned();
        assert!(!run("ip", &["-6", "addr", "show", "dev", &bridge]).contains("inet6"));
        platform.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_in_use_are_avoided() {
    if !is_inside("networks_in_use_are_avoided") {
        return;
    }
    // A pool of four, three of which are taken: by a bridge that is up, one that is down, and a route.
    for (name, address) in [("docker0", "10.201.0.1/24"), ("br-down", "10.201.4.1/22")] {
        run("ip", &["link", "add", name, "type", "bridge"]);
        run("ip", &["addr", "add", address, "dev", name]);
    }
    run("ip", &["link", "set", "docker0", "up"]);
    run("ip", &["route", "add", "10.201.8.0/23", "dev", "docker0"]);
    let open = |instance: &str| {
        let directory = tempfile::tempdir().unwrap();
        let name = format!("{instance}-{}", std::process::id());
        let mut config = ContainerConfig::new(name, directory.path().join("state"));
        config.address_pool = "10.201.0.0/20".parse().unwrap();
        config.warm_network_slots = 0;
        (config, directory)
    };
    let (config, directory) = open("first");
    let platform = Platform::open_on(config, directory, RuntimeKind::Runc).await;
    assert_eq!(platform.runtime.bridge_network().subnet().to_string(), "10.201.12.0/22");
    let (config, directory) = open("second");
    let refused = ionian_container::RuncRuntime::open(config).await.err().unwrap();
    let message = std::iter::successors(Some(&refused as &dyn std::error::Error), |error| error.source())
        .map(ToString::to_string)
        .collect::<String>();
    assert!(message.contains("overlaps with a route"), "{message}");
    drop(directory);
    platform.close().await;
}

/// What an earlier run of the machine, and earlier versions, may have left of this instance.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_other_times_is_reaped() {
    if !is_inside("what_is_left_of_other_times_is_reaped") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let name = format!("times-{}", std::process::id());
    let mut config = ContainerConfig::new(name, directory.path().join("state"));
    config.warm_network_slots = 0;
    let id = config.short_id();

    // Directories of containers, one with a record of an older form, one of another run of the machine, one
    // with none.
    let containers = config.state_dir.join("containers");
    for (container, record) in [
        ("older", Some("{\"version\": 0, \"pid\": 1}")),
        (
            "rebooted",
            Some(
                "{\"version\": 1, \"boot_id\": \"another\", \"keeper\": {\"pid\": 1, \"start_time\": 1}, \"started\": null}",
            ),
        ),
        ("bare", None),
    ] {
        let path = containers.join(container);
        std::fs::create_dir_all(path.join("rootfs")).unwrap();
        if let Some(record) = record {
            std::fs::write(path.join("container.json"), record).unwrap();
        }
    }
    // A bridge with other addresses, a container's end of an interface, and a table with other rules.
    run("ip", &["link", "add", &format!("ion{id}"), "type", "bridge"]);
    run("ip", &["addr", "add", "10.77.0.1/16", "dev", &format!("ion{id}")]);
    run("ip", &["link", "add", &format!("iv{id}00001"), "type", "bridge"]);
    let table = format!("ionian_{id}");
    feed(
        "nft",
        &["-f", "-"],
        &format!("table inet {table} {{ chain obsolete {{ type filter hook input priority 0; policy drop; }}\n}}\n"),
    );
    // The choice of another version.
    std::fs::write(
        config.state_dir.join("network.json"),
        "{\"version\": 99, \"subnet\": 7}",
    )
    .unwrap();

    let platform = Platform::open_on(config.clone(), directory, RuntimeKind::Runc).await;
    assert_eq!(std::fs::read_dir(&containers).unwrap().count(), 0);
    assert_eq!(platform.links(), 0);
    assert!(!run("nft", &["list", "table", "inet", &table]).contains("obsolete"));
    assert!(!run("ip", &["addr", "show", "dev", &format!("ion{id}")]).contains("10.77."));
    let outside = Outside::open();
    is_at_home(&platform, &outside).await;
    platform.close().await;
}
