//! Logs of apps: stored, followed, filtered.

use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::{ContainerId, FunctionId, Timestamp};
use ionian_proto::client as pb;
use tonic::Code;

use crate::support::deploy::create_app;
use crate::support::{Deploy, DeployedApp, Platform, assert_refused, within};

fn entry(app: &DeployedApp, container_id: ContainerId, stream: LogStream, text: &str) -> LogEntry {
    LogEntry {
        at: Timestamp::now(),
        app_id: app.id,
        function_id: app.function("f"),
        container_id,
        stream,
        text: text.to_owned(),
    }
}

fn texts(batches: &[pb::TaskLogsBatch]) -> Vec<String> {
    batches
        .iter()
        .flat_map(|batch| &batch.items)
        .map(|item| item.data.clone())
        .collect()
}

async fn fetch(platform: &Platform, request: pb::AppFetchLogsRequest) -> Vec<String> {
    texts(
        &platform
            .client()
            .app_fetch_logs(request)
            .await
            .unwrap()
            .into_inner()
            .batches,
    )
}

async fn said(platform: &Platform) -> (DeployedApp, ContainerId) {
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let (one, two) = (ContainerId::generate(), ContainerId::generate());
    let entries = vec![
        entry(&app, one, LogStream::Stdout, "a\n"),
        entry(&app, one, LogStream::Stderr, "b\n"),
        entry(&app, two, LogStream::Stdout, "c\n"),
    ];
    platform.control.logs().append(entries).await;
    (app, one)
}

#[tokio::test]
async fn stored_logs_are_filtered_and_limited() {
    let platform = Platform::start().await;
    let (app, one) = said(&platform).await;
    let all = || pb::AppFetchLogsRequest {
        app_id: app.id.to_string(),
        ..Default::default()
    };
    assert_eq!(fetch(&platform, all()).await, ["a\n", "b\n", "c\n"]);
    assert_eq!(
        fetch(&platform, pb::AppFetchLogsRequest { limit: 1, ..all() }).await,
        ["c\n"]
    );
    assert_eq!(
        fetch(&platform, pb::AppFetchLogsRequest { source: 2, ..all() }).await,
        ["b\n"]
    );
    let container = pb::AppFetchLogsRequest {
        task_id: one.to_string(),
        ..all()
    };
    assert_eq!(fetch(&platform, container).await, ["a\n", "b\n"]);
    let function = pb::AppFetchLogsRequest {
        function_id: app.function("f").to_string(),
        ..all()
    };
    assert_eq!(fetch(&platform, function).await.len(), 3);
    let searched = pb::AppFetchLogsRequest {
        search_text: "c".to_owned(),
        ..all()
    };
    assert_eq!(fetch(&platform, searched).await, ["c\n"]);
    let future = prost_types::Timestamp {
        seconds: Timestamp::now().micros() / 1_000_000 + 60,
        nanos: 0,
    };
    assert!(
        fetch(
            &platform,
            pb::AppFetchLogsRequest {
                since: Some(future),
                ..all()
            }
        )
        .await
        .is_empty()
    );
    let call = pb::AppFetchLogsRequest {
        function_call_id: "fc-x".to_owned(),
        ..all()
    };
    assert_refused(
        platform.client().app_fetch_logs(call).await,
        Code::Unimplemented,
        "not attributed to single calls",
    );
    let unknown = pb::AppFetchLogsRequest {
        function_id: FunctionId::generate().to_string(),
        ..all()
    };
    assert_refused(
        platform.client().app_fetch_logs(unknown).await,
        Code::NotFound,
        "does not exist",
    );
}

#[tokio::test]
async fn entries_are_counted_before_a_range_is_fetched() {
    let platform = Platform::start().await;
    let (app, _) = said(&platform).await;
    let request = pb::AppCountLogsRequest {
        app_id: app.id.to_string(),
        bucket_secs: 86_400,
        ..Default::default()
    };
    let buckets = platform
        .client()
        .app_count_logs(request)
        .await
        .unwrap()
        .into_inner()
        .buckets;
    let (stdout, stderr): (u64, u64) = buckets.iter().fold((0, 0), |sum, bucket| {
        (sum.0 + bucket.stdout_logs, sum.1 + bucket.stderr_logs)
    });
    assert_eq!((stdout, stderr), (2, 1));
    assert_eq!(buckets[0].bucket_start_at.unwrap().seconds % 86_400, 0);
}

#[tokio::test]
async fn a_run_follows_its_app_to_its_end() {
    let platform = Platform::start().await;
    let app_id = create_app(&mut platform.client(), "run.py", pb::AppState::Ephemeral).await;
    let request = pb::AppGetLogsRequest {
        app_id: app_id.clone(),
        timeout: 55.0,
        ..Default::default()
    };
    let mut stream = platform.client().app_get_logs(request).await.unwrap().into_inner();
    let deploy = Deploy::into_app(&platform, "", app_id.clone());
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish_as(pb::AppState::Ephemeral)
        .await;
    let container = platform.container(app.function("f")).await;
    let mut states = Vec::new();
    while states.is_empty() {
        let batch = within(stream.message()).await.unwrap().unwrap();
        assert_eq!(
            (batch.task_id.as_str(), batch.entry_id.as_str()),
            (container.id.to_string().as_str(), "")
        );
        states.extend(batch.items.iter().map(pb::TaskLogs::task_state));
    }
    assert_eq!(states, [pb::TaskState::LoadingImage]);
    platform
        .control
        .logs()
        .append(vec![entry(&app, container.id, LogStream::Stdout, "hello\n")])
        .await;
    let batch = within(stream.message()).await.unwrap().unwrap();
    assert_eq!(
        (batch.items[0].data.as_str(), batch.entry_id.as_str()),
        ("hello\n", "1-0")
    );
    let request = pb::AppClientDisconnectRequest {
        app_id,
        reason: pb::AppDisconnectReason::EntrypointCompleted.into(),
        ..Default::default()
    };
    platform.client().app_client_disconnect(request).await.unwrap();
    loop {
        let batch = within(stream.message()).await.unwrap().expect("the end is announced");
        if batch.app_done {
            break;
        }
    }
    assert!(within(stream.message()).await.unwrap().is_none());
    let live = platform.control.snapshot().borrow().clone();
    assert!(live.is_empty(), "the end is announced when the containers have gone");
}

#[tokio::test]
async fn a_follower_that_reconnects_misses_nothing() {
    let platform = Platform::start().await;
    let (app, _) = said(&platform).await;
    let request = pb::AppGetLogsRequest {
        app_id: app.id.to_string(),
        timeout: 0.1,
        last_entry_id: "1-0".to_owned(),
        ..Default::default()
    };
    let mut stream = platform.client().app_get_logs(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while let Some(batch) = within(stream.message()).await.unwrap() {
        assert!(!batch.app_done, "a deployed app does not end");
        seen.push(batch);
    }
    assert_eq!(texts(&seen), ["b\n", "c\n"]);
}

#[tokio::test]
async fn following_a_container_ends_with_it() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    platform
        .control
        .logs()
        .append(vec![entry(&app, container.id, LogStream::Stdout, "mine\n")])
        .await;
    // By the container alone, as `modal container logs --follow` asks.
    let request = pb::AppGetLogsRequest {
        task_id: container.id.to_string(),
        timeout: 55.0,
        ..Default::default()
    };
    let mut stream = platform.client().app_get_logs(request).await.unwrap().into_inner();
    assert_eq!(within(stream.message()).await.unwrap().unwrap().items[0].data, "mine\n");
    let stop = pb::ContainerStopRequest {
        task_id: container.id.to_string(),
        ..Default::default()
    };
    platform.client().container_stop(stop).await.unwrap();
    loop {
        let batch = within(stream.message()).await.unwrap().expect("the end is announced");
        if batch.app_done {
            break;
        }
    }
}
