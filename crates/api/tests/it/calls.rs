//! Calls: started, awaited, fed, cancelled.

use ionian_domain::{CallId, FunctionId};
use ionian_proto::client as pb;
use pb::FunctionCallInvocationType::{Async, Sync};
use pb::generic_result::{DataOneof, GenericStatus};
use tokio::time::Instant;
use tonic::Code;

use crate::support::container::args_of;
use crate::support::{Client, DeployedApp, MOMENT, Platform, assert_refused, cbor_input, eventually, tried, within};

pub(crate) fn unary(
    function_id: FunctionId,
    args: &[u8],
    invocation: pb::FunctionCallInvocationType,
) -> pb::FunctionMapRequest {
    pb::FunctionMapRequest {
        function_id: function_id.to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: invocation.into(),
        pipelined_inputs: vec![cbor_input(0, args)],
        ..Default::default()
    }
}

pub(crate) fn map(function_id: FunctionId) -> pb::FunctionMapRequest {
    pb::FunctionMapRequest {
        function_id: function_id.to_string(),
        function_call_type: pb::FunctionCallType::Map.into(),
        function_call_invocation_type: Sync.into(),
        ..Default::default()
    }
}

/// As the Python client waits for a single result.
pub(crate) fn single(call_id: &str, timeout: f32) -> pb::FunctionGetOutputsRequest {
    pb::FunctionGetOutputsRequest {
        function_call_id: call_id.to_owned(),
        timeout,
        last_entry_id: "0-0".to_owned(),
        clear_on_success: true,
        start_idx: Some(0),
        end_idx: Some(0),
        ..Default::default()
    }
}

pub(crate) async fn start(client: &mut Client, request: pb::FunctionMapRequest) -> String {
    client
        .function_map(request)
        .await
        .unwrap()
        .into_inner()
        .function_call_id
}

pub(crate) async fn outputs(
    client: &mut Client,
    request: pb::FunctionGetOutputsRequest,
) -> pb::FunctionGetOutputsResponse {
    within(client.function_get_outputs(request)).await.unwrap().into_inner()
}

pub(crate) fn value(item: &pb::FunctionGetOutputsItem) -> Vec<u8> {
    match item.result.clone().unwrap().data_oneof {
        Some(DataOneof::Data(bytes)) => bytes.to_vec(),
        other => panic!("no value: {other:?}"),
    }
}

pub(crate) async fn deployed(platform: &Platform) -> DeployedApp {
    platform.deploy("app").await.function("f").await.publish().await
}

#[tokio::test]
async fn a_call_goes_to_a_container_and_its_result_comes_back() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let started = client
        .function_map(unary(app.function("f"), b"question", Sync))
        .await
        .unwrap()
        .into_inner();
    assert!(!started.sync_client_retries_enabled);
    assert_eq!(
        (started.pipelined_inputs.len(), started.pipelined_inputs[0].idx),
        (1, 0)
    );
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    assert_eq!(input.input_id, started.pipelined_inputs[0].input_id);
    assert_eq!(input.function_call_id, started.function_call_id);
    assert_eq!(args_of(&input), "question");
    assert_eq!((input.retry_count, input.attempt_token.as_str()), (0, ""));
    container.succeed(&input, b"answer").await;
    let page = outputs(&mut client, single(&started.function_call_id, 55.0)).await;
    assert_eq!(value(&page.outputs[0]), b"answer");
    assert_eq!((page.outputs[0].data_format, page.num_unfinished_inputs), (4, 0));
    assert_eq!(page.outputs[0].task_id, container.id.to_string());
}

#[tokio::test]
async fn whoever_waits_for_a_result_is_woken_by_it() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let call = start(&mut platform.client(), unary(app.function("f"), b"x", Sync)).await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    let waiting = tokio::spawn({
        let mut client = platform.client();
        async move { outputs(&mut client, single(&call, 55.0)).await }
    });
    tokio::time::sleep(MOMENT).await;
    assert!(!waiting.is_finished());
    let before = Instant::now();
    container.succeed(&input, b"y").await;
    assert_eq!(within(waiting).await.unwrap().outputs.len(), 1);
    assert!(before.elapsed().as_secs() < 5, "the wait ended by itself");
}

#[tokio::test]
async fn a_poll_that_waits_gets_the_next_input_and_an_empty_answer_is_no_error() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    let polling = tokio::spawn(async move { container.next().await });
    tokio::time::sleep(MOMENT).await;
    start(&mut platform.client(), unary(app.function("f"), b"late", Sync)).await;
    assert_eq!(args_of(&within(polling).await.unwrap()), "late");
    // No result yet: a short poll says how many are unfinished.
    let call = start(&mut platform.client(), unary(app.function("f"), b"x", Async)).await;
    let page = outputs(&mut platform.client(), single(&call, 0.0)).await;
    assert_eq!((page.outputs.len(), page.num_unfinished_inputs), (0, 1));
}

#[tokio::test]
async fn an_input_whose_poll_was_cut_off_goes_to_the_next_one() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.warm_pool_size = 1)
        .await
        .publish()
        .await;
    let container = platform.container(app.function("f")).await;
    for round in 0..20_u8 {
        let call = start(&mut platform.client(), unary(app.function("f"), &[round], Sync)).await;
        // The connection breaks at whatever point it has come to.
        let cut = tokio::time::timeout(
            std::time::Duration::from_micros(300 * u64::from(round)),
            container.poll(),
        )
        .await;
        let input = match cut {
            Ok(answered) => answered.unwrap().remove(0),
            Err(_cut_off) => container.next().await,
        };
        assert_eq!(args_of(&input), [round].as_slice());
        container.succeed(&input, b"done").await;
        assert_eq!(
            outputs(&mut platform.client(), single(&call, 55.0)).await.outputs.len(),
            1
        );
    }
}

#[tokio::test]
async fn results_of_a_spawned_call_are_read_as_often_as_wanted() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let call = start(&mut platform.client(), unary(app.function("f"), b"x", Async)).await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    container.succeed(&input, b"kept").await;
    for _ in 0..3 {
        // Whatever the reader says about clearing, in the Python and in the npm client's form.
        let python = outputs(&mut platform.client(), single(&call, 0.0)).await;
        assert_eq!(value(&python.outputs[0]), b"kept");
        let npm = pb::FunctionGetOutputsRequest {
            start_idx: None,
            end_idx: None,
            max_values: 1,
            ..single(&call, 0.0)
        };
        assert_eq!(value(&outputs(&mut platform.client(), npm).await.outputs[0]), b"kept");
    }
    let request = pb::FunctionCallFromIdRequest { function_call_id: call };
    let found = platform
        .client()
        .function_call_from_id(request)
        .await
        .unwrap()
        .into_inner();
    let metadata = found.metadata.unwrap();
    assert_eq!((found.num_inputs, metadata.app_id), (1, app.id.to_string()));
    assert_eq!(metadata.function_id, app.function("f").to_string());
}

#[tokio::test]
async fn a_result_that_its_caller_has_is_kept_for_less_long() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let remote = start(&mut client, unary(app.function("f"), b"x", Sync)).await;
    let spawned = start(&mut client, unary(app.function("f"), b"x", Async)).await;
    let container = platform.container(app.function("f")).await;
    let echo = tokio::spawn(async move { container.echo().await });
    for call in [&remote, &spawned] {
        assert_eq!(outputs(&mut client, single(call, 55.0)).await.outputs.len(), 1);
    }
    platform.control.sweep().await;
    let consumed = |call: &str| {
        let (store, call) = (platform.store.clone(), call.parse::<CallId>().unwrap());
        async move { store.calls().call_summary(call).await.unwrap().unwrap().consumed }
    };
    eventually("the call to be noted", || async {
        consumed(&remote).await.then_some(())
    })
    .await;
    assert!(!consumed(&spawned).await);
    // An answer that was lost is asked for again.
    assert_eq!(outputs(&mut client, single(&remote, 55.0)).await.outputs.len(), 1);
    echo.abort();
}

#[tokio::test]
async fn arguments_and_results_of_some_megabytes_pass() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let large = vec![7; 9 * 1024 * 1024];
    let mut client = platform.client();
    let call = start(&mut client, unary(app.function("f"), &large, Sync)).await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    assert_eq!(args_of(&input), large);
    container.succeed(&input, &large).await;
    assert_eq!(
        value(&outputs(&mut client, single(&call, 55.0)).await.outputs[0]),
        large
    );
}

#[tokio::test]
async fn a_request_to_start_a_call_that_is_repeated_starts_one() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let request = || unary(app.function("f"), b"once", Sync);
    let mut client = platform.client();
    let first = client
        .function_map(tried(request(), "key", 0))
        .await
        .unwrap()
        .into_inner();
    let again = client
        .function_map(tried(request(), "key", 1))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.function_call_id, again.function_call_id);
    assert_eq!(first.pipelined_inputs, again.pipelined_inputs);
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    container.succeed(&input, b"y").await;
    // After it has finished, and from a client that does not say that it repeats itself.
    let late = client
        .function_map(tried(request(), "key", 0))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(late.function_call_id, first.function_call_id);
    let none = tokio::time::timeout(MOMENT, container.poll()).await;
    assert!(none.is_err(), "the input ran again: {none:?}");
    let request = pb::FunctionCallFromIdRequest {
        function_call_id: first.function_call_id,
    };
    assert_eq!(
        client
            .function_call_from_id(request)
            .await
            .unwrap()
            .into_inner()
            .num_inputs,
        1
    );
}

#[tokio::test]
async fn a_key_that_is_used_twice_does_not_disturb_the_platform() {
    let platform = Platform::start().await;
    let app = platform
        .deploy("app")
        .await
        .function("f")
        .await
        .function("g")
        .await
        .publish()
        .await;
    let mut client = platform.client();
    client
        .function_map(tried(unary(app.function("f"), b"x", Sync), "key", 0))
        .await
        .unwrap();
    let other = client
        .function_map(tried(unary(app.function("g"), b"x", Sync), "key", 0))
        .await;
    assert_refused(
        other,
        Code::InvalidArgument,
        "the idempotency key was used for a call of another function",
    );
    let put = |call: &str, indices: &[i32]| pb::FunctionPutInputsRequest {
        function_id: app.function("f").to_string(),
        function_call_id: call.to_owned(),
        inputs: indices.iter().map(|index| cbor_input(*index, b"x")).collect(),
    };
    let (one, two) = (
        start(&mut client, map(app.function("f"))).await,
        start(&mut client, map(app.function("f"))).await,
    );
    for (call, indices) in [
        (&one, [0, 1].as_slice()),
        (&one, &[1]),
        (&two, &[0, 1]),
        (&one, &[1, 2]),
    ] {
        client
            .function_put_inputs(tried(put(call, indices), "same", 0))
            .await
            .unwrap();
    }
    let stranger = pb::FunctionPutInputsRequest {
        function_id: app.function("g").to_string(),
        ..put(&one, &[9])
    };
    assert_refused(
        client.function_put_inputs(stranger).await,
        Code::InvalidArgument,
        "is not a call of function",
    );
    let unknown = put(&CallId::generate().to_string(), &[0]);
    assert_refused(
        client.function_put_inputs(unknown).await,
        Code::NotFound,
        "does not exist",
    );
}

#[tokio::test]
async fn cancelling_a_call_ends_what_waits_and_tells_what_runs() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.concurrency_limit = 1)
        .await
        .publish()
        .await;
    let mut client = platform.client();
    let running = start(&mut client, unary(app.function("f"), b"runs", Sync)).await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    let waiting = start(&mut client, unary(app.function("f"), b"waits", Sync)).await;
    for call in [&running, &waiting] {
        let request = pb::FunctionCallCancelRequest {
            function_call_id: call.clone(),
            ..Default::default()
        };
        client.function_call_cancel(request).await.unwrap();
        let result = outputs(&mut client, single(call, 55.0))
            .await
            .outputs
            .remove(0)
            .result
            .unwrap();
        assert_eq!(result.status(), GenericStatus::Terminated);
        assert_eq!(result.exception, "Input was cancelled by user");
    }
    let heartbeat = container
        .client
        .clone()
        .container_heartbeat(pb::ContainerHeartbeatRequest::default())
        .await;
    let cancelled = heartbeat.unwrap().into_inner().cancel_input_event.unwrap();
    assert_eq!(cancelled.input_ids, std::slice::from_ref(&input.input_id));
    // The container's own word about it comes too late, and is taken all the same.
    container.succeed(&input, b"late").await;
    let result = outputs(&mut client, single(&running, 55.0))
        .await
        .outputs
        .remove(0)
        .result
        .unwrap();
    assert_eq!(result.status(), GenericStatus::Terminated);
    let unknown = pb::FunctionCallCancelRequest {
        function_call_id: CallId::generate().to_string(),
        ..Default::default()
    };
    assert_refused(
        client.function_call_cancel(unknown).await,
        Code::NotFound,
        "does not exist",
    );
}

#[tokio::test]
async fn stopping_an_app_ends_the_inputs_that_wait() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let call = start(&mut client, unary(app.function("f"), b"x", Sync)).await;
    client
        .app_stop(pb::AppStopRequest {
            app_id: app.id.to_string(),
            ..Default::default()
        })
        .await
        .unwrap();
    let result = outputs(&mut client, single(&call, 55.0))
        .await
        .outputs
        .remove(0)
        .result
        .unwrap();
    assert_eq!(
        (result.status(), result.exception.as_str()),
        (GenericStatus::Terminated, "the app was stopped")
    );
}

#[tokio::test]
async fn an_exception_comes_back_as_the_container_sent_it() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let call = start(&mut client, unary(app.function("f"), b"x", Sync)).await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    let raised = pb::GenericResult {
        status: GenericStatus::Failure.into(),
        exception: "ValueError: no".to_owned(),
        traceback: "Traceback".to_owned(),
        serialized_tb: "tb".into(),
        tb_line_cache: "lines".into(),
        data_oneof: Some(DataOneof::Data("pickled".into())),
        ..Default::default()
    };
    container
        .put(&input, raised.clone(), pb::DataFormat::Pickle.into())
        .await;
    let item = outputs(&mut client, single(&call, 55.0)).await.outputs.remove(0);
    assert_eq!(item.data_format(), pb::DataFormat::Pickle);
    assert_eq!(item.result.unwrap(), raised);
}

#[tokio::test]
async fn a_failing_input_is_retried_by_its_functions_policy() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await.function_with("f", |function| {
        let policy = pb::FunctionRetryPolicy {
            retries: 1,
            backoff_coefficient: 1.0,
            ..Default::default()
        };
        function.retry_policy = Some(policy);
    });
    let app = deploy.await.publish().await;
    let mut client = platform.client();
    let call = start(&mut client, unary(app.function("f"), b"x", Sync)).await;
    let container = platform.container(app.function("f")).await;
    for attempt in 0..2 {
        let input = container.next().await;
        assert_eq!((input.retry_count, args_of(&input)), (attempt, "x".into()));
        let raised = pb::GenericResult {
            status: GenericStatus::Failure.into(),
            ..Default::default()
        };
        container.put(&input, raised, 1).await;
    }
    let result = outputs(&mut client, single(&call, 55.0))
        .await
        .outputs
        .remove(0)
        .result
        .unwrap();
    assert_eq!(result.status(), GenericStatus::Failure);
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let untyped = pb::FunctionMapRequest {
        function_call_type: 0,
        ..unary(app.function("f"), b"", Sync)
    };
    assert_refused(
        client.function_map(untyped).await,
        Code::InvalidArgument,
        "the call has no type",
    );
    let unknown = unary(FunctionId::generate(), b"", Sync);
    assert_refused(client.function_map(unknown).await, Code::NotFound, "does not exist");
    let negative = pb::FunctionMapRequest {
        pipelined_inputs: vec![cbor_input(-1, b"")],
        ..unary(app.function("f"), b"", Sync)
    };
    assert_refused(
        client.function_map(negative).await,
        Code::InvalidArgument,
        "index is negative",
    );
    let many = pb::FunctionMapRequest {
        pipelined_inputs: (0..1_001).map(|index| cbor_input(index, b"")).collect(),
        ..unary(app.function("f"), b"", Sync)
    };
    assert_refused(client.function_map(many).await, Code::InvalidArgument, "at most 1000");
    let call = start(&mut client, unary(app.function("f"), b"", Sync)).await;
    let entry = pb::FunctionGetOutputsRequest {
        last_entry_id: "x-0".to_owned(),
        ..single(&call, 0.0)
    };
    assert_refused(
        client.function_get_outputs(entry).await,
        Code::InvalidArgument,
        "'x-0' is not an entry id",
    );
    let expired = single(&CallId::generate().to_string(), 0.0);
    assert_refused(
        client.function_get_outputs(expired).await,
        Code::NotFound,
        "its results have expired",
    );
}
