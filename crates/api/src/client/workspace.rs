//! The workspace, and who the caller is.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ionian_control::Caller;
use ionian_domain::{Timestamp, WorkspaceId};
use ionian_proto::client as pb;
use sha2::{Digest, Sha256};
use tonic::Status;

use crate::context::Context;
use crate::service::Api;

/// How long the JWT of `AuthTokenGet` is good for. The client refreshes it half-way.
const AUTH_TOKEN_LIFETIME: std::time::Duration = std::time::Duration::from_mins(20);

pub(crate) async fn hello(api: &Api, _: &Context, (): ()) -> Result<pb::ClientHelloResponse, Status> {
    Ok(pb::ClientHelloResponse {
        warning: String::new(),
        image_builder_version: api.control.config().image_builder_version.clone(),
        server_warnings: Vec::new(),
    })
}

/// A JWT that says only when to come back. Requests are authenticated by the token pair that every one
/// of them carries, so this one opens nothing.
pub(crate) async fn auth_token(
    _: &Api,
    ctx: &Context,
    _: pb::AuthTokenGetRequest,
) -> Result<pb::AuthTokenGetResponse, Status> {
    let expires = (Timestamp::now() + AUTH_TOKEN_LIFETIME).micros() / 1_000_000;
    let header = URL_SAFE_NO_PAD.encode(br#"{"alg":"none","typ":"JWT"}"#);
    let claims = serde_json::json!({ "exp": expires, "sub": ctx.caller.name() });
    let payload = URL_SAFE_NO_PAD.encode(claims.to_string());
    Ok(pb::AuthTokenGetResponse {
        token: format!("{header}.{payload}."),
    })
}

pub(crate) async fn name_lookup(api: &Api, _: &Context, (): ()) -> Result<pb::WorkspaceNameLookupResponse, Status> {
    let name = api.control.config().workspace.clone();
    Ok(pb::WorkspaceNameLookupResponse {
        workspace_name: name.clone(),
        username: name,
    })
}

pub(crate) async fn token_info(
    api: &Api,
    ctx: &Context,
    _: pb::TokenInfoGetRequest,
) -> Result<pb::TokenInfoGetResponse, Status> {
    let (token_id, token_name) = match &ctx.caller {
        Caller::Client {
            token_id, token_name, ..
        } => (token_id.to_string(), token_name.clone()),
        Caller::Container { entry, .. } => (entry.id.to_string(), String::new()),
    };
    let workspace = &api.control.config().workspace;
    Ok(pb::TokenInfoGetResponse {
        token_id,
        // There is one workspace and it has no record: its name is what it is known by.
        workspace_id: WorkspaceId::from_digest(&Sha256::digest(workspace).into()).to_string(),
        workspace_name: workspace.clone(),
        token_name,
        ..pb::TokenInfoGetResponse::default()
    })
}
