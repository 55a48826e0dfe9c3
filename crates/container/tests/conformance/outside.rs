//! A stand-in for the outside: a network namespace of the test's own, behind the host as the internet is.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

/// What every server of ours answers.
pub(crate) const CANARY: &str = "canary-of-the-outside";

pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const PORT: u16 = 8080;

/// Removed when dropped.
pub(crate) struct Outside {
    name: String,
    link: String,
    /// Where the stand-in answers: two ordinary addresses.
    pub(crate) first: IpAddr,
    pub(crate) second: IpAddr,
    /// Whether the metadata address leads to the stand-in, which one test at a time can have.
    pub(crate) has_metadata: bool,
}

impl Outside {
    pub(crate) fn open() -> Self {
        let id = std::process::id();
        let name = format!("iontest{id}");
        let link = format!("it{:x}", id & 0xff_ffff);
        // Addresses for tests of networks (RFC 2544); a /29 for each test process.
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (id % 16_384) * 8;
        let address = |index: u32| Ipv4Addr::from(base + index);
        let mut outside = Self {
            name: name.clone(),
            link: link.clone(),
            first: address(2).into(),
            second: address(3).into(),
            has_metadata: false,
        };
        let inner = format!("{link}x");
        ip(&format!("netns add {name}"));
        ip(&format!("link add {link} type veth peer name {inner} netns {name}"));
        ip(&format!("addr add {}/29 dev {link}", address(1)));
        ip(&format!("link set {link} up"));
        for index in [2, 3] {
            ip(&format!("-n {name} addr add {}/29 dev {inner}", address(index)));
        }
        ip(&format!("-n {name} addr add {METADATA}/32 dev {inner}"));
        ip(&format!("-n {name} link set {inner} up"));
        ip(&format!("-n {name} route add default via {}", address(1)));
        // A route that is there already is of another test, or of a cloud.
        outside.has_metadata = try_ip(&format!("route add {METADATA}/32 via {}", address(2)));
        outside.serve();
        outside
    }

    fn serve(&self) {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let path = format!("/run/netns/{}", self.name);
        std::thread::spawn(move || {
            let namespace = std::fs::File::open(path).unwrap();
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            ready.send(()).unwrap();
            answer_all(&listener, CANARY);
        });
        is_ready.recv_timeout(crate::support::LIMIT).unwrap();
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.has_metadata {
            try_ip(&format!("route del {METADATA}/32"));
        }
        try_ip(&format!("link del {}", self.link));
        try_ip(&format!("netns del {}", self.name));
    }
}

/// Serves on the host, for as long as the test runs. Returns the port.
pub(crate) fn serve_on_host(address: IpAddr, text: &'static str) -> u16 {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || answer_all(&listener, text));
    port
}

fn answer_all(listener: &TcpListener, text: &str) {
    for mut stream in listener.incoming().flatten() {
        let _ = stream.write_all(text.as_bytes());
    }
}

fn ip(arguments: &str) {
    assert!(try_ip(arguments), "ip {arguments}");
}

fn try_ip(arguments: &str) -> bool {
    Command::new("ip")
        .args(arguments.split(' '))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .success()
}
