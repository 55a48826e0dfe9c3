//! A container's life: hello, heartbeats, failure.

use std::time::Duration;

use ionian_domain::outcome::OutcomeStatus;
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::reach::BlobNames;
use crate::service::Api;
use crate::{decode, status};

/// The runtime's heartbeat attempt times out after 15.1 s; it sends the next one 15 s after the last.
const HEARTBEAT_HOLD: Duration = Duration::from_secs(12);

pub(crate) async fn hello(_: &Api, ctx: &Context, (): ()) -> Result<(), Status> {
    ctx.container().map(|_| ())
}

/// The heartbeat is how cancellations reach the runtime: it is held until there is one.
pub(crate) async fn heartbeat(
    _: &Api,
    ctx: &Context,
    _: pb::ContainerHeartbeatRequest,
) -> Result<pb::ContainerHeartbeatResponse, Status> {
    let cancelled = ctx.container()?.cancellations(HEARTBEAT_HOLD).await;
    let cancel_input_event = (!cancelled.is_empty()).then(|| pb::CancelInputEvent {
        input_ids: cancelled.iter().map(ToString::to_string).collect(),
        ..pb::CancelInputEvent::default()
    });
    Ok(pb::ContainerHeartbeatResponse { cancel_input_event })
}

/// The runtime could not set the function up. Its exit code is 0 all the same.
pub(crate) async fn task_result(api: &Api, ctx: &Context, request: pb::TaskResultRequest) -> Result<(), Status> {
    let entry = ctx.container()?;
    let mut result = request.result;
    BlobNames::of(api, ctx).read_result(result.as_mut())?;
    let outcome = decode::outcome(result, 0)?;
    if outcome.status == OutcomeStatus::Success {
        return Ok(());
    }
    api.control
        .container_calls()
        .failed(entry, outcome)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn server_ready(
    api: &Api,
    ctx: &Context,
    _: pb::ContainerServerLifecycleReadyRequest,
) -> Result<(), Status> {
    let entry = ctx.container()?;
    api.control
        .container_calls()
        .server_ready(entry)
        .await
        .map_err(status::from_error)
}
