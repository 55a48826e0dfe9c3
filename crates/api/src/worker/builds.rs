//! Image builds on workers: control's jobs out, lines and results back.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ionian_control::app::images::{BuildLine, PresentFn};
use ionian_control::{BuildFailure, BuildFn, BuildJob};
use ionian_domain::WorkerId;
use ionian_domain::image::BuiltImage;
use ionian_proto::worker as pb;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::wire;

/// How long a build waits for a worker. A worker that restarts is back within seconds.
const WORKER_WAIT: Duration = Duration::from_secs(30);

type BuildResult = Result<BuiltImage, BuildFailure>;

/// Builds under way on workers, and which workers there are for them. Cheap to clone.
#[derive(Clone, Default)]
pub struct RemoteBuilds {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    arrivals: Notify,
}

#[derive(Default)]
struct State {
    workers: BTreeMap<WorkerId, Builder>,
    running: HashMap<String, Running>,
}

/// A connected worker.
struct Builder {
    session: u64,
    orders: mpsc::Sender<pb::to_worker::Message>,
    layers: HashSet<String>,
}

struct Running {
    worker_id: WorkerId,
    session: u64,
    lines: mpsc::Sender<BuildLine>,
    result: oneshot::Sender<BuildResult>,
}

/// Takes a build out of the table however its wait ends.
struct Ticket<'a> {
    builds: &'a RemoteBuilds,
    id: String,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.builds.inner.state.lock().running.remove(&self.id);
    }
}

fn failure(message: &str) -> BuildFailure {
    BuildFailure {
        by_user: false,
        message: message.to_owned(),
    }
}

impl RemoteBuilds {
    /// For control: builds on any connected worker.
    pub fn build_fn(&self) -> BuildFn {
        let builds = self.clone();
        Arc::new(move |job, lines, cancel| {
            let builds = builds.clone();
            Box::pin(async move { builds.build(job, lines, cancel).await })
        })
    }

    /// For control: whether a worker has all layers of an image. While none is connected nobody knows, and an
    /// image that was built is taken to be there.
    pub fn present_fn(&self) -> PresentFn {
        let builds = self.clone();
        Arc::new(move |image| {
            let state = builds.inner.state.lock();
            let has_all = |worker: &Builder| image.layers.iter().all(|key| worker.layers.contains(key));
            state.workers.is_empty() || state.workers.values().any(has_all)
        })
    }

    async fn build(&self, job: BuildJob, lines: mpsc::Sender<BuildLine>, cancel: CancellationToken) -> BuildResult {
        let (worker_id, session, orders) = tokio::select! {
            () = cancel.cancelled() => return Err(failure("the build was cancelled")),
            found = tokio::time::timeout(WORKER_WAIT, self.any_worker()) => {
                found.map_err(|_| failure("no worker is connected that could build the image; start `ionian worker`"))?
            }
        };
        let id = hex::encode(rand::random::<[u8; 12]>());
        let (result, done) = oneshot::channel();
        let running = Running {
            worker_id,
            session,
            lines,
            result,
        };
        self.inner.state.lock().running.insert(id.clone(), running);
        let ticket = Ticket {
            builds: self,
            id: id.clone(),
        };
        let gone = || failure("the worker that built the image went away; try again");
        let order = pb::to_worker::Message::Build(wire::build(id.clone(), job));
        orders.send(order).await.map_err(|_| gone())?;
        let outcome = tokio::select! {
            outcome = done => outcome.unwrap_or_else(|_| Err(gone())),
            () = cancel.cancelled() => {
                // A worker that is gone has cancelled it by itself.
                let _gone = orders.send(pb::to_worker::Message::CancelBuild(pb::CancelBuild { build_id: id })).await;
                Err(failure("the build was cancelled"))
            }
        };
        drop(ticket);
        if let Ok(image) = &outcome
            && let Some(worker) = self.inner.state.lock().workers.get_mut(&worker_id)
        {
            worker.layers.extend(image.layers.iter().cloned());
        }
        outcome
    }

    async fn any_worker(&self) -> (WorkerId, u64, mpsc::Sender<pb::to_worker::Message>) {
        loop {
            let arrival = self.inner.arrivals.notified();
            tokio::pin!(arrival);
            // Before the look, so that no arrival falls between them.
            arrival.as_mut().enable();
            {
                let state = self.inner.state.lock();
                if let Some((id, worker)) = state.workers.first_key_value() {
                    return (*id, worker.session, worker.orders.clone());
                }
            }
            arrival.await;
        }
    }

    pub(super) fn connected(
        &self,
        worker_id: WorkerId,
        session: u64,
        orders: mpsc::Sender<pb::to_worker::Message>,
        layers: Vec<String>,
    ) {
        let worker = Builder {
            session,
            orders,
            layers: layers.into_iter().collect(),
        };
        let mut state = self.inner.state.lock();
        state.workers.insert(worker_id, worker);
        // A build does not survive its session: the worker has cancelled it.
        state
            .running
            .retain(|_, running| running.worker_id != worker_id || running.session == session);
        drop(state);
        self.inner.arrivals.notify_waiters();
    }

    pub(super) fn disconnected(&self, worker_id: WorkerId, session: u64) {
        let mut state = self.inner.state.lock();
        if state
            .workers
            .get(&worker_id)
            .is_some_and(|worker| worker.session == session)
        {
            state.workers.remove(&worker_id);
        }
        // Whoever waits is told that the worker went away, by the dropped sender.
        state
            .running
            .retain(|_, running| running.worker_id != worker_id || running.session != session);
    }

    /// Where lines of a build go, if it is one of this session's.
    pub(super) fn lines(&self, session: u64, build_id: &str) -> Option<mpsc::Sender<BuildLine>> {
        let state = self.inner.state.lock();
        let running = state
            .running
            .get(build_id)
            .filter(|running| running.session == session)?;
        Some(running.lines.clone())
    }

    pub(super) fn ended(&self, session: u64, build_id: &str, result: BuildResult) {
        let mut state = self.inner.state.lock();
        if state
            .running
            .get(build_id)
            .is_some_and(|running| running.session == session)
            && let Some(running) = state.running.remove(build_id)
        {
            // Who asked may have gone.
            let _gone = running.result.send(result);
        }
    }
}
