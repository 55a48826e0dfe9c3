//! Containers, as people see them. The wire calls them tasks.

use ionian_domain::{AppId, ContainerId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, status};

/// The running containers. One that was told to stop is left out: a client that stops containers waits
/// until they are gone from this list.
pub(crate) async fn list(
    api: &Api,
    ctx: &Context,
    request: pb::TaskListRequest,
) -> Result<pb::TaskListResponse, Status> {
    let app_id: Option<AppId> = decode::optional_id(&request.app_id)?;
    let environment = ctx.environment(&request.environment_name);
    let environment = api
        .control
        .environments()
        .get(environment)
        .await
        .map_err(status::from_error)?;
    let live = api.control.snapshot().borrow().clone();
    let mut tasks = Vec::new();
    for container in live.iter().filter(|container| !container.ending) {
        if app_id.is_some_and(|wanted| wanted != container.app_id) {
            continue;
        }
        let Some(entry) = api.control.containers().find(container.id) else {
            continue;
        };
        if app_id.is_none() && entry.environment_name != environment.name {
            continue;
        }
        tasks.push(pb::TaskStats {
            task_id: container.id.to_string(),
            app_id: container.app_id.to_string(),
            app_description: entry.app_name.clone(),
            started_at: if container.ready {
                container.created_at.as_unix_seconds()
            } else {
                0.0
            },
            enqueued_at: container.created_at.as_unix_seconds(),
        });
    }
    Ok(pb::TaskListResponse { tasks })
}

pub(crate) async fn get_info(
    api: &Api,
    _: &Context,
    request: pb::TaskGetInfoRequest,
) -> Result<pb::TaskGetInfoResponse, Status> {
    let id: ContainerId = decode::id(&request.task_id)?;
    let task = api.control.tasks().get(id).await.map_err(status::from_error)?;
    let at = task.created_at.as_unix_seconds();
    Ok(pb::TaskGetInfoResponse {
        app_id: task.app_id.to_string(),
        info: Some(pb::TaskInfo {
            id: id.to_string(),
            started_at: at,
            enqueued_at: at,
            finished_at: task.ended_at.map_or(0.0, Timestamp::as_unix_seconds),
            ..pb::TaskInfo::default()
        }),
    })
}

/// From a client: `modal container stop` and hot reload. From a container: about itself only.
pub(crate) async fn stop(
    api: &Api,
    ctx: &Context,
    request: pb::ContainerStopRequest,
) -> Result<pb::ContainerStopResponse, Status> {
    let id: ContainerId = decode::id(&request.task_id)?;
    if let ionian_control::Caller::Container { entry, .. } = &ctx.caller
        && entry.id != id
    {
        return Err(Status::permission_denied("a container may stop itself only"));
    }
    api.control
        .container_calls()
        .stop(id, request.graceful)
        .await
        .map_err(status::from_error)?;
    Ok(pb::ContainerStopResponse {})
}
