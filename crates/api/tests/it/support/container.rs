//! The official runtime's side of the conversation.

use bytes::Bytes;
use ionian_domain::ContainerId;
use ionian_proto::client as pb;
use pb::generic_result::DataOneof;
use tonic::Status;

use super::{Client, Platform, client_of, within};

pub(crate) struct Container {
    pub id: ContainerId,
    pub client: Client,
}

impl Container {
    pub(super) fn new(platform: &Platform, id: ContainerId) -> Self {
        let credential = platform.control.containers().issue_credential(id);
        Self {
            id,
            client: client_of(&platform.api, &[("x-ionian-container", &credential)]),
        }
    }

    pub(crate) async fn poll(&self) -> Result<Vec<pb::FunctionGetInputsItem>, Status> {
        let request = pb::FunctionGetInputsRequest {
            batch_max_size: 0,
            ..Default::default()
        };
        let answer = self.client.clone().function_get_inputs(request).await?;
        Ok(answer.into_inner().inputs)
    }

    /// Polls until there is an input, which is not the order to end.
    pub(crate) async fn next(&self) -> pb::FunctionGetInputsItem {
        let mut inputs = within(self.poll()).await.unwrap();
        assert_eq!(inputs.len(), 1, "without batching an answer has one input");
        let input = inputs.remove(0);
        assert!(!input.kill_switch, "the container is told to end");
        input
    }

    pub(crate) async fn put(&self, input: &pb::FunctionGetInputsItem, result: pb::GenericResult, data_format: i32) {
        let item = pb::FunctionPutOutputsItem {
            input_id: input.input_id.clone(),
            result: Some(result),
            input_started_at: 1.0,
            output_created_at: 2.0,
            data_format,
            retry_count: input.retry_count,
            ..Default::default()
        };
        let request = pb::FunctionPutOutputsRequest {
            outputs: vec![item],
            ..Default::default()
        };
        within(self.client.clone().function_put_outputs(request)).await.unwrap();
    }

    pub(crate) async fn succeed(&self, input: &pb::FunctionGetInputsItem, value: &[u8]) {
        let result = pb::GenericResult {
            status: pb::generic_result::GenericStatus::Success.into(),
            data_oneof: Some(DataOneof::Data(Bytes::copy_from_slice(value))),
            ..Default::default()
        };
        self.put(input, result, 4).await;
    }

    /// Answers inputs with their own arguments until the platform tells it to end.
    pub(crate) async fn echo(&self) {
        loop {
            let Ok(inputs) = self.poll().await else { return };
            for input in inputs {
                if input.kill_switch {
                    return;
                }
                let args = args_of(&input);
                self.succeed(&input, &args).await;
            }
        }
    }
}

pub(crate) fn args_of(input: &pb::FunctionGetInputsItem) -> Bytes {
    match input.input.clone().unwrap().args_oneof.unwrap() {
        pb::function_input::ArgsOneof::Args(bytes) => bytes,
        pb::function_input::ArgsOneof::ArgsBlobId(id) => panic!("the arguments are in blob {id}"),
    }
}
