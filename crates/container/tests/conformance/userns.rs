//! User namespaces of runc's containers: whose ids they have, what of the host's files they see as whose, and when
//! they are not had.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use ionian_container::{
    Bind, ContainerConfig, NetworkMode, OpenError, Rootfs, RuncRuntime, RunningContainer, StartError, Upper,
    UserNamespaces,
};
use ionian_domain::container::{ContainerExit, RuntimeKind};

use crate::probe::{Answer, answer, probing};
use crate::support::{Platform, can_isolate, finish, read_until, rootfs};

const IDS: u32 = 65_536;

/// `None`, and said, where the kernel has no user namespaces for containers.
async fn open(test: &str) -> Option<Platform> {
    can_isolate().then_some(())?;
    let directory = tempfile::tempdir().unwrap();
    let mut config = ContainerConfig::new(format!("{test}-{}", std::process::id()), directory.path().join("state"));
    config.warm_network_slots = 1;
    config.user_namespaces = UserNamespaces::Require;
    match RuncRuntime::open(config.clone()).await {
        Ok(runtime) => drop(runtime),
        Err(OpenError::UserNamespaces { reason }) => {
            println!("skipped: {reason}");
            return None;
        }
        Err(error) => panic!("{error:?}"),
    }
    Some(Platform::open_on(config, directory, RuntimeKind::Runc).await)
}

/// A container that runs until it is killed, and the first id of its range on the host.
async fn running(platform: &Platform, name: &str) -> (RunningContainer, u32) {
    let mut container = platform
        .runtime
        .start(platform.shell(name, "echo up; sleep 1000"))
        .await
        .unwrap();
    read_until(container.stdout.as_mut().unwrap(), "up").await;
    let first = owner_of(container.pid);
    (container, first)
}

/// The user that a process is on the host.
fn owner_of(pid: i32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(|id| id.parse().unwrap()).collect()
    };
    let (users, groups) = (ids("Uid:"), ids("Gid:"));
    assert!(users.iter().chain(&groups).all(|id| *id == users[0]), "{status}");
    users[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn root_inside_is_nobody_in_particular_outside() {
    let Some(platform) = open("userns-ids").await else {
        return;
    };
    let script = "cat /proc/self/uid_map /proc/self/gid_map; id -u; cat /proc/1/setgroups";
    let finished = platform.run(platform.shell("ids", script)).await;
    let words: Vec<_> = finished.stdout.split_whitespace().collect();
    let [inside, outside, count, rest @ ..] = words.as_slice() else {
        panic!("{}{}", finished.stdout, finished.stderr)
    };
    assert_eq!((*inside, *count), ("0", "65536"));
    assert!(outside.parse::<u32>().unwrap() >= 0x7000_0000);
    // The same groups, one line each: no id of the host's own is within reach.
    assert_eq!(rest, ["0", *outside, "65536", "0", "allow"]);

    let (one, first_of_one) = running(&platform, "one").await;
    let (other, first_of_other) = running(&platform, "other").await;
    assert!(
        first_of_one.abs_diff(first_of_other) >= IDS,
        "{first_of_one} {first_of_other}"
    );
    // To the kernel they are two users, also for who stands outside of their process namespaces.
    let kill_as = |user: u32, container: &RunningContainer| {
        let mut kill = Command::new("/bin/kill");
        kill.args(["-0", &container.pid.to_string()]).stderr(Stdio::null());
        kill.uid(user).gid(user).status().unwrap().success()
    };
    assert!(kill_as(first_of_one, &one) && kill_as(first_of_other, &other));
    assert!(!kill_as(first_of_one, &other) && !kill_as(first_of_other, &one));
    one.dispose().await.unwrap();
    other.dispose().await.unwrap();
    platform.close().await;
}

/// What is known of the kernel's faults in user namespaces, most needs power over a network namespace.
#[tokio::test(flavor = "multi_thread")]
async fn network_namespaces_belong_to_the_host() {
    let Some(platform) = open("userns-net").await else {
        return;
    };
    let host = std::fs::metadata("/proc/self/ns/user").unwrap().ino();
    for network in [NetworkMode::Bridge, NetworkMode::None] {
        let mut launch = platform.shell("net", "ls /sys/class/net; echo up; sleep 1000");
        launch.network = network;
        let mut container = platform.runtime.start(launch).await.unwrap();
        let seen = read_until(container.stdout.as_mut().unwrap(), "up").await;
        let expected = if network == NetworkMode::Bridge {
            "eth0\nlo\n"
        } else {
            "lo\n"
        };
        assert!(seen.starts_with(expected), "{seen}");
        let user = std::fs::metadata(format!("/proc/{}/ns/user", container.pid))
            .unwrap()
            .ino();
        assert_ne!(user, host);
        assert_eq!(owner_of_network(container.pid), host, "{network:?}");
        container.dispose().await.unwrap();
    }
    platform.close().await;
}

fn owner_of_network(pid: i32) -> u64 {
    use std::os::fd::{AsRawFd, FromRawFd};
    /// `_IO(0xb7, 1)`
    const NS_GET_USERNS: nix::libc::c_ulong = 0xb701;
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
    // SAFETY: the descriptor is open, and this request takes no argument and returns a new one.
    #[expect(unsafe_code, reason = "there is no wrapper for it")]
    let owner = unsafe {
        let owner = nix::libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS);
        assert!(owner >= 0, "{}", io::Error::last_os_error());
        std::fs::File::from_raw_fd(owner)
    };
    owner.metadata().unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_are_the_same_inside_and_on_disk() {
    let Some(platform) = open("userns-owners").await else {
        return;
    };
    let shared = tempfile::tempdir().unwrap();
    // As the platform's own directories are: the container's user could not enter it, and need not.
    std::fs::set_permissions(shared.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let secret = shared.path().join("secret");
    std::fs::write(&secret, "for root").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(shared.path().join("webs"), "").unwrap();
    chown(shared.path().join("webs"), Some(1000), Some(29)).unwrap();
    let script = "cd /shared; cat secret; [ -O secret ] && echo mine; ls -ln webs; : > new; : > given; \
                  mkdir -m 4750 dir; ls -ldn dir";
    let bind = |target: &str, read_only| Bind {
        source: shared.path().to_owned(),
        target: target.to_owned(),
        read_only,
    };
    let mut launch = platform.shell("owners", script);
    launch.binds = vec![bind("/shared", false)];
    let finished = platform.run(launch).await;
    assert!(
        finished.stdout.starts_with("for rootmine\n"),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    assert!(
        finished.stdout.contains("1000 29") && finished.stdout.contains("drwsr-x---"),
        "{}",
        finished.stdout
    );
    for name in ["new", "given", "dir"] {
        let found = std::fs::metadata(shared.path().join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (0, 0), "{name}");
    }

    // Another user of the image reads what it may and no more.
    let mut launch = platform.shell(
        "web",
        "cat /shared/secret; touch /shared/no; cat /shared/webs && echo read",
    );
    launch.user = Some("web:29".to_owned());
    launch.binds = vec![bind("/shared", true)];
    std::fs::set_permissions(shared.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let finished = platform.run(launch).await;
    assert_eq!(finished.stdout, "read\n", "{}", finished.stderr);
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_changes_owners_and_its_layer_has_the_images_ids() {
    let Some(platform) = open("userns-build").await else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper_dir, work_dir) = (path("lower"), path("upper"), path("work"));
    std::fs::create_dir(lower.join("bin")).unwrap();
    std::fs::copy(rootfs().join("bin/id"), lower.join("bin/as-web")).unwrap();
    // The bit has no effect with "no new privileges", and is kept.
    chown(lower.join("bin/as-web"), Some(1000), Some(1000)).unwrap();
    std::fs::set_permissions(lower.join("bin/as-web"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    let step = |what: &str| {
        let mut launch = probing(platform.launch("step", &[]), what);
        launch.rootfs.lower_dirs = vec![rootfs(), lower.clone()];
        launch.rootfs.upper = Upper::Keep {
            upper_dir: upper_dir.clone(),
            work_dir: work_dir.clone(),
        };
        launch
    };
    for (id, works) in [
        (1000, true),
        (65_534, true),
        (65_535, true),
        (65_536, false),
        (100_000, false),
    ] {
        let finished = platform.run(step(&format!("chown /etc/group {id}"))).await;
        let found = answer(&finished.stdout);
        assert_eq!(matches!(found, Some(Answer::Worked(_))), works, "{id}: {found:?}");
        let finished = platform.run(step(&format!("become {id}"))).await;
        let found = answer(&finished.stdout);
        assert_eq!(matches!(found, Some(Answer::Worked(_))), works, "{id}: {found:?}");
    }
    let group = std::fs::metadata(upper_dir.join("etc/group")).unwrap();
    assert_eq!((group.uid(), group.gid()), (65_535, 65_535), "copied up and changed");

    let script = "ls -ln /bin/as-web /etc/group; /bin/as-web -u; rm /bin/as-web; mkdir -p /srv/new; : > /srv/new/file";
    let mut launch = step("");
    launch.argv = ["sh", "-c", script].map(str::to_owned).into();
    let finished = platform.run(launch).await;
    assert!(
        finished.stdout.starts_with("-rwsr-xr-x 1  1000  1000 ") && finished.stdout.ends_with("\n0\n"),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let made = std::fs::metadata(upper_dir.join("srv/new/file")).unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0));

    let mut next = platform.shell("next", "test ! -e /bin/as-web && ls -ln /etc/group /srv/new");
    next.rootfs = Rootfs::scratch(vec![rootfs(), lower.clone(), upper_dir.clone()]);
    let finished = platform.run(next).await;
    assert_eq!(finished.exit, ContainerExit::Exited { code: 0 });
    assert!(finished.stdout.contains("65535 65535"), "{}", finished.stdout);
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_writes_to_its_own_small_files_and_its_output_again() {
    let Some(platform) = open("userns-own").await else {
        return;
    };
    let script =
        "echo 10.1.2.3 other >> /etc/hosts; cat /etc/hosts; echo again > /dev/stdout; echo x > /proc/self/fd/2";
    for user in [None, Some("web")] {
        let mut launch = platform.shell("own", script);
        launch.user = user.map(str::to_owned);
        let finished = platform.run(launch).await;
        assert!(
            finished.stdout.ends_with("again\n"),
            "{user:?}: {}{}",
            finished.stdout,
            finished.stderr
        );
        assert_eq!(
            finished.stdout.contains("10.1.2.3"),
            user.is_none(),
            "{}",
            finished.stdout
        );
        assert!(finished.stderr.ends_with("x\n"), "{}", finished.stderr);
    }
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_no_range_has_is_refused() {
    let Some(platform) = open("userns-user").await else {
        return;
    };
    let mut launch = platform.shell("user", "true");
    launch.user = Some("70000".to_owned());
    let error = platform.runtime.start(launch).await.unwrap_err();
    assert!(
        matches!(&error, StartError::User { reason, .. } if reason.contains("65535") && reason.contains("user_namespaces")),
        "{error:?}"
    );
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_turns_them_off_and_one_insists_on_them() {
    if !can_isolate() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let closed = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::set_permissions(closed.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let config = |mode, volatile: Option<&Path>| {
        let name = format!("userns-setting-{}", std::process::id());
        let mut config = ContainerConfig::new(name, directory.path().join("state"));
        config.warm_network_slots = 0;
        config.user_namespaces = mode;
        if let Some(volatile) = volatile {
            // Where a container's own root could not get to.
            config.volatile_dir = volatile.join("volatile");
        }
        config
    };
    let refused = RuncRuntime::open(config(UserNamespaces::Require, Some(closed.path()))).await;
    assert!(
        matches!(&refused, Err(OpenError::UserNamespaces { reason }) if reason.contains("entered")),
        "{:?}",
        refused.err()
    );
    for config in [
        config(UserNamespaces::Auto, Some(closed.path())),
        config(UserNamespaces::Off, None),
    ] {
        let own = tempfile::tempdir().unwrap();
        let platform = Platform::open_on(config, own, RuntimeKind::Runc).await;
        let mut launch = platform.shell("plain", "cat /proc/self/uid_map; ls /sys/class/net");
        launch.binds.push(Bind {
            source: rootfs(),
            target: "/mnt".to_owned(),
            read_only: true,
        });
        let finished = platform.run(launch).await;
        let words: Vec<_> = finished.stdout.split_whitespace().collect();
        assert_eq!(words, ["0", "0", "4294967295", "lo"], "{}", finished.stderr);
        platform.close().await;
    }
}

/// After a change of the setting and a restart, a container that has a namespace is adopted and removed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_setting_may_change_under_a_running_container() {
    let Some(platform) = open("userns-change").await else {
        return;
    };
    let config = platform.config.clone();
    let mut launch = platform.shell("lasting", "echo up; sleep 1000");
    launch.outlives_us = true;
    let mut container = platform.runtime.start(launch).await.unwrap();
    read_until(container.stdout.as_mut().unwrap(), "up").await;
    let pid = container.pid;
    container.release();
    let directory = platform.detach().await;

    let mut off = config;
    off.user_namespaces = UserNamespaces::Off;
    let platform = Platform::open_on(off, directory, RuntimeKind::Runc).await;
    let adopted = platform.runtime.adopt("lasting").await.unwrap();
    assert_eq!(adopted.pid, pid);
    assert!(owner_of(pid) >= 0x7000_0000);
    assert!(!platform.container_traces().is_empty());
    adopted.kill();
    assert_eq!(finish(adopted).await.exit, ContainerExit::Signaled { signal: 9 });
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    platform.close().await;
}

/// Prints what user namespaces cost a start, in pairs of one without and one with; nothing is asserted, since tests
/// share the machine.
#[tokio::test(flavor = "multi_thread")]
async fn their_cost_is_measured() {
    const ROUNDS: usize = 25;
    let Some(with) = open("userns-cost").await else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut config = ContainerConfig::new(
        format!("userns-none-{}", std::process::id()),
        directory.path().join("state"),
    );
    config.warm_network_slots = 2;
    config.user_namespaces = UserNamespaces::Off;
    let without = Platform::open_on(config, directory, RuntimeKind::Runc).await;
    let mut totals: [Vec<(Duration, Duration)>; 2] = Default::default();
    let mut steps: [Vec<Vec<Duration>>; 2] = Default::default();
    for round in 0..ROUNDS {
        // Who comes first changes.
        let mut order = [(&without, 0), (&with, 1)];
        if round % 2 == 1 {
            order.reverse();
        }
        for (platform, column) in order {
            platform.runtime.bridge_network().wait_until_warm().await;
            let mut launch = platform.launch(&format!("m{round}"), &["sleep", "1000"]);
            launch.network = NetworkMode::Bridge;
            for index in 0..5 {
                launch.binds.push(Bind {
                    source: rootfs().join("bin"),
                    target: format!("/mnt/{index}"),
                    read_only: true,
                });
            }
            let container = platform.runtime.start(launch).await.unwrap();
            let parts: Vec<Duration> = container.timings.steps.iter().map(|(_, duration)| *duration).collect();
            let began = std::time::Instant::now();
            container.dispose().await.unwrap();
            totals[column].push((parts.iter().sum(), began.elapsed()));
            steps[column].push(parts);
        }
    }
    let median = |mut values: Vec<Duration>| {
        values.sort();
        values[values.len() / 2]
    };
    for (column, name) in ["without", "with"].into_iter().enumerate() {
        let start = median(totals[column].iter().map(|(start, _)| *start).collect());
        let end = median(totals[column].iter().map(|(_, end)| *end).collect());
        let parts: Vec<_> = (0..steps[column][0].len())
            .map(|part| median(steps[column].iter().map(|parts| parts[part]).collect()))
            .collect();
        println!("{name} user namespaces: start {start:?} {parts:?}, removal {end:?}");
    }
    let mut ratios: Vec<f64> = std::iter::zip(&totals[0], &totals[1])
        .map(|(without, with)| with.0.as_secs_f64() / without.0.as_secs_f64())
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("median ratio of {ROUNDS} pairs of starts: {:.3}", ratios[ROUNDS / 2]);
    with.close().await;
    without.close().await;
}
