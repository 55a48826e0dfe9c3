//! The worker protocol between its two real ends, over real connections: the gateway that the server has, and the
//! link that `ionian worker` has. What is at either end of them is a stand-in.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ionian_api::{JoinTokens, RemoteBuilds, WorkerGateway, WorkerHost, WorkerTimes};
use ionian_control::app::images::BuildLine as ControlLine;
use ionian_control::{BuildJob, Error};
use ionian_domain::container::{
    ContainerExit, ContainerSpec, ContainerStarted, RuntimeKind, StartTimings, StopReason, WebHookMode,
};
use ionian_domain::function::Resources;
use ionian_domain::image::{BuiltImage, ImageSpec, RegistryAuth};
use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::mount::MountFile;
use ionian_domain::network::Egress;
use ionian_domain::worker::{DesiredContainer, DesiredSet, DesiredState, Generation, WorkerCapacity, WorkerReport};
use ionian_domain::{AppId, ContainerId, FunctionId, ImageId, Timestamp, WorkerId};
use ionian_worker::{BuildFailure, BuildOrder, Link, LinkConfig, LinkEnds, LinkError};
use parking_lot::Mutex;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

/// Nothing here takes a second; a machine with a hundred other tests may.
const PATIENCE: Duration = Duration::from_mins(1);
const KEY: [u8; 32] = [7; 32];

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("this did not happen: {what}"))
}

/// What the rest of the server is.
struct Host {
    desired: watch::Sender<DesiredSet>,
    connects: Mutex<Vec<(WorkerId, WorkerCapacity)>>,
    heard: AtomicUsize,
    reports: mpsc::UnboundedSender<WorkerReport>,
    log: Mutex<Vec<String>>,
    /// Each write of logs takes one.
    log_permits: Semaphore,
}

#[tonic::async_trait]
impl WorkerHost for Host {
    async fn connect(&self, id: WorkerId, capacity: WorkerCapacity) -> Result<watch::Receiver<DesiredSet>, Error> {
        self.connects.lock().push((id, capacity));
        Ok(self.desired.subscribe())
    }

    async fn heard(&self, _: WorkerId) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }

    async fn report(&self, _: WorkerId, report: WorkerReport) {
        self.reports.send(report).unwrap();
    }

    async fn log(&self, entries: Vec<LogEntry>) {
        self.log_permits.acquire().await.unwrap().forget();
        self.log.lock().extend(entries.into_iter().map(|entry| entry.text));
    }
}

/// What connections go through: it can be cut, and it can hold everything without closing anything, which is what a
/// stopped process looks like.
struct Cable {
    address: SocketAddr,
    state: Arc<Mutex<CableState>>,
}

#[derive(Clone, Default)]
struct CableState {
    target: Option<SocketAddr>,
    cut: CancellationToken,
    frozen: CancellationToken,
}

impl Cable {
    async fn lay() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cable = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
        };
        let state = Arc::clone(&cable.state);
        tokio::spawn(async move {
            while let Ok((mut inside, _)) = listener.accept().await {
                let state = state.lock().clone();
                tokio::spawn(async move {
                    // Not there: the connection is closed at once.
                    let Some(target) = state.target else { return };
                    let mut outside = TcpStream::connect(target).await.unwrap();
                    let carried = async {
                        tokio::select! {
                            _ = copy_bidirectional(&mut inside, &mut outside) => {}
                            () = state.frozen.cancelled() => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = carried => {}
                        () = state.cut.cancelled() => {}
                    }
                });
            }
        });
        cable
    }

    fn connect(&self, target: SocketAddr) {
        *self.state.lock() = CableState {
            target: Some(target),
            ..CableState::default()
        };
    }

    fn cut(&self) {
        let mut state = self.state.lock();
        state.target = None;
        state.cut.cancel();
    }

    fn freeze(&self) {
        self.state.lock().frozen.cancel();
    }
}

/// A server that can be taken away and come back.
struct Server {
    host: Arc<Host>,
    reports: mpsc::UnboundedReceiver<WorkerReport>,
    builds: RemoteBuilds,
    cable: Cable,
    address: SocketAddr,
    times: WorkerTimes,
    dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        Self::with_silence(PATIENCE).await
    }

    async fn with_silence(silence: Duration) -> Self {
        let (reports_sender, reports) = mpsc::unbounded_channel();
        let cable = Cable::lay().await;
        let server = Self {
            host: Arc::new(Host {
                desired: watch::channel(DesiredSet::default()).0,
                connects: Mutex::default(),
                heard: AtomicUsize::new(0),
                reports: reports_sender,
                log: Mutex::default(),
                log_permits: Semaphore::new(Semaphore::MAX_PERMITS),
            }),
            reports,
            builds: RemoteBuilds::default(),
            address: cable.address,
            cable,
            times: WorkerTimes {
                heartbeat: Duration::from_millis(50),
                silence,
            },
            dir: tempfile::tempdir().unwrap(),
        };
        server.serve().await;
        server
    }

    /// Also again, with nothing in memory of what was before.
    async fn serve(&self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.cable.connect(listener.local_addr().unwrap());
        let (content, _) = ionian_blobs::open_local(&self.dir.path().join("blobs")).await.unwrap();
        let gateway = WorkerGateway::new(
            Arc::clone(&self.host) as Arc<dyn WorkerHost>,
            JoinTokens::new(KEY),
            self.builds.clone(),
            content,
            "127.0.0.1:1".to_owned(),
            self.times,
        );
        let router = tonic::transport::Server::builder().add_service(gateway.service());
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
    }

    /// As a crash ends it: all connections break, and nobody answers.
    fn vanish(&self) {
        self.cable.cut();
    }

    fn desire(&self, generation: u64, containers: Vec<DesiredContainer>) {
        self.host.desired.send_replace(DesiredSet {
            generation: Generation(generation),
            containers,
        });
    }

    async fn report(&mut self) -> WorkerReport {
        soon("a report", self.reports.recv()).await.unwrap()
    }

    async fn started(&mut self) -> ContainerStarted {
        match self.report().await {
            WorkerReport::Started(started) => started,
            WorkerReport::Exited { exit, .. } => panic!("{exit}"),
        }
    }
}

/// What `ionian worker` has, without a worker in it.
struct Worker {
    id: WorkerId,
    desired: watch::Receiver<DesiredSet>,
    reports: mpsc::Sender<WorkerReport>,
    logs: ionian_worker::LogSink,
    containers_address: watch::Receiver<Option<String>>,
    running: JoinHandle<Result<(), LinkError>>,
    cancel: CancellationToken,
}

impl Worker {
    fn start(server: SocketAddr, id: WorkerId) -> Self {
        Self::with_token(server, id, JoinTokens::new(KEY).issue())
    }

    fn with_token(server: SocketAddr, id: WorkerId, join_token: String) -> Self {
        let (link, ends) = Link::new(LinkConfig {
            server: format!("http://{server}"),
            join_token,
            worker_id: id,
            version: "test".to_owned(),
            capacity: WorkerCapacity {
                cpu_millis: 1000,
                memory_mib: 2000,
                max_starting: 3,
                runtimes: [RuntimeKind::Process, RuntimeKind::Gvisor].into(),
            },
            layers: vec!["base".to_owned()],
            containers_url: "http://here:1".to_owned(),
        })
        .unwrap();
        let LinkEnds {
            desired,
            reports,
            logs,
            containers_address,
        } = ends;
        let cancel = CancellationToken::new();
        let running = tokio::spawn(link.run(
            Vec::new(),
            Arc::new(|order, lines, cancel| Box::pin(build(order, lines, cancel))),
            cancel.clone(),
        ));
        Self {
            id,
            desired,
            reports,
            logs,
            containers_address,
            running,
            cancel,
        }
    }

    /// The next set that the worker is to follow.
    async fn set(&mut self) -> DesiredSet {
        soon("a desired set", self.desired.changed()).await.unwrap();
        self.desired.borrow_and_update().clone()
    }

    async fn report(&self, report: WorkerReport) {
        soon("room for a report", self.reports.send(report)).await.unwrap();
    }

    async fn end(self) {
        self.cancel.cancel();
        soon("the end of the link", self.running).await.unwrap().unwrap();
    }
}

/// Prints what it was asked for; `fail` fails, `wait` waits for its cancellation.
async fn build(
    order: BuildOrder,
    lines: mpsc::Sender<ionian_worker::BuildLine>,
    cancel: CancellationToken,
) -> Result<BuiltImage, BuildFailure> {
    let commands = order.request.spec.dockerfile_commands.join(" ");
    let line = ionian_worker::BuildLine {
        at: Timestamp(1),
        stream: LogStream::Info,
        text: format!("{commands} with {:?}", order.request.secrets),
    };
    lines.send(line).await.unwrap();
    if commands == "wait" {
        cancel.cancelled().await;
    }
    if commands == "fail" || cancel.is_cancelled() {
        return Err(BuildFailure {
            by_user: true,
            message: "as asked".to_owned(),
        });
    }
    Ok(BuiltImage {
        layers: vec!["base".to_owned(), commands],
        ..BuiltImage::default()
    })
}

fn job(commands: &str) -> BuildJob {
    BuildJob {
        image_id: ImageId::generate(),
        spec: ImageSpec {
            base_images: Vec::new(),
            dockerfile_commands: vec![commands.to_owned()],
            context_files: Vec::new(),
            context_mount_id: None,
            secret_ids: Vec::new(),
            build_args: BTreeMap::new(),
            registry_auth: RegistryAuth::Public,
            gpu: None,
            build_function_id: None,
            builder_version: "2025.06".to_owned(),
        },
        bases: BTreeMap::new(),
        context: Vec::new(),
        secrets: vec![("A".to_owned(), "1".to_owned())],
        registry_login: None,
        client_version: "1.6.4".to_owned(),
        force: false,
    }
}

fn spec() -> ContainerSpec {
    ContainerSpec {
        app_id: AppId::generate(),
        function_id: FunctionId::generate(),
        function_name: "f".to_owned(),
        runtime: RuntimeKind::Runc,
        image_id: ImageId::generate(),
        image: Arc::new(BuiltImage {
            layers: vec!["base".to_owned()],
            ..BuiltImage::default()
        }),
        files: vec![MountFile {
            path: "/root/app.py".to_owned(),
            sha256_hex: "ab".repeat(32),
            mode: Some(0o644),
        }],
        volumes: Vec::new(),
        resources: Resources::default(),
        secret_env: vec![("SECRET".to_owned(), "s3cret".to_owned())],
        platform_env: BTreeMap::from([("MODAL_SERVER_URL".to_owned(), "http://there:2".to_owned())]),
        arguments: bytes::Bytes::from_static(b"\x00\xffarguments"),
        client_version: "1.6.4".to_owned(),
        mount_client_dependencies: true,
        web_hook: WebHookMode::On,
        egress: Egress::Allow(vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()]),
    }
}

fn wanted(id: ContainerId, spec: &Arc<ContainerSpec>) -> DesiredContainer {
    DesiredContainer {
        id,
        spec: Arc::clone(spec),
        state: DesiredState::Running,
        must_exist: false,
    }
}

fn started(id: ContainerId) -> WorkerReport {
    WorkerReport::Started(ContainerStarted {
        container_id: id,
        address: [10, 0, 0, 2].into(),
        timings: StartTimings {
            steps: vec![("files".to_owned(), Duration::from_micros(1500))],
        },
    })
}

fn entry(text: &str) -> LogEntry {
    LogEntry {
        at: Timestamp(5),
        app_id: AppId::generate(),
        function_id: FunctionId::generate(),
        container_id: ContainerId::generate(),
        stream: LogStream::Stdout,
        text: text.to_owned(),
    }
}

#[tokio::test]
async fn a_worker_gets_what_should_be_and_tells_what_it_saw() {
    let mut server = Server::start().await;
    let mut worker = Worker::start(server.address, WorkerId::generate());
    soon(
        "a welcome",
        worker
            .containers_address
            .wait_for(|address| address.as_deref() == Some("127.0.0.1:1")),
    )
    .await
    .unwrap();
    assert_eq!(server.host.connects.lock()[0].0, worker.id);
    assert_eq!(server.host.connects.lock()[0].1.max_starting, 3);
    let runtimes = server.host.connects.lock()[0].1.runtimes;
    assert_eq!(runtimes, [RuntimeKind::Process, RuntimeKind::Gvisor].into());
    // Nothing has been said, so nothing was heard here.
    assert_eq!(worker.desired.borrow().generation, Generation(0));

    let (id, spec) = (ContainerId::generate(), Arc::new(spec()));
    server.desire(7, vec![wanted(id, &spec)]);
    let set = worker.set().await;
    assert_eq!(set.containers.len(), 1);
    assert_eq!(set.containers[0].id, id);
    // All of it arrives, and the server's address becomes the one that is reached from here.
    let mut expected = (*spec).clone();
    expected
        .platform_env
        .insert("MODAL_SERVER_URL".to_owned(), "http://here:1".to_owned());
    assert_eq!(*set.containers[0].spec, expected);

    worker.report(started(id)).await;
    let report = server.started().await;
    assert_eq!(report.address, std::net::IpAddr::from([10, 0, 0, 2]));
    assert_eq!(
        report.timings.steps,
        [("files".to_owned(), Duration::from_micros(1500))]
    );

    let state = DesiredState::Stopped {
        grace: Duration::from_millis(2500),
        reason: StopReason::TimedOut,
    };
    let stopping = DesiredContainer {
        state,
        must_exist: true,
        ..wanted(id, &spec)
    };
    server.desire(8, vec![stopping]);
    let set = worker.set().await;
    assert_eq!(set.containers[0].state, state);
    assert!(set.containers[0].must_exist);
    // The spec was not sent again: it is the very same.
    assert_eq!(*set.containers[0].spec, expected);

    for exit in [
        ContainerExit::Exited { code: 3 },
        ContainerExit::Signaled { signal: 9 },
        ContainerExit::OutOfMemory,
        ContainerExit::Lost,
        ContainerExit::StartFailed {
            message: "no".to_owned(),
        },
    ] {
        let report = WorkerReport::Exited {
            container_id: id,
            exit: exit.clone(),
        };
        worker.report(report).await;
        let WorkerReport::Exited { exit: told, .. } = server.report().await else {
            panic!("it has started before")
        };
        assert_eq!(told, exit);
    }
    soon("heartbeats", async {
        while server.host.heard.load(Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    worker.end().await;
}

#[tokio::test]
async fn a_server_that_comes_back_is_told_again_what_runs() {
    let mut server = Server::start().await;
    let mut worker = Worker::start(server.address, WorkerId::generate());
    let (kept, ended, spec) = (ContainerId::generate(), ContainerId::generate(), Arc::new(spec()));
    server.desire(40, vec![wanted(kept, &spec), wanted(ended, &spec)]);
    let first = worker.set().await;
    worker.report(started(kept)).await;
    worker.report(started(ended)).await;
    server.started().await;
    server.started().await;
    let exit = || WorkerReport::Exited {
        container_id: ended,
        exit: ContainerExit::Exited { code: 1 },
    };
    worker.report(exit()).await;
    assert!(matches!(server.report().await, WorkerReport::Exited { .. }));

    server.vanish();
    server.serve().await;
    // A server that restarted counts its sets from the beginning, and the worker follows it all the same.
    server.desire(1, vec![wanted(kept, &spec), wanted(ended, &spec)]);
    let second = soon("the set of the new session", async {
        loop {
            let set = worker.set().await;
            if set.generation > first.generation {
                return set;
            }
        }
    })
    .await;
    assert_eq!(second.containers.len(), 2);
    // The one that runs is told again; of the one that ended, its exit is, by whoever repeats it with each set.
    worker.report(exit()).await;
    let (mut again, mut exits) = (Vec::new(), 0);
    while again.is_empty() || exits == 0 {
        match server.report().await {
            WorkerReport::Started(started) => again.push(started.container_id),
            WorkerReport::Exited { container_id, .. } => {
                assert_eq!(container_id, ended);
                exits += 1;
            }
        }
    }
    assert_eq!(again, [kept]);
    worker.end().await;
}

#[tokio::test]
async fn a_second_connection_of_a_worker_ends_the_first() {
    let mut server = Server::start().await;
    let id = WorkerId::generate();
    let mut first = Worker::start(server.address, id);
    server.desire(1, Vec::new());
    first.set().await;
    let mut second = Worker::start(server.address, id);
    second.set().await;
    let error = soon("the end of the first", first.running).await.unwrap().unwrap_err();
    assert!(
        matches!(error, LinkError::Superseded { worker_id } if worker_id == id),
        "{error}"
    );
    // The second is the worker.
    let container = ContainerId::generate();
    server.desire(2, vec![wanted(container, &Arc::new(spec()))]);
    second.set().await;
    second.report(started(container)).await;
    assert_eq!(server.started().await.container_id, container);
    second.end().await;
}

#[tokio::test]
async fn what_a_container_may_reach_arrives_as_it_was_said() {
    let server = Server::start().await;
    let mut worker = Worker::start(server.address, WorkerId::generate());
    for (generation, egress) in (1..).zip([Egress::Open, Egress::Blocked]) {
        let spec = Arc::new(ContainerSpec { egress, ..spec() });
        server.desire(generation, vec![wanted(ContainerId::generate(), &spec)]);
        assert_eq!(worker.set().await.containers[0].spec.egress, spec.egress);
    }
    worker.end().await;
}

#[tokio::test]
async fn a_stranger_is_refused_with_a_sentence() {
    let server = Server::start().await;
    for token in ["guess".to_owned(), JoinTokens::new([8; 32]).issue()] {
        let worker = Worker::with_token(server.address, WorkerId::generate(), token);
        let error = soon("the refusal", worker.running).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("ionian token new --worker"), "{error}");
    }
    assert!(server.host.connects.lock().is_empty());
}

#[tokio::test]
async fn a_flood_of_output_waits_and_nothing_of_it_is_lost_or_repeated() {
    let mut server = Server::start().await;
    server.host.log_permits.forget_permits(Semaphore::MAX_PERMITS);
    let mut worker = Worker::start(server.address, WorkerId::generate());
    server.desire(1, Vec::new());
    worker.set().await;
    // The server's disk is stuck. Printing goes on for as long as there is room, and stops then.
    let printed = Arc::new(AtomicUsize::new(0));
    let total = 200;
    let printing = {
        let (logs, printed) = (Arc::clone(&worker.logs), Arc::clone(&printed));
        tokio::spawn(async move {
            for number in 0..total {
                logs(vec![entry(&format!("{number}\n"))]).await;
                printed.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    soon("a full outbox", async {
        let mut before = usize::MAX;
        // It has stopped when nothing changes over many turns of everybody else.
        while before != printed.load(Ordering::Relaxed) || before == 0 {
            before = printed.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    assert!(printed.load(Ordering::Relaxed) <= 32, "{printed:?}");
    // Meanwhile the worker is heard.
    let heard = server.host.heard.load(Ordering::Relaxed);
    soon("a sign of life", async {
        while server.host.heard.load(Ordering::Relaxed) == heard {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // The connection breaks with batches on their way; some were written, and not confirmed.
    server.host.log_permits.add_permits(5);
    soon("some output", async {
        while server.host.log.lock().len() < 5 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    server.host.log_permits.add_permits(10_000);
    soon("all output", printing).await.unwrap();
    let container = ContainerId::generate();
    worker.report(started(container)).await;
    server.started().await;
    // What was printed before a report is there when the report comes.
    let log = server.host.log.lock().clone();
    let expected: Vec<String> = (0..total).map(|number| format!("{number}\n")).collect();
    assert_eq!(log[..log.len()], expected[..log.len()]);
    worker
        .report(WorkerReport::Exited {
            container_id: container,
            exit: ContainerExit::Lost,
        })
        .await;
    server.report().await;
    assert_eq!(*server.host.log.lock(), expected);
    worker.end().await;
}

#[tokio::test]
async fn output_survives_a_broken_connection_once() {
    let server = Server::start().await;
    let mut worker = Worker::start(server.address, WorkerId::generate());
    server.desire(1, Vec::new());
    worker.set().await;
    (worker.logs)(vec![entry("before")]).await;
    soon("the first line", async {
        while server.host.log.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    server.vanish();
    // Taken in while nobody is there.
    (worker.logs)(vec![entry("while away")]).await;
    server.serve().await;
    server.desire(2, Vec::new());
    worker.set().await;
    (worker.logs)(vec![entry("after")]).await;
    soon("all lines", async {
        while server.host.log.lock().last().is_none_or(|text| text != "after") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    // The very first may come again: a server that restarted does not know that it has it.
    let log = server.host.log.lock().clone();
    assert_eq!(log[log.len() - 2..], ["while away", "after"]);
    worker.end().await;
}

#[tokio::test]
async fn images_are_built_on_the_worker() {
    let server = Server::start().await;
    let (build, present) = (server.builds.build_fn(), server.builds.present_fn());
    let image = |layers: &[&str]| BuiltImage {
        layers: layers.iter().map(|layer| (*layer).to_owned()).collect(),
        ..BuiltImage::default()
    };
    let (lines, mut incoming) = mpsc::channel::<ControlLine>(16);
    // It waits for a worker.
    let waiting = tokio::spawn(build(job("RUN true"), lines.clone(), CancellationToken::new()));
    let mut worker = Worker::start(server.address, WorkerId::generate());
    let built = soon("the image", waiting).await.unwrap().unwrap();
    assert_eq!(built.layers, ["base", "RUN true"]);
    assert_eq!(incoming.recv().await.unwrap().text, "RUN true with [(\"A\", \"1\")]");
    assert!(present(&built));
    assert!(!present(&image(&["base", "other"])));

    let failed = soon("a failure", build(job("fail"), lines.clone(), CancellationToken::new()))
        .await
        .unwrap_err();
    assert!(failed.by_user && failed.message == "as asked", "{failed:?}");

    let cancel = CancellationToken::new();
    let cancelled = tokio::spawn(build(job("wait"), lines.clone(), cancel.clone()));
    soon("its first line", async {
        while incoming.recv().await.unwrap().text != "wait with [(\"A\", \"1\")]" {}
    })
    .await;
    cancel.cancel();
    assert!(soon("the end", cancelled).await.unwrap().is_err());

    let interrupted = tokio::spawn(build(job("wait"), lines, CancellationToken::new()));
    soon("its first line", incoming.recv()).await.unwrap();
    worker.containers_address.mark_unchanged();
    worker.end().await;
    let failure = soon("the end", interrupted).await.unwrap().unwrap_err();
    assert!(!failure.by_user && failure.message.contains("went away"), "{failure:?}");
}

#[tokio::test]
async fn a_worker_that_is_silent_is_not_waited_for() {
    let server = Server::with_silence(Duration::from_millis(300)).await;
    let mut worker = Worker::start(server.address, WorkerId::generate());
    server.desire(1, Vec::new());
    worker.set().await;
    let subscribers = || server.host.desired.receiver_count();
    assert_eq!(subscribers(), 1);
    server.cable.freeze();
    soon("the end of the connection", async {
        while subscribers() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    worker.end().await;
}
