//! The keeper alone, around programs of this machine.

use super::*;

struct Subject {
    directory: tempfile::TempDir,
    keeper: Keeper,
}

impl Subject {
    fn spawn(script: &str, inherited: &[RawFd]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        create_fifos(directory.path(), None).unwrap();
        let command = ["/bin/sh", "-c", script].map(OsString::from);
        let keeper = Keeper::spawn(&command, directory.path(), inherited).unwrap();
        Self { directory, keeper }
    }

    fn identity(&self) -> ProcessIdentity {
        ProcessIdentity::of(self.keeper.pid()).unwrap()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        assert!(self.keeper.kill_and_wait(Duration::from_secs(10)));
    }
}

/// The limit of every wait.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work)
        .await
        .expect("in time")
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn output_and_status_wait_for_somebody_who_comes_late() {
    let subject = Subject::spawn("echo out; echo err >&2; exit 42", &[]);
    let directory = subject.directory.path().to_owned();
    eventually("the program ends", || read_exit(&directory).is_some()).await;
    assert!(!has_ended(
        subject.keeper.pidfd.as_ref().unwrap().get_ref(),
        Duration::ZERO
    ));

    let (mut stdout, mut stderr, readers) = Readers::open(&directory).unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    soon(async { tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)) })
        .await
        .unwrap();
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    soon(subject.keeper.ended()).await.unwrap();
    assert_eq!(subject.keeper.exit_status().unwrap().code(), Some(42));
    drop(readers);
}

#[tokio::test]
async fn a_program_without_reader_waits_and_gets_no_error() {
    /// Several times what a pipe holds.
    const BYTES: usize = 300_000;
    let subject = Subject::spawn(&format!("head -c {BYTES} /dev/zero; echo $? >&2"), &[]);
    let directory = subject.directory.path().to_owned();
    // Read a little and go away, as an owner that crashes; then another comes.
    let (mut stdout, stderr, readers) = Readers::open(&directory).unwrap();
    let mut some = [0; 1000];
    soon(async {
        // Until the keeper has opened its end, there is nothing to read.
        let mut length = 0;
        while length < some.len() {
            length += stdout.read(&mut some[length..]).await.unwrap();
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop((stdout, stderr, readers));
    let (mut stdout, mut stderr, _readers) = Readers::open(&directory).unwrap();
    let (mut rest, mut status) = (Vec::new(), String::new());
    soon(async { tokio::try_join!(stdout.read_to_end(&mut rest), stderr.read_to_string(&mut status)) })
        .await
        .unwrap();
    assert_eq!(rest.len() + some.len(), BYTES);
    assert_eq!(status, "0\n");
}

#[tokio::test]
async fn a_keeper_has_a_process_group_and_nothing_of_ours() {
    let leak = std::fs::File::open("/etc/passwd").unwrap();
    // Without the flag that closes it in children, as something this process was started with.
    let leak = rustix::io::dup(&leak).unwrap();
    let inherited = inherited_descriptors().unwrap();
    assert!(
        inherited.contains(&std::os::fd::AsRawFd::as_raw_fd(&leak)),
        "{inherited:?}"
    );
    let subject = Subject::spawn("echo up; exec sleep 1000", &inherited);
    let (mut stdout, _stderr, _readers) = Readers::open(subject.directory.path()).unwrap();
    let pid = subject.keeper.pid();
    soon(async {
        let mut byte = [0];
        while stdout.read(&mut byte).await.unwrap() == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let group = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(2).unwrap();
    assert_eq!(group, pid.to_string());
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let own = subject.directory.path().to_owned();
    for process in [pid.to_string(), child.trim().to_owned()] {
        for entry in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
            let target = std::fs::read_link(entry.unwrap().path()).unwrap();
            assert!(
                target == Path::new("/dev/null") || target.starts_with(&own),
                "{target:?}"
            );
        }
    }
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environment = String::from_utf8(environment).unwrap();
    assert!(
        environment.starts_with("PATH=") && environment.matches('\0').count() == 1,
        "{environment}"
    );
}

#[tokio::test]
async fn a_killed_keeper_tells_no_status_and_leaves_no_zombie() {
    let subject = Subject::spawn("exec sleep 1000", &[]);
    let identity = subject.identity();
    assert!(kill_stray(&identity, Duration::from_secs(10)).unwrap());
    soon(subject.keeper.ended()).await.unwrap();
    assert_eq!(subject.keeper.exit_status(), None);
    assert!(!Path::new(&format!("/proc/{}", identity.pid)).exists());
    assert!(identity.open().unwrap().is_none());
}

#[test]
fn half_a_status_is_none() {
    let directory = tempfile::tempdir().unwrap();
    for (text, code) in [
        ("", None),
        ("1", None),
        ("1\n", Some(1)),
        ("x\n", None),
        ("300\n", None),
    ] {
        std::fs::write(directory.path().join("exit"), text).unwrap();
        assert_eq!(
            read_exit(directory.path()).and_then(|status| status.code()),
            code,
            "{text:?}"
        );
    }
}
