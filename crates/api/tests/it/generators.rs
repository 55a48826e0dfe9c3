//! Generators: values on their way from a container to a caller.

use bytes::Bytes;
use ionian_proto::client as pb;
use tonic::Code;

use crate::support::{Container, Platform, assert_refused, cbor_input, within};

fn chunk(index: u64, value: &'static str) -> pb::DataChunk {
    pb::DataChunk {
        data_format: pb::DataFormat::Cbor.into(),
        index,
        data_oneof: Some(pb::data_chunk::DataOneof::Data(Bytes::from(value))),
    }
}

async fn yields(container: &Container, call: &str, chunks: Vec<pb::DataChunk>) -> Result<(), tonic::Status> {
    let request = pb::FunctionCallPutDataRequest {
        call_info: Some(pb::function_call_put_data_request::CallInfo::FunctionCallId(
            call.to_owned(),
        )),
        data_chunks: chunks,
    };
    within(container.client.clone().function_call_put_data_out(request))
        .await
        .map(|_| ())
}

async fn follow(platform: &Platform, call: &str, last_index: u64) -> tonic::Streaming<pb::DataChunk> {
    let request = pb::FunctionCallGetDataRequest {
        call_info: Some(pb::function_call_get_data_request::CallInfo::FunctionCallId(
            call.to_owned(),
        )),
        last_index,
    };
    platform
        .client()
        .function_call_get_data_out(request)
        .await
        .unwrap()
        .into_inner()
}

async fn next(stream: &mut tonic::Streaming<pb::DataChunk>) -> Option<u64> {
    within(stream.message()).await.unwrap().map(|chunk| chunk.index)
}

async fn running(platform: &Platform) -> (Container, pb::FunctionGetInputsItem) {
    let app = platform.deploy("app").await.function("gen").await.publish().await;
    let request = pb::FunctionMapRequest {
        function_id: app.function("gen").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::SyncLegacy.into(),
        pipelined_inputs: vec![cbor_input(0, b"")],
        ..Default::default()
    };
    platform.client().function_map(request).await.unwrap();
    let container = platform.container(app.function("gen")).await;
    let input = container.next().await;
    (container, input)
}

#[tokio::test]
async fn values_reach_a_caller_before_and_after_it_attaches() {
    let platform = Platform::start().await;
    let (container, input) = running(&platform).await;
    let call = input.function_call_id.clone();
    yields(&container, &call, vec![chunk(1, "a"), chunk(2, "b")])
        .await
        .unwrap();
    let mut stream = follow(&platform, &call, 0).await;
    assert_eq!([next(&mut stream).await, next(&mut stream).await], [Some(1), Some(2)]);
    // The container repeats a request whose answer was lost.
    yields(&container, &call, vec![chunk(2, "b"), chunk(3, "c")])
        .await
        .unwrap();
    assert_eq!(next(&mut stream).await, Some(3));
    let mut resumed = follow(&platform, &call, 2).await;
    assert_eq!(next(&mut resumed).await, Some(3));
    container.succeed(&input, b"done").await;
    assert_eq!(next(&mut stream).await, None);
}

#[tokio::test]
async fn a_container_speaks_only_for_calls_that_it_runs() {
    let platform = Platform::start().await;
    let (container, input) = running(&platform).await;
    let foreign = ionian_domain::CallId::generate().to_string();
    let answer = yields(&container, &foreign, vec![chunk(1, "forged")]).await;
    assert_refused(answer, Code::NotFound, "does not exist for this container");
    container.succeed(&input, b"done").await;
    let answer = yields(&container, &input.function_call_id, vec![chunk(1, "late")]).await;
    assert_refused(answer, Code::FailedPrecondition, "runs in this container");
}
