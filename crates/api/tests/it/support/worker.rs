//! A worker that starts nothing: containers are started when they are wanted and end when they are not. Those
//! of an earlier server live on, or are gone.

use std::collections::HashSet;
use std::sync::Arc;

use ionian_domain::ContainerId;
use ionian_domain::container::{ContainerExit, ContainerSpec, ContainerStarted, StartTimings};
use ionian_domain::worker::{DesiredSet, DesiredState, WorkerReport};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// What the worker was told about containers.
#[derive(Default)]
pub(crate) struct Seen {
    pub specs: Vec<(ContainerId, Arc<ContainerSpec>)>,
    pub stopped: Vec<ContainerId>,
    /// Taken over from an earlier server.
    pub adopted: Vec<ContainerId>,
}

/// What became of the containers of an earlier server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Survivors {
    Live,
    Gone,
}

pub(crate) struct Worker {
    pub seen: Arc<Mutex<Seen>>,
    pub reports: mpsc::Sender<WorkerReport>,
    task: JoinHandle<()>,
}

impl Worker {
    pub(crate) fn start(
        desired: watch::Receiver<DesiredSet>,
        reports: mpsc::Sender<WorkerReport>,
        survivors: Survivors,
    ) -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        let task = tokio::spawn(run(desired, reports.clone(), Arc::clone(&seen), survivors));
        Self { seen, reports, task }
    }

    pub(crate) fn spec(&self, id: ContainerId) -> Arc<ContainerSpec> {
        let seen = self.seen.lock();
        let found = seen.specs.iter().find(|(known, _)| *known == id);
        Arc::clone(&found.expect("the worker was told of the container").1)
    }

    /// A container ends by itself.
    pub(crate) async fn exit(&self, container_id: ContainerId, exit: ContainerExit) {
        self.reports
            .send(WorkerReport::Exited { container_id, exit })
            .await
            .unwrap();
    }

    pub(crate) async fn stop(self) {
        self.task.abort();
        let _aborted = self.task.await;
    }
}

async fn run(
    mut desired: watch::Receiver<DesiredSet>,
    reports: mpsc::Sender<WorkerReport>,
    seen: Arc<Mutex<Seen>>,
    survivors: Survivors,
) {
    let mut started: HashSet<ContainerId> = HashSet::new();
    let mut ended: HashSet<ContainerId> = HashSet::new();
    loop {
        let set = desired.borrow_and_update().clone();
        assert!(
            set.generation.0 > 0 || set.containers.is_empty(),
            "generation 0 says nothing"
        );
        started.retain(|id| set.containers.iter().any(|container| container.id == *id));
        for container in set.containers {
            let is_survivor = container.must_exist && !started.contains(&container.id);
            let report = match container.state {
                DesiredState::Running | DesiredState::Stopped { .. } if is_survivor && survivors == Survivors::Gone => {
                    if !ended.insert(container.id) {
                        continue;
                    }
                    WorkerReport::Exited {
                        container_id: container.id,
                        exit: ContainerExit::Lost,
                    }
                }
                DesiredState::Running if started.insert(container.id) => {
                    let mut seen = seen.lock();
                    if is_survivor {
                        seen.adopted.push(container.id);
                    }
                    seen.specs.push((container.id, container.spec));
                    WorkerReport::Started(ContainerStarted {
                        container_id: container.id,
                        address: [127, 0, 0, 1].into(),
                        timings: StartTimings::default(),
                    })
                }
                DesiredState::Stopped { .. } if ended.insert(container.id) => {
                    seen.lock().stopped.push(container.id);
                    WorkerReport::Exited {
                        container_id: container.id,
                        exit: ContainerExit::Exited { code: 0 },
                    }
                }
                DesiredState::Running | DesiredState::Stopped { .. } => continue,
            };
            if reports.send(report).await.is_err() {
                return;
            }
        }
        if desired.changed().await.is_err() {
            return;
        }
    }
}
