//! Calls, as their callers see them.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use ionian_control::app::calls::{ReadOutputs, StartCall};
use ionian_control::app::streams::Chunk;
use ionian_domain::call::Payload;
use ionian_domain::record::OutputRecord;
use ionian_domain::{CallId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::reach::{self, BlobNames};
use crate::service::Api;
use crate::{decode, encode, status};

/// How many inputs of a map its client keeps in flight.
const MAX_INPUTS_OUTSTANDING: u32 = 1_000;
/// The longest that a stream of yielded values is silent before it looks at its call again.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);
/// How long the stream of a call that is over stays open.
const OVER_PAUSE: Duration = Duration::from_secs(1);

fn decode_inputs(
    names: &BlobNames<'_>,
    items: Vec<pb::FunctionPutInputsItem>,
) -> Result<Vec<(u32, ionian_domain::call::InputPayload)>, Status> {
    items
        .into_iter()
        .map(|mut item| {
            names.read_input(item.input.as_mut())?;
            let index = u32::try_from(item.idx).map_err(|_| status::invalid("an input's index is negative"))?;
            Ok((index, decode::input(item.input)?))
        })
        .collect()
}

/// The token by which the client names an input later: opaque to it.
fn encode_started(
    call_id: CallId,
    inputs: Vec<(u32, ionian_domain::InputId)>,
) -> Vec<pb::FunctionPutInputsResponseItem> {
    inputs
        .into_iter()
        .map(|(index, id)| pb::FunctionPutInputsResponseItem {
            idx: index as i32,
            input_id: id.to_string(),
            input_jwt: format!("{call_id}:{id}"),
        })
        .collect()
}

pub(crate) async fn map(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionMapRequest,
) -> Result<pb::FunctionMapResponse, Status> {
    let function_id = decode::id(&request.function_id)?;
    let started = api
        .control
        .calls()
        .start(StartCall {
            function_id,
            kind: decode::call_kind(request.function_call_type)?,
            invocation: decode::invocation(request.function_call_invocation_type),
            parent_input_id: reach::parent(ctx, decode::optional_id(&request.parent_input_id)?),
            origin: reach::origin(ctx),
            inputs: decode_inputs(&BlobNames::of(api, ctx), request.pipelined_inputs)?,
            dedupe: ctx.idempotency_key.clone(),
        })
        .await
        .map_err(status::from_error)?;
    let retry = started.retry;
    Ok(pb::FunctionMapResponse {
        function_call_id: started.call_id.to_string(),
        pipelined_inputs: encode_started(started.call_id, started.inputs),
        retry_policy: Some(pb::FunctionRetryPolicy {
            backoff_coefficient: retry.backoff_coefficient,
            initial_delay_ms: u32::try_from(retry.initial_delay.as_millis()).unwrap_or(u32::MAX),
            max_delay_ms: u32::try_from(retry.max_delay.as_millis()).unwrap_or(u32::MAX),
            retries: retry.max_retries,
        }),
        function_call_jwt: started.call_id.to_string(),
        // Retries are the server's: it knows which attempts were lost through no fault of the user's.
        sync_client_retries_enabled: false,
        max_inputs_outstanding: MAX_INPUTS_OUTSTANDING,
    })
}

pub(crate) async fn put_inputs(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionPutInputsRequest,
) -> Result<pb::FunctionPutInputsResponse, Status> {
    let call_id = decode::id(&request.function_call_id)?;
    reach::check_call(api, ctx, call_id).await?;
    let inputs = api
        .control
        .calls()
        .put_inputs(
            call_id,
            decode::id(&request.function_id)?,
            decode_inputs(&BlobNames::of(api, ctx), request.inputs)?,
            ctx.idempotency_key.clone(),
        )
        .await
        .map_err(status::from_error)?;
    Ok(pb::FunctionPutInputsResponse {
        inputs: encode_started(call_id, inputs),
    })
}

pub(crate) async fn finish_inputs(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionFinishInputsRequest,
) -> Result<(), Status> {
    let call_id = decode::id(&request.function_call_id)?;
    reach::check_call(api, ctx, call_id).await?;
    api.control
        .calls()
        .finish_inputs(call_id, request.num_inputs)
        .await
        .map_err(status::from_error)
}

/// `"<sequence>-0"`; the client treats it as opaque, but starts with `"0-0"` or nothing.
fn sequence(entry_id: &str) -> Result<u64, Status> {
    let number = entry_id.split('-').next().unwrap_or_default();
    if number.is_empty() {
        return Ok(0);
    }
    number.parse().map_err(|_| {
        status::invalid(format!(
            "'{}' is not an entry id",
            entry_id.chars().take(40).collect::<String>()
        ))
    })
}

fn output(names: &BlobNames<'_>, mut record: OutputRecord) -> pb::FunctionGetOutputsItem {
    record.outcome.payload = names.show_payload(record.outcome.payload);
    pb::FunctionGetOutputsItem {
        idx: record.index as i32,
        input_id: record.input_id.to_string(),
        data_format: record.outcome.data_format,
        task_id: record.container_id.map(|id| id.to_string()).unwrap_or_default(),
        input_started_at: record.started_at.map_or(0.0, Timestamp::as_unix_seconds),
        output_created_at: record.finished_at.as_unix_seconds(),
        // The client compares it with its own count of retries, and it does none: the server's attempts
        // are not its business.
        retry_count: 0,
        result: Some(encode::result(record.outcome)),
        fc_trace_tag: String::new(),
    }
}

pub(crate) async fn get_outputs(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionGetOutputsRequest,
) -> Result<pb::FunctionGetOutputsResponse, Status> {
    let call_id = decode::id(&request.function_call_id)?;
    reach::check_call(api, ctx, call_id).await?;
    let after = sequence(&request.last_entry_id)?;
    let range = match (request.start_idx, request.end_idx) {
        (Some(start), Some(end)) => Some((u32::try_from(start).unwrap_or(0), u32::try_from(end).unwrap_or(0))),
        _ => None,
    };
    let hold = decode::seconds(request.timeout);
    // Readers of single results name a range (Python) or a number of outputs (npm).
    let is_last_word =
        hold.is_zero() && request.clear_on_success && after == 0 && range.is_none() && request.max_values == 0;
    if is_last_word {
        // The reader of a map has everything that it wants.
        let summary = api
            .control
            .calls()
            .acknowledge(call_id)
            .await
            .map_err(status::from_error)?;
        return Ok(pb::FunctionGetOutputsResponse {
            last_entry_id: "0-0".to_owned(),
            num_unfinished_inputs: summary.input_count.saturating_sub(summary.finished_count) as i32,
            ..pb::FunctionGetOutputsResponse::default()
        });
    }
    let page = api
        .control
        .calls()
        .outputs(ReadOutputs {
            call_id,
            after,
            range,
            limit: u32::try_from(request.max_values).ok().filter(|limit| *limit > 0),
            hold,
            clears: request.clear_on_success,
        })
        .await
        .map_err(status::from_error)?;
    let names = BlobNames::of(api, ctx);
    Ok(pb::FunctionGetOutputsResponse {
        outputs: page.outputs.into_iter().map(|record| output(&names, record)).collect(),
        last_entry_id: format!("{}-0", page.last_sequence),
        num_unfinished_inputs: page.unfinished as i32,
        ..pb::FunctionGetOutputsResponse::default()
    })
}

pub(crate) async fn cancel(api: &Api, ctx: &Context, request: pb::FunctionCallCancelRequest) -> Result<(), Status> {
    let call_id = decode::id(&request.function_call_id)?;
    reach::check_call(api, ctx, call_id).await?;
    api.control
        .calls()
        .cancel(call_id, request.terminate_containers)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn from_id(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionCallFromIdRequest,
) -> Result<pb::FunctionCallFromIdResponse, Status> {
    let call_id = decode::id(&request.function_call_id)?;
    reach::check_call(api, ctx, call_id).await?;
    let summary = api.control.calls().summary(call_id).await.map_err(status::from_error)?;
    Ok(pb::FunctionCallFromIdResponse {
        function_call_id: summary.call.id.to_string(),
        num_inputs: summary.input_count as i32,
        metadata: Some(pb::FunctionCallHandleMetadata {
            app_id: summary.call.app_id.to_string(),
            function_id: summary.call.function_id.to_string(),
        }),
    })
}

fn data_chunk(names: &BlobNames<'_>, chunk: Chunk) -> pb::DataChunk {
    pb::DataChunk {
        data_format: chunk.data_format,
        index: chunk.index,
        data_oneof: Some(match names.show_payload(chunk.payload) {
            Payload::Inline(bytes) => pb::data_chunk::DataOneof::Data(bytes),
            Payload::Blob(blob_id) => pb::data_chunk::DataOneof::DataBlobId(blob_id),
        }),
    }
}

pub(crate) fn call_of(info: Option<pb::function_call_get_data_request::CallInfo>) -> Result<CallId, Status> {
    match info {
        Some(pb::function_call_get_data_request::CallInfo::FunctionCallId(id)) => decode::id(&id),
        Some(pb::function_call_get_data_request::CallInfo::AttemptToken(_)) => {
            Err(Status::unimplemented("this server has no input plane"))
        }
        None => Err(status::invalid("the request names no call")),
    }
}

type ChunkStream = Pin<Box<dyn Stream<Item = Result<pb::DataChunk, Status>> + Send>>;

/// What a generator yields, as it yields it. The client drops the stream when it has what it wants, and
/// opens it anew when it ends: a call that is over is looked at once in a while, not without a pause.
pub(crate) async fn get_data_out(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionCallGetDataRequest,
) -> Result<ChunkStream, Status> {
    let call_id = call_of(request.call_info)?;
    reach::check_call(api, ctx, call_id).await?;
    api.control.calls().summary(call_id).await.map_err(status::from_error)?;
    let (api, ctx) = (api.clone(), ctx.clone());
    let control = api.control.clone();
    let state = (control, request.last_index, Vec::<Chunk>::new().into_iter());
    let stream = futures_util::stream::try_unfold(state, move |(control, last, mut ready)| {
        let (api, ctx) = (api.clone(), ctx.clone());
        async move {
            let names = BlobNames::of(&api, &ctx);
            let mut last = last;
            loop {
                if let Some(chunk) = ready.next() {
                    last = chunk.index;
                    let chunk = data_chunk(&names, chunk);
                    return Ok(Some((chunk, (control, last, ready))));
                }
                // Looked at before the chunks: a call that was over by then has put all of its chunks.
                let mut outcome = control.calls().follow(call_id);
                let over = match control.calls().summary(call_id).await {
                    Ok(summary) => summary.input_count > 0 && summary.finished_count >= summary.input_count,
                    Err(_expired) => true,
                };
                let (chunks, mut news) = control.streams().read(call_id, last).map_err(status::from_error)?;
                if !chunks.is_empty() {
                    ready = chunks.into_iter();
                    continue;
                }
                if over {
                    tokio::time::sleep(OVER_PAUSE).await;
                    return Ok(None);
                }
                // Woken by a value or by the outcome, whichever comes first.
                tokio::select! {
                    _ = news.changed() => {}
                    () = outcome.changed() => {}
                    () = tokio::time::sleep(STREAM_PATIENCE) => {}
                }
            }
        }
    });
    Ok(Box::pin(stream))
}
