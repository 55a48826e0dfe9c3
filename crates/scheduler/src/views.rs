//! The state as others may see it: the desired set, lists for people, statistics.

use ionian_domain::container::RuntimeKinds;
use ionian_domain::worker::DesiredState;
use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp, WorkerId};

use crate::breaks::Break;
use crate::state::{Phase, State, count};
use crate::turn::DesiredEntry;

/// A container, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    pub id: ContainerId,
    pub worker_id: WorkerId,
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub created_at: Timestamp,
    pub ready: bool,
    /// It was told to end.
    pub ending: bool,
    pub running_inputs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    pub backlog: u32,
    pub containers: u32,
    pub running_inputs: u32,
    pub free_slots: u32,
}

impl State {
    pub(crate) fn desired(&self) -> Vec<DesiredEntry> {
        self.containers
            .iter()
            .map(|(id, container)| DesiredEntry {
                worker_id: container.worker_id,
                must_exist: container.seen_at.is_some() && !self.is_broken(Break::ForgetsSightings),
                container_id: *id,
                function_id: container.function_id,
                definition_id: container.definition_id,
                state: match container.phase {
                    Phase::Starting { .. } | Phase::Ready | Phase::Draining { .. } => DesiredState::Running,
                    Phase::Stopping { reason, grace } => DesiredState::Stopped { grace, reason },
                },
            })
            .collect()
    }

    /// What the workers have that are there; `None` without any.
    pub(crate) fn runtimes(&self) -> Option<RuntimeKinds> {
        let there = self.workers.values().filter(|worker| !worker.is_silent);
        let kinds = there.filter_map(|worker| Some(worker.capacity?.runtimes));
        kinds.reduce(RuntimeKinds::union)
    }

    pub(crate) fn container_views(&self) -> Vec<ContainerView> {
        self.containers
            .iter()
            .map(|(id, container)| ContainerView {
                id: *id,
                worker_id: container.worker_id,
                app_id: container.app_id,
                function_id: container.function_id,
                created_at: container.created_at,
                ready: container.phase == Phase::Ready,
                ending: !container.is_live(),
                running_inputs: container.load(),
            })
            .collect()
    }

    pub(crate) fn pool_stats(&self, function_id: FunctionId) -> PoolStats {
        let Some(pool) = self.pools.get(&function_id) else {
            return PoolStats::default();
        };
        let mut stats = PoolStats {
            backlog: count(pool.queue.len() + pool.delayed.len()).saturating_add(pool.web_queued),
            ..PoolStats::default()
        };
        let capacity = pool.settings.capacity();
        for (_, container) in self.containers_in(pool) {
            stats.running_inputs += container.load();
            if container.is_live() {
                stats.containers += 1;
            }
            if container.phase == Phase::Ready {
                stats.free_slots += capacity.saturating_sub(container.load());
            }
        }
        stats
    }
}
