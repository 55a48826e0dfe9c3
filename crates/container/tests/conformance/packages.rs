//! The programs that builds and functions run, against the seccomp profile and the capabilities.
//!
//! Needs a Debian mirror and a package index, so it runs when asked for:
//! `cargo nextest run -p ionian-container --run-ignored only`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ionian_container::{Bind, NetworkMode, Rootfs};
use ionian_domain::container::ContainerExit;
use tokio::io::AsyncReadExt;

use crate::support::{Platform, can_isolate};

const MIRROR: &str = "http://deb.debian.org/debian";

/// Installing and importing; on a slow mirror.
const PATIENCE: Duration = Duration::from_mins(5);

/// The host's certificates, for machines behind a proxy that signs anew.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

const SCRIPT: &str = r#"set -eux
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy --no-install-recommends redis-server nodejs sudo
id redis
useradd --create-home somebody
su somebody -c 'id -un'
echo 'somebody:secret' | chpasswd
node -e 'require("fs").promises.readFile("/etc/hostname", "utf8").then(text => console.log("node", text.trim()))'
pip install --quiet --break-system-packages numpy uvloop fastapi uvicorn
python3 - <<'END'
import asyncio, concurrent.futures, multiprocessing, os, signal, socket, ssl, subprocess, tempfile, threading, time
import numpy, uvloop, fastapi
print("numpy", numpy.ones((200, 200)).dot(numpy.ones((200, 200))).sum())
print("context", ssl.create_default_context() is not None)
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print("pool", pool.map(abs, [-1, -2]))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        print("threads", list(threads.map(abs, range(3))))
    async def main():
        process = await asyncio.create_subprocess_exec("echo", "child")
        await process.wait()
    uvloop.run(main())
    print("cpus", os.cpu_count(), len(os.sched_getaffinity(0)))
    a, b = socket.socketpair(); a.send(b"x"); print("pair", b.recv(1))
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=1 << 20) if hasattr(multiprocessing, "shared_memory") else None
    if shared: shared.close(); shared.unlink()
    ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP); ping.settimeout(5)
    ping.sendto(bytes([8, 0, 0, 0, 0, 0, 0, 1]), ("127.0.0.1", 0)); print("ping", len(ping.recv(64)))
    print("all done")
END
"#;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "installs packages from the network"]
async fn package_managers_and_interpreters_work() {
    if !can_isolate() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base");
    let built = Command::new("mmdebstrap")
        .args(["--variant=minbase", "--include=python3-pip,ca-certificates", "bookworm"])
        .arg(&base)
        .arg(MIRROR)
        .status()
        .unwrap();
    assert!(built.success());

    let platform = Platform::open("packages").await;
    let mut launch = platform.launch("packages", &["bash", "-c", SCRIPT]);
    launch.rootfs = Rootfs::scratch(vec![base]);
    launch.limits.memory_bytes = Some(2 << 30);
    launch.limits.pids = Some(512);
    launch.network = NetworkMode::Bridge;
    launch.env = vec![
        (
            "PATH".to_owned(),
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        ),
        ("SSL_CERT_FILE".to_owned(), CERTIFICATES.to_owned()),
        ("PIP_CERT".to_owned(), CERTIFICATES.to_owned()),
    ];
    let binds = [(CERTIFICATES, CERTIFICATES), ("/etc/pip.conf", "/etc/pip.conf")];
    launch.binds = binds
        .into_iter()
        .filter(|(source, _)| Path::new(source).exists())
        .map(|(source, target)| Bind {
            source: source.into(),
            target: target.to_owned(),
            read_only: true,
        })
        .collect();
    launch
        .env
        .extend(std::env::vars().filter(|(name, _)| name.starts_with("PIP_INDEX")));
    let mut container = platform.runtime.start(launch).await.unwrap();
    let (mut stdout, mut stderr) = (container.stdout.take().unwrap(), container.stderr.take().unwrap());
    let (mut out, mut err) = (String::new(), String::new());
    let all = async {
        tokio::join!(
            container.wait(),
            stdout.read_to_string(&mut out),
            stderr.read_to_string(&mut err)
        )
    };
    let (exit, _, _) = tokio::time::timeout(PATIENCE, all).await.expect("it ends in time");
    container.dispose().await.unwrap();
    println!("{out}\n{err}");
    assert_eq!(exit, ContainerExit::Exited { code: 0 });
    assert!(out.contains("all done"));
    platform.close().await;
}
