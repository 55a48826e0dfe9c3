//! The whole worker over the runtime without isolation, with a shell script in the place of Python: real
//! processes, pipes and signals, and no root needed. What needs a real image is in `tests/runc.rs`.

use std::time::Instant as StdInstant;

use ionian_container::{Launch, NetworkMode, ProcessRuntime, Rootfs};
use ionian_domain::VolumeId;
use ionian_domain::container::{ContainerSpec, RuntimeKind, StopReason};
use ionian_domain::function::VolumeMount;
use ionian_domain::mount::MountFile;
use ionian_domain::worker::{DesiredContainer, DesiredState, Generation};
use ionian_image::base::{BaseConfig, BaseImages};
use ionian_image::client_bundle::ClientBundlesConfig;
use ionian_image::{BuilderConfig, HostTrust, LayerStore};
use parking_lot::Mutex;

use super::*;
use crate::steps::{ContainerSteps, StepLimits};

/// Nothing here takes a second; a machine with a hundred other tests may.
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    root: tempfile::TempDir,
    desired: watch::Sender<DesiredSet>,
    reports: mpsc::Receiver<WorkerReport>,
    logs: watch::Receiver<String>,
    cancel: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

/// Output as it was written, line after line.
fn log_sink() -> (LogSink, watch::Receiver<String>) {
    let (tx, rx) = watch::channel(String::new());
    let tx = Arc::new(tx);
    let sink: LogSink = Arc::new(move |entries| {
        let tx = Arc::clone(&tx);
        Box::pin(async move {
            // A sink takes its time: what is told after it must not overtake it.
            tokio::time::sleep(Duration::from_millis(1)).await;
            tx.send_modify(|text| text.extend(entries.into_iter().map(|entry| entry.text)));
        })
    });
    (sink, rx)
}

impl World {
    fn new() -> Self {
        Self::with_concurrent_starts(4)
    }

    fn with_concurrent_starts(concurrent_starts: usize) -> Self {
        Self::open(tempfile::tempdir().unwrap(), concurrent_starts, Vec::new())
    }

    /// `found` is what an earlier process left.
    fn open(root: tempfile::TempDir, concurrent_starts: usize, found: Vec<RunningContainer>) -> Self {
        let path = |name: &str| root.path().join(name);
        fs::create_dir_all(path("content")).unwrap();
        let python = path("python");
        // Its arguments are those of Python; what it does comes in a variable of the function.
        fs::write(&python, "#!/bin/sh\neval \"$SCRIPT\"\n").unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        let runtime: Arc<dyn Runtime> = Arc::new(ProcessRuntime::new());
        let steps = ContainerSteps::open(Arc::clone(&runtime), &path("steps"), StepLimits::for_host()).unwrap();
        let steps: Arc<dyn StepRunner> = Arc::new(steps);
        let content_dir = path("content");
        let content: ContextFiles = Arc::new(move |name| Ok(content_dir.join(name)));
        let images = ImageBuilder::new(BuilderConfig {
            layers: LayerStore::open(path("layers")).unwrap(),
            base_images: Arc::new(BaseImages::new(BaseConfig::new(path("bases"))).unwrap()),
            runner: Arc::clone(&steps),
            files: Arc::clone(&content),
            trust: HostTrust::default(),
            step_timeout: PATIENCE,
            cache_dir: path("cache"),
            scratch_dir: path("scratch"),
            volatile_dir: path("volatile"),
        });
        let (logs, log) = log_sink();
        let worker = Worker::open(WorkerParts {
            runtimes: vec![runtime],
            images,
            steps,
            bundles: Arc::new(ClientBundles::new(ClientBundlesConfig::default())),
            content,
            fetch: Arc::new(|_| Box::pin(async { Ok(()) })),
            state_dir: path("state"),
            logs,
            limits: WorkerLimits {
                concurrent_starts,
                ..WorkerLimits::for_host()
            },
            found: found
                .into_iter()
                .map(|container| FoundContainer {
                    runtime: RuntimeKind::Process,
                    container,
                })
                .collect(),
            process_python: Some(python),
        })
        .unwrap();
        let (desired, wanted) = watch::channel(DesiredSet::default());
        let (report, reports) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let running = tokio::spawn(worker.run(wanted, report, cancel.clone()));
        Self {
            root,
            desired,
            reports,
            logs: log,
            cancel,
            running,
        }
    }

    fn desire(&self, containers: &[(ContainerId, &Arc<ContainerSpec>, DesiredState)]) {
        let containers = containers
            .iter()
            .map(|(id, spec, state)| DesiredContainer {
                id: *id,
                spec: Arc::clone(spec),
                state: *state,
                must_exist: false,
            })
            .collect();
        self.desire_all(containers);
    }

    /// Containers that were reported as started once.
    fn desire_known(&self, ids: &[ContainerId], spec: &Arc<ContainerSpec>) {
        let known = |id: &ContainerId| DesiredContainer {
            id: *id,
            spec: Arc::clone(spec),
            state: RUNNING,
            must_exist: true,
        };
        self.desire_all(ids.iter().map(known).collect());
    }

    fn desire_all(&self, containers: Vec<DesiredContainer>) {
        self.desired.send_modify(|set| {
            *set = DesiredSet {
                generation: Generation(set.generation.0 + 1),
                containers,
            };
        });
    }

    async fn report(&mut self) -> WorkerReport {
        tokio::time::timeout(PATIENCE, self.reports.recv())
            .await
            .expect("a report is due")
            .unwrap()
    }

    async fn started(&mut self) -> ionian_domain::container::ContainerStarted {
        match self.report().await {
            WorkerReport::Started(started) => started,
            WorkerReport::Exited { exit, .. } => panic!("exited: {exit}"),
        }
    }

    async fn exit(&mut self, id: ContainerId) -> ContainerExit {
        match self.report().await {
            WorkerReport::Exited { container_id, exit } if container_id == id => exit,
            other => panic!("{other:?}"),
        }
    }

    async fn said(&mut self, wanted: &str) {
        let wait = self.logs.wait_for(|text| text.contains(wanted));
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("nobody said {wanted:?}"))
            .unwrap();
    }

    fn said_so_far(&self) -> String {
        self.logs.borrow().clone()
    }

    /// Directories of containers that are there.
    fn run_dirs(&self) -> usize {
        fs::read_dir(self.root.path().join("state/run")).unwrap().count()
    }

    async fn shut_down(self) -> tempfile::TempDir {
        self.cancel.cancel();
        tokio::time::timeout(PATIENCE, self.running).await.unwrap().unwrap();
        self.root
    }
}

/// A container as an earlier process of the worker left it: it runs, and has a directory.
async fn left_behind(root: &Path, id: ContainerId, script: &str) -> RunningContainer {
    let run_dir = root.join("state/run").join(id.to_string());
    fs::create_dir_all(&run_dir).unwrap();
    fs::write(run_dir.join("arguments.bin"), "arguments").unwrap();
    let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let mut launch = Launch::new(id.to_string(), Rootfs::host(), argv);
    launch.network = NetworkMode::Host;
    launch.env = vec![("PATH".to_owned(), std::env::var("PATH").unwrap())];
    ProcessRuntime::new().start(launch).await.unwrap()
}

fn script(script: &str) -> Arc<ContainerSpec> {
    let mut spec = crate::launch::tests::spec();
    spec.runtime = RuntimeKind::Process;
    spec.secret_env = vec![("SCRIPT".to_owned(), script.to_owned())];
    Arc::new(spec)
}

fn stopped(grace: Duration) -> DesiredState {
    DesiredState::Stopped {
        grace,
        reason: StopReason::ScaleDown,
    }
}

const RUNNING: DesiredState = DesiredState::Running;

#[tokio::test]
async fn a_container_is_started_and_its_end_told_until_it_is_acknowledged() {
    let mut world = World::new();
    let (id, other) = (ContainerId::generate(), ContainerId::generate());
    let spec = script("echo hello; exit 3");
    world.desire(&[(id, &spec, RUNNING)]);
    let started = world.started().await;
    assert_eq!(started.container_id, id);
    let steps: Vec<&str> = started.timings.steps.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(steps, ["queue", "files", "spawn"]);
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 3 });
    // Named again, told again.
    world.desire(&[(id, &spec, stopped(PATIENCE))]);
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 3 });
    // Left out: the next report is about something else.
    world.desire(&[(other, &script("exit 0"), RUNNING)]);
    assert_eq!(world.started().await.container_id, other);
    world.shut_down().await;
}

#[tokio::test]
async fn all_output_is_written_before_the_end_is_told() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; printf last; exit 1");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 1 });
    let text = world.said_so_far();
    assert_eq!(text.lines().count(), 3001);
    assert!(text.ends_with("line 2999\nlast"));
    world.shut_down().await;
}

#[tokio::test]
async fn a_stop_interrupts_first() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("trap 'echo bye; exit 7' INT; echo ready; sleep 60 & wait $!");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    world.said("ready").await;
    world.desire(&[(id, &spec, stopped(PATIENCE))]);
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 7 });
    assert!(world.said_so_far().contains("bye"));
    world.shut_down().await;
}

#[tokio::test]
async fn what_does_not_listen_is_killed_after_its_grace_and_a_shorter_grace_shortens() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("trap '' INT; echo ready; sleep 60");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    world.said("ready").await;
    let asked = StdInstant::now();
    world.desire(&[(id, &spec, stopped(Duration::from_secs(50)))]);
    tokio::task::yield_now().await;
    world.desire(&[(id, &spec, stopped(Duration::from_millis(300)))]);
    assert_eq!(world.exit(id).await, ContainerExit::Signaled { signal: 9 });
    assert!(asked.elapsed() >= Duration::from_millis(300), "{:?}", asked.elapsed());
    world.shut_down().await;
}

#[tokio::test]
async fn no_grace_kills_at_once_and_the_host_is_left_clean() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("trap 'exit 0' INT; echo ready; sleep 60 & wait $!");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    world.said("ready").await;
    assert_eq!(world.run_dirs(), 1);
    world.desire(&[(id, &spec, stopped(Duration::ZERO))]);
    assert_eq!(world.exit(id).await, ContainerExit::Signaled { signal: 9 });
    let root = world.shut_down().await;
    assert_eq!(fs::read_dir(root.path().join("state/run")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_is_not_named_is_killed_without_a_word() {
    let mut world = World::new();
    let (id, other) = (ContainerId::generate(), ContainerId::generate());
    let spec = script("echo pid $$; sleep 60 & wait $!");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    world.said("\n").await;
    let text = world.said_so_far();
    let pid = text.strip_prefix("pid ").unwrap().trim().to_owned();
    world.desire(&[]);
    let process = Path::new("/proc").join(pid);
    let deadline = StdInstant::now() + PATIENCE;
    while process.exists() {
        assert!(StdInstant::now() < deadline, "it still runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    world.desire(&[(other, &script("exit 0"), RUNNING)]);
    assert_eq!(world.started().await.container_id, other);
    world.shut_down().await;
}

#[tokio::test]
async fn a_failed_start_says_what_is_wrong() {
    let mut world = World::new();
    let mut with_file = (*script("exit 0")).clone();
    with_file.files = vec![MountFile {
        path: "/root/app.py".into(),
        sha256_hex: "gone".into(),
        mode: None,
    }];
    let mut with_volume = (*script("exit 0")).clone();
    let volume_id = VolumeId::generate();
    with_volume.volumes = vec![VolumeMount {
        volume_id,
        path: "/data".into(),
        read_only: false,
        sub_path: None,
    }];
    let mut isolated = (*script("exit 0")).clone();
    isolated.runtime = RuntimeKind::Runc;
    for (spec, words) in [
        (with_file, "failed to provide the function's files: failed to look at"),
        (with_volume, "mounts volumes"),
        (isolated, "does not have the runc runtime"),
    ] {
        let id = ContainerId::generate();
        world.desire(&[(id, &Arc::new(spec), RUNNING)]);
        let ContainerExit::StartFailed { message } = world.exit(id).await else {
            panic!("{words}")
        };
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(world.run_dirs(), 0);
    world.shut_down().await;
}

#[tokio::test]
async fn a_process_finds_its_files_and_variables() {
    let mut world = World::new();
    fs::write(world.root.path().join("content/abc"), "content of the app").unwrap();
    let id = ContainerId::generate();
    let mut spec = (*script(
        "cat app.py; echo; cat \"$MODAL_CONTAINER_ARGUMENTS_PATH\"; echo; echo $1 ${2##*/} $PYTHONPATH = $PWD $MODAL_TASK_ID",
    ))
    .clone();
    spec.files = vec![MountFile {
        path: "/root/app.py".into(),
        sha256_hex: "abc".into(),
        mode: Some(0o600),
    }];
    world.desire(&[(id, &Arc::new(spec), RUNNING)]);
    world.started().await;
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 0 });
    let text = world.said_so_far();
    let home = world
        .root
        .path()
        .canonicalize()
        .unwrap()
        .join("state/run")
        .join(id.to_string())
        .join("files/root");
    let home = home.display();
    assert_eq!(
        text,
        format!("content of the app\narguments\n-u launcher.py {home} = {home} ta-1\n")
    );
    world.shut_down().await;
}

#[tokio::test]
async fn a_container_that_waits_for_its_turn_can_still_be_stopped() {
    let mut world = World::with_concurrent_starts(1);
    let ids: Vec<ContainerId> = (0..20).map(|_| ContainerId::generate()).collect();
    let spec = script("echo ran; sleep 60");
    let wanted: Vec<_> = ids.iter().map(|id| (*id, &spec, RUNNING)).collect();
    world.desire(&wanted);
    let unwanted: Vec<_> = ids.iter().map(|id| (*id, &spec, stopped(Duration::ZERO))).collect();
    world.desire(&unwanted);
    let mut ended = 0;
    while ended < ids.len() {
        match world.report().await {
            WorkerReport::Started(_) => {}
            WorkerReport::Exited { exit, .. } => {
                // `Lost` where both sets came as one: it was never to run.
                assert!(
                    matches!(exit, ContainerExit::Signaled { signal: 9 } | ContainerExit::Lost),
                    "{exit:?}"
                );
                ended += 1;
            }
        }
    }
    world.shut_down().await;
}

#[tokio::test]
async fn an_older_set_changes_nothing() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("echo ready; sleep 60");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    let newest = world.desired.borrow().generation;
    world.desired.send_modify(|set| {
        *set = DesiredSet {
            generation: Generation(newest.0 - 1),
            containers: Vec::new(),
        }
    });
    world.said("ready").await;
    world.desired.send_modify(|set| set.generation = newest);
    world.desire(&[(id, &spec, stopped(Duration::ZERO))]);
    assert_eq!(world.exit(id).await, ContainerExit::Signaled { signal: 9 });
    world.shut_down().await;
}

#[tokio::test]
async fn an_end_is_told_although_a_daemon_holds_the_pipe() {
    let mut world = World::new();
    let id = ContainerId::generate();
    let spec = script("setsid sleep 20 & echo started; sleep 0.2; exit 0");
    world.desire(&[(id, &spec, RUNNING)]);
    world.started().await;
    let started = StdInstant::now();
    assert_eq!(world.exit(id).await, ContainerExit::Exited { code: 0 });
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    world.shut_down().await;
}

#[tokio::test]
async fn many_containers_at_once() {
    let mut world = World::new();
    let spec = script("echo out of $MODAL_TASK_ID");
    let ids: Vec<ContainerId> = (0..40).map(|_| ContainerId::generate()).collect();
    let wanted: Vec<_> = ids.iter().map(|id| (*id, &spec, RUNNING)).collect();
    world.desire(&wanted);
    let seen = Mutex::new((0, 0));
    while *seen.lock() != (ids.len(), ids.len()) {
        match world.report().await {
            WorkerReport::Started(_) => seen.lock().0 += 1,
            WorkerReport::Exited { exit, .. } => {
                assert_eq!(exit, ContainerExit::Exited { code: 0 });
                seen.lock().1 += 1;
            }
        }
    }
    assert_eq!(world.said_so_far().lines().count(), ids.len());
    world.shut_down().await;
}

#[tokio::test]
async fn what_the_first_set_names_is_adopted_and_the_rest_removed() {
    let root = tempfile::tempdir().unwrap();
    let (kept, ended, unwanted, missing) = (
        ContainerId::generate(),
        ContainerId::generate(),
        ContainerId::generate(),
        ContainerId::generate(),
    );
    let found = vec![
        left_behind(
            root.path(),
            kept,
            "trap 'echo bye; exit 7' INT; echo ready; sleep 60 & wait $!",
        )
        .await,
        left_behind(root.path(), ended, "echo last words; exit 3").await,
        left_behind(root.path(), unwanted, "sleep 60").await,
    ];
    let unwanted_pid = found[2].pid;
    fs::create_dir_all(root.path().join("state/run").join(ContainerId::generate().to_string())).unwrap();
    let mut world = World::open(root, 4, found);
    assert_eq!(
        world.run_dirs(),
        3,
        "only the directories of containers that were found are kept"
    );
    let spec = script("echo never");
    // Nothing has been said: nothing ends.
    world.desired.send_modify(|_| ());
    world.desire_known(&[kept, ended, missing], &spec);
    let (mut started, mut exits) = (BTreeSet::new(), BTreeMap::new());
    while started.len() < 2 || exits.len() < 2 {
        match world.report().await {
            WorkerReport::Started(report) => drop(started.insert(report.container_id)),
            WorkerReport::Exited { container_id, exit } => drop(exits.insert(container_id, exit)),
        }
    }
    assert_eq!(started, BTreeSet::from([kept, ended]));
    let expected = [
        (ended, ContainerExit::Exited { code: 3 }),
        (missing, ContainerExit::Lost),
    ];
    assert_eq!(exits, BTreeMap::from(expected));
    world.said("ready").await;
    world.said("last words").await;
    let process = Path::new("/proc").join(unwanted_pid.to_string());
    let deadline = StdInstant::now() + PATIENCE;
    while process.exists() || world.run_dirs() > 1 {
        assert!(StdInstant::now() < deadline, "it still runs");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // From here on it is a container like any other.
    world.desire(&[(kept, &spec, stopped(PATIENCE))]);
    assert_eq!(world.exit(kept).await, ContainerExit::Exited { code: 7 });
    world.said("bye").await;
    world.shut_down().await;
}

#[tokio::test]
async fn what_is_isolated_less_than_is_wanted_now_is_not_adopted() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::generate();
    let found = vec![left_behind(root.path(), id, "sleep 60").await];
    let process = Path::new("/proc").join(found[0].pid.to_string());
    let mut world = World::open(root, 4, found);
    let isolated = Arc::new(ContainerSpec {
        runtime: RuntimeKind::Runc,
        ..(*script("echo never")).clone()
    });
    world.desire_known(&[id], &isolated);
    assert_eq!(world.exit(id).await, ContainerExit::Lost);
    assert!(!process.exists());
    world.shut_down().await;
}

#[tokio::test]
async fn an_orderly_end_also_ends_what_was_never_named() {
    let root = tempfile::tempdir().unwrap();
    let id = ContainerId::generate();
    let found = vec![left_behind(root.path(), id, "sleep 60").await];
    let process = Path::new("/proc").join(found[0].pid.to_string());
    let world = World::open(root, 4, found);
    world.desired.send_modify(|_| ());
    tokio::task::yield_now().await;
    assert!(process.exists());
    let root = world.shut_down().await;
    assert!(!process.exists());
    assert_eq!(fs::read_dir(root.path().join("state/run")).unwrap().count(), 0);
}
