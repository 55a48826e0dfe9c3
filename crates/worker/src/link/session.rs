//! One connection, from Hello to its end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::ContainerId;
use ionian_domain::container::ContainerSpec;
use ionian_domain::worker::{DesiredContainer, DesiredSet, WorkerReport};
use ionian_proto::worker as pb;
use pb::workers_client::WorkersClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{self, Endpoint};
use tonic::{Request, Status, Streaming};

use super::wire::{self, Malformed, malformed};
use super::{BuildFn, LinkConfig, LinkState, MAX_MESSAGE_BYTES};

type ToServer = pb::from_worker::Message;

/// Messages between this loop and the connection; beyond it the loop waits for the server to read.
const OUTGOING: usize = 8;
/// Messages of builds that wait for this loop.
const BUILD_MESSAGES: usize = 64;
/// Until the server has said how often it wants to hear of us.
const FIRST_HEARTBEAT: Duration = Duration::from_secs(5);
/// A heartbeat is not asked for more often than this.
const SHORTEST_HEARTBEAT: Duration = Duration::from_millis(50);
/// Lines of one message, at most. What is there is sent at once.
const BUILD_LINES: usize = 256;

/// How a connection ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    Unreachable(transport::Error),
    Refused(Status),
    Closed,
    Malformed(Malformed),
}

/// What counts within one session.
struct Session<'a> {
    config: &'a LinkConfig,
    state: &'a mut LinkState,
    build: &'a BuildFn,
    outgoing: mpsc::Sender<pb::FromWorker>,
    /// Sent once; the sets name them by id.
    specs: BTreeMap<ContainerId, Arc<ContainerSpec>>,
    generation: u64,
    /// The last log batch that was sent.
    logs_sent: u64,
    builds: JoinSet<()>,
    cancels: HashMap<String, CancellationToken>,
    build_messages: mpsc::Sender<ToServer>,
}

/// The stream's other end is gone; what was read from it last says why.
struct Gone;

pub(super) async fn run(
    config: &LinkConfig,
    endpoint: &Endpoint,
    run_id: &str,
    state: &mut LinkState,
    build: &BuildFn,
) -> SessionEnd {
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return SessionEnd::Unreachable(error),
    };
    let mut client = WorkersClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (outgoing, messages) = mpsc::channel(OUTGOING);
    let mut request = Request::new(ReceiverStream::new(messages));
    let Ok(mut credential) = format!("Bearer {}", config.join_token).parse::<MetadataValue<Ascii>>() else {
        return SessionEnd::Refused(Status::unauthenticated(
            "the join token holds characters that no token has",
        ));
    };
    credential.set_sensitive(true);
    request.metadata_mut().insert("authorization", credential);
    let (build_messages, from_builds) = mpsc::channel(BUILD_MESSAGES);
    let session = Session {
        config,
        state,
        build,
        outgoing,
        specs: BTreeMap::new(),
        generation: 0,
        logs_sent: 0,
        builds: JoinSet::new(),
        cancels: HashMap::new(),
        build_messages,
    };
    // Room for it is there: nothing else has been sent.
    let _unread = session.outgoing.try_send(pb::FromWorker {
        message: Some(ToServer::Hello(hello(config, run_id, session.state))),
    });
    match client.connect(request).await {
        Ok(response) => session.run(response.into_inner(), from_builds).await,
        Err(status) => SessionEnd::Refused(status),
    }
}

fn hello(config: &LinkConfig, run_id: &str, state: &LinkState) -> pb::Hello {
    pb::Hello {
        worker_id: config.worker_id.to_string(),
        run_id: run_id.to_owned(),
        version: config.version.clone(),
        capacity: Some(pb::Capacity {
            cpu_millis: config.capacity.cpu_millis,
            memory_mib: config.capacity.memory_mib,
            max_starting: config.capacity.max_starting,
        }),
        runtimes: config
            .capacity
            .runtimes
            .iter()
            .map(|kind| wire::runtime(kind).into())
            .collect(),
        limits_egress: true,
        container_ids: state
            .found
            .iter()
            .chain(state.started.keys())
            .map(ToString::to_string)
            .collect(),
        layers: config.layers.clone(),
    }
}

impl Session<'_> {
    async fn run(
        mut self,
        mut incoming: Streaming<pb::ToWorker>,
        mut from_builds: mpsc::Receiver<ToServer>,
    ) -> SessionEnd {
        let mut heartbeat = interval(FIRST_HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let logs = self.state.logs.clone();
        loop {
            let step = tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(pb::ToWorker { message: Some(pb::to_worker::Message::Welcome(welcome)) })) => {
                        let period = Duration::from_millis(welcome.heartbeat_millis.into()).max(SHORTEST_HEARTBEAT);
                        heartbeat = interval(period);
                        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
                        self.welcome(welcome);
                        // What an earlier session did not get confirmed.
                        self.send_logs().await
                    }
                    Ok(Some(message)) => match self.obey(message).await {
                        Ok(step) => step,
                        Err(error) => return SessionEnd::Malformed(error),
                    },
                    Ok(None) => return SessionEnd::Closed,
                    Err(status) => return SessionEnd::Refused(status),
                },
                // In a session the worker's words come after the server's welcome.
                Some(report) = self.state.reports.recv(), if self.state.was_welcome => self.report(report).await,
                () = logs.news(), if self.state.was_welcome => self.send_logs().await,
                Some(message) = from_builds.recv() => self.send(message).await,
                Some(_ended) = self.builds.join_next() => Ok(()),
                _ = heartbeat.tick() => self.send(ToServer::Heartbeat(pb::Heartbeat {})).await,
            };
            if let Err(Gone) = step {
                return match incoming.message().await {
                    Err(status) => SessionEnd::Refused(status),
                    Ok(_) => SessionEnd::Closed,
                };
            }
        }
    }

    async fn send(&self, message: ToServer) -> Result<(), Gone> {
        let message = pb::FromWorker { message: Some(message) };
        self.outgoing.send(message).await.map_err(|_| Gone)
    }

    fn welcome(&mut self, welcome: pb::Welcome) {
        tracing::info!(
            session = welcome.session,
            server = welcome.version,
            "connected to the server"
        );
        self.state.was_welcome = true;
        self.state
            .containers_address
            .send_replace(Some(welcome.containers_address));
    }

    async fn obey(&mut self, message: pb::ToWorker) -> Result<Result<(), Gone>, Malformed> {
        match message.message {
            Some(pb::to_worker::Message::Spec(spec)) => {
                let (id, mut spec) = wire::spec(spec)?;
                // The server does not know by which address its containers reach it from here.
                if let Some(url) = spec.platform_env.get_mut("MODAL_SERVER_URL") {
                    url.clone_from(&self.config.containers_url);
                }
                self.specs.insert(id, Arc::new(spec));
                Ok(Ok(()))
            }
            Some(pb::to_worker::Message::Desired(set)) => self.desire(set).await,
            Some(pb::to_worker::Message::LogsTaken(taken)) => {
                self.state.logs.confirm(taken.sequence);
                Ok(Ok(()))
            }
            Some(pb::to_worker::Message::Build(build)) => {
                let id = build.build_id.clone();
                let order = wire::build(build)?;
                let cancel = CancellationToken::new();
                self.cancels.retain(|_, cancel| !cancel.is_cancelled());
                self.cancels.insert(id.clone(), cancel.clone());
                let build = run_build(id, order, Arc::clone(self.build), self.build_messages.clone(), cancel);
                self.builds.spawn(build);
                Ok(Ok(()))
            }
            Some(pb::to_worker::Message::CancelBuild(build)) => {
                if let Some(cancel) = self.cancels.remove(&build.build_id) {
                    cancel.cancel();
                }
                Ok(Ok(()))
            }
            // A newer server says more than this worker knows.
            Some(pb::to_worker::Message::Welcome(_)) | None => Ok(Ok(())),
        }
    }

    async fn desire(&mut self, set: pb::DesiredSet) -> Result<Result<(), Gone>, Malformed> {
        if set.generation <= self.generation {
            return Ok(Ok(()));
        }
        let is_first = self.generation == 0;
        self.generation = set.generation;
        let containers = set.containers.into_iter().map(|container| {
            let id = wire::id(&container.id)?;
            let spec = self.specs.get(&id).ok_or(malformed("a container without its spec"))?;
            Ok(DesiredContainer {
                id,
                spec: Arc::clone(spec),
                state: wire::state(container.stop)?,
                must_exist: container.must_exist,
            })
        });
        let containers = containers.collect::<Result<Vec<_>, Malformed>>()?;
        let named: BTreeSet<ContainerId> = containers.iter().map(|container| container.id).collect();
        self.specs.retain(|id, _| named.contains(id));
        self.state.started.retain(|id, _| named.contains(id));
        self.state.generation.0 += 1;
        // From here on they are adopted, and told as started, or end.
        self.state.found.clear();
        let generation = self.state.generation;
        self.state.desired.send_replace(DesiredSet { generation, containers });
        if is_first {
            // A server that restarted does not know where the containers are.
            for started in self.state.started.values() {
                if let Err(Gone) = self.send(ToServer::Started(wire::started(started))).await {
                    return Ok(Err(Gone));
                }
            }
        }
        Ok(Ok(()))
    }

    async fn report(&mut self, report: WorkerReport) -> Result<(), Gone> {
        match &report {
            WorkerReport::Started(started) => {
                self.state.started.insert(started.container_id, started.clone());
            }
            WorkerReport::Exited { container_id, .. } => {
                self.state.started.remove(container_id);
                // What the container printed last comes before its end.
                self.send_logs().await?;
            }
        }
        // What is lost with the connection is told again: starts by the next session, exits by every set.
        self.send(wire::report(report)).await
    }

    async fn send_logs(&mut self) -> Result<(), Gone> {
        while let Some(batch) = self.state.logs.after(self.logs_sent) {
            self.logs_sent = batch.sequence;
            self.send(ToServer::Logs(batch)).await?;
        }
        Ok(())
    }
}

/// Ends with the session: whoever waits for the build is told that the worker went away.
async fn run_build(
    id: String,
    order: crate::builds::BuildOrder,
    build: BuildFn,
    messages: mpsc::Sender<ToServer>,
    cancel: CancellationToken,
) {
    let (lines, mut incoming) = mpsc::channel(BUILD_LINES);
    let _cancelled_with_us = cancel.clone().drop_guard();
    let forward = async {
        let mut batch = Vec::new();
        while incoming.recv_many(&mut batch, BUILD_LINES).await > 0 {
            let lines = batch.drain(..).map(wire::build_line).collect();
            let build_id = id.clone();
            // Nobody reads any more where the session is over.
            let _over = messages
                .send(ToServer::BuildLines(pb::BuildLines { build_id, lines }))
                .await;
        }
    };
    let (result, ()) = tokio::join!(build(order, lines, cancel), forward);
    let _over = messages.send(ToServer::BuildEnded(wire::build_ended(id, result))).await;
}
