//! Secrets. Values come in; none goes out.

use ionian_control::app::secrets::SecretCreation;
use ionian_domain::secret::Secret;
use ionian_domain::{AppId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, status};

/// The client asks for 100 at a time.
const MAX_LISTED: u32 = 1_000;

fn metadata(secret: &Secret, environment_name: &str) -> pb::SecretMetadata {
    pb::SecretMetadata {
        name: secret.name.clone().unwrap_or_default(),
        creation_info: Some(pb::CreationInfo {
            created_at: secret.created_at.as_unix_seconds(),
            created_by: String::new(),
        }),
        keys: secret.keys.clone(),
        environment_name: environment_name.to_owned(),
        last_used_at: secret.last_used_at.map_or(0.0, Timestamp::as_unix_seconds),
        template_type: String::new(),
    }
}

pub(crate) async fn get_or_create(
    api: &Api,
    ctx: &Context,
    request: pb::SecretGetOrCreateRequest,
) -> Result<pb::SecretGetOrCreateResponse, Status> {
    let environment = ctx.environment(&request.environment_name);
    let creation = request.object_creation_type();
    let (name, values, dedupe) = (
        &request.deployment_name,
        request.env_dict,
        ctx.idempotency_key.as_deref(),
    );
    let secrets = api.control.secrets();
    let created = match creation {
        pb::ObjectCreationType::Unspecified => secrets.get(environment, name, &request.required_keys).await,
        pb::ObjectCreationType::CreateIfMissing => {
            secrets
                .create(environment, name, values, SecretCreation::IfMissing, dedupe)
                .await
        }
        pb::ObjectCreationType::CreateFailIfExists => {
            secrets
                .create(environment, name, values, SecretCreation::FailIfExists, dedupe)
                .await
        }
        pb::ObjectCreationType::CreateOverwriteIfExists => {
            secrets
                .create(environment, name, values, SecretCreation::Overwrite, dedupe)
                .await
        }
        pb::ObjectCreationType::AnonymousOwnedByApp => {
            let app_id: AppId = decode::id(&request.app_id)?;
            secrets.create_anonymous(environment, Some(app_id), values).await
        }
        pb::ObjectCreationType::Ephemeral => secrets.create_anonymous(environment, None, values).await,
    };
    let secret = created.map_err(status::from_error)?;
    let environment = api
        .control
        .environments()
        .get_by_id(secret.environment_id)
        .await
        .map_err(status::from_error)?;
    Ok(pb::SecretGetOrCreateResponse {
        secret_id: secret.id.to_string(),
        metadata: Some(metadata(&secret, &environment.name)),
    })
}

pub(crate) async fn list(
    api: &Api,
    _: &Context,
    request: pb::SecretListRequest,
) -> Result<pb::SecretListResponse, Status> {
    let pagination = request.pagination.unwrap_or_default();
    let before = (pagination.created_before > 0.0).then(|| Timestamp::from_unix_seconds(pagination.created_before));
    let limit = u32::try_from(pagination.max_objects)
        .ok()
        .filter(|n| *n > 0)
        .unwrap_or(MAX_LISTED)
        .min(MAX_LISTED);
    let environment = api
        .control
        .environments()
        .get(&request.environment_name)
        .await
        .map_err(status::from_error)?;
    let secrets = api
        .control
        .secrets()
        .list(&environment.name, before, limit)
        .await
        .map_err(status::from_error)?;
    let items = secrets
        .iter()
        .map(|secret| pb::SecretListItem {
            label: secret.name.clone().unwrap_or_default(),
            created_at: secret.created_at.as_unix_seconds(),
            last_used_at: secret.last_used_at.map_or(0.0, Timestamp::as_unix_seconds),
            environment_name: environment.name.clone(),
            secret_id: secret.id.to_string(),
            metadata: Some(metadata(secret, &environment.name)),
        })
        .collect();
    Ok(pb::SecretListResponse {
        items,
        environment_name: environment.name,
    })
}

pub(crate) async fn delete(api: &Api, ctx: &Context, request: pb::SecretDeleteRequest) -> Result<(), Status> {
    let id = decode::id(&request.secret_id)?;
    api.control
        .secrets()
        .delete(id, ctx.is_retry)
        .await
        .map_err(status::from_error)
}

pub(crate) async fn get_info(
    api: &Api,
    _: &Context,
    request: pb::SecretGetInfoRequest,
) -> Result<pb::SecretGetInfoResponse, Status> {
    let secret = api
        .control
        .secrets()
        .get_by_id(decode::id(&request.secret_id)?)
        .await
        .map_err(status::from_error)?;
    let environment = api
        .control
        .environments()
        .get_by_id(secret.environment_id)
        .await
        .map_err(status::from_error)?;
    Ok(pb::SecretGetInfoResponse {
        metadata: Some(metadata(&secret, &environment.name)),
    })
}
