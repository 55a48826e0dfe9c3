//! Apps: deployed, run, listed, stopped.

use std::time::Duration;

use ionian_domain::AppId;
use ionian_proto::client as pb;
use pb::AppState::{Deployed, Detached, Ephemeral, Initializing, Stopped};
use tonic::Code;

use crate::support::deploy::create_app;
use crate::support::{Deploy, Platform, assert_refused, cbor_input, eventually, tried};

async fn state(platform: &Platform, app_id: &str) -> pb::AppState {
    let request = pb::AppGetLifecycleRequest {
        app_id: app_id.to_owned(),
    };
    let lifecycle = platform
        .client()
        .app_get_lifecycle(request)
        .await
        .unwrap()
        .into_inner()
        .lifecycle
        .unwrap();
    lifecycle.app_state()
}

async fn disconnect(platform: &Platform, app_id: &str, reason: pb::AppDisconnectReason) {
    let request = pb::AppClientDisconnectRequest {
        app_id: app_id.to_owned(),
        reason: reason.into(),
        ..Default::default()
    };
    platform.client().app_client_disconnect(request).await.unwrap();
}

async fn by_name(platform: &Platform, name: &str) -> pb::AppGetByDeploymentNameResponse {
    let request = pb::AppGetByDeploymentNameRequest {
        name: name.to_owned(),
        ..Default::default()
    };
    platform
        .client()
        .app_get_by_deployment_name(request)
        .await
        .unwrap()
        .into_inner()
}

#[tokio::test]
async fn a_deployed_app_is_found_by_name_and_keeps_its_ids() {
    let platform = Platform::start().await;
    assert_eq!(by_name(&platform, "app").await.app_id, "");
    let first = platform
        .deploy("app")
        .await
        .function("f")
        .await
        .class("C")
        .await
        .publish()
        .await;
    assert!(first.published.deployed_at > 0.0);
    let found = by_name(&platform, "app").await;
    assert_eq!(
        (found.app_id.as_str(), found.environment_name.as_str()),
        (first.id.to_string().as_str(), "main")
    );
    assert_eq!(found.lifecycle.unwrap().version, 1);

    let request = pb::AppGetLayoutRequest {
        app_id: first.id.to_string(),
    };
    let layout = platform
        .client()
        .app_get_layout(request)
        .await
        .unwrap()
        .into_inner()
        .app_layout
        .unwrap();
    assert_eq!(layout.function_ids["f"], first.function("f").to_string());
    assert!(layout.class_ids.contains_key("C"));
    assert!(
        layout
            .objects
            .iter()
            .any(|object| object.object_id == layout.class_ids["C"])
    );

    let second = platform.deploy("app").await.function("f").await.publish().await;
    assert_eq!(second.id, first.id);
    assert_eq!(second.function("f"), first.function("f"));
}

#[tokio::test]
async fn the_history_of_an_app_lists_its_deployments() {
    let platform = Platform::start().await;
    let mut deploy = platform.deploy("app").await;
    deploy.create("f", |_| ()).await;
    let mut request = deploy.publish_request(Deployed);
    request.deployment_tag = "first".to_owned();
    platform.client().app_publish(request).await.unwrap();
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let request = pb::AppDeploymentHistoryRequest {
        app_id: app.id.to_string(),
    };
    let history = platform
        .client()
        .app_deployment_history(request)
        .await
        .unwrap()
        .into_inner();
    let seen: Vec<(u32, &str, &str, &str)> = history
        .app_deployment_histories
        .iter()
        .map(|item| {
            (
                item.version,
                item.tag.as_str(),
                item.deployed_by.as_str(),
                item.client_version.as_str(),
            )
        })
        .collect();
    assert_eq!(seen, [(2, "", "tester", "1.6.4"), (1, "first", "tester", "1.6.4")]);
    assert_eq!(history.production_app_version, 2);
}

#[tokio::test]
async fn a_request_for_a_new_app_that_is_repeated_makes_one_app() {
    let platform = Platform::start().await;
    let request = || pb::AppCreateRequest {
        description: "run".to_owned(),
        app_state: Ephemeral.into(),
        ..Default::default()
    };
    let first = platform
        .client()
        .app_create(tried(request(), "key", 0))
        .await
        .unwrap()
        .into_inner()
        .app_id;
    let again = platform
        .client()
        .app_create(tried(request(), "key", 1))
        .await
        .unwrap()
        .into_inner()
        .app_id;
    let other = platform
        .client()
        .app_create(tried(request(), "other", 0))
        .await
        .unwrap()
        .into_inner()
        .app_id;
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[tokio::test]
async fn a_publish_that_is_repeated_makes_one_version() {
    let platform = Platform::start().await;
    let mut deploy = platform.deploy("app").await;
    deploy.create("f", |_| ()).await;
    let request = deploy.publish_request(Deployed);
    platform
        .client()
        .app_publish(tried(request.clone(), "key", 0))
        .await
        .unwrap();
    platform
        .client()
        .app_publish(tried(request.clone(), "key", 1))
        .await
        .unwrap();
    assert_eq!(by_name(&platform, "app").await.lifecycle.unwrap().version, 1);
    platform.client().app_publish(tried(request, "other", 0)).await.unwrap();
    assert_eq!(by_name(&platform, "app").await.lifecycle.unwrap().version, 2);
}

#[tokio::test]
async fn two_first_deployments_at_once_do_not_make_two_apps_of_one_name() {
    let platform = Platform::start().await;
    let one = platform.deploy("app").await.function("f").await;
    let two = platform.deploy("app").await.function("f").await;
    assert_ne!(one.app_id, two.app_id);
    one.publish().await;
    let answer = platform.client().app_publish(two.publish_request(Deployed)).await;
    assert_refused(answer, Code::FailedPrecondition, "an app named 'app'");
}

#[tokio::test]
async fn stopping_an_app_ends_its_containers_and_frees_its_name() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    platform
        .client()
        .app_stop(pb::AppStopRequest {
            app_id: app.id.to_string(),
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(state(&platform, &app.id.to_string()).await, Stopped);
    eventually("the container to be stopped", || async {
        platform
            .worker
            .seen
            .lock()
            .stopped
            .contains(&container.id)
            .then_some(())
    })
    .await;
    let found = by_name(&platform, "app").await;
    assert_eq!(
        (found.app_id.as_str(), found.previous_app_id.as_str()),
        ("", app.id.to_string().as_str())
    );
    let input = pb::FunctionMapRequest {
        function_id: app.function("f").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        pipelined_inputs: vec![cbor_input(0, b"")],
        ..Default::default()
    };
    assert_refused(
        platform.client().function_map(input).await,
        Code::FailedPrecondition,
        "its app was stopped",
    );
    let late = Deploy::into_app(&platform, "app", app.id.to_string());
    let answer = platform.client().app_publish(late.publish_request(Deployed)).await;
    assert_refused(answer, Code::FailedPrecondition, "was stopped; deploy it again");
    let next = platform.deploy("app").await.function("f").await.publish().await;
    assert_ne!(next.id, app.id);
}

#[tokio::test]
async fn apps_are_listed_with_their_containers() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    let listed = platform
        .client()
        .app_list(pb::AppListRequest::default())
        .await
        .unwrap()
        .into_inner()
        .apps;
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].name.as_str(), listed[0].n_running_tasks, listed[0].state()),
        ("app", 1, Deployed)
    );
    let request = pb::TaskListRequest {
        app_id: app.id.to_string(),
        ..Default::default()
    };
    let tasks = platform.client().task_list(request).await.unwrap().into_inner().tasks;
    assert_eq!(tasks[0].task_id, container.id.to_string());
    assert!(tasks[0].enqueued_at > 0.0);
    let other = pb::TaskListRequest {
        app_id: AppId::generate().to_string(),
        ..Default::default()
    };
    assert!(
        platform
            .client()
            .task_list(other)
            .await
            .unwrap()
            .into_inner()
            .tasks
            .is_empty()
    );
}

#[tokio::test]
async fn a_hot_reload_keeps_ids_and_tells_old_containers_from_new_ones() {
    let platform = Platform::start().await;
    let app_id = create_app(&mut platform.client(), "serve.py", Ephemeral).await;
    let warm = |function: &mut pb::Function| function.warm_pool_size = 1;
    let deploy = Deploy::into_app(&platform, "", app_id.clone());
    let first = deploy.function_with("f", warm).await.publish_as(Ephemeral).await;
    let old = platform.container(first.function("f")).await;
    let mut deploy = Deploy::into_app(&platform, "", app_id.clone());
    deploy
        .create("f", |function| {
            warm(function);
            function.timeout_secs = 61;
        })
        .await;
    let mut request = deploy.publish_request(Ephemeral);
    request.app_state = pb::AppState::Unspecified.into();
    assert_eq!(request.function_ids["f"], first.function("f").to_string());
    let published = platform.client().app_publish(request).await.unwrap().into_inner();
    assert_eq!(state(&platform, &app_id).await, Ephemeral);
    let new = platform.container_but(first.function("f"), &[old.id]).await;
    let request = pb::TaskListRequest {
        app_id,
        ..Default::default()
    };
    let tasks = platform.client().task_list(request).await.unwrap().into_inner().tasks;
    let new = tasks.iter().find(|task| task.task_id == new.id.to_string()).unwrap();
    assert!(
        new.enqueued_at >= published.deployed_at,
        "the client would stop it as an old one"
    );
    assert!(first.published.deployed_at < published.deployed_at);
}

#[tokio::test]
async fn an_ephemeral_app_ends_with_its_session() {
    let platform = Platform::start().await;
    let app_id = create_app(&mut platform.client(), "run.py", Ephemeral).await;
    let app = Deploy::into_app(&platform, "", app_id.clone())
        .function("f")
        .await
        .publish_as(Ephemeral)
        .await;
    assert_eq!(state(&platform, &app_id).await, Ephemeral);
    disconnect(&platform, &app_id, pb::AppDisconnectReason::EntrypointCompleted).await;
    assert_eq!(state(&platform, &app_id).await, Stopped);
    // The session's last heartbeat may cross its end.
    let heartbeat = pb::AppHeartbeatRequest {
        app_id: app.id.to_string(),
    };
    platform.client().app_heartbeat(heartbeat).await.unwrap();
}

#[tokio::test]
async fn a_failed_deployment_ends_only_an_app_that_never_was_published() {
    let platform = Platform::start().await;
    let new = create_app(&mut platform.client(), "app", Initializing).await;
    disconnect(&platform, &new, pb::AppDisconnectReason::DeploymentException).await;
    assert_eq!(state(&platform, &new).await, Stopped);
    let app = platform
        .deploy("app")
        .await
        .function("f")
        .await
        .publish()
        .await
        .id
        .to_string();
    disconnect(&platform, &app, pb::AppDisconnectReason::DeploymentException).await;
    assert_eq!(state(&platform, &app).await, Deployed);
}

#[tokio::test]
async fn a_detached_app_ends_when_its_session_has_and_nothing_is_left_to_do() {
    let platform = Platform::start().await;
    let idle = create_app(&mut platform.client(), "run.py", Detached).await;
    let interrupted = create_app(&mut platform.client(), "run.py", Detached).await;
    let busy = create_app(&mut platform.client(), "run.py", Detached).await;
    let app = Deploy::into_app(&platform, "", busy.clone())
        .function("f")
        .await
        .publish_as(Detached)
        .await;
    let input = pb::FunctionMapRequest {
        function_id: app.function("f").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        pipelined_inputs: vec![cbor_input(0, b"")],
        ..Default::default()
    };
    platform.client().function_map(input).await.unwrap();
    disconnect(&platform, &idle, pb::AppDisconnectReason::EntrypointCompleted).await;
    disconnect(&platform, &interrupted, pb::AppDisconnectReason::KeyboardInterrupt).await;
    disconnect(&platform, &busy, pb::AppDisconnectReason::EntrypointCompleted).await;
    assert_eq!(state(&platform, &idle).await, Stopped);
    assert_eq!(state(&platform, &interrupted).await, Detached);
    assert_eq!(state(&platform, &busy).await, Detached);
}

#[tokio::test]
async fn an_app_whose_client_fell_silent_is_stopped() {
    // The sweep looks every ten seconds; here it is asked to look at once.
    let platform = Platform::start_with(|config| config.client_heartbeat_timeout = Duration::from_secs(1)).await;
    let silent = create_app(&mut platform.client(), "run.py", Ephemeral).await;
    let detached = create_app(&mut platform.client(), "run.py", Detached).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let heard = create_app(&mut platform.client(), "run.py", Ephemeral).await;
    platform.control.sweep().await;
    assert_eq!(state(&platform, &silent).await, Stopped);
    assert_eq!(state(&platform, &heard).await, Ephemeral);
    assert_eq!(state(&platform, &detached).await, Detached);
}

#[tokio::test]
async fn an_app_is_looked_up_or_created_by_name() {
    let platform = Platform::start().await;
    let request = |creates| pb::AppGetOrCreateRequest {
        app_name: "lookup".to_owned(),
        object_creation_type: if creates {
            pb::ObjectCreationType::CreateIfMissing as i32
        } else {
            0
        },
        ..Default::default()
    };
    assert_refused(
        platform.client().app_get_or_create(request(false)).await,
        Code::NotFound,
        "App 'lookup' not found",
    );
    let (mut one, mut two) = (platform.client(), platform.client());
    let (one, two) = tokio::join!(
        one.app_get_or_create(request(true)),
        two.app_get_or_create(request(true))
    );
    let created = one.unwrap().into_inner().app_id;
    assert_eq!(created, two.unwrap().into_inner().app_id);
    let found = platform
        .client()
        .app_get_or_create(request(false))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(found.app_id, created);
    let invalid = pb::AppGetOrCreateRequest {
        app_name: "a b".to_owned(),
        ..request(true)
    };
    assert_refused(
        platform.client().app_get_or_create(invalid).await,
        Code::InvalidArgument,
        "'a b' is not a valid",
    );
}

#[tokio::test]
async fn an_unknown_app_is_named() {
    let platform = Platform::start().await;
    let id = AppId::generate().to_string();
    let answer = platform
        .client()
        .app_get_lifecycle(pb::AppGetLifecycleRequest { app_id: id.clone() })
        .await;
    assert_refused(answer, Code::NotFound, &id);
    let answer = platform
        .client()
        .app_get_lifecycle(pb::AppGetLifecycleRequest {
            app_id: "app".to_owned(),
        })
        .await;
    assert_refused(answer, Code::InvalidArgument, "'app' is not an app id");
}
