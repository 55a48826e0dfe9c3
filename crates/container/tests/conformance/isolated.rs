//! What a container of an isolated runtime may not do, and what it is limited to.

use ionian_container::{Bind, Rootfs, StartError, Upper};
use ionian_domain::container::ContainerExit;

use crate::support::{Platform, can_isolate, finish, rootfs};

#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_itself_alone() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("alone").await;
    let script = "echo pid=$$; echo processes=$(ls -d /proc/[0-9]* | wc -l); cat /proc/sys/kernel/hostname; \
                  ls /work /home /usr/share 2>/dev/null; ls /sys/class/net; cat /proc/self/cgroup; cat /etc/hostname";
    let finished = platform.run(platform.shell("lonely", script)).await;
    assert_eq!(finished.exit, ContainerExit::Exited { code: 0 }, "{}", finished.stderr);
    let lines: Vec<_> = finished.stdout.lines().collect();
    // The shell and, while they count, `ls` and `wc` with the shell of their pipeline.
    assert_eq!(lines[0], "pid=1");
    assert!(
        lines[1].trim_start_matches("processes=").parse::<u32>().unwrap() <= 5,
        "{}",
        lines[1]
    );
    assert_eq!(lines[2], "lonely");
    assert_eq!(lines[3], "lo");
    assert_eq!(*lines.last().unwrap(), "lonely");
    assert!(
        !finished.stdout.contains("ionian"),
        "the control group's place on the host is hidden: {}",
        finished.stdout
    );
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_in_a_container_cannot_reach_the_kernel_or_the_host() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("powerless").await;
    for forbidden in [
        "mount -t tmpfs none /tmp",
        "mount --bind /tmp /root",
        "unshare --mount true",
        "unshare --user true",
        "unshare --net true",
        "mknod /tmp/disk b 254 0 && cat /tmp/disk",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo b > /proc/sysrq-trigger",
        "test -d /sys/fs/cgroup/memory && mkdir /sys/fs/cgroup/memory/mine",
        "test ! -d /sys/fs/cgroup/memory && mkdir /sys/fs/cgroup/mine",
        "head -c 1 /proc/kcore | wc -c | { read n; test $n = 1; }",
        "cat /dev/vda /dev/sda /dev/mem",
    ] {
        let finished = platform.run(platform.shell("powerless", forbidden)).await;
        assert_ne!(finished.exit, ContainerExit::Exited { code: 0 }, "{forbidden} worked");
    }
    let status = platform
        .run(platform.launch("status", &["cat", "/proc/self/status"]))
        .await
        .stdout;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"));
    let forbidden_capabilities = (1 << 21/* SYS_ADMIN */)
        | (1 << 12/* NET_ADMIN */)
        | (1 << 13/* NET_RAW */)
        | (1 << 19/* SYS_PTRACE */)
        | (1 << 16/* SYS_MODULE */)
        | (1 << 27/* MKNOD */);
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        assert_eq!(
            u64::from_str_radix(&field(set), 16).unwrap() & forbidden_capabilities,
            0,
            "{set}"
        );
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16).unwrap(), 0, "{set}");
    }
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn binds_are_seen_and_read_only_ones_stay_so() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("binds").await;
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "from the host").unwrap();
    let bind = |target: &str, read_only| Bind {
        source: shared.path().to_owned(),
        target: target.to_owned(),
        read_only,
    };
    let script = "cat /fixed/file /not/there/yet/file; echo inside > /not/there/yet/new; echo no > /fixed/no; echo $?";
    let mut launch = platform.shell("binds", script);
    launch.binds = vec![bind("/fixed", true), bind("/not/there/yet", false)];
    let finished = platform.run(launch).await;
    assert!(
        finished.stdout.starts_with("from the hostfrom the host"),
        "{}",
        finished.stdout
    );
    assert!(finished.stderr.contains("Read-only"), "{}", finished.stderr);
    assert_eq!(std::fs::read_to_string(shared.path().join("new")).unwrap(), "inside\n");
    assert!(!shared.path().join("no").exists());

    let mut launch = platform.shell("no-source", "true");
    launch.binds = vec![Bind {
        source: shared.path().join("absent"),
        target: "/x".to_owned(),
        read_only: true,
    }];
    let error = platform.runtime.start(launch).await.unwrap_err();
    assert!(
        matches!(&error, StartError::Prepare { path, .. } if path.ends_with("absent")),
        "{error:?}"
    );
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_limited_and_its_lack_is_told_from_a_kill() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("memory").await;
    let mut launch = platform.launch("hungry", &["tail", "/dev/zero"]);
    launch.limits.memory_bytes = Some(64 << 20);
    assert_eq!(platform.run(launch).await.exit, ContainerExit::OutOfMemory);

    // A child of the first process, as in a shell of an image build.
    let mut launch = platform.shell("hungry-child", "tail /dev/zero; exit $?");
    launch.limits.memory_bytes = Some(64 << 20);
    assert_eq!(platform.run(launch).await.exit, ContainerExit::OutOfMemory);

    let container = platform
        .runtime
        .start(platform.launch("killed", &["sleep", "1000"]))
        .await
        .unwrap();
    container.kill();
    assert_eq!(finish(container).await.exit, ContainerExit::Signaled { signal: 9 });
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_and_cpu_are_limited() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("pids").await;
    let mut launch = platform.shell(
        "many",
        "for i in $(seq 1 50) 1 2 3 4 5 6 7 8 9; do sleep 30 & done; echo all",
    );
    launch.argv[2] = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 30 & done; echo all".to_owned();
    launch.limits.pids = Some(8);
    let finished = platform.run(launch).await;
    assert!(
        !finished.stdout.contains("all") && finished.stderr.contains("fork"),
        "{}{}",
        finished.stdout,
        finished.stderr
    );

    // Half a CPU: at most about half a second of work in a second.
    let script = "timeout 1 sh -c 'while :; do :; done'; cat /proc/self/stat >/dev/null; times";
    let mut launch = platform.shell("slow", script);
    launch.limits.cpu_millis = Some(200);
    let finished = platform.run(launch).await;
    let children = finished
        .stdout
        .lines()
        .last()
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    let seconds: f64 = children.trim_start_matches("0m").trim_end_matches('s').parse().unwrap();
    assert!(seconds < 0.6, "used {seconds} s of CPU: {}", finished.stdout);
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_the_image_are_resolved_and_have_no_capabilities() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("users").await;
    for (user, expected) in [
        ("web", "1000:1000:1000 29"),
        ("1000:29", "1000:29:29"),
        ("4242", "4242:0:0"),
    ] {
        let mut launch = platform.shell("user", "echo $(id -u):$(id -g):$(id -G); cat /proc/self/status");
        launch.user = Some(user.to_owned());
        let finished = platform.run(launch).await;
        assert_eq!(finished.stdout.lines().next(), Some(expected), "{user}");
        let effective = finished
            .stdout
            .lines()
            .find(|line| line.starts_with("CapEff:"))
            .unwrap()
            .to_owned();
        assert!(effective.ends_with("0000000000000000"), "{effective}");
    }
    let mut launch = platform.shell("user", "true");
    launch.user = Some("stranger".to_owned());
    let error = platform.runtime.start(launch).await.unwrap_err();
    assert!(
        matches!(&error, StartError::User { user, .. } if user == "stranger"),
        "{error:?}"
    );
    assert_eq!(platform.container_traces(), Vec::<String>::new());
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_to_a_scratch_layer_or_to_the_callers() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("layers").await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (middle, upper_dir, work_dir) = (path("middle"), path("upper"), path("work"));
    std::fs::write(middle.join("from-middle"), "middle").unwrap();
    let script = "cat /from-middle && echo new > /tmp/new && rm /from-middle";
    let mut launch = platform.shell("build", script);
    launch.rootfs.lower_dirs = vec![rootfs(), middle.clone()];
    launch.rootfs.upper = Upper::Keep {
        upper_dir: upper_dir.clone(),
        work_dir,
    };
    let finished = platform.run(launch).await;
    assert_eq!(
        (finished.exit, finished.stdout.as_str()),
        (ContainerExit::Exited { code: 0 }, "middle")
    );
    assert_eq!(std::fs::read_to_string(upper_dir.join("tmp/new")).unwrap(), "new\n");
    assert!(middle.join("from-middle").exists(), "a layer below is never written");

    // The layer on top of the others, as the next step of a build sees it.
    let mut launch = platform.shell(
        "next",
        "cat /tmp/new; test ! -e /from-middle; echo $?; echo gone > /tmp/scratch",
    );
    launch.rootfs = Rootfs::scratch(vec![rootfs(), middle, upper_dir.clone()]);
    assert_eq!(platform.run(launch).await.stdout, "new\n0\n");
    assert!(!upper_dir.join("tmp/scratch").exists());
    platform.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_unique_while_in_use() {
    if !can_isolate() {
        return;
    }
    let platform = Platform::open("names").await;
    let first = platform
        .runtime
        .start(platform.launch("same", &["sleep", "1000"]))
        .await
        .unwrap();
    let error = platform
        .runtime
        .start(platform.launch("same", &["true"]))
        .await
        .unwrap_err();
    assert!(matches!(error, StartError::NameTaken { .. }), "{error:?}");
    first.dispose().await.unwrap();
    assert_eq!(
        platform.run(platform.launch("same", &["true"])).await.exit,
        ContainerExit::Exited { code: 0 }
    );
    platform.close().await;
}
