//! The HTTP lane as the scheduler sees it: demand, not requests.

use std::collections::BTreeMap;
use std::time::Duration;

use ionian_domain::{ContainerId, FunctionId, Timestamp};

use crate::event::WebUse;
use crate::state::{Phase, State};
use crate::turn::Turn;

impl State {
    /// Takes the ingress' whole view of a pool. It replaces the one before: a container that it does not
    /// name has no requests.
    pub(crate) fn web_demand(
        &mut self,
        now: Timestamp,
        function_id: FunctionId,
        queued: u32,
        uses: &[WebUse],
        turn: &mut Turn,
    ) {
        let Some(pool) = self.pools.get_mut(&function_id) else {
            // Its app stopped, and may come back before these requests give up.
            self.note_waiting(function_id, queued);
            return;
        };
        pool.web_queued = queued;
        self.dirty.insert(function_id);
        let uses: BTreeMap<ContainerId, &WebUse> = uses.iter().map(|used| (used.container_id, used)).collect();
        for container_id in self.containers_of(function_id, |container| container.is_web) {
            self.web_used(now, container_id, uses.get(&container_id).copied());
            self.end_if_drained(now, container_id, turn);
        }
    }

    fn web_used(&mut self, now: Timestamp, container_id: ContainerId, used: Option<&WebUse>) {
        let Some(container) = self.containers.get_mut(&container_id) else {
            return;
        };
        if container.ready_at.is_none() {
            // The ingress does not know it yet.
            return;
        }
        container.web_in_flight = used.map_or(0, |used| used.in_flight);
        if container.web_in_flight > 0 {
            container.has_served = true;
        }
        container.idle_since = container.is_empty().then(|| {
            // The ingress' clock is ours (one process), but a report may be older than the readiness
            // that opened the idle time: idle time never starts before that.
            let last_active = used.map(|used| used.last_active).max(container.ready_at).unwrap_or(now);
            container
                .idle_since
                .map_or(last_active, |since| since.max(last_active))
                .min(now)
        });
        if let Phase::Draining {
            awaits_ingress,
            deadline,
            ..
        } = &mut container.phase
            && std::mem::take(awaits_ingress)
        {
            // A request that reached it before the ingress heard of the drain gets its time too. Without one
            // the container ends at once.
            let timeout = self
                .pools
                .get(&container.function_id)
                .map_or(Duration::ZERO, |pool| pool.settings.timeout);
            *deadline = (now + timeout + self.config.drain_grace).max(*deadline);
        }
        if container.has_served {
            self.start_was_worth_it(container_id);
        }
    }

    /// Keeps what the ingress said of a function that has no pool: it says it once.
    pub(crate) fn note_waiting(&mut self, function_id: FunctionId, queued: u32) {
        if queued > 0 {
            self.web_waiting.insert(function_id, queued);
        } else {
            self.web_waiting.remove(&function_id);
        }
    }
}
