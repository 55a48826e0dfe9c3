//! Workers that are processes of their own: what each should run, and what it says.
//!
//! The connection belongs to `api`; here it is a desired set to watch and reports to take. Whether a worker is
//! silent, and what becomes of its containers, is the scheduler's business.

use std::collections::HashMap;

use ionian_domain::worker::{DesiredSet, WorkerCapacity, WorkerReport};
use ionian_domain::{ContainerId, ErrorKind, WorkerId};
use ionian_scheduler::{DesiredEntry, Event};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::error::{Error, Result};
use crate::{Control, dispatch};

/// Workers that may connect in the life of this process. Each keeps a task that prepares specifications.
const MAX_WORKERS: usize = 256;

/// What the use cases below need.
pub(crate) struct WorkerLinks {
    entries: watch::Receiver<Vec<DesiredEntry>>,
    reports: mpsc::Sender<WorkerReport>,
    /// The sets of workers that have connected to this process.
    sets: Mutex<HashMap<WorkerId, watch::Receiver<DesiredSet>>>,
}

impl WorkerLinks {
    pub(crate) fn new(entries: watch::Receiver<Vec<DesiredEntry>>, reports: mpsc::Sender<WorkerReport>) -> Self {
        Self {
            entries,
            reports,
            sets: Mutex::default(),
        }
    }

    fn belongs(&self, container_id: ContainerId, worker_id: WorkerId) -> bool {
        let entries = self.entries.borrow();
        entries
            .iter()
            .any(|entry| entry.container_id == container_id && entry.worker_id == worker_id)
    }
}

pub struct Workers<'a>(pub(crate) &'a Control);

impl Workers<'_> {
    /// A worker is there, for the first time or again. Returns what it should run.
    pub async fn connect(&self, worker_id: WorkerId, capacity: WorkerCapacity) -> Result<watch::Receiver<DesiredSet>> {
        if worker_id == self.0.embedded_worker().await? {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("the worker {worker_id} is part of the server; give the copy a data directory of its own"),
            ));
        }
        let links = self.0.worker_links();
        let is_known = links.sets.lock().contains_key(&worker_id);
        if !is_known && links.sets.lock().len() >= MAX_WORKERS {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("{MAX_WORKERS} workers have connected, which is the most that a server takes; restart it"),
            ));
        }
        self.0
            .turn()
            .tell(Event::WorkerConnected { worker_id, capacity })
            .await?;
        // After this round trip the entries name every container that was recovered. A set that left one out would
        // end it.
        self.0.turn().inspect(|_| ()).await?;
        let mut sets = links.sets.lock();
        let desired = sets.entry(worker_id).or_insert_with(|| {
            let (sender, desired) = watch::channel(DesiredSet::default());
            let mut entries = links.entries.clone();
            // What has been decided already counts too.
            entries.mark_changed();
            // Kind: for the life of the process, since specifications are kept for the worker's return.
            tokio::spawn(dispatch::run(
                self.0.clone(),
                worker_id,
                entries,
                sender,
                self.0.cancel_token().clone(),
            ));
            desired
        });
        Ok(desired.clone())
    }

    /// A sign of life.
    pub async fn heard(&self, worker_id: WorkerId) -> Result<()> {
        self.0.turn().tell(Event::WorkerHeard { worker_id }).await
    }

    /// What a worker saw. A worker speaks for its own containers only.
    pub async fn report(&self, worker_id: WorkerId, report: WorkerReport) -> Result<()> {
        let links = self.0.worker_links();
        let container_id = match &report {
            WorkerReport::Started(started) => started.container_id,
            WorkerReport::Exited { container_id, .. } => *container_id,
        };
        if !links.belongs(container_id, worker_id) {
            // It was given up, and is fenced off; or its end was acknowledged already.
            tracing::debug!(worker = %worker_id, container = %container_id, "a late report was dropped");
            return Ok(());
        }
        links
            .reports
            .send(report)
            .await
            .map_err(|_closed| Error::new(ErrorKind::Unavailable, "the server is shutting down"))
    }
}
