//! Inputs out to containers, outputs back.

use bytes::Bytes;
use ionian_control::AttemptReport;
use ionian_control::app::container_calls::Work;
use ionian_control::data_channel::{WebInput, WebScope};
use ionian_domain::call::AttemptNumber;
use ionian_domain::{FunctionId, InputId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::reach::BlobNames;
use crate::service::Api;
use crate::{decode, encode, status};

pub(crate) async fn get(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionGetInputsRequest,
) -> Result<pb::FunctionGetInputsResponse, Status> {
    let entry = ctx.container()?;
    let function_id: Option<FunctionId> = decode::optional_id(&request.function_id)?;
    if function_id.is_some_and(|wanted| wanted != entry.function_id) {
        return Err(Status::permission_denied(
            "a container gets inputs of its own function only",
        ));
    }
    let names = BlobNames::of(api, ctx);
    let work = api
        .control
        .container_calls()
        .next(entry, request.batch_max_size.max(1))
        .await
        .map_err(status::from_error)?;
    let inputs = match work {
        Work::Inputs(inputs) => inputs
            .into_iter()
            .map(|mut input| pb::FunctionGetInputsItem {
                input_id: input.input_id.to_string(),
                input: Some({
                    input.input.payload = names.show_payload(input.input.payload);
                    encode::input(input.input)
                }),
                kill_switch: false,
                function_call_id: input.call_id.to_string(),
                function_call_invocation_type: encode::invocation(input.invocation),
                retry_count: input.attempt.0,
                function_map_idx: Some(input.index as i32),
                ..pb::FunctionGetInputsItem::default()
            })
            .collect(),
        Work::Web(input) => vec![web_input(&input)],
        Work::KillSwitch => {
            vec![pb::FunctionGetInputsItem {
                kill_switch: true,
                ..pb::FunctionGetInputsItem::default()
            }]
        }
        Work::Nothing => Vec::new(),
    };
    Ok(pb::FunctionGetInputsResponse {
        inputs,
        rate_limit_sleep_duration: 0.0,
    })
}

/// A request as an input: the arguments are the ASGI scope, in CBOR, since the runtime cannot unpack
/// the form that it announces for web endpoints.
fn web_input(input: &WebInput) -> pb::FunctionGetInputsItem {
    let mut args = Vec::new();
    let call = ciborium::Value::Array(vec![
        ciborium::Value::Array(vec![scope_value(&input.scope)]),
        ciborium::Value::Map(Vec::new()),
    ]);
    ciborium::into_writer(&call, &mut args).expect("writing CBOR to memory does not fail");
    pb::FunctionGetInputsItem {
        input_id: input.input_id.to_string(),
        input: Some(pb::FunctionInput {
            args_oneof: Some(pb::function_input::ArgsOneof::Args(Bytes::from(args))),
            final_input: false,
            data_format: pb::DataFormat::Cbor.into(),
            method_name: input.method.clone(),
        }),
        function_call_id: input.call_id.to_string(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Sync.into(),
        function_map_idx: Some(0),
        ..pb::FunctionGetInputsItem::default()
    }
}

fn scope_value(scope: &WebScope) -> ciborium::Value {
    use ciborium::Value;
    let text = |text: &str| Value::Text(text.to_owned());
    let headers = scope
        .headers
        .iter()
        .map(|(name, value)| Value::Array(vec![Value::Bytes(name.to_vec()), Value::Bytes(value.to_vec())]))
        .collect();
    let extensions = Value::Map(vec![(text("http.response.trailers"), Value::Map(Vec::new()))]);
    let mut entries = vec![
        (text("type"), text(if scope.websocket { "websocket" } else { "http" })),
        (text("http_version"), text(&scope.http_version)),
        (text("scheme"), text(&scope.scheme)),
        (text("path"), text(&scope.path)),
        (text("query_string"), Value::Bytes(scope.query_string.to_vec())),
        (text("headers"), Value::Array(headers)),
    ];
    if let Some((host, port)) = &scope.client {
        entries.push((
            text("client"),
            Value::Array(vec![text(host), Value::Integer((*port).into())]),
        ));
    }
    if scope.websocket {
        entries.push((
            text("subprotocols"),
            Value::Array(scope.subprotocols.iter().map(|name| text(name)).collect()),
        ));
    } else {
        entries.push((text("method"), text(&scope.method)));
        entries.push((text("extensions"), extensions));
    }
    Value::Map(entries)
}

pub(crate) async fn put_outputs(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionPutOutputsRequest,
) -> Result<(), Status> {
    let entry = ctx.container()?;
    let mut reports = Vec::with_capacity(request.outputs.len());
    let names = BlobNames::of(api, ctx);
    for mut output in request.outputs {
        names.read_result(output.result.as_mut())?;
        let input_id: InputId = decode::id(&output.input_id)?;
        let may_answer = api.control.container_calls().may_answer(entry, input_id).await;
        if !may_answer.map_err(status::from_error)? {
            return Err(Status::permission_denied(format!(
                "input {input_id} is not one of this container's function"
            )));
        }
        reports.push(AttemptReport {
            input_id,
            attempt: AttemptNumber(output.retry_count),
            outcome: decode::outcome(output.result, output.data_format)?,
            started_at: (output.input_started_at > 0.0).then(|| Timestamp::from_unix_seconds(output.input_started_at)),
        });
    }
    api.control
        .container_calls()
        .put_outputs(entry, reports)
        .await
        .map_err(status::from_error)
}

/// How many inputs to run at once: the runtime may use all of its slots, since the scheduler plans with
/// the target.
pub(crate) async fn dynamic_concurrency(
    _: &Api,
    _: &Context,
    request: pb::FunctionGetDynamicConcurrencyRequest,
) -> Result<pb::FunctionGetDynamicConcurrencyResponse, Status> {
    Ok(pb::FunctionGetDynamicConcurrencyResponse {
        concurrency: request.max_concurrency,
    })
}
