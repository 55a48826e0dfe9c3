//! Data channels: requests and responses of web endpoints, and the values of generators.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use ionian_control::app::streams::Chunk;
use ionian_control::data_channel::{FromApp, ToApp};
use ionian_domain::{CallId, ErrorKind};
use ionian_proto::client as pb;
use prost::Message;
use tonic::Status;

use crate::client::calls::call_of;
use crate::context::Context;
use crate::reach::{self, BlobNames};
use crate::service::Api;
use crate::{decode, status};

/// A response body chunk that came through a blob.
const MAX_BLOB_CHUNK: u64 = 256 * 1024 * 1024;
/// A generator whose caller is behind tries again after this.
const ROOM_PAUSE: Duration = Duration::from_secs(1);

type ChunkStream = Pin<Box<dyn Stream<Item = Result<pb::DataChunk, Status>> + Send>>;

fn encode_to_app(event: ToApp) -> pb::Asgi {
    use pb::asgi::{self, Type};
    let kind = match event {
        ToApp::Body { bytes, more } => Type::HttpRequest(asgi::HttpRequest {
            body: bytes,
            more_body: more,
        }),
        ToApp::Disconnect => Type::HttpDisconnect(asgi::HttpDisconnect {}),
        ToApp::WebsocketConnect => Type::WebsocketConnect(asgi::WebsocketConnect {}),
        ToApp::WebsocketText(text) => Type::WebsocketReceive(asgi::WebsocketReceive {
            content: Some(asgi::websocket_receive::Content::Text(text)),
        }),
        ToApp::WebsocketBinary(bytes) => Type::WebsocketReceive(asgi::WebsocketReceive {
            content: Some(asgi::websocket_receive::Content::Bytes(bytes)),
        }),
        ToApp::WebsocketDisconnect { code } => Type::WebsocketDisconnect(asgi::WebsocketDisconnect {
            code: Some(u32::from(code)),
        }),
    };
    pb::Asgi { r#type: Some(kind) }
}

/// Headers travel as a flat list: name, value, name, value.
fn header_pairs(flat: Vec<Bytes>) -> Vec<(Bytes, Bytes)> {
    let mut pairs = Vec::with_capacity(flat.len() / 2);
    let mut items = flat.into_iter();
    while let (Some(name), Some(value)) = (items.next(), items.next()) {
        pairs.push((name, value));
    }
    pairs
}

fn decode_from_app(asgi: pb::Asgi) -> Option<FromApp> {
    use pb::asgi::Type;
    Some(match asgi.r#type? {
        Type::HttpResponseStart(start) => FromApp::ResponseStart {
            status: u16::try_from(start.status).unwrap_or(500),
            headers: header_pairs(start.headers),
            trailers: start.trailers,
        },
        Type::HttpResponseBody(body) => FromApp::Body {
            bytes: body.body,
            more: body.more_body,
        },
        Type::HttpResponseTrailers(trailers) => FromApp::Trailers {
            headers: header_pairs(trailers.headers),
            more: trailers.more_trailers,
        },
        Type::WebsocketAccept(accept) => FromApp::WebsocketAccept {
            subprotocol: accept.subprotocol,
            headers: header_pairs(accept.headers),
        },
        Type::WebsocketSend(send) => match send.content? {
            pb::asgi::websocket_send::Content::Bytes(bytes) => FromApp::WebsocketBinary(bytes),
            pb::asgi::websocket_send::Content::Text(text) => FromApp::WebsocketText(text),
        },
        Type::WebsocketClose(close) => FromApp::WebsocketClose {
            code: close.code.and_then(|code| u16::try_from(code).ok()).unwrap_or(1000),
            reason: close.reason,
        },
        // These go the other way.
        Type::Http(_)
        | Type::HttpRequest(_)
        | Type::HttpDisconnect(_)
        | Type::Websocket(_)
        | Type::WebsocketConnect(_)
        | Type::WebsocketReceive(_)
        | Type::WebsocketDisconnect(_) => return None,
    })
}

/// The events of a request, as the ingress sends them. The runtime resets the stream when the app's
/// call returns.
pub(crate) async fn get_in(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionCallGetDataRequest,
) -> Result<ChunkStream, Status> {
    let call_id = call_of(request.call_info)?;
    let entry = ctx.container()?;
    let inbound = api
        .control
        .data_channels()
        .inbound(entry.id, call_id)
        .ok_or_else(|| Status::not_found(format!("function call {call_id} has no input stream here")))?;
    let stream = futures_util::stream::unfold((inbound, request.last_index), |(inbound, last)| async move {
        let (index, event) = inbound.next(last).await?;
        let chunk = pb::DataChunk {
            data_format: pb::DataFormat::Asgi.into(),
            index,
            data_oneof: Some(pb::data_chunk::DataOneof::Data(Bytes::from(
                encode_to_app(event).encode_to_vec(),
            ))),
        };
        Some((Ok(chunk), (inbound, index)))
    });
    Ok(Box::pin(stream))
}

/// Response events of a request, or values of a generator.
pub(crate) async fn put_out(api: &Api, ctx: &Context, request: pb::FunctionCallPutDataRequest) -> Result<(), Status> {
    let entry = ctx.container()?;
    let call_id: CallId = match request.call_info {
        Some(pb::function_call_put_data_request::CallInfo::FunctionCallId(id)) => decode::id(&id)?,
        Some(pb::function_call_put_data_request::CallInfo::AttemptToken(_)) => {
            return Err(Status::unimplemented("this server has no input plane"));
        }
        None => return Err(status::invalid("the request names no call")),
    };
    let is_exchange = api.control.data_channels().inbound(entry.id, call_id).is_some();
    if !is_exchange && !entry.runs(call_id) {
        reach::check_call(api, ctx, call_id).await?;
        return Err(Status::failed_precondition(format!(
            "no input of function call {call_id} runs in this container"
        )));
    }
    let names = BlobNames::of(api, ctx);
    let mut values = Vec::new();
    for chunk in request.data_chunks {
        let payload = match chunk.data_oneof {
            Some(pb::data_chunk::DataOneof::Data(bytes)) => decode::payload(Some(bytes), None),
            Some(pb::data_chunk::DataOneof::DataBlobId(id)) => {
                decode::payload(None, Some(names.read(&id)?.to_string()))
            }
            None => decode::payload(None, None),
        };
        if !is_exchange {
            values.push(Chunk {
                index: chunk.index,
                data_format: chunk.data_format,
                payload,
            });
            continue;
        }
        let bytes = match payload {
            ionian_domain::call::Payload::Inline(bytes) => bytes,
            ionian_domain::call::Payload::Blob(id) => api
                .control
                .blobs()
                .read_all(decode::id(&id)?, MAX_BLOB_CHUNK)
                .await
                .map_err(|error| status::from_kind(error.kind(), &error))?,
        };
        let asgi = pb::Asgi::decode(bytes).map_err(|error| status::invalid(format!("not an ASGI event: {error}")))?;
        let Some(event) = decode_from_app(asgi) else {
            return Err(status::invalid("the ASGI event is not one that an app sends"));
        };
        api.control
            .data_channels()
            .push(entry.id, call_id, chunk.index, event)
            .await;
    }
    if values.is_empty() {
        return Ok(());
    }
    api.control.streams().push(call_id, values).await.map_err(|error| {
        let is_full = error.kind() == ErrorKind::Exhausted;
        let status = status::from_error(error);
        // The runtime does not retry this by itself: the generator would fail.
        if is_full {
            status::retry_after(&status, ROOM_PAUSE)
        } else {
            status
        }
    })
}
