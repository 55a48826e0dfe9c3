//! Apps.

use ionian_control::app::apps::{Disconnect, Publish, Published};
use ionian_domain::app::{App, AppState};
use ionian_domain::environment::Environment;
use ionian_domain::{AppId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, encode, status};

fn page_url(api: &Api, app_id: AppId) -> String {
    format!(
        "{}/apps/{app_id}",
        api.control.config().public_url(&api.control.config().base_domain)
    )
}

async fn environment_of(api: &Api, app: &App) -> Result<Environment, Status> {
    api.control
        .environments()
        .get_by_id(app.environment_id)
        .await
        .map_err(status::from_error)
}

async fn get(api: &Api, app_id: &str) -> Result<App, Status> {
    api.control
        .apps()
        .get(decode::id(app_id)?)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn create(
    api: &Api,
    ctx: &Context,
    request: pb::AppCreateRequest,
) -> Result<pb::AppCreateResponse, Status> {
    let state = match request.app_state() {
        pb::AppState::Ephemeral => AppState::Ephemeral,
        pb::AppState::Detached => AppState::Detached,
        pb::AppState::Initializing => AppState::Initializing,
        other => {
            return Err(status::invalid(format!(
                "an app cannot be created in state {}",
                other.as_str_name()
            )));
        }
    };
    let app = api
        .control
        .apps()
        .create(
            &request.environment_name,
            &request.description,
            state,
            request.tags,
            ctx.idempotency_key.as_deref(),
        )
        .await
        .map_err(status::from_error)?;
    let url = page_url(api, app.id);
    Ok(pb::AppCreateResponse {
        app_id: app.id.to_string(),
        app_logs_url: format!("{url}/logs"),
        app_page_url: url,
    })
}

pub(crate) async fn get_or_create(
    api: &Api,
    ctx: &Context,
    request: pb::AppGetOrCreateRequest,
) -> Result<pb::AppGetOrCreateResponse, Status> {
    let creates = request.object_creation_type() == pb::ObjectCreationType::CreateIfMissing;
    let name = ctx.environment(&request.environment_name);
    let found = api
        .control
        .apps()
        .find_by_name(name, &request.app_name)
        .await
        .map_err(status::from_error)?;
    let app = match found {
        Some(app) => app,
        None => {
            if creates {
                ctx.check_developer("create apps")?;
            }
            let created = api.control.apps().get_or_create(name, &request.app_name, creates).await;
            created.map_err(status::from_error)?
        }
    };
    let environment = environment_of(api, &app).await?;
    Ok(pb::AppGetOrCreateResponse {
        app_id: app.id.to_string(),
        handle_metadata: Some(encode::app_metadata(&app, &environment)),
    })
}

/// Answers an unknown name with an empty id, which is how the client asks whether it exists.
pub(crate) async fn get_by_deployment_name(
    api: &Api,
    ctx: &Context,
    request: pb::AppGetByDeploymentNameRequest,
) -> Result<pb::AppGetByDeploymentNameResponse, Status> {
    let name = ctx.environment(&request.environment_name);
    let environment = api.control.environments().get(name).await.map_err(status::from_error)?;
    let app = api
        .control
        .apps()
        .find_by_name(name, &request.name)
        .await
        .map_err(status::from_error)?;
    let previous = match &app {
        Some(_) => None,
        None => api
            .control
            .apps()
            .find_stopped_by_name(name, &request.name)
            .await
            .map_err(status::from_error)?,
    };
    Ok(pb::AppGetByDeploymentNameResponse {
        app_id: app.as_ref().map(|app| app.id.to_string()).unwrap_or_default(),
        previous_app_id: previous.as_ref().map(|app| app.id.to_string()).unwrap_or_default(),
        environment_name: environment.name,
        lifecycle: app.as_ref().or(previous.as_ref()).map(encode::lifecycle),
    })
}

pub(crate) async fn get_lifecycle(
    api: &Api,
    _: &Context,
    request: pb::AppGetLifecycleRequest,
) -> Result<pb::AppGetLifecycleResponse, Status> {
    let app = get(api, &request.app_id).await?;
    Ok(pb::AppGetLifecycleResponse {
        lifecycle: Some(encode::lifecycle(&app)),
    })
}

pub(crate) async fn get_layout(
    api: &Api,
    _: &Context,
    request: pb::AppGetLayoutRequest,
) -> Result<pb::AppGetLayoutResponse, Status> {
    let app = get(api, &request.app_id).await?;
    let environment = environment_of(api, &app).await?;
    let mut functions = Vec::new();
    for id in app.layout.functions.values() {
        functions.push(
            api.control
                .functions()
                .get_running(*id)
                .await
                .map_err(status::from_error)?,
        );
    }
    let layout = encode::layout(&api.control, &app, &environment, &functions);
    Ok(pb::AppGetLayoutResponse {
        app_layout: Some(layout),
    })
}

pub(crate) async fn publish(
    api: &Api,
    ctx: &Context,
    request: pb::AppPublishRequest,
) -> Result<pb::AppPublishResponse, Status> {
    if request.staged {
        return Err(Status::unimplemented(
            "staged deployments are not available on this server yet",
        ));
    }
    let state = match request.app_state() {
        pb::AppState::Unspecified => None,
        pb::AppState::Ephemeral => Some(AppState::Ephemeral),
        pb::AppState::Detached => Some(AppState::Detached),
        pb::AppState::Deployed => Some(AppState::Deployed),
        other => {
            return Err(status::invalid(format!(
                "an app cannot be published in state {}",
                other.as_str_name()
            )));
        }
    };
    let mut functions = std::collections::BTreeMap::new();
    for (tag, function_id) in &request.function_ids {
        functions.insert(tag.clone(), decode::id(function_id)?);
    }
    let mut classes = std::collections::BTreeMap::new();
    for (name, class_id) in &request.class_ids {
        classes.insert(name.clone(), decode::id(class_id)?);
    }
    let mut definitions = std::collections::BTreeMap::new();
    for (function_id, definition_id) in &request.definition_ids {
        definitions.insert(decode::id(function_id)?, decode::id(definition_id)?);
    }
    let publish = Publish {
        name: (!request.name.is_empty()).then_some(request.name),
        state,
        functions,
        classes,
        definitions,
        deployment_tag: request.deployment_tag,
    };
    let id = decode::id(&request.app_id)?;
    let published = api
        .control
        .apps()
        .publish_as(&ctx.caller, id, publish, ctx.is_retry)
        .await;
    let Published { app, at } = published.map_err(status::from_error)?;
    if !request.tags.is_empty() {
        api.control
            .apps()
            .set_tags(app.id, request.tags)
            .await
            .map_err(status::from_error)?;
    }
    Ok(pb::AppPublishResponse {
        url: page_url(api, app.id),
        server_warnings: Vec::new(),
        // The client stops containers from before this. Zero would be shown as "skipped".
        deployed_at: at.as_unix_seconds(),
    })
}

pub(crate) async fn heartbeat(api: &Api, _: &Context, request: pb::AppHeartbeatRequest) -> Result<(), Status> {
    api.control
        .apps()
        .heartbeat(decode::id(&request.app_id)?)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn client_disconnect(
    api: &Api,
    _: &Context,
    request: pb::AppClientDisconnectRequest,
) -> Result<(), Status> {
    let disconnect = match request.reason() {
        pb::AppDisconnectReason::DeploymentException => Disconnect::FailedDeploy,
        pb::AppDisconnectReason::KeyboardInterrupt => Disconnect::Interrupted,
        pb::AppDisconnectReason::Unspecified
        | pb::AppDisconnectReason::LocalException
        | pb::AppDisconnectReason::EntrypointCompleted
        | pb::AppDisconnectReason::RemoteException => Disconnect::Ended,
    };
    api.control
        .apps()
        .disconnect(decode::id(&request.app_id)?, disconnect)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn stop(api: &Api, _: &Context, request: pb::AppStopRequest) -> Result<(), Status> {
    api.control
        .apps()
        .stop(decode::id(&request.app_id)?)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn list(api: &Api, ctx: &Context, request: pb::AppListRequest) -> Result<pb::AppListResponse, Status> {
    let name = ctx.environment(&request.environment_name);
    let environment = api.control.environments().get(name).await.map_err(status::from_error)?;
    let apps = api.control.apps().list(name).await.map_err(status::from_error)?;
    let live = api.control.snapshot().borrow().clone();
    let items = apps
        .iter()
        .map(|app| pb::app_list_response::AppListItem {
            app_id: app.id.to_string(),
            description: app.description.clone(),
            state: encode::app_state(app.state).into(),
            created_at: app.created_at.as_unix_seconds(),
            stopped_at: app.stopped_at.map_or(0.0, Timestamp::as_unix_seconds),
            n_running_tasks: live.iter().filter(|container| container.app_id == app.id).count() as i32,
            name: app.name.clone().unwrap_or_default(),
            metadata: Some(encode::app_metadata(app, &environment)),
        })
        .collect();
    Ok(pb::AppListResponse { apps: items })
}

pub(crate) async fn deployment_history(
    api: &Api,
    _: &Context,
    request: pb::AppDeploymentHistoryRequest,
) -> Result<pb::AppDeploymentHistoryResponse, Status> {
    let app = get(api, &request.app_id).await?;
    let versions = api.control.apps().versions(app.id).await.map_err(status::from_error)?;
    let histories = versions
        .into_iter()
        .map(|version| pb::AppDeploymentHistory {
            app_id: app.id.to_string(),
            version: version.version,
            client_version: version.client_version,
            deployed_at: version.deployed_at.as_unix_seconds(),
            deployed_by: version.deployed_by,
            tag: version.tag,
            ..pb::AppDeploymentHistory::default()
        })
        .collect();
    Ok(pb::AppDeploymentHistoryResponse {
        app_deployment_histories: histories,
        production_app_version: app.version,
    })
}
