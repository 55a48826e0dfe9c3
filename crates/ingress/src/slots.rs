//! The slots of one function's containers, and the room where requests wait for one.
//!
//! All of it is one small state under one short lock. The rules:
//!
//! * A container never holds more requests than it has slots.
//! * Whoever waits is served in order of arrival: a freed slot is handed to the first waiter under the
//!   same lock, so there is nothing to poll for and nobody to overtake.
//! * A new request goes to the *fullest* container with a free slot, the oldest of equals. Packing lets
//!   the others fall idle, so that scale-down finds containers to stop; spreading would keep all alive.
//! * A [`SlotLease`] gives its slot back when it is dropped, wherever that happens: also inside the
//!   channel to a waiter who left at the same moment.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ionian_control::web::{ContainerUse, DemandReport};
use ionian_domain::web::WebTarget;
use ionian_domain::{ContainerId, FunctionId, Timestamp};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::demand::{DemandBoard, REPORT_DELAY, URGENT_GAP, Urgency};
use crate::upstream::DirectTarget;

/// A container as requests see it.
#[derive(Debug)]
pub(crate) struct PoolContainer {
    pub(crate) id: ContainerId,
    targets: Vec<(Option<String>, Target)>,
    /// Cancelled when the container is gone, so that its requests do not wait for packets that will
    /// never come (a removed network does not send resets).
    pub(crate) gone: CancellationToken,
}

#[derive(Debug)]
pub(crate) enum Target {
    Direct(DirectTarget),
    DataChannel,
}

impl PoolContainer {
    pub(crate) fn target(&self, method: Option<&str>) -> Option<&Target> {
        self.targets
            .iter()
            .find(|(name, _)| name.as_deref() == method)
            .map(|(_, target)| target)
    }

    fn matches(&self, targets: &[(Option<String>, WebTarget)]) -> bool {
        self.targets.len() == targets.len()
            && self
                .targets
                .iter()
                .zip(targets)
                .all(|((name, target), (other_name, other))| {
                    name == other_name
                        && match (target, other) {
                            (Target::Direct(direct), WebTarget::Direct(address)) => direct.address == *address,
                            (Target::DataChannel, WebTarget::DataChannel) => true,
                            (Target::Direct(_), WebTarget::DataChannel)
                            | (Target::DataChannel, WebTarget::Direct(_)) => false,
                        }
                })
    }
}

#[derive(Debug)]
struct Entry {
    container: Arc<PoolContainer>,
    slots: u32,
    in_flight: u32,
    accepts_requests: bool,
    last_active: Timestamp,
}

/// Why a request got no slot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcquireError {
    #[error("the waiting room is full")]
    RoomFull,
    #[error("no container became ready within {0:?}")]
    NoContainer(Duration),
    #[error("all containers were busy for {0:?}")]
    AllBusy(Duration),
    #[error("containers cannot start: {0}")]
    StartFailed(String),
    /// The pool was forgotten between finding and using it: find it again.
    #[error("the pool is retired")]
    Retired,
}

/// How long and in what company a request may wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WaitLimits {
    pub(crate) max_waiting: usize,
    /// While no container is ready.
    pub(crate) startup_timeout: Duration,
    /// In addition, once containers are ready but busy: the longest that the request before may take.
    pub(crate) request_timeout: Duration,
}

type Granted = Result<SlotLease, String>;

#[derive(Debug, Default)]
struct State {
    /// In order of arrival. Scanned per request: a function has tens of containers, rarely hundreds,
    /// and a scan of hundreds of entries costs less than keeping an index.
    entries: Vec<Entry>,
    /// By ticket, which is the order of arrival.
    waiters: BTreeMap<u64, oneshot::Sender<Granted>>,
    next_ticket: u64,
    is_retired: bool,
    telling: Telling,
}

/// What control still has to be told, and what is planned for that.
#[derive(Debug, Default)]
struct Telling {
    /// Something changed since the last report.
    is_due: bool,
    routine_planned: bool,
    urgent_planned: bool,
    last_urgent: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct FunctionPool {
    function_id: FunctionId,
    board: Arc<DemandBoard>,
    state: Mutex<State>,
}

impl FunctionPool {
    pub(crate) fn new(function_id: FunctionId, board: Arc<DemandBoard>) -> Self {
        Self {
            function_id,
            board,
            state: Mutex::default(),
        }
    }

    /// Takes a slot, waiting for one in order of arrival. `avoid` names a container that just failed
    /// this request; it is used only when no other has a free slot.
    ///
    /// Dropping the future withdraws the request.
    pub(crate) async fn acquire(
        self: &Arc<Self>,
        limits: WaitLimits,
        avoid: Option<ContainerId>,
    ) -> Result<SlotLease, AcquireError> {
        let arrived = Instant::now();
        let (mut granted, _waiter) = {
            let mut state = self.state.lock();
            if state.is_retired {
                return Err(AcquireError::Retired);
            }
            if let Some(index) = pick(&state.entries, avoid) {
                let lease = self.grant(&mut state, index);
                self.note(&mut state, Urgency::Routine);
                return Ok(lease);
            }
            if state.waiters.len() >= limits.max_waiting {
                return Err(AcquireError::RoomFull);
            }
            let (sender, receiver) = oneshot::channel();
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.waiters.insert(ticket, sender);
            self.note(&mut state, Urgency::Urgent);
            (
                receiver,
                WaiterGuard {
                    pool: Arc::clone(self),
                    ticket,
                },
            )
        };
        let start_by = arrived + limits.startup_timeout;
        let result = match tokio::time::timeout_at(start_by, &mut granted).await {
            Ok(result) => result,
            Err(_elapsed) if self.has_ready_container() => {
                // The app runs, it is only busy: the queue moves at its pace.
                let longest = limits.startup_timeout + limits.request_timeout;
                match tokio::time::timeout_at(arrived + longest, &mut granted).await {
                    Ok(result) => result,
                    Err(_elapsed) => return Err(AcquireError::AllBusy(longest)),
                }
            }
            Err(_elapsed) => return Err(AcquireError::NoContainer(limits.startup_timeout)),
        };
        match result {
            Ok(Ok(lease)) => Ok(lease),
            Ok(Err(message)) => Err(AcquireError::StartFailed(message)),
            // Senders are removed only by a grant, a failure or the guard that this function holds.
            Err(_closed) => Err(AcquireError::Retired),
        }
    }

    pub(crate) fn ready(self: &Arc<Self>, id: ContainerId, slots: u32, targets: &[(Option<String>, WebTarget)]) {
        let mut state = self.state.lock();
        // A container without slots could never serve: one is the least that "ready" can mean.
        let slots = slots.max(1);
        match state.entries.iter_mut().find(|entry| entry.container.id == id) {
            // Told again: the numbers count, running requests keep theirs.
            Some(entry) => {
                entry.slots = slots;
                entry.accepts_requests = true;
                if !entry.container.matches(targets) {
                    entry.container = Arc::new(container(id, targets, entry.container.gone.clone()));
                }
            }
            None => state.entries.push(Entry {
                container: Arc::new(container(id, targets, CancellationToken::new())),
                slots,
                in_flight: 0,
                accepts_requests: true,
                last_active: Timestamp::now(),
            }),
        }
        self.serve_waiters(&mut state);
        self.note(&mut state, Urgency::Routine);
    }

    pub(crate) fn draining(self: &Arc<Self>, id: ContainerId) {
        let mut state = self.state.lock();
        let Some(entry) = state.entries.iter_mut().find(|entry| entry.container.id == id) else {
            return;
        };
        entry.accepts_requests = false;
        let urgency = if entry.in_flight == 0 {
            Urgency::Urgent
        } else {
            Urgency::Routine
        };
        self.note(&mut state, urgency);
    }

    pub(crate) fn gone(self: &Arc<Self>, id: ContainerId) {
        let removed = {
            let mut state = self.state.lock();
            let Some(index) = state.entries.iter().position(|entry| entry.container.id == id) else {
                return;
            };
            let removed = state.entries.remove(index);
            self.note(&mut state, Urgency::Routine);
            removed
        };
        // Outside the lock: this wakes the container's requests, whose leases take the lock.
        removed.container.gone.cancel();
    }

    /// Fails everyone who waits now.
    pub(crate) fn start_failed(self: &Arc<Self>, message: &str) {
        let waiters = {
            let mut state = self.state.lock();
            let waiters = std::mem::take(&mut state.waiters);
            if !waiters.is_empty() {
                // The queue is empty: control must not start another container for it.
                self.note(&mut state, Urgency::Urgent);
            }
            waiters
        };
        for (_ticket, waiter) in waiters {
            // A waiter that left meanwhile needs no answer.
            let _left = waiter.send(Err(message.to_owned()));
        }
    }

    /// Marks an empty pool as no longer used. False where somebody still needs it.
    pub(crate) fn retire(&self) -> bool {
        let mut state = self.state.lock();
        let is_empty = state.entries.is_empty() && state.waiters.is_empty();
        state.is_retired = is_empty;
        is_empty
    }

    /// The numbers, if they changed since they were last told.
    pub(crate) fn take_report(&self, urgency: Urgency, now: Instant) -> Option<DemandReport> {
        let mut state = self.state.lock();
        match urgency {
            Urgency::Urgent => {
                state.telling.urgent_planned = false;
                state.telling.last_urgent = Some(now);
            }
            Urgency::Routine => state.telling.routine_planned = false,
        }
        if !std::mem::take(&mut state.telling.is_due) {
            return None;
        }
        Some(DemandReport {
            function_id: self.function_id,
            queued: u32::try_from(state.waiters.len()).unwrap_or(u32::MAX),
            containers: state
                .entries
                .iter()
                .map(|entry| ContainerUse {
                    container_id: entry.container.id,
                    in_flight: entry.in_flight,
                    last_active: entry.last_active,
                })
                .collect(),
        })
    }

    fn has_ready_container(&self) -> bool {
        self.state.lock().entries.iter().any(|entry| entry.accepts_requests)
    }

    fn grant(self: &Arc<Self>, state: &mut State, index: usize) -> SlotLease {
        let entry = &mut state.entries[index];
        entry.in_flight += 1;
        entry.last_active = Timestamp::now();
        assert!(
            entry.in_flight <= entry.slots,
            "a container was given more requests than it has slots"
        );
        SlotLease {
            pool: Arc::clone(self),
            container: Arc::clone(&entry.container),
            is_held: true,
        }
    }

    /// Hands free slots to waiters, first come first served.
    fn serve_waiters(self: &Arc<Self>, state: &mut State) {
        while !state.waiters.is_empty() {
            let Some(index) = pick(&state.entries, None) else {
                return;
            };
            let Some((_ticket, waiter)) = state.waiters.pop_first() else {
                return;
            };
            let lease = self.grant(state, index);
            if let Err(Ok(mut lease)) = waiter.send(Ok(lease)) {
                // The waiter left between our lock and its guard. Its lease must not be dropped as
                // held, because dropping takes the lock that we hold.
                lease.is_held = false;
                state.entries[index].in_flight -= 1;
            }
        }
    }

    fn release(self: &Arc<Self>, container: &PoolContainer) {
        let mut state = self.state.lock();
        // By id, not by pointer: a container that was told again has a new value and the same slots.
        let Some(entry) = state
            .entries
            .iter_mut()
            .find(|entry| entry.container.id == container.id)
        else {
            return; // It is gone, and its slots with it.
        };
        entry.in_flight -= 1;
        entry.last_active = Timestamp::now();
        let is_drained = !entry.accepts_requests && entry.in_flight == 0;
        if !state.waiters.is_empty() {
            self.serve_waiters(&mut state);
        }
        self.note(&mut state, if is_drained { Urgency::Urgent } else { Urgency::Routine });
    }

    fn withdraw(self: &Arc<Self>, ticket: u64) {
        let mut state = self.state.lock();
        if state.waiters.remove(&ticket).is_some() {
            self.note(&mut state, Urgency::Routine);
        }
    }

    /// Notes that the numbers changed and plans a report where none is planned.
    fn note(self: &Arc<Self>, state: &mut State, urgency: Urgency) {
        state.telling.is_due = true;
        match urgency {
            Urgency::Urgent => {
                if !state.telling.urgent_planned {
                    state.telling.urgent_planned = true;
                    let now = Instant::now();
                    let at = state.telling.last_urgent.map_or(now, |last| now.max(last + URGENT_GAP));
                    self.board.plan(at, Arc::clone(self), urgency);
                }
            }
            Urgency::Routine => {
                if !state.telling.routine_planned {
                    state.telling.routine_planned = true;
                    self.board
                        .plan(Instant::now() + REPORT_DELAY, Arc::clone(self), urgency);
                }
            }
        }
    }
}

fn container(id: ContainerId, targets: &[(Option<String>, WebTarget)], gone: CancellationToken) -> PoolContainer {
    let targets = targets
        .iter()
        .map(|(method, target)| {
            let target = match target {
                WebTarget::Direct(address) => Target::Direct(DirectTarget::new(*address)),
                WebTarget::DataChannel => Target::DataChannel,
            };
            (method.clone(), target)
        })
        .collect();
    PoolContainer { id, targets, gone }
}

/// The fullest container with a free slot, the oldest of equals.
fn pick(entries: &[Entry], avoid: Option<ContainerId>) -> Option<usize> {
    let mut best: Option<usize> = None;
    let mut last_resort: Option<usize> = None;
    for (index, entry) in entries.iter().enumerate() {
        if !entry.accepts_requests || entry.in_flight >= entry.slots {
            continue;
        }
        if Some(entry.container.id) == avoid {
            last_resort = Some(index);
        } else if best.is_none_or(|best| entry.in_flight > entries[best].in_flight) {
            best = Some(index);
        }
    }
    best.or(last_resort)
}

/// One request's right to be in one container.
#[derive(Debug)]
pub(crate) struct SlotLease {
    pool: Arc<FunctionPool>,
    container: Arc<PoolContainer>,
    /// False only for a lease that its granter took back itself.
    is_held: bool,
}

impl SlotLease {
    pub(crate) fn container(&self) -> &Arc<PoolContainer> {
        &self.container
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        if self.is_held {
            self.pool.release(&self.container);
        }
    }
}

/// Withdraws a waiter whose request ended, by its client or its deadline.
struct WaiterGuard {
    pool: Arc<FunctionPool>,
    ticket: u64,
}

impl Drop for WaiterGuard {
    fn drop(&mut self) {
        self.pool.withdraw(self.ticket);
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
