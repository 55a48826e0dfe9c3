//! A container's life, as the platform and people see it.

use ionian_domain::container::ContainerExit;
use ionian_domain::{ContainerId, FunctionId};
use ionian_proto::client as pb;
use pb::generic_result::GenericStatus;
use prost::Message as _;
use tonic::Code;

use crate::support::{Platform, assert_refused, cbor_input, eventually, within};

async fn call(platform: &Platform, function_id: FunctionId) -> String {
    let request = pb::FunctionMapRequest {
        function_id: function_id.to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        pipelined_inputs: vec![cbor_input(0, b"x")],
        ..Default::default()
    };
    platform
        .client()
        .function_map(request)
        .await
        .unwrap()
        .into_inner()
        .function_call_id
}

async fn result(platform: &Platform, call_id: &str) -> pb::GenericResult {
    let request = pb::FunctionGetOutputsRequest {
        function_call_id: call_id.to_owned(),
        timeout: 55.0,
        ..Default::default()
    };
    let page = within(platform.client().function_get_outputs(request))
        .await
        .unwrap()
        .into_inner();
    page.outputs[0].result.clone().unwrap()
}

#[tokio::test]
async fn a_container_is_told_all_that_the_runtime_needs() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await.function("helper").await.class("C").await;
    let dependency = ionian_domain::SecretId::generate().to_string();
    let deploy = deploy.function_with("f", |function| {
        function.object_dependencies = vec![pb::ObjectDependency {
            object_id: dependency.clone(),
        }];
        function.max_concurrent_inputs = 3;
        function.checkpointing_enabled = true;
    });
    let app = deploy.await.publish().await;
    call(&platform, app.function("f")).await;
    let container = platform.container(app.function("f")).await;
    let spec = eventually("the specification", || async {
        let seen = platform.worker.seen.lock();
        seen.specs
            .iter()
            .find(|(id, _)| *id == container.id)
            .map(|(_, spec)| std::sync::Arc::clone(spec))
    })
    .await;
    let env = |name: &str| spec.platform_env[name].as_str();
    assert_eq!(
        (env("MODAL_SERVER_URL"), env("MODAL_IS_REMOTE")),
        ("http://10.0.0.1:9", "1")
    );
    assert_eq!(env("MODAL_TASK_ID"), container.id.to_string());
    assert!(env("MODAL_OVERRIDE_HEADERS").starts_with(&format!("x-ionian-container:{}.", container.id)));
    assert!(!env("MODAL_OVERRIDE_HEADERS").contains(','));
    assert!(
        !format!("{spec:?}").contains(env("MODAL_OVERRIDE_HEADERS")),
        "credentials stay out of logs"
    );

    let arguments = pb::ContainerArguments::decode(spec.arguments.clone()).unwrap();
    assert_eq!(
        (arguments.task_id, arguments.app_id),
        (container.id.to_string(), app.id.to_string())
    );
    let definition = arguments.function_def.unwrap();
    assert_eq!(
        (definition.max_concurrent_inputs, definition.checkpointing_enabled),
        (3, false)
    );
    let layout = arguments.app_layout.unwrap();
    assert_eq!(layout.function_ids.len(), 2);
    assert!(layout.objects.iter().any(|object| object.object_id == dependency));
    assert!(
        layout
            .objects
            .iter()
            .any(|object| object.object_id == layout.class_ids["C"])
    );
    assert!(arguments.input_plane_server_url.is_empty());
}

#[tokio::test]
async fn a_function_that_cannot_be_set_up_fails_its_callers_with_its_own_exception() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let waiting = call(&platform, app.function("f")).await;
    let container = platform.container(app.function("f")).await;
    let failure = pb::GenericResult {
        status: GenericStatus::Failure.into(),
        exception: "ModuleNotFoundError: no module named 'x'".to_owned(),
        data_oneof: Some(pb::generic_result::DataOneof::Data("pickled".into())),
        ..Default::default()
    };
    let request = pb::TaskResultRequest {
        result: Some(failure.clone()),
        ..Default::default()
    };
    container.client.clone().task_result(request).await.unwrap();
    let seen = result(&platform, &waiting).await;
    assert_eq!(
        (seen.exception, seen.data_oneof),
        (failure.exception, failure.data_oneof)
    );
}

#[tokio::test]
async fn an_input_whose_container_died_runs_again_elsewhere() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let waiting = call(&platform, app.function("f")).await;
    let first = platform.container(app.function("f")).await;
    let input = first.next().await;
    platform
        .worker
        .exit(first.id, ContainerExit::Signaled { signal: 9 })
        .await;
    let second = platform.container_but(app.function("f"), &[first.id]).await;
    let again = second.next().await;
    assert_eq!(
        (again.input_id.as_str(), again.retry_count),
        (input.input_id.as_str(), 1)
    );
    second.succeed(&again, b"y").await;
    assert_eq!(result(&platform, &waiting).await.status(), GenericStatus::Success);
}

#[tokio::test]
async fn a_container_is_stopped_by_a_developer_and_stays_known() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    let info = |id: ContainerId| {
        let mut client = platform.client();
        async move {
            client
                .task_get_info(pb::TaskGetInfoRequest {
                    task_id: id.to_string(),
                })
                .await
        }
    };
    let live = info(container.id).await.unwrap().into_inner();
    assert_eq!(live.app_id, app.id.to_string());
    let live = live.info.unwrap();
    assert!(live.enqueued_at > 0.0 && live.finished_at == 0.0);
    let stop = pb::ContainerStopRequest {
        task_id: container.id.to_string(),
        ..Default::default()
    };
    platform.client().container_stop(stop.clone()).await.unwrap();
    eventually("the end of the container", || async {
        (info(container.id).await.unwrap().into_inner().info.unwrap().finished_at > 0.0).then_some(())
    })
    .await;
    // Whoever stops a list of containers meets some that have gone.
    platform.client().container_stop(stop).await.unwrap();
    let unknown = ContainerId::generate();
    assert_refused(info(unknown).await, Code::NotFound, &unknown.to_string());
    let stop = pb::ContainerStopRequest {
        task_id: unknown.to_string(),
        ..Default::default()
    };
    assert_refused(
        platform.client().container_stop(stop).await,
        Code::NotFound,
        &unknown.to_string(),
    );
}

#[tokio::test]
async fn a_redeployment_replaces_containers_only_of_what_changed() {
    let platform = Platform::start().await;
    let deploy = |timeout: u32| {
        let platform = &platform;
        async move {
            let warm = |function: &mut pb::Function| function.warm_pool_size = 1;
            let deploy = platform.deploy("app").await.function_with("same", warm).await;
            let deploy = deploy.function_with("changed", move |function| {
                warm(function);
                function.timeout_secs = timeout;
            });
            deploy.await.publish().await
        }
    };
    let app = deploy(60).await;
    let same = platform.container(app.function("same")).await;
    let old = platform.container(app.function("changed")).await;
    within(async {
        // Ready, so that it drains.
        let polling = old.poll();
        let redeploying = async {
            tokio::time::sleep(crate::support::MOMENT).await;
            deploy(61).await
        };
        let (polled, _) = tokio::join!(polling, redeploying);
        assert!(polled.unwrap()[0].kill_switch);
    })
    .await;
    platform.container_but(app.function("changed"), &[old.id]).await;
    let live = platform.control.snapshot().borrow().clone();
    assert!(
        live.iter()
            .any(|container| container.id == same.id && !container.ending)
    );
}

#[tokio::test]
async fn a_container_that_cannot_be_prepared_says_why_in_its_apps_log() {
    let platform = Platform::start().await;
    let secret = ionian_domain::SecretId::generate().to_string();
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.secret_ids = vec![secret.clone()])
        .await
        .publish()
        .await;
    let waiting = call(&platform, app.function("f")).await;
    let text = eventually("a line in the log", || async {
        let request = pb::AppFetchLogsRequest {
            app_id: app.id.to_string(),
            ..Default::default()
        };
        let batches = platform
            .client()
            .app_fetch_logs(request)
            .await
            .unwrap()
            .into_inner()
            .batches;
        batches.first().map(|batch| batch.items[0].data.clone())
    })
    .await;
    assert!(text.contains(&format!("secret {secret} does not exist")), "{text}");
    let seen = result(&platform, &waiting).await;
    assert!(seen.exception.contains(&secret), "{}", seen.exception);
}

#[tokio::test]
async fn slots_of_a_concurrent_function_are_all_used() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| {
            function.max_concurrent_inputs = 2;
            function.concurrency_limit = 1;
        })
        .await
        .publish()
        .await;
    call(&platform, app.function("f")).await;
    call(&platform, app.function("f")).await;
    let container = platform.container(app.function("f")).await;
    let (one, two) = (container.next().await, container.next().await);
    assert_ne!(one.input_id, two.input_id);
    let request = pb::FunctionGetDynamicConcurrencyRequest {
        max_concurrency: 2,
        ..Default::default()
    };
    let slots = container
        .client
        .clone()
        .function_get_dynamic_concurrency(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(slots.concurrency, 2);
}
