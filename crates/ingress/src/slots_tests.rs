//! Slots, waiting and demand, on paused time.

use std::sync::Arc;
use std::time::Duration;

use ionian_control::web::{DemandReport, DemandSender};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::demand;

const LIMITS: WaitLimits = WaitLimits {
    max_waiting: 100,
    startup_timeout: Duration::from_secs(10),
    request_timeout: Duration::from_mins(1),
};

struct Fixture {
    pool: Arc<FunctionPool>,
    reports: mpsc::Receiver<DemandReport>,
    _shutdown: tokio_util::sync::DropGuard,
}

fn fixture() -> Fixture {
    let board = Arc::new(DemandBoard::default());
    let pool = Arc::new(FunctionPool::new(FunctionId::generate(), Arc::clone(&board)));
    let (sender, reports) = mpsc::channel(100);
    let shutdown = CancellationToken::new();
    tokio::spawn(demand::run(board, DemandSender(sender), shutdown.clone()));
    Fixture {
        pool,
        reports,
        _shutdown: shutdown.drop_guard(),
    }
}

impl Fixture {
    fn ready(&self, slots: u32) -> ContainerId {
        let id = ContainerId::generate();
        self.pool.ready(id, slots, &[(None, WebTarget::DataChannel)]);
        id
    }

    /// A request that waits; it is in the queue when this returns.
    async fn waiting(&self) -> JoinHandle<Result<SlotLease, AcquireError>> {
        let before = self.queued();
        let pool = Arc::clone(&self.pool);
        let task = tokio::spawn(async move { pool.acquire(LIMITS, None).await });
        while self.queued() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    fn queued(&self) -> usize {
        self.pool.state.lock().waiters.len()
    }

    fn in_flight(&self) -> Vec<u32> {
        self.pool
            .state
            .lock()
            .entries
            .iter()
            .map(|entry| entry.in_flight)
            .collect()
    }

    async fn now(&self) -> SlotLease {
        self.pool.acquire(LIMITS, None).await.unwrap()
    }

    fn reports_so_far(&mut self) -> Vec<DemandReport> {
        std::iter::from_fn(|| self.reports.try_recv().ok()).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn the_fullest_container_is_packed_and_the_oldest_of_equals_first() {
    let fixture = fixture();
    let first = fixture.ready(2);
    let second = fixture.ready(3);
    let a = fixture.now().await;
    assert_eq!(a.container().id, first, "the oldest of two empty ones");
    let b = fixture.now().await;
    assert_eq!(b.container().id, first, "the fullest with a free slot");
    let c = fixture.now().await;
    assert_eq!(c.container().id, second);
    drop(a);
    // One request each: the oldest again.
    assert_eq!(fixture.now().await.container().id, first);
}

#[tokio::test(start_paused = true)]
async fn slots_are_exact() {
    let fixture = fixture();
    fixture.ready(2);
    let held = [fixture.now().await, fixture.now().await];
    let third = fixture.waiting().await;
    assert_eq!(fixture.in_flight(), [2]);
    drop(held);
    let lease = third.await.unwrap().unwrap();
    assert_eq!(fixture.in_flight(), [1]);
    drop(lease);
    assert_eq!(fixture.in_flight(), [0]);
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_order() {
    let fixture = fixture();
    let mut waiters = Vec::new();
    for _ in 0..3 {
        waiters.push(fixture.waiting().await);
    }
    fixture.ready(1);
    for waiter in waiters {
        // Each holds the only slot until it is dropped here, so the next one cannot be before it.
        let lease = waiter.await.unwrap().unwrap();
        assert_eq!(fixture.in_flight(), [1]);
        drop(lease);
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_is_withdrawn() {
    let fixture = fixture();
    let first = fixture.waiting().await;
    let second = fixture.waiting().await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert_eq!(fixture.queued(), 1);
    fixture.ready(1);
    second.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_slot_granted_to_a_waiter_who_left_at_that_moment_is_free_again() {
    let fixture = fixture();
    let waiter = fixture.waiting().await;
    // Granted, but the waiter's task has not run since; then it is cancelled with the lease in its channel.
    fixture.ready(1);
    assert_eq!(fixture.in_flight(), [1]);
    waiter.abort();
    assert!(waiter.await.is_err());
    assert_eq!(fixture.in_flight(), [0]);
    fixture.now().await;
}

#[tokio::test(start_paused = true)]
async fn a_cold_start_has_its_deadline() {
    let fixture = fixture();
    let began = Instant::now();
    let error = fixture.pool.acquire(LIMITS, None).await.unwrap_err();
    assert!(matches!(error, AcquireError::NoContainer(_)), "{error}");
    assert_eq!(began.elapsed(), LIMITS.startup_timeout);
    assert_eq!(fixture.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn behind_a_busy_app_a_request_waits_longer() {
    let fixture = fixture();
    fixture.ready(1);
    let _held = fixture.now().await;
    let began = Instant::now();
    let error = fixture.pool.acquire(LIMITS, None).await.unwrap_err();
    assert!(matches!(error, AcquireError::AllBusy(_)), "{error}");
    assert_eq!(began.elapsed(), LIMITS.startup_timeout + LIMITS.request_timeout);
}

#[tokio::test(start_paused = true)]
async fn a_failed_start_fails_all_who_wait_now() {
    let fixture = fixture();
    let waiters = [fixture.waiting().await, fixture.waiting().await];
    fixture.pool.start_failed("no module named 'x'");
    for waiter in waiters {
        let error = waiter.await.unwrap().unwrap_err();
        assert!(
            matches!(&error, AcquireError::StartFailed(message) if message == "no module named 'x'"),
            "{error}"
        );
    }
    // Later ones wait again.
    let later = fixture.waiting().await;
    fixture.ready(1);
    later.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_waiting_room_is_bounded() {
    let fixture = fixture();
    let limits = WaitLimits {
        max_waiting: 1,
        ..LIMITS
    };
    let _waiter = fixture.waiting().await;
    assert!(matches!(
        fixture.pool.acquire(limits, None).await,
        Err(AcquireError::RoomFull)
    ));
}

#[tokio::test(start_paused = true)]
async fn a_draining_container_gets_nothing_new() {
    let fixture = fixture();
    let old = fixture.ready(2);
    let held = fixture.now().await;
    fixture.pool.draining(old);
    let waiter = fixture.waiting().await;
    drop(held);
    assert_eq!(fixture.queued(), 1, "its freed slot is not given away");
    let new = fixture.ready(1);
    assert_eq!(waiter.await.unwrap().unwrap().container().id, new);
}

#[tokio::test(start_paused = true)]
async fn a_container_to_avoid_is_the_last_resort() {
    let fixture = fixture();
    let first = fixture.ready(2);
    let second = fixture.ready(1);
    assert_eq!(
        fixture.pool.acquire(LIMITS, Some(first)).await.unwrap().container().id,
        second
    );
    let _held = fixture.pool.acquire(LIMITS, Some(first)).await.unwrap();
    assert_eq!(
        fixture.pool.acquire(LIMITS, Some(first)).await.unwrap().container().id,
        first
    );
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_gone_tells_its_requests() {
    let fixture = fixture();
    let id = fixture.ready(1);
    let lease = fixture.now().await;
    let waiter = fixture.waiting().await;
    fixture.pool.gone(id);
    assert!(lease.container().gone.is_cancelled());
    drop(lease);
    assert_eq!(fixture.queued(), 1, "a lease of a gone container frees nothing");
    fixture.ready(1);
    waiter.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_container_told_ready_twice_keeps_its_requests() {
    let fixture = fixture();
    let id = fixture.ready(1);
    let held = fixture.now().await;
    fixture
        .pool
        .ready(id, 2, &[(Some("m".to_owned()), WebTarget::DataChannel)]);
    assert_eq!(fixture.in_flight(), [1]);
    let second = fixture.now().await;
    assert!(second.container().target(Some("m")).is_some());
    drop((held, second));
    assert_eq!(fixture.in_flight(), [0]);
}

#[tokio::test(start_paused = true)]
async fn retired_pools_refuse_and_used_ones_do_not_retire() {
    let fixture = fixture();
    let id = fixture.ready(1);
    assert!(!fixture.pool.retire());
    fixture.pool.gone(id);
    assert!(fixture.pool.retire());
    assert!(matches!(
        fixture.pool.acquire(LIMITS, None).await,
        Err(AcquireError::Retired)
    ));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_starts_to_wait_is_told_at_once() {
    let mut fixture = fixture();
    let began = Instant::now();
    let _waiter = fixture.waiting().await;
    let report = fixture.reports.recv().await.unwrap();
    assert_eq!((report.queued, began.elapsed()), (1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_waiters_is_told_in_few_reports() {
    let mut fixture = fixture();
    let mut waiters = Vec::new();
    for _ in 0..50 {
        waiters.push(fixture.waiting().await);
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let reports = fixture.reports_so_far();
    assert!(reports.len() <= 3, "{} reports", reports.len());
    assert_eq!(reports.last().unwrap().queued, 50);
}

#[tokio::test(start_paused = true)]
async fn a_busy_function_reports_a_few_times_a_second_and_after_its_last_request() {
    let mut fixture = fixture();
    fixture.ready(1);
    for _ in 0..1_000 {
        drop(fixture.now().await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let during = fixture.reports_so_far().len();
    assert!((3..=5).contains(&during), "{during} reports in a second");
    let lease = fixture.now().await;
    drop(lease);
    let before_end = Timestamp::now();
    tokio::time::sleep(demand::REPORT_DELAY).await;
    let last = fixture
        .reports_so_far()
        .pop()
        .expect("a report follows the last activity");
    assert_eq!(last.containers[0].in_flight, 0);
    assert!(last.containers[0].last_active <= before_end);
    // And then silence.
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert!(fixture.reports_so_far().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_emptied_draining_container_is_told_at_once() {
    let mut fixture = fixture();
    let id = fixture.ready(1);
    let lease = fixture.now().await;
    fixture.pool.draining(id);
    tokio::time::sleep(Duration::from_secs(1)).await;
    fixture.reports_so_far();
    let began = Instant::now();
    drop(lease);
    let report = fixture.reports.recv().await.unwrap();
    assert_eq!((report.containers[0].in_flight, began.elapsed()), (0, Duration::ZERO));
    // One that was empty already, too.
    let idle = fixture.ready(1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    fixture.reports_so_far();
    let began = Instant::now();
    fixture.pool.draining(idle);
    assert_eq!(fixture.reports.recv().await.unwrap().containers.len(), 2);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_failed_start_tells_that_nobody_waits() {
    let mut fixture = fixture();
    let waiter = fixture.waiting().await;
    assert_eq!(fixture.reports.recv().await.unwrap().queued, 1);
    fixture.pool.start_failed("broken");
    let began = Instant::now();
    assert_eq!(fixture.reports.recv().await.unwrap().queued, 0);
    assert!(began.elapsed() <= URGENT_GAP);
    assert!(waiter.await.unwrap().is_err());
}
