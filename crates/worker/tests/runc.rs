//! The worker over real containers. Needs root, runc and `IONIAN_TEST_LAYERS`: a layer store that holds a base
//! image of Python (and, to need no network, the client for it). Layers that the tests build stay in it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, which clippy does not see as tests"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ionian_container::{ContainerConfig, RuncRuntime, Runtime};
use ionian_domain::container::{ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, StopReason, WebHookMode};
use ionian_domain::function::Resources;
use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata, ImageSpec, RegistryAuth};
use ionian_domain::mount::MountFile;
use ionian_domain::network::Egress;
use ionian_domain::worker::{DesiredContainer, DesiredSet, DesiredState, Generation, WorkerReport};
use ionian_domain::{AppId, ContainerId, FunctionId, ImageId};
use ionian_image::base::{BaseConfig, BaseImages};
use ionian_image::client_bundle::{ClientBundles, ClientBundlesConfig};
use ionian_image::{
    BuildError, BuildRequest, BuilderConfig, ContextFiles, HostTrust, ImageBuilder, LayerRecord, LayerStore, StepExit,
    StepRunner,
};
use ionian_worker::{BuildLine, Builder, ContainerSteps, LogSink, StepLimits, Worker, WorkerLimits, WorkerParts};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_mins(2);
const CLIENT: &str = "1.6.4";

struct World {
    root: tempfile::TempDir,
    image: BuiltImage,
    runtime: Arc<dyn Runtime>,
    builder: Builder,
    desired: watch::Sender<DesiredSet>,
    reports: mpsc::Receiver<WorkerReport>,
    log: Arc<Mutex<String>>,
    cancel: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

/// `None`, and a word about it, where this cannot run. `name` keeps tests apart that run at the same time.
async fn world(name: &str) -> Option<World> {
    let Some(store) = std::env::var_os("IONIAN_TEST_LAYERS").map(PathBuf::from) else {
        println!("skipped: IONIAN_TEST_LAYERS names no layer store");
        return None;
    };
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    let layers = LayerStore::open(store.clone()).unwrap();
    let Some(image) = python_image(&store) else {
        println!("skipped: the layer store has no base image of Python 3.11");
        return None;
    };
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    fs::create_dir(path("content")).unwrap();
    let instance = format!("worker-test-{name}-{}", std::process::id());
    let runtime: Arc<dyn Runtime> = Arc::new(
        RuncRuntime::open(ContainerConfig::new(instance, path("runc")))
            .await
            .unwrap(),
    );
    let mut limits = StepLimits::for_host();
    limits.pids = 500;
    let steps: Arc<dyn StepRunner> =
        Arc::new(ContainerSteps::open(Arc::clone(&runtime), &path("steps"), limits).unwrap());
    let content_dir = path("content");
    let content: ContextFiles = Arc::new(move |name| Ok(content_dir.join(name)));
    let trust = HostTrust::detect();
    let images = ImageBuilder::new(BuilderConfig {
        layers,
        base_images: Arc::new(BaseImages::new(BaseConfig::new(path("bases"))).unwrap()),
        runner: Arc::clone(&steps),
        files: Arc::clone(&content),
        trust,
        step_timeout: Duration::from_secs(2),
        cache_dir: path("cache"),
        scratch_dir: path("scratch"),
        volatile_dir: "/dev/shm".into(),
    });
    let log = Arc::new(Mutex::new(String::new()));
    let kept = Arc::clone(&log);
    let logs: LogSink = Arc::new(move |entries| {
        kept.lock().extend(entries.into_iter().map(|entry| entry.text));
        Box::pin(async {})
    });
    let worker = Worker::open(WorkerParts {
        runtimes: vec![Arc::clone(&runtime)],
        images,
        steps,
        bundles: Arc::new(ClientBundles::new(ClientBundlesConfig::default())),
        content,
        fetch: Arc::new(|_| Box::pin(async { Ok(()) })),
        state_dir: path("state"),
        logs,
        limits: WorkerLimits::for_host(),
        found: Vec::new(),
        process_python: None,
    })
    .unwrap();
    let (desired, wanted) = watch::channel(DesiredSet::default());
    let (report, reports) = mpsc::channel(16);
    let cancel = CancellationToken::new();
    let builder = worker.builder();
    let running = tokio::spawn(worker.run(wanted, report, cancel.clone()));
    Some(World {
        root,
        image,
        runtime,
        builder,
        desired,
        reports,
        log,
        cancel,
        running,
    })
}

/// The base image as its maker would describe it.
fn python_image(store: &std::path::Path) -> Option<BuiltImage> {
    let layers = fs::read_dir(store.join("l")).unwrap();
    let records = layers.filter_map(|entry| {
        let text = fs::read(entry.ok()?.path().join("layer.json")).ok()?;
        serde_json::from_slice::<LayerRecord>(&text).ok()
    });
    let base = records
        .into_iter()
        .find(|record| record.note.made_by.starts_with("python:3.11"))?;
    let path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin";
    let env = vec![
        ("PATH".to_owned(), path.to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ];
    let config = ImageConfig {
        env,
        ..ImageConfig::default()
    };
    Some(BuiltImage {
        layers: vec![base.key],
        config,
        metadata: ImageMetadata::default(),
    })
}

impl World {
    fn spec(&self) -> ContainerSpec {
        ContainerSpec {
            app_id: AppId::generate(),
            function_id: FunctionId::generate(),
            function_name: "f".to_owned(),
            runtime: RuntimeKind::Runc,
            image_id: ImageId::generate(),
            image: Arc::new(self.image.clone()),
            files: Vec::new(),
            volumes: Vec::new(),
            resources: Resources::default(),
            secret_env: Vec::new(),
            platform_env: BTreeMap::from([("MODAL_IS_REMOTE".to_owned(), "1".to_owned())]),
            arguments: bytes::Bytes::from_static(b"arguments"),
            client_version: CLIENT.to_owned(),
            mount_client_dependencies: true,
            web_hook: WebHookMode::Off,
            egress: Egress::Open,
        }
    }

    /// A function whose entrypoint does not `exec` its arguments, but a script of ours.
    fn scripted(&self, script: &str) -> ContainerSpec {
        let mut spec = self.spec();
        Arc::make_mut(&mut spec.image).config.entrypoint = ["/bin/sh", "-c", script, "sh"].map(str::to_owned).to_vec();
        spec
    }

    fn desire(&self, id: ContainerId, spec: &Arc<ContainerSpec>, state: DesiredState) {
        let containers = vec![DesiredContainer {
            id,
            spec: Arc::clone(spec),
            state,
            must_exist: false,
        }];
        self.desired.send_modify(|set| {
            *set = DesiredSet {
                generation: Generation(set.generation.0 + 1),
                containers,
            }
        });
    }

    async fn report(&mut self) -> WorkerReport {
        tokio::time::timeout(PATIENCE, self.reports.recv())
            .await
            .expect("a report is due")
            .unwrap()
    }

    async fn start(&mut self, spec: ContainerSpec) -> (ContainerId, Arc<ContainerSpec>, ContainerStarted) {
        let (id, spec) = (ContainerId::generate(), Arc::new(spec));
        self.desire(id, &spec, DesiredState::Running);
        match self.report().await {
            WorkerReport::Started(started) => (id, spec, started),
            WorkerReport::Exited { exit, .. } => panic!("{exit}"),
        }
    }

    async fn exit(&mut self) -> ContainerExit {
        match self.report().await {
            WorkerReport::Exited { exit, .. } => exit,
            WorkerReport::Started(started) => panic!("{started:?}"),
        }
    }

    async fn said(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log.lock().contains(wanted) {
            assert!(
                Instant::now() < deadline,
                "nobody said {wanted:?}, but: {}",
                self.log.lock()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn build(&self, commands: &[&str], force: bool) -> (Result<BuiltImage, BuildError>, Vec<BuildLine>) {
        let spec = ImageSpec {
            base_images: vec![("base".to_owned(), ImageId::generate())],
            dockerfile_commands: commands.iter().map(|command| (*command).to_owned()).collect(),
            context_files: Vec::new(),
            context_mount_id: None,
            secret_ids: Vec::new(),
            build_args: BTreeMap::new(),
            registry_auth: RegistryAuth::Public,
            gpu: None,
            build_function_id: None,
            builder_version: "2025.06".to_owned(),
        };
        let request = BuildRequest {
            spec,
            bases: BTreeMap::from([("base".to_owned(), self.image.clone())]),
            context: Vec::new(),
            secrets: vec![("TOKEN".to_owned(), "value".to_owned())],
            registry_auth: None,
            force,
        };
        let (lines, mut incoming) = mpsc::channel::<BuildLine>(16);
        let collect = async {
            let mut collected = Vec::new();
            while let Some(line) = incoming.recv().await {
                collected.push(line);
            }
            collected
        };
        let build = self.builder.build(request, lines, CancellationToken::new());
        tokio::time::timeout(PATIENCE, async { tokio::join!(build, collect) })
            .await
            .unwrap()
    }

    async fn shut_down(self) {
        self.cancel.cancel();
        tokio::time::timeout(PATIENCE, self.running).await.unwrap().unwrap();
        self.runtime.remove_all().await.unwrap();
        assert_eq!(fs::read_dir(self.root.path().join("state/run")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(self.root.path().join("steps/roots")).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.root.path().to_str().unwrap()), "{mounts}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_finds_everything_and_ends_as_it_should() {
    let Some(mut world) = world("life").await else { return };
    fs::write(world.root.path().join("content/app"), "print('app')").unwrap();

    // What is inside.
    let mut spec = world.scripted(
        "echo args $# $(basename $1) $2 $3; echo user $(id -u) in $PWD home $HOME path $PYTHONPATH; \
         cat /root/pkg/app.py; echo; cat $MODAL_CONTAINER_ARGUMENTS_PATH; echo; \
         python -c 'import modal, aiohttp, uvicorn; print(modal.__version__, modal.__file__, aiohttp.__file__, uvicorn.__file__)'; \
         stat -c 'mode %a of %n' /tmp /root/pkg /root/pkg/app.py /lib/added; test -L /lib && echo lib is a link; \
         touch /pkg/x 2>/dev/null || echo pkg is read-only; test -s $SSL_CERT_FILE && echo trusted; ls /sys/class/net; exit 5",
    );
    let file = |path: &str| MountFile {
        path: path.into(),
        sha256_hex: "app".into(),
        mode: None,
    };
    spec.files = vec![file("/root/pkg/app.py"), file("/lib/added"), file("/tmp/added")];
    let (_, _, started) = world.start(spec.clone()).await;
    println!("first start: {:?}", started.timings);
    assert_eq!(world.exit().await, ContainerExit::Exited { code: 5 });
    let text = std::mem::take(&mut *world.log.lock());
    println!("{text}");
    for line in [
        "args 3 python -u /__ionian/hook/ionian_container/launcher.py\n",
        "user 0 in /root home /root path /root:/pkg\n",
        "print('app')\narguments\n",
        "1.6.4 /pkg/modal/__init__.py /__modal/deps/aiohttp/__init__.py /__ionian/deps/uvicorn/__init__.py\n",
        "mode 1777 of /tmp\nmode 755 of /root/pkg\nmode 644 of /root/pkg/app.py\nmode 644 of /lib/added\nlib is a link\n",
        "pkg is read-only\n",
        "trusted\n",
        "eth0\n",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }

    // A second start has nothing to prepare.
    let (_, _, started) = world.start(spec).await;
    println!("second start: {:?}", started.timings);
    world.exit().await;

    // The launcher runs the official runtime, which finds the arguments and cannot read them.
    world.log.lock().clear();
    let mut spec = world.spec();
    spec.arguments = bytes::Bytes::from_static(b"\xff");
    world.start(spec).await;
    assert_eq!(world.exit().await, ContainerExit::Exited { code: 1 });
    let text = world.log.lock().clone();
    assert!(
        text.contains("_container_entrypoint") && text.contains("DecodeError"),
        "{text}"
    );

    // A polite stop, and one that is not heard.
    world.log.lock().clear();
    let spec = world.scripted("trap 'echo bye; exit 7' INT; echo ready; sleep 100 & wait $!");
    let (id, spec, _) = world.start(spec).await;
    world.said("ready").await;
    world.desire(
        id,
        &spec,
        DesiredState::Stopped {
            grace: PATIENCE,
            reason: StopReason::ScaleDown,
        },
    );
    assert_eq!(world.exit().await, ContainerExit::Exited { code: 7 });
    assert!(world.log.lock().ends_with("bye\n"));
    world.log.lock().clear();
    let spec = world.scripted("trap '' INT; setsid sleep 100 & echo ready; sleep 100");
    let (id, spec, _) = world.start(spec).await;
    world.said("ready").await;
    let grace = Duration::from_millis(200);
    world.desire(
        id,
        &spec,
        DesiredState::Stopped {
            grace,
            reason: StopReason::ScaleDown,
        },
    );
    assert_eq!(world.exit().await, ContainerExit::Signaled { signal: 9 });

    // Limits, and an image without Python.
    let mut spec = world.spec();
    spec.resources.memory_limit_mib = Some(64);
    Arc::make_mut(&mut spec.image).config.entrypoint =
        ["python", "-c", "x = b'x' * (300 << 20)"].map(str::to_owned).to_vec();
    world.start(spec).await;
    assert_eq!(world.exit().await, ContainerExit::OutOfMemory);
    let mut spec = world.spec();
    Arc::make_mut(&mut spec.image).config.env = vec![("PATH".to_owned(), "/etc".to_owned())];
    let (id, spec) = (ContainerId::generate(), Arc::new(spec));
    world.desire(id, &spec, DesiredState::Running);
    let ContainerExit::StartFailed { message } = world.exit().await else {
        panic!("it started")
    };
    assert!(message.contains("no python"), "{message}");
    world.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_output_slows_the_container_and_ends_with_it() {
    let Some(mut world) = world("flood").await else { return };
    let spec = world.scripted("echo ready; exec yes 'a line of a container that never stops'");
    let (id, spec, _) = world.start(spec).await;
    world.said("ready").await;
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let bytes = world.log.lock().len();
    // 8 MiB at once and 2 MiB each second.
    let limit = (8.0 + 2.0 * (began.elapsed().as_secs_f64() + 1.0)) * f64::from(1 << 20);
    println!("{bytes} bytes in {:?}", began.elapsed());
    assert!(bytes > 4 << 20 && (bytes as f64) < limit, "{bytes}");
    world.desire(
        id,
        &spec,
        DesiredState::Stopped {
            grace: Duration::ZERO,
            reason: StopReason::Requested,
        },
    );
    assert_eq!(world.exit().await, ContainerExit::Signaled { signal: 9 });
    world.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_built_in_containers() {
    let Some(mut world) = world("build").await else { return };
    let unique = format!(
        "RUN echo {} > /made && echo out && echo err >&2 && id -u",
        ContainerId::generate()
    );
    let (image, lines) = world
        .build(
            &["FROM base", "ENV A=b", &unique, "RUN cat /made && ! test -e /pkg"],
            false,
        )
        .await;
    let image = image.unwrap();
    let text = |lines: &[BuildLine]| lines.iter().map(|line| line.text.as_str()).collect::<String>();
    println!("{}", text(&lines));
    for line in ["out\n", "err\n", "0\n"] {
        assert!(lines.iter().any(|got| got.text == line), "{line:?} in {lines:?}");
    }
    assert!(world.builder.is_present(&image));

    // It runs.
    world.image = image;
    let spec = world.scripted("cat /made; echo A is $A");
    world.start(spec).await;
    assert_eq!(world.exit().await, ContainerExit::Exited { code: 0 });
    assert!(world.log.lock().contains("A is b"), "{}", world.log.lock());

    // Failures of several kinds are the user's, and say what happened.
    let failed = async |command: &str| {
        let (result, lines) = world.build(&["FROM base", command], true).await;
        let Err(BuildError::StepFailed { exit, .. }) = result else {
            panic!("{result:?} {}", text(&lines))
        };
        (exit, text(&lines))
    };
    let (exit, log) = failed("RUN echo about to fail; exit 9").await;
    assert!(exit == StepExit::Exited(9) && log.contains("about to fail"));
    assert_eq!(failed("RUN sleep 30").await.0, StepExit::TimedOut);
    assert!(matches!(
        failed("RUN [\"/no/such/program\"]").await.0,
        StepExit::Exited(_)
    ));

    // Cancelled in the middle.
    let cancel = CancellationToken::new();
    let (lines, mut incoming) = mpsc::channel::<BuildLine>(16);
    let request = BuildRequest {
        spec: ImageSpec {
            base_images: vec![("base".to_owned(), ImageId::generate())],
            dockerfile_commands: vec!["FROM base".to_owned(), "RUN echo begun; sleep 30".to_owned()],
            context_files: Vec::new(),
            context_mount_id: None,
            secret_ids: Vec::new(),
            build_args: BTreeMap::new(),
            registry_auth: RegistryAuth::Public,
            gpu: None,
            build_function_id: None,
            builder_version: "2025.06".to_owned(),
        },
        bases: BTreeMap::from([("base".to_owned(), world.image.clone())]),
        context: Vec::new(),
        secrets: Vec::new(),
        registry_auth: None,
        force: true,
    };
    let stop = cancel.clone();
    let watch = async {
        while let Some(line) = incoming.recv().await {
            if line.text == "begun\n" {
                stop.cancel();
            }
        }
    };
    let began = Instant::now();
    let (result, ()) = tokio::join!(world.builder.build(request, lines, cancel), watch);
    assert!(matches!(result, Err(BuildError::Cancelled)), "{result:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    world.shut_down().await;
}
