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

#[tokio::test]
async fn slots_are_exact_under_load() {
    let platform = Arc::new(Platform::start().await);
    let gauges = [Gauge::default(), Gauge::default()];
    let apps = [gauges[0].app(Duration::from_millis(5)).await, gauges[1].app(Duration::from_millis(5)).await];
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
    assert_eq!(gauges.iter().map(|gauge| gauge.total.load(Ordering::SeqCst)).sum::<usize>(), 200);
}

#[tokio::test]
async fn a_cold_request_waits_for_its_container() {
    let mut platform = Platform::start().await;
    let app = App::start(|_| async { text("warm") }).await;
    let (answer, ()) = tokio::join!(
        {
            let open = platform.open(crate::support::request("GET", "/"));
            async { open.await.status() }
        },
        async {
            // Nothing to wait for but control's own reaction.
            tokio::task::yield_now().await;
        }
    )
    .to_owned_or_ready(&mut platform, &app)
    .await;
    assert_eq!(answer, 200);
}
