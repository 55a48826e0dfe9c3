//! What a container reaches, and what reaches it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ionian_container::{Launch, NetworkMode, Runtime};
use ionian_domain::container::ContainerExit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{LIMIT, Platform, can_isolate, read_until};

/// `IONIAN_TEST_OUTSIDE=host:port` names another place that this machine reaches.
const OUTSIDE: &str = "pypi.org:443";

fn networked(platform: &Platform, name: &str, script: &str) -> Launch {
    let mut launch = platform.launch(name, &["bash", "-c", script]);
    launch.network = NetworkMode::Bridge;
    launch
}

/// Whether a container can connect.
async fn reaches(platform: &Platform, host: &str, port: u16) -> bool {
    let script = format!("timeout 5 bash -c 'exec 3<>/dev/tcp/{host}/{port}'");
    platform.run(networked(platform, "client", &script)).await.exit == ContainerExit::Exited { code: 0 }
}

/// Answers every connection with one byte.
async fn serve(address: SocketAddr) -> u16 {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"x").await;
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_has_eth0_with_its_own_address_and_the_uplinks_mtu() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("eth0").await;
    let script = "ls /sys/class/net; cat /sys/class/net/eth0/mtu; cat /proc/net/route; cat /etc/hosts; cat /etc/resolv.conf; \
                  exec 3<>/dev/tcp/127.0.0.1/9; echo refused; cat /proc/net/if_inet6";
    let container = platform
        .runtime
        .start(networked(&platform, "eth", script))
        .await
        .unwrap();
    let address = container.address.unwrap();
    let finished = crate::support::finish(container).await;
    assert!(finished.stdout.starts_with("eth0\nlo\n"), "{}", finished.stdout);
    assert!(
        finished.stdout.contains(&format!("{address}\teth")),
        "{}",
        finished.stdout
    );
    assert!(
        finished.stdout.contains("refused"),
        "loopback is up: {}",
        finished.stderr
    );
    let routes = std::fs::read_to_string("/proc/net/route").unwrap();
    if let Some(uplink) = routes
        .lines()
        .map(|line| line.split('\t').collect::<Vec<_>>())
        .find(|fields| fields[1] == "00000000")
    {
        let mtu = std::fs::read_to_string(format!("/sys/class/net/{}/mtu", uplink[0])).unwrap();
        assert!(
            finished.stdout.contains(&format!("\n{mtu}")),
            "{mtu} {}",
            finished.stdout
        );
    }
    assert!(
        !finished
            .stdout
            .lines()
            .any(|line| line.ends_with("eth0") && line.starts_with("fe80")),
        "{}",
        finished.stdout
    );
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_host_only_the_allowed_port_is_reachable() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("host-ports").await;
    let network = platform.runtime.bridge_network();
    let gateway = network.gateway();
    let allowed = serve(SocketAddr::new(gateway, 0)).await;
    let closed = serve(SocketAddr::new(gateway, 0)).await;
    let everywhere = serve("0.0.0.0:0".parse().unwrap()).await;
    assert!(
        !reaches(&platform, &gateway.to_string(), allowed).await,
        "nothing is open at first"
    );
    network.allow_host_port(allowed).await.unwrap();
    assert!(reaches(&platform, &gateway.to_string(), allowed).await);
    assert!(!reaches(&platform, &gateway.to_string(), closed).await);
    assert!(!reaches(&platform, &gateway.to_string(), everywhere).await);

    // The host's other addresses: those of its uplink, and the bridge of another instance.
    let other = Platform::open("host-ports-other").await;
    let mut addresses = vec![other.runtime.bridge_network().gateway()];
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    if probe.connect("192.0.2.255:9").is_ok() {
        addresses.push(probe.local_addr().unwrap().ip());
    }
    for address in addresses {
        network.allow_host_port(everywhere).await.unwrap();
        assert!(
            TcpStream::connect((address, everywhere)).await.is_ok(),
            "the host itself reaches it"
        );
        assert!(!reaches(&platform, &address.to_string(), everywhere).await, "{address}");
    }
    other.close().await;
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_do_not_reach_each_other_but_the_host_reaches_them() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("neighbours").await;
    let other = Platform::open("neighbours-other").await;
    let server = |platform: &Platform| {
        // Bash cannot listen; a thread of this process does so in the container's network.
        networked(platform, "server", "echo ready; sleep 1000")
    };
    let mut neighbour = platform.runtime.start(server(&platform)).await.unwrap();
    let mut stranger = other.runtime.start(server(&other)).await.unwrap();
    for container in [&mut neighbour, &mut stranger] {
        read_until(container.stdout.as_mut().unwrap(), "ready").await;
        let address = container.address.unwrap();
        let (pid, port) = (container.pid, 7070);
        listen_inside(pid, port);
        let mut stream = tokio::time::timeout(LIMIT, TcpStream::connect((address, port)))
            .await
            .unwrap()
            .expect("the host reaches it");
        let mut answer = [0];
        stream.read_exact(&mut answer).await.unwrap();
        assert!(!reaches(&platform, &address.to_string(), port).await, "{address}");
    }
    neighbour.dispose().await.unwrap();
    stranger.dispose().await.unwrap();
    other.close().await;
    platform.close().await;
}

/// Serves `port` in the network namespace of a process, from a thread of this one.
pub(crate) fn listen_inside(pid: i32, port: u16) {
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let listener = std::net::TcpListener::bind((IpAddr::from([0, 0, 0, 0]), port)).unwrap();
        ready.send(()).unwrap();
        // The host's one connection; a neighbour's would be answered as well.
        for stream in listener.incoming().take(2) {
            std::io::Write::write_all(&mut stream.unwrap(), b"x").unwrap();
        }
    });
    is_ready.recv_timeout(LIMIT).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outside_is_reachable_by_name() {
    if !can_isolate() {
        return;
    }
    let outside = std::env::var("IONIAN_TEST_OUTSIDE").unwrap_or_else(|_| OUTSIDE.to_owned());
    let from_host = tokio::time::timeout(Duration::from_secs(5), TcpStream::connect(&outside)).await;
    if !matches!(from_host, Ok(Ok(_))) {
        println!("skipped: this machine does not reach {outside} itself");
        return;
    }
    let platform = Platform::open("outside").await;
    let (host, port) = outside.rsplit_once(':').unwrap();
    let script =
        format!("getent hosts {host} && timeout 10 bash -c 'exec 3<>/dev/tcp/{host}/{port}' && echo connected");
    let finished = platform.run(networked(&platform, "outside", &script)).await;
    assert!(
        finished.stdout.contains("connected"),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    assert!(!reaches(&platform, "169.254.169.254", 80).await, "no metadata service");
    platform.close().await;
}
