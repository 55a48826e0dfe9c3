//! One connection of a worker: three tasks, of which none waits for another's slowness.
//!
//! The reader never waits for the disk or for the scheduler's turn, so that a worker that lives is heard. The
//! recorder writes output and passes reports on, in the order in which they came. The writer follows the desired
//! set. When one of them ends, all do.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use ionian_domain::worker::{DesiredSet, WorkerReport};
use ionian_domain::{ContainerId, WorkerId};
use ionian_proto::worker as pb;
use pb::from_worker::Message as FromWorker;
use pb::to_worker::Message as ToWorker;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Status, Streaming};

use super::{LogsTaken, WorkerGateway, wire};

/// Who connects says at once who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages between the writer and the connection.
const OUTGOING: usize = 8;
/// Orders of builds, and confirmations of log batches, of which a worker waits for a few dozen.
const ORDERS: usize = 64;
/// Log batches and reports that wait to be recorded. A worker sends few batches before they are confirmed, and
/// repeats an exit only with a set.
const MAX_UNRECORDED: usize = 1024;
/// Of these, log batches; a worker that sends more does not keep to the protocol.
const MAX_UNCONFIRMED_BATCHES: usize = 32;
/// Signs of life are passed on this often at most.
const HEARD_PERIOD: Duration = Duration::from_secs(1);

/// What the recorder does, in order.
enum Record {
    Logs(pb::LogBatch),
    Report(WorkerReport),
}

pub(super) async fn open(
    gateway: &WorkerGateway,
    mut incoming: Streaming<pb::FromWorker>,
) -> Result<BoxStream<pb::ToWorker>, Status> {
    let hello = match timeout(HELLO_TIMEOUT, incoming.message()).await {
        Ok(Ok(Some(pb::FromWorker {
            message: Some(FromWorker::Hello(hello)),
        }))) => hello,
        Ok(Err(status)) => return Err(status),
        Ok(Ok(_)) | Err(_) => return Err(Status::invalid_argument("the first message of a worker is a Hello")),
    };
    if !hello.limits_egress {
        return Err(Status::failed_precondition(
            "this worker is too old: it would let containers reach what they may not; install the server's version",
        ));
    }
    let worker_id = wire::worker_id(&hello)?;
    let capacity = wire::capacity(&hello)?;
    let desired = gateway
        .inner
        .host
        .connect(worker_id, capacity)
        .await
        .map_err(crate::status::from_error)?;
    let connected = gateway.enter(worker_id);
    tracing::info!(
        worker = %worker_id,
        version = hello.version,
        session = connected.session,
        containers = hello.container_ids.len(),
        "a worker connected"
    );
    let (orders, from_builds) = mpsc::channel(ORDERS);
    let (outgoing, messages) = mpsc::channel(OUTGOING);
    let (records, to_record) = mpsc::channel(MAX_UNRECORDED);
    gateway
        .inner
        .builds
        .connected(worker_id, connected.session, orders.clone(), hello.layers);
    let session = Session {
        gateway: gateway.clone(),
        worker_id,
        number: connected.session,
        run_id: hello.run_id,
        unconfirmed: Arc::default(),
        over: CancellationToken::new(),
        superseded: connected.superseded,
    };
    // Kind: for the life of the connection, which the reader's end ends.
    tokio::spawn(session.clone().write(outgoing, desired, from_builds));
    tokio::spawn(session.clone().record(to_record, orders));
    tokio::spawn(session.read(incoming, records));
    Ok(Box::pin(ReceiverStream::new(messages)) as BoxStream<pb::ToWorker>)
}

#[derive(Clone)]
struct Session {
    gateway: WorkerGateway,
    worker_id: WorkerId,
    number: u64,
    run_id: String,
    /// Log batches that were received and not recorded.
    unconfirmed: Arc<AtomicUsize>,
    over: CancellationToken,
    superseded: CancellationToken,
}

impl Session {
    async fn read(self, mut incoming: Streaming<pb::FromWorker>, records: mpsc::Sender<Record>) {
        let _over = self.over.clone().drop_guard();
        let silence = self.gateway.inner.times.silence;
        let mut heard_at: Option<Instant> = None;
        let end = loop {
            let message = tokio::select! {
                () = self.superseded.cancelled() => break "another connection took over".to_owned(),
                () = self.over.cancelled() => break "the worker does not read".to_owned(),
                message = timeout(silence, incoming.next()) => message,
            };
            let message = match message {
                Err(_elapsed) => break format!("nothing was heard for {} s", silence.as_secs()),
                Ok(None) => break "the worker closed it".to_owned(),
                Ok(Some(Err(status))) => break status.message().to_owned(),
                Ok(Some(Ok(message))) => message,
            };
            if heard_at.is_none_or(|at| at.elapsed() >= HEARD_PERIOD) {
                heard_at = Some(Instant::now());
                self.gateway.inner.host.heard(self.worker_id).await;
            }
            if let Err(status) = self.take(message, &records).await {
                tracing::warn!(worker = %self.worker_id, reason = status.message(), "the worker's connection is given up");
                break status.message().to_owned();
            }
        };
        tracing::info!(worker = %self.worker_id, session = self.number, reason = end, "a worker's connection ended");
        self.gateway.leave(self.worker_id, self.number);
    }

    async fn take(&self, message: pb::FromWorker, records: &mpsc::Sender<Record>) -> Result<(), Status> {
        let record = match message.message {
            Some(FromWorker::Started(started)) => Record::Report(wire::started(started)?),
            Some(FromWorker::Exited(exited)) => Record::Report(wire::exited(exited)?),
            Some(FromWorker::Logs(batch)) => {
                if self.unconfirmed.fetch_add(1, Ordering::Relaxed) >= MAX_UNCONFIRMED_BATCHES {
                    return Err(Status::resource_exhausted("the worker sends more output than it may"));
                }
                Record::Logs(batch)
            }
            Some(FromWorker::BuildLines(message)) => return self.build_lines(message).await,
            Some(FromWorker::BuildEnded(ended)) => {
                let build_id = ended.build_id.clone();
                let result = wire::build_result(ended)?;
                self.gateway.inner.builds.ended(self.number, &build_id, result);
                return Ok(());
            }
            // It was heard, which is what they are for. What a newer worker says besides is not for us.
            Some(FromWorker::Heartbeat(_) | FromWorker::Hello(_)) | None => return Ok(()),
        };
        records
            .try_send(record)
            .map_err(|_| Status::resource_exhausted("the worker reports faster than can be recorded"))
    }

    async fn build_lines(&self, message: pb::BuildLines) -> Result<(), Status> {
        let Some(lines) = self.gateway.inner.builds.lines(self.number, &message.build_id) else {
            return Ok(());
        };
        for line in message.lines {
            // Control reads its builds' lines at once, into memory. Nobody reads any more where one was cancelled.
            let _cancelled = lines.send(wire::build_line(line)?).await;
        }
        Ok(())
    }

    /// Output first, in the order in which it came: what a container printed is there when its end is known.
    async fn record(self, mut records: mpsc::Receiver<Record>, orders: mpsc::Sender<ToWorker>) {
        let _over = self.over.clone().drop_guard();
        while let Some(record) = records.recv().await {
            if self.superseded.is_cancelled() {
                // The connection that took over says the rest.
                return;
            }
            match record {
                Record::Report(report) => self.gateway.inner.host.report(self.worker_id, report).await,
                Record::Logs(batch) => {
                    let sequence = batch.sequence;
                    if let Err(status) = self.write_logs(batch).await {
                        tracing::warn!(worker = %self.worker_id, reason = status.message(), "a batch of output was dropped");
                    }
                    self.unconfirmed.fetch_sub(1, Ordering::Relaxed);
                    let taken = ToWorker::LogsTaken(pb::LogsTaken { sequence });
                    if orders.send(taken).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    async fn write_logs(&self, batch: pb::LogBatch) -> Result<(), Status> {
        let sequence = batch.sequence;
        let taken = Arc::clone(self.gateway.inner.logs_taken.lock().entry(self.worker_id).or_default());
        // Held while writing: an earlier connection of the worker may be about to write the same batch.
        let mut taken = taken.lock().await;
        if taken.run_id == self.run_id && sequence <= taken.sequence {
            return Ok(());
        }
        self.gateway.inner.host.log(wire::log_entries(batch)?).await;
        *taken = LogsTaken {
            run_id: self.run_id.clone(),
            sequence,
        };
        Ok(())
    }

    async fn write(
        self,
        outgoing: mpsc::Sender<Result<pb::ToWorker, Status>>,
        mut desired: watch::Receiver<DesiredSet>,
        mut orders: mpsc::Receiver<ToWorker>,
    ) {
        let _over = self.over.clone().drop_guard();
        let welcome = ToWorker::Welcome(pb::Welcome {
            session: self.number.to_string(),
            heartbeat_millis: u32::try_from(self.gateway.inner.times.heartbeat.as_millis()).unwrap_or(u32::MAX),
            containers_address: self.gateway.inner.containers_address.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        let send = async |message| {
            tokio::select! {
                sent = outgoing.send(Ok(pb::ToWorker { message: Some(message) })) => sent.is_ok(),
                // A worker that does not read is not waited for once its connection is over.
                () = self.over.cancelled() => false,
            }
        };
        if !send(welcome).await {
            return;
        }
        // What was wanted before counts too.
        desired.mark_changed();
        let mut sent: HashSet<ContainerId> = HashSet::new();
        let mut wants_news = true;
        loop {
            tokio::select! {
                biased;
                () = self.superseded.cancelled() => {
                    let status = Status::aborted("another connection of this worker took over");
                    // The other end may be gone, which is the usual reason for a new connection.
                    let _gone = timeout(HELLO_TIMEOUT, outgoing.send(Err(status))).await;
                    return;
                }
                () = self.over.cancelled() => return,
                order = orders.recv() => match order {
                    Some(order) => if !send(order).await { return },
                    None => return,
                },
                changed = desired.changed(), if wants_news => {
                    if changed.is_err() {
                        wants_news = false;
                        continue;
                    }
                    let set = desired.borrow_and_update().clone();
                    // Nothing has been said yet.
                    if set.generation.0 == 0 {
                        continue;
                    }
                    sent.retain(|id| set.containers.iter().any(|container| container.id == *id));
                    for container in &set.containers {
                        if sent.insert(container.id)
                            && !send(ToWorker::Spec(wire::spec(container.id, &container.spec))).await
                        {
                            return;
                        }
                    }
                    if !send(ToWorker::Desired(wire::desired(set.generation, &set.containers))).await {
                        return;
                    }
                }
            }
        }
    }
}
