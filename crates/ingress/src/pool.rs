//! All pools, fed by control's events.
//!
//! One task applies the events in their order and forgets the pools of functions that are no more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ionian_control::web::RouteTable;
use ionian_domain::FunctionId;
use ionian_domain::web::PoolEvent;
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::demand::DemandBoard;
use crate::slots::FunctionPool;

#[derive(Debug)]
pub(crate) struct Pools {
    by_function: RwLock<HashMap<FunctionId, Arc<FunctionPool>>>,
    board: Arc<DemandBoard>,
}

impl Pools {
    pub(crate) fn new(board: Arc<DemandBoard>) -> Self {
        Self {
            by_function: RwLock::default(),
            board,
        }
    }

    pub(crate) fn ensure(&self, function_id: FunctionId) -> Arc<FunctionPool> {
        if let Some(pool) = self.by_function.read().get(&function_id) {
            return Arc::clone(pool);
        }
        let mut pools = self.by_function.write();
        let pool = pools
            .entry(function_id)
            .or_insert_with(|| Arc::new(FunctionPool::new(function_id, Arc::clone(&self.board))));
        Arc::clone(pool)
    }

    fn find(&self, function_id: FunctionId) -> Option<Arc<FunctionPool>> {
        self.by_function.read().get(&function_id).cloned()
    }

    pub(crate) fn apply(&self, event: &PoolEvent) {
        match event {
            PoolEvent::Ready {
                function_id,
                container_id,
                slots,
                targets,
            } => {
                self.ensure(*function_id).ready(*container_id, *slots, targets);
            }
            // Events about containers that were never ready, or of pools that nobody asked: nothing to do.
            PoolEvent::Draining {
                function_id,
                container_id,
            } => {
                if let Some(pool) = self.find(*function_id) {
                    pool.draining(*container_id);
                }
            }
            PoolEvent::Gone {
                function_id,
                container_id,
            } => {
                if let Some(pool) = self.find(*function_id) {
                    pool.gone(*container_id);
                }
            }
            PoolEvent::StartFailed {
                function_id,
                container_id: _,
                message,
            } => {
                if let Some(pool) = self.find(*function_id) {
                    pool.start_failed(message);
                }
            }
        }
    }

    /// Forgets pools that have no route, no container and nobody waiting.
    fn forget_unrouted(&self, routes: &RouteTable) {
        let routed: HashSet<FunctionId> = routes.by_host_label.values().map(|route| route.function_id).collect();
        self.by_function
            .write()
            .retain(|function_id, pool| routed.contains(function_id) || !pool.retire());
    }
}

/// Applies events until control ends or the process shuts down.
pub(crate) async fn run(
    pools: Arc<Pools>,
    mut events: mpsc::Receiver<PoolEvent>,
    mut routes: watch::Receiver<Arc<RouteTable>>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            event = events.recv() => {
                let Some(event) = event else { return };
                pools.apply(&event);
                if matches!(event, PoolEvent::Gone { .. }) {
                    let table = Arc::clone(&routes.borrow());
                    pools.forget_unrouted(&table);
                }
            }
            changed = routes.changed() => {
                if changed.is_err() {
                    return; // Control is gone, so the process is ending.
                }
                let table = Arc::clone(&routes.borrow_and_update());
                pools.forget_unrouted(&table);
            }
        }
    }
}
