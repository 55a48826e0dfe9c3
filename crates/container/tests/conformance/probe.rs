//! A program that runs inside containers: this test binary itself, started with `IONIAN_PROBE`.
//!
//! It tries one thing and says how the kernel answered.

#![expect(unsafe_code, reason = "system calls that no wrapper has are what is tried")]

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use ionian_container::{Bind, Launch};
use nix::libc::{self, c_long};

/// Where the binary is inside.
const PATH: &str = "/probe";

/// A connection that is dropped rather than refused.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Makes a launch run the probe.
pub(crate) fn probing(mut launch: Launch, what: &str) -> Launch {
    launch.argv = [PATH, "probe::inside", "--exact", "--nocapture", "--test-threads=1"]
        .map(str::to_owned)
        .into();
    launch.env.push(("IONIAN_PROBE".to_owned(), what.to_owned()));
    launch.binds.push(Bind {
        source: std::env::current_exe().unwrap(),
        target: PATH.to_owned(),
        read_only: true,
    });
    launch
}

/// What a probe found, from its output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Worked(String),
    Failed(String),
}

pub(crate) fn answer(stdout: &str) -> Option<Answer> {
    // The test harness prints on the same line.
    let found = |marker: &str| {
        let start = stdout.find(marker)? + marker.len();
        Some(stdout[start..].lines().next().unwrap_or_default().trim().to_owned())
    };
    found("PROBE-WORKED ")
        .map(Answer::Worked)
        .or_else(|| found("PROBE-FAILED ").map(Answer::Failed))
}

#[test]
fn inside() {
    let Ok(what) = std::env::var("IONIAN_PROBE") else {
        return;
    };
    let mut words = what.split(' ');
    let name = words.next().unwrap_or_default();
    let arguments: Vec<_> = words.collect();
    match attempt(name, &arguments) {
        Ok(detail) => println!("PROBE-WORKED {detail}"),
        Err(error) => {
            let code = error.raw_os_error().map_or_else(
                || error.to_string(),
                |code| format!("{:?}", nix::errno::Errno::from_raw(code)),
            );
            println!("PROBE-FAILED {code}");
        }
    }
    let _ = io::stdout().flush();
    std::process::exit(0);
}

fn check(result: c_long) -> io::Result<String> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result.to_string())
    }
}

fn call(number: c_long, arguments: [c_long; 6]) -> io::Result<String> {
    // SAFETY: every caller passes integers, null, or pointers to what lives until the call returns.
    check(unsafe {
        libc::syscall(
            number,
            arguments[0],
            arguments[1],
            arguments[2],
            arguments[3],
            arguments[4],
            arguments[5],
        )
    })
}

fn pointer(text: &CString) -> c_long {
    text.as_ptr() as c_long
}

#[expect(clippy::too_many_lines, reason = "a list, one attempt after the other")]
fn attempt(name: &str, arguments: &[&str]) -> io::Result<String> {
    let text = |text: &str| CString::new(text).unwrap();
    let buffer = [0_u8; 256];
    let zeros = buffer.as_ptr() as c_long;
    match name {
        "mount" => {
            let (kind, target) = (text("tmpfs"), text("/tmp"));
            call(
                libc::SYS_mount,
                [pointer(&kind), pointer(&target), pointer(&kind), 0, 0, 0],
            )
        }
        "umount" => call(
            libc::SYS_umount2,
            [pointer(&text("/proc")), libc::MNT_DETACH.into(), 0, 0, 0, 0],
        ),
        "ptrace" => {
            let mut child = std::process::Command::new("/bin/sleep").arg("5").spawn()?;
            let result = call(
                libc::SYS_ptrace,
                [libc::PTRACE_ATTACH.into(), child.id().into(), 0, 0, 0, 0],
            );
            let _ = child.kill();
            result
        }
        "become" => {
            let id: c_long = arguments[0].parse().unwrap();
            let group = libc::gid_t::try_from(id).unwrap();
            call(libc::SYS_setgroups, [1, &raw const group as c_long, 0, 0, 0, 0])?;
            call(libc::SYS_setresgid, [id; 6])?;
            call(libc::SYS_setresuid, [id; 6])?;
            Ok(nix::unistd::getuid().to_string())
        }
        "chown" => {
            let (path, id) = (text(arguments[0]), arguments[1].parse().unwrap());
            call(
                libc::SYS_fchownat,
                [libc::AT_FDCWD.into(), pointer(&path), id, id, 0, 0],
            )
        }
        "write" => {
            let mut file = fs::File::options().write(true).open(arguments[0])?;
            file.write_all(arguments[1..].join(" ").as_bytes())
                .map(|()| "written".to_owned())
        }
        "read" => {
            let mut found = [0; 64];
            let length = fs::File::open(arguments[0])?.read(&mut found)?;
            Ok(String::from_utf8_lossy(&found[..length]).replace('\n', " "))
        }
        "release_agent" => release_agent(),
        "add_key" => {
            let (kind, description) = (text("user"), text("ionian"));
            call(
                libc::SYS_add_key,
                [
                    pointer(&kind),
                    pointer(&description),
                    zeros,
                    1,
                    libc::KEY_SPEC_SESSION_KEYRING.into(),
                    0,
                ],
            )
        }
        "keyctl" => call(libc::SYS_keyctl, [0, libc::KEY_SPEC_SESSION_KEYRING.into(), 1, 0, 0, 0]),
        "userfaultfd" => call(libc::SYS_userfaultfd, [0; 6]),
        "io_uring_setup" => call(libc::SYS_io_uring_setup, [8, zeros, 0, 0, 0, 0]),
        "raw_socket" => call(
            libc::SYS_socket,
            [
                libc::AF_INET.into(),
                libc::SOCK_RAW.into(),
                libc::IPPROTO_TCP.into(),
                0,
                0,
                0,
            ],
        ),
        "packet_socket" => call(
            libc::SYS_socket,
            [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0, 0, 0],
        ),
        "vsock" => call(
            libc::SYS_socket,
            [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0],
        ),
        "abstract" => {
            use std::os::linux::net::SocketAddrExt;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(arguments[0])?;
            std::os::unix::net::UnixStream::connect_addr(&address).map(|_| "connected".to_owned())
        }
        "device" => {
            let (major, minor): (u32, u32) = (arguments[0].parse().unwrap(), arguments[1].parse().unwrap());
            let path = text("/tmp/device");
            let device = libc::makedev(major, minor);
            let mode = libc::S_IFBLK | 0o600;
            call(
                libc::SYS_mknod,
                [pointer(&path), mode.into(), device.cast_signed(), 0, 0, 0],
            )?;
            let mut found = [0; 512];
            let length = fs::File::open("/tmp/device")?.read(&mut found)?;
            Ok(format!("read {length} bytes"))
        }
        "bpf" => call(libc::SYS_bpf, [0, zeros, 48, 0, 0, 0]),
        "perf_event_open" => call(libc::SYS_perf_event_open, [zeros, 0, -1, -1, 0, 0]),
        "kexec_load" => call(libc::SYS_kexec_load, [0, 0, 0, 0, 0, 0]),
        "init_module" => call(libc::SYS_init_module, [zeros, 256, zeros, 0, 0, 0]),
        "finit_module" => call(libc::SYS_finit_module, [0, zeros, 0, 0, 0, 0]),
        "reboot" => call(libc::SYS_reboot, [0, 0, 0, 0, 0, 0]),
        "unshare_user" => call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0, 0]),
        "setns" => {
            use std::os::fd::AsRawFd;
            let namespace = fs::File::open("/proc/1/ns/mnt")?;
            call(libc::SYS_setns, [namespace.as_raw_fd().into(), 0, 0, 0, 0, 0])
        }
        "open_by_handle_at" => {
            // The root of an ext4: inode 2.
            let mut handle = [0_u8; 16];
            handle[0] = 8;
            handle[4] = 1;
            handle[8] = 2;
            call(
                libc::SYS_open_by_handle_at,
                [libc::AT_FDCWD.into(), handle.as_ptr() as c_long, 0, 0, 0, 0],
            )
        }
        "kernel_log" => call(libc::SYS_syslog, [3, zeros, 256, 0, 0, 0]),
        "clock_settime" => call(libc::SYS_clock_settime, [0, zeros, 0, 0, 0, 0]),
        "chroot" => chroot_out(arguments[0]),
        "connect" => {
            let address = arguments[0].to_socket_addrs()?.next().unwrap();
            let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
            stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
            let mut found = [0; 64];
            let length = stream.read(&mut found)?;
            Ok(String::from_utf8_lossy(&found[..length]).into_owned())
        }
        "serve" => {
            let listener = TcpListener::bind(arguments[0])?;
            println!("PROBE-SERVES");
            for stream in listener.incoming() {
                stream?.write_all(b"from inside")?;
            }
            Ok(String::new())
        }
        other => panic!("no probe {other}"),
    }
}

/// Looks for a way to have the host run a program when a control group empties.
fn release_agent() -> io::Result<String> {
    let mut last = io::Error::from_raw_os_error(libc::ENOENT);
    let mut directories = vec!["/sys/fs/cgroup".to_owned()];
    while let Some(directory) = directories.pop() {
        for file in ["release_agent", "notify_on_release"] {
            match fs::write(format!("{directory}/{file}"), "1") {
                Ok(()) => return Ok(format!("wrote {directory}/{file}")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => last = error,
            }
        }
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && directories.len() < 100 {
                directories.push(entry.path().display().to_string());
            }
        }
    }
    Err(last)
}

/// The classic way out of a `chroot` for a process that may call it.
fn chroot_out(wanted: &str) -> io::Result<String> {
    fs::create_dir_all("/tmp/jail")?;
    let keep = fs::File::open("/")?;
    std::os::unix::fs::chroot("/tmp/jail")?;
    nix::unistd::fchdir(&keep)?;
    for _ in 0..64 {
        nix::unistd::chdir("..")?;
    }
    std::os::unix::fs::chroot(".")?;
    fs::read_to_string(wanted)
}
