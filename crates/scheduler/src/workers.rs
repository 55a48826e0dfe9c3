//! Workers: who offers a machine, and who has gone silent.
//!
//! A worker is known from the moment it connects, or from the containers that a restarted server finds in
//! its record. Whatever is heard of it is a sign of life; one that is silent for `Config::worker_silence`
//! is given up. Nobody can know what its containers do then, so they count as lost: their inputs run again
//! elsewhere with the next attempt number, their credentials are forgotten, and what they report later
//! is refused. The worker itself may come back at any time; what it still runs is not in its desired set,
//! and so it ends it.

use ionian_domain::container::ContainerExit;
use ionian_domain::worker::WorkerCapacity;
use ionian_domain::{ContainerId, Timestamp, WorkerId};

use crate::breaks::Break;
use crate::state::State;
use crate::turn::Turn;

/// Silent workers that are remembered, so that a sign of life is enough for them to be used again. One that
/// is beyond this number has to connect again, which a worker whose connection broke does anyway.
pub(crate) const SILENT_WORKERS: usize = 256;

/// A host that runs containers.
#[derive(Debug)]
pub(crate) struct Worker {
    /// What it offers; `None` while only recovered containers name it.
    pub capacity: Option<WorkerCapacity>,
    pub heard_at: Timestamp,
    /// It was given up, and nothing was heard of it since.
    pub is_silent: bool,
}

impl State {
    pub(crate) fn worker_connected(
        &mut self,
        now: Timestamp,
        worker_id: WorkerId,
        capacity: WorkerCapacity,
        turn: &mut Turn,
    ) {
        self.expect_worker(now, worker_id);
        self.worker_heard(now, worker_id, turn);
        if let Some(worker) = self.workers.get_mut(&worker_id) {
            worker.capacity = Some(capacity);
        }
        // It has to be told what should be, also where that is nothing.
        turn.desired_changed = true;
    }

    /// Gives a worker that is not yet known its time to connect.
    pub(crate) fn expect_worker(&mut self, now: Timestamp, worker_id: WorkerId) {
        self.workers.entry(worker_id).or_insert_with(|| {
            self.silences.insert((now, worker_id));
            Worker {
                capacity: None,
                heard_at: now,
                is_silent: false,
            }
        });
    }

    /// Takes a sign of life. One of a worker that never connected says nothing.
    pub(crate) fn worker_heard(&mut self, now: Timestamp, worker_id: WorkerId, turn: &mut Turn) {
        if self.is_broken(Break::IgnoresSignsOfLife) {
            return;
        }
        let Some(worker) = self.workers.get_mut(&worker_id) else {
            return;
        };
        self.silences.remove(&(worker.heard_at, worker_id));
        worker.heard_at = worker.heard_at.max(now);
        self.silences.insert((worker.heard_at, worker_id));
        if std::mem::take(&mut worker.is_silent) {
            // It may still run what was given up.
            turn.desired_changed = true;
        }
    }

    /// The process of a container runs. Told again by a worker that connects again.
    pub(crate) fn worker_started(&mut self, now: Timestamp, container_id: ContainerId, turn: &mut Turn) {
        let Some(container) = self.containers.get(&container_id) else {
            // Its worker was given up, or its exit overtook this.
            return;
        };
        self.worker_heard(now, container.worker_id, turn);
        self.container_seen(now, container_id, turn);
        self.adopted_web_ready(now, container_id, turn);
    }

    /// Gives up workers of which nothing was heard for too long.
    pub(crate) fn expire_workers(&mut self, now: Timestamp, turn: &mut Turn) {
        if self.is_broken(Break::WaitsForSilentWorkers) {
            return;
        }
        while let Some((heard_at, worker_id)) = self.silences.first().copied()
            && heard_at + self.config.worker_silence <= now
        {
            self.silences.remove(&(heard_at, worker_id));
            if let Some(worker) = self.workers.get_mut(&worker_id) {
                worker.is_silent = true;
            }
            let its: Vec<ContainerId> = self
                .containers
                .iter()
                .filter(|(_, container)| container.worker_id == worker_id)
                .map(|(id, _)| *id)
                .collect();
            for container_id in its {
                self.container_ended(now, container_id, &ContainerExit::Lost, turn);
            }
            turn.desired_changed = true;
            self.forget_silent_workers();
        }
    }

    fn forget_silent_workers(&mut self) {
        let mut silent: Vec<(Timestamp, WorkerId)> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.is_silent)
            .map(|(id, worker)| (worker.heard_at, *id))
            .collect();
        silent.sort_unstable();
        let beyond = silent.len().saturating_sub(SILENT_WORKERS);
        for (_, worker_id) in &silent[..beyond] {
            self.workers.remove(worker_id);
        }
    }

    /// When the next worker is given up if nothing is heard of it.
    pub(crate) fn next_silence(&self) -> Option<Timestamp> {
        let (heard_at, _) = self.silences.first()?;
        Some(*heard_at + self.config.worker_silence)
    }
}
