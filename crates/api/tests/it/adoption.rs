//! Containers that outlive the server, and requests that are repeated across its restart.

use ionian_domain::web::{AnnouncedEndpoint, PoolEvent, WebTarget};
use ionian_domain::{ContainerId, FunctionId};
use ionian_proto::client as pb;
use pb::generic_result::GenericStatus;
use tonic::Code;

use crate::restart::{result, spawn};
use crate::support::{
    Container, Platform, Survivors, assert_refused, cbor_input, client_of, eventually, tried, within,
};

/// A running input of a function that has one container.
async fn running(platform: &Platform) -> (FunctionId, Container, pb::FunctionGetInputsItem) {
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.concurrency_limit = 1)
        .await
        .publish()
        .await;
    let function_id = app.function("f");
    platform
        .client()
        .function_map(spawn(function_id, b"args"))
        .await
        .unwrap();
    let container = platform.container(function_id).await;
    let input = container.next().await;
    (function_id, container, input)
}

async fn adopted(platform: &Platform, id: ContainerId) {
    eventually("the container to be adopted", || async {
        platform.worker.seen.lock().adopted.contains(&id).then_some(())
    })
    .await;
}

fn yields(call: &str) -> pb::FunctionCallPutDataRequest {
    let chunk = pb::DataChunk {
        data_format: pb::DataFormat::Cbor.into(),
        index: 1,
        data_oneof: Some(pb::data_chunk::DataOneof::Data("value".into())),
    };
    pb::FunctionCallPutDataRequest {
        call_info: Some(pb::function_call_put_data_request::CallInfo::FunctionCallId(
            call.to_owned(),
        )),
        data_chunks: vec![chunk],
    }
}

#[tokio::test]
async fn a_container_goes_on_with_its_input_and_its_credential() {
    let platform = Platform::start().await;
    let (function_id, container, input) = running(&platform).await;
    let platform = platform.restart().await;
    adopted(&platform, container.id).await;
    let container = platform.survivor(container.id);
    // It may still speak for the call that it runs.
    within(
        container
            .client
            .clone()
            .function_call_put_data_out(yields(&input.function_call_id)),
    )
    .await
    .unwrap();
    container.succeed(&input, b"after").await;
    assert_eq!(
        result(&platform, &input.function_call_id).await.status(),
        GenericStatus::Success
    );
    // And it takes the next one.
    platform
        .client()
        .function_map(spawn(function_id, b"next"))
        .await
        .unwrap();
    assert_eq!(container.next().await.retry_count, 0);
}

#[tokio::test]
async fn a_repeated_report_is_taken_once() {
    let platform = Platform::start().await;
    let (_, container, input) = running(&platform).await;
    container.succeed(&input, b"first").await;
    let platform = platform.restart().await;
    adopted(&platform, container.id).await;
    // The answer to the report was lost with the server.
    platform.survivor(container.id).succeed(&input, b"repeated").await;
    let result = result(&platform, &input.function_call_id).await;
    assert_eq!(
        result.data_oneof,
        Some(pb::generic_result::DataOneof::Data("first".into()))
    );
}

#[tokio::test]
async fn a_container_that_is_gone_is_fenced_and_its_input_runs_again() {
    let platform = Platform::start().await;
    let (function_id, old, input) = running(&platform).await;
    let platform = platform.restart_with(Survivors::Gone, |_| ()).await;
    let new = platform.container_but(function_id, &[old.id]).await;
    let again = new.next().await;
    assert_eq!(
        (again.input_id.as_str(), again.retry_count),
        (input.input_id.as_str(), 1)
    );
    // It was cut off and not gone: nothing that it says is heard.
    let late = platform.survivor(old.id).poll().await;
    assert_refused(late, Code::Unauthenticated, "the container has ended");
    new.succeed(&again, b"after").await;
    assert_eq!(
        result(&platform, &input.function_call_id).await.status(),
        GenericStatus::Success
    );
}

#[tokio::test]
async fn containers_that_know_an_old_address_are_given_up() {
    let platform = Platform::start().await;
    let (function_id, old, input) = running(&platform).await;
    let move_away = |config: &mut ionian_control::ControlConfig| {
        config.container_server_url = "http://10.0.0.1:10".to_owned();
    };
    let platform = platform.restart_with(Survivors::Live, move_away).await;
    let new = platform.container_but(function_id, &[old.id]).await;
    assert_eq!(new.next().await.input_id, input.input_id);
    assert_refused(
        platform.survivor(old.id).poll().await,
        Code::Unauthenticated,
        "the container has ended",
    );
    assert!(!platform.worker.seen.lock().adopted.contains(&old.id));
}

#[tokio::test]
async fn a_generator_begins_anew() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("gen", |function| {
            function.concurrency_limit = 1;
            function.function_type = pb::function::FunctionType::Generator.into();
        })
        .await
        .publish()
        .await;
    platform
        .client()
        .function_map(spawn(app.function("gen"), b""))
        .await
        .unwrap();
    let container = platform.container(app.function("gen")).await;
    let input = container.next().await;
    within(
        container
            .client
            .clone()
            .function_call_put_data_out(yields(&input.function_call_id)),
    )
    .await
    .unwrap();
    let platform = platform.restart().await;
    adopted(&platform, container.id).await;
    let container = platform.survivor(container.id);
    // What it yields now would leave a gap after what was in the old server's memory.
    let mut client = container.client.clone();
    let answer = within(client.function_call_put_data_out(yields(&input.function_call_id))).await;
    assert_refused(answer, Code::FailedPrecondition, "runs in this container");
    let told = within(client.container_heartbeat(pb::ContainerHeartbeatRequest::default())).await;
    let told = told.unwrap().into_inner().cancel_input_event.unwrap();
    assert_eq!(told.input_ids, [input.input_id.as_str()]);
    let again = container.next().await;
    assert_eq!((again.input_id, again.retry_count), (input.input_id, 1));
}

#[tokio::test]
async fn a_web_container_serves_again_without_a_poll() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("web", |function| {
            function.warm_pool_size = 1;
            function.webhook_config = Some(pb::WebhookConfig {
                r#type: pb::WebhookType::AsgiApp.into(),
                ..Default::default()
            });
        })
        .await
        .publish()
        .await;
    let container = platform.container(app.function("web")).await;
    let entry = platform.control.containers().find(container.id).unwrap();
    let endpoints = vec![AnnouncedEndpoint {
        method: None,
        port: 8000,
    }];
    platform.control.announce(&entry, endpoints.clone());
    eventually("the note of the announcement", || async {
        let noted = platform.store.containers().live_web_endpoints().await.unwrap();
        (noted.get(&container.id) == Some(&endpoints)).then_some(())
    })
    .await;
    let mut platform = platform.restart().await;
    let ready = within(platform.web.pool.recv()).await.unwrap();
    let direct = WebTarget::Direct(([127, 0, 0, 1], 8000).into());
    assert_eq!(
        ready,
        PoolEvent::Ready {
            function_id: app.function("web"),
            container_id: container.id,
            slots: 1,
            targets: vec![(None, direct)],
        }
    );
}

#[tokio::test]
async fn requests_that_are_repeated_after_a_restart_are_recorded_once() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let function_id = app.function("f");
    let spawned = |platform: &Platform, attempt| {
        let mut client = platform.client();
        let request = tried(spawn(function_id, b"args"), "spawn", attempt);
        async move { client.function_map(request).await.unwrap().into_inner() }
    };
    let map = pb::FunctionMapRequest {
        function_call_type: pb::FunctionCallType::Map.into(),
        pipelined_inputs: Vec::new(),
        ..spawn(function_id, b"")
    };
    let first = spawned(&platform, 0).await;
    let map = platform.client().function_map(map).await.unwrap().into_inner();
    let put = |platform: &Platform, attempt| {
        let mut client = platform.client();
        let request = pb::FunctionPutInputsRequest {
            function_id: function_id.to_string(),
            function_call_id: map.function_call_id.clone(),
            inputs: vec![cbor_input(0, b"a"), cbor_input(1, b"b")],
        };
        let request = tried(request, "put", attempt);
        async move { client.function_put_inputs(request).await.unwrap().into_inner() }
    };
    let inputs = put(&platform, 0).await;
    let platform = platform.restart().await;
    assert_eq!(spawned(&platform, 1).await, first);
    assert_eq!(put(&platform, 1).await, inputs);
    for (call, count) in [(&first.function_call_id, 1), (&map.function_call_id, 2)] {
        let id = call.parse().unwrap();
        let recorded = platform.store.calls().call_summary(id).await.unwrap().unwrap();
        assert_eq!(recorded.input_count, count);
    }
    // The code of a container repeats itself, too: its keys are its own, and it keeps its identity.
    let container = platform.container(function_id).await;
    let credential = platform.control.containers().issue_credential(container.id);
    let inside = |platform: &Platform, attempt| {
        let mut client = client_of(&platform.api, &[("x-ionian-container", &credential)]);
        let request = tried(spawn(function_id, b"inner"), "spawn", attempt);
        async move { client.function_map(request).await.unwrap().into_inner() }
    };
    let inner = inside(&platform, 0).await;
    assert_ne!(inner.function_call_id, first.function_call_id);
    let platform = platform.restart().await;
    assert_eq!(inside(&platform, 1).await, inner);
}
