//! Calls with many inputs.

use std::collections::BTreeSet;

use ionian_domain::CallId;
use ionian_proto::client as pb;
use pb::FunctionCallInvocationType::Async;

use crate::calls::{deployed, map, outputs, single, start, value};
use crate::support::{Platform, cbor_input, eventually, tried};

#[tokio::test]
async fn a_map_of_a_thousand_gets_every_result_once() {
    const INPUTS: i32 = 1_000;
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| {
            function.warm_pool_size = 2;
            function.concurrency_limit = 2;
        })
        .await
        .publish()
        .await;
    let first = platform.container(app.function("f")).await;
    let second = platform.container_but(app.function("f"), &[first.id]).await;
    let containers = [
        tokio::spawn(async move { first.echo().await }),
        tokio::spawn(async move { second.echo().await }),
    ];
    let mut client = platform.client();
    let started = client.function_map(map(app.function("f"))).await.unwrap().into_inner();
    assert!(started.pipelined_inputs.is_empty());
    let call = started.function_call_id;
    let feeding = tokio::spawn({
        let (mut client, call, function_id) = (platform.client(), call.clone(), app.function("f").to_string());
        async move {
            for start in (0..INPUTS).step_by(49) {
                let inputs: Vec<_> = (start..INPUTS.min(start + 49))
                    .map(|index| cbor_input(index, index.to_string().as_bytes()))
                    .collect();
                let request = || pb::FunctionPutInputsRequest {
                    function_id: function_id.clone(),
                    function_call_id: call.clone(),
                    inputs: inputs.clone(),
                };
                let key = format!("put-{start}");
                let sent = client
                    .function_put_inputs(tried(request(), &key, 0))
                    .await
                    .unwrap()
                    .into_inner();
                // Every request is sent twice, as if the first answer had been lost.
                let again = client
                    .function_put_inputs(tried(request(), &key, 1))
                    .await
                    .unwrap()
                    .into_inner();
                assert_eq!(sent, again);
            }
        }
    });
    let mut seen: BTreeSet<i32> = BTreeSet::new();
    let mut last_entry_id = "0-0".to_owned();
    while seen.len() < INPUTS as usize {
        let request = pb::FunctionGetOutputsRequest {
            function_call_id: call.clone(),
            timeout: 55.0,
            last_entry_id: last_entry_id.clone(),
            ..Default::default()
        };
        let page = outputs(&mut client, request).await;
        for item in &page.outputs {
            assert_eq!(value(item), item.idx.to_string().as_bytes());
            assert_eq!(item.retry_count, 0);
            assert!(seen.insert(item.idx), "{} came twice", item.idx);
        }
        last_entry_id = page.last_entry_id;
    }
    feeding.await.unwrap();
    let last_word = pb::FunctionGetOutputsRequest {
        function_call_id: call.clone(),
        last_entry_id: "0-0".to_owned(),
        clear_on_success: true,
        ..Default::default()
    };
    let answer = outputs(&mut client, last_word).await;
    assert_eq!((answer.outputs.len(), answer.num_unfinished_inputs), (0, 0));
    let call: CallId = call.parse().unwrap();
    eventually("the call to be consumed", || async {
        platform
            .store
            .calls()
            .call_summary(call)
            .await
            .unwrap()
            .unwrap()
            .consumed
            .then_some(())
    })
    .await;
    for container in containers {
        container.abort();
    }
}

#[tokio::test]
async fn results_of_a_range_are_read_by_index() {
    let platform = Platform::start().await;
    let app = deployed(&platform).await;
    let mut client = platform.client();
    let request = pb::FunctionMapRequest {
        function_call_invocation_type: Async.into(),
        ..map(app.function("f"))
    };
    let call = start(&mut client, request).await;
    let put = pb::FunctionPutInputsRequest {
        function_id: app.function("f").to_string(),
        function_call_id: call.clone(),
        inputs: (0..5).map(|index| cbor_input(index, &[index as u8])).collect(),
    };
    client.function_put_inputs(put).await.unwrap();
    let finish = pb::FunctionFinishInputsRequest {
        function_id: app.function("f").to_string(),
        function_call_id: call.clone(),
        num_inputs: 5,
    };
    client.function_finish_inputs(finish).await.unwrap();
    let container = platform.container(app.function("f")).await;
    let echo = tokio::spawn(async move { container.echo().await });
    eventually("all results", || async {
        let page = outputs(&mut platform.client(), single(&call, 0.0)).await;
        (page.num_unfinished_inputs == 0).then_some(())
    })
    .await;
    let request = pb::FunctionGetOutputsRequest {
        start_idx: Some(2),
        end_idx: Some(3),
        ..single(&call, 0.0)
    };
    let mut indices: Vec<i32> = outputs(&mut client, request)
        .await
        .outputs
        .iter()
        .map(|item| item.idx)
        .collect();
    indices.sort_unstable();
    assert_eq!(indices, [2, 3]);
    echo.abort();
}
