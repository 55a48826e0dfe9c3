//! Environments.

use ionian_domain::ErrorKind;
use ionian_domain::environment::Environment;
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::status;

/// What every load that builds images or runs an app asks first.
pub(crate) async fn get_or_create(
    api: &Api,
    ctx: &Context,
    request: pb::EnvironmentGetOrCreateRequest,
) -> Result<pb::EnvironmentGetOrCreateResponse, Status> {
    let name = ctx.environment(&request.deployment_name);
    let creates = request.object_creation_type() == pb::ObjectCreationType::CreateIfMissing;
    let environment = match api.control.environments().get(name).await {
        Ok(environment) => environment,
        Err(error) if creates && error.kind() == ErrorKind::NotFound => {
            ctx.check_developer("create environments")?;
            let dedupe = ctx.idempotency_key.as_deref();
            api.control
                .environments()
                .create(name, dedupe)
                .await
                .map_err(status::from_error)?
        }
        Err(error) => return Err(status::from_error(error)),
    };
    Ok(pb::EnvironmentGetOrCreateResponse {
        environment_id: environment.id.to_string(),
        metadata: Some(pb::EnvironmentMetadata {
            name: environment.name,
            settings: Some(pb::EnvironmentSettings {
                image_builder_version: api.control.config().image_builder_version.clone(),
                webhook_suffix: environment.web_suffix,
                ..pb::EnvironmentSettings::default()
            }),
            environment_type: pb::EnvironmentType::Unspecified.into(),
        }),
    })
}

fn item(api: &Api, environment: &Environment) -> pb::EnvironmentListItem {
    pb::EnvironmentListItem {
        name: environment.name.clone(),
        webhook_suffix: environment.web_suffix.clone(),
        created_at: environment.created_at.as_unix_seconds(),
        default: environment.is_default,
        environment_id: environment.id.to_string(),
        image_builder_version: Some(api.control.config().image_builder_version.clone()),
        ..pb::EnvironmentListItem::default()
    }
}

pub(crate) async fn list(api: &Api, _: &Context, (): ()) -> Result<pb::EnvironmentListResponse, Status> {
    let environments = api.control.environments().list().await.map_err(status::from_error)?;
    Ok(pb::EnvironmentListResponse {
        items: environments.iter().map(|environment| item(api, environment)).collect(),
    })
}

pub(crate) async fn create(api: &Api, ctx: &Context, request: pb::EnvironmentCreateRequest) -> Result<(), Status> {
    let dedupe = ctx.idempotency_key.as_deref();
    api.control
        .environments()
        .create(&request.name, dedupe)
        .await
        .map(|_| ())
        .map_err(status::from_error)
}
