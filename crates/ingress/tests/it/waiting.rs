//! Slots and the waiting room, seen by clients and by control.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ionian_ingress::{IngressConfig, Limits};

use crate::support::{App, Platform, text, within};

/// Counts how many requests are in an app at once.
#[derive(Clone, Default)]
struct Gauge {
    now: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    total: Arc<AtomicUsize>,
}

impl Gauge {
    async fn app(&self, work: Duration) -> App {
        let gauge = self.clone();
        App::start(move |_| {
            let gauge = gauge.clone();
            async move {
                let now = gauge.now.fetch_add(1, Ordering::SeqCst) + 1;
                gauge.most.fetch_max(now, Ordering::SeqCst);
                gauge.total.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(work).await;
                gauge.now.fetch_sub(1, Ordering::SeqCst);
                text("done")
            }
        })
        .await
    }

    fn most(&self) -> usize {
        self.most.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_are_exact_under_load() {
    let platform = Arc::new(Platform::start().await);
    let gauges = [Gauge::default(), Gauge::default()];
    let apps = [
        gauges[0].app(Duration::from_millis(5)).await,
        gauges[1].app(Duration::from_millis(5)).await,
    ];
    for app in &apps {
        platform.ready(3, app.target()).await;
    }
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let platform = Arc::clone(&platform);
        requests.spawn(async move { platform.get("/").await.status() });
    }
    while let Some(status) = within(requests.join_next()).await {
        assert_eq!(status.unwrap(), 200);
    }
    assert_eq!((gauges[0].most(), gauges[1].most()), (3, 3));
    assert_eq!(
        gauges
            .iter()
            .map(|gauge| gauge.total.load(Ordering::SeqCst))
            .sum::<usize>(),
        200
    );
}

#[tokio::test]
async fn a_cold_request_waits_for_its_container() {
    let platform = Platform::start().await;
    let app = App::start(|_| async { text("warm") }).await;
    let (answer, ()) = tokio::join!(platform.get("/"), async {
        platform
            .demand_where(|report| report.queued == 1 && report.containers.is_empty())
            .await;
        platform.ready(1, app.target()).await;
    });
    assert_eq!(answer.text(), "warm");
    let after = platform
        .demand_where(|report| report.queued == 0 && report.containers.len() == 1)
        .await;
    assert!(after.containers[0].in_flight <= 1);
}

#[tokio::test]
async fn a_cold_request_has_a_deadline() {
    let platform = Platform::start_with(IngressConfig::default(), |route| {
        route.startup_timeout = Duration::from_millis(100);
    })
    .await;
    let answer = platform.get("/").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (504, "no_container"));
    platform.demand_where(|report| report.queued == 0).await;
}

#[tokio::test]
async fn an_app_that_fails_to_start_answers_at_once() {
    let platform = Platform::start().await;
    let (answers, ()) = tokio::join!(
        futures_util::future::join_all((0..5).map(|_| platform.get("/"))),
        async {
            platform.demand_where(|report| report.queued == 5).await;
            platform
                .start_failed("ModuleNotFoundError: No module named 'fastapi'")
                .await;
        }
    );
    for answer in answers {
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (500, "app_failed_to_start")
        );
        assert!(answer.text().contains("No module named 'fastapi'"), "{}", answer.text());
    }
}

#[tokio::test]
async fn a_full_waiting_room_says_when_to_come_back() {
    let limits = Limits {
        max_waiting_per_function: 2,
        ..Limits::default()
    };
    let platform = Platform::start_with(
        IngressConfig {
            limits,
            ..IngressConfig::default()
        },
        |_| {},
    )
    .await;
    let app = App::start(|_| async { text("done") }).await;
    let (waited, ()) = tokio::join!(
        futures_util::future::join_all((0..2).map(|_| platform.get("/"))),
        async {
            platform.demand_where(|report| report.queued == 2).await;
            let refused = platform.get("/").await;
            assert_eq!((refused.status(), refused.error_code().as_str()), (503, "overloaded"));
            assert!(refused.header("retry-after").is_some());
            platform.ready(1, app.target()).await;
        }
    );
    assert!(waited.iter().all(|answer| answer.status() == 200));
}

#[tokio::test]
async fn a_client_who_leaves_the_waiting_room_is_withdrawn() {
    let platform = Arc::new(Platform::start().await);
    let waiting = {
        let platform = Arc::clone(&platform);
        tokio::spawn(async move { platform.raw_get().await })
    };
    platform.demand_where(|report| report.queued == 1).await;
    waiting.abort();
    platform.demand_where(|report| report.queued == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replacing_containers_fails_no_request() {
    let platform = Arc::new(Platform::start().await);
    let first = App::start(|_| async { text("old") }).await;
    let mut current = platform.ready(4, first.target()).await;
    let mut apps = vec![first];
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (platform, stop) = (Arc::clone(&platform), Arc::clone(&stop));
        clients.spawn(async move {
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                let answer = platform.get("/").await;
                assert_eq!(answer.status(), 200, "{}", answer.text());
                answered += 1;
            }
            answered
        });
    }
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(30)).await;
        let app = App::start(|_| async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            text("new")
        })
        .await;
        let next = platform.ready(4, app.target()).await;
        platform.draining(current).await;
        // What control does: it stops the old container once the report says that it is empty.
        let old = current;
        platform
            .demand_where(|report| {
                report
                    .containers
                    .iter()
                    .any(|c| c.container_id == old && c.in_flight == 0)
            })
            .await;
        apps.remove(0).kill().await;
        platform.gone(old).await;
        apps.push(app);
        current = next;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(answered) = within(clients.join_next()).await {
        assert!(answered.unwrap() > 0);
    }
}
