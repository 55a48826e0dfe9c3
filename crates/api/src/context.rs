//! Who sent a request, and by which address it reached us.

use std::sync::Arc;

use ionian_control::containers::ContainerEntry;
use ionian_control::{Caller, Control};
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::{encode, status};

/// What every handler gets beside its message.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub caller: Caller,
    /// `scheme://host:port` by which the sender reaches us, for URLs in the answer.
    pub base_url: String,
    /// Equal for every try of one request.
    pub idempotency_key: Option<String>,
    pub is_retry: bool,
}

/// What the official runtime itself needs. Where a call or another container is named, the handler checks
/// that it is one of this container's own.
const RUNTIME_RPCS: &[&str] = &[
    "BlobCreate",
    "BlobGet",
    "ContainerHeartbeat",
    "ContainerHello",
    "ContainerServerLifecycleReady",
    "ContainerStop",
    "FunctionCallGetDataIn",
    "FunctionCallPutDataOut",
    "FunctionGetDynamicConcurrency",
    "FunctionGetInputs",
    "FunctionPutOutputs",
    "TaskResult",
];

/// What the code in a container may do beside that: look up and call functions, and follow calls whose id
/// it knows. Not deploy, stop or list apps, nor read secrets.
const CODE_RPCS: &[&str] = &[
    "AppGetByDeploymentName",
    "AppGetLayout",
    "AppGetOrCreate",
    "AuthTokenGet",
    "ClassGet",
    "ClientHello",
    "EnvironmentGetOrCreate",
    "FunctionBindParams",
    "FunctionCallCancel",
    "FunctionCallFromId",
    "FunctionCallGetDataOut",
    "FunctionFinishInputs",
    "FunctionGet",
    "FunctionGetById",
    "FunctionGetCurrentStats",
    "FunctionGetOutputs",
    "FunctionMap",
    "FunctionPutInputs",
    "ImageFromId",
    "WorkspaceNameLookup",
];

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> &'a str {
    metadata
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// The sender of a request to this RPC, or why it is refused.
pub(crate) async fn authenticate(control: &Control, metadata: &MetadataMap, rpc: &str) -> Result<Caller, Status> {
    let client_version = text(metadata, "x-modal-client-version");
    let credential = text(metadata, ionian_control::dispatch::CREDENTIAL_HEADER);
    if !credential.is_empty() {
        let entry = control.containers().authenticate(credential).ok_or_else(|| {
            Status::unauthenticated("the container's credential is not valid: the container has ended")
        })?;
        check_container(&entry, rpc)?;
        return Ok(Caller::Container {
            entry,
            client_version: client_version.to_owned(),
        });
    }
    let (id, secret) = (
        text(metadata, "x-modal-token-id"),
        text(metadata, "x-modal-token-secret"),
    );
    if id.is_empty() && secret.is_empty() {
        return Err(Status::unauthenticated(
            "no token was sent: make one with `ionian token new`, and set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET to what \
             it prints",
        ));
    }
    control
        .tokens()
        .authenticate(id, secret, client_version)
        .await
        .map_err(status::from_error)
}

/// Whether a container's credential is good for this RPC.
fn check_container(entry: &ContainerEntry, rpc: &str) -> Result<(), Status> {
    if RUNTIME_RPCS.contains(&rpc) {
        return Ok(());
    }
    if !CODE_RPCS.contains(&rpc) {
        return Err(Status::permission_denied(format!(
            "{rpc} is not allowed from inside a container; give the code a token of its own for that"
        )));
    }
    if encode::definition(&entry.function).untrusted {
        return Err(Status::permission_denied(format!(
            "{rpc} is not allowed: function '{}' was declared with restrict_modal_access=True",
            entry.function.spec.name
        )));
    }
    Ok(())
}

impl Context {
    pub(crate) fn new(caller: Caller, base_url: String, metadata: &MetadataMap) -> Self {
        let key = text(metadata, "x-idempotency-key");
        // The key is one caller's own: two callers that draw the same key must not meet.
        let scope = match &caller {
            Caller::Client { token_id, .. } => token_id.to_string(),
            Caller::Container { entry, .. } => entry.id.to_string(),
        };
        Self {
            idempotency_key: (!key.is_empty()).then(|| format!("{scope}/{key}")),
            is_retry: !matches!(text(metadata, "x-retry-attempt"), "" | "0")
                || !matches!(text(metadata, "x-throttle-retry-attempt"), "" | "0"),
            caller,
            base_url,
        }
    }

    /// The container that sends this, for RPCs that only containers send.
    pub(crate) fn container(&self) -> Result<&Arc<ContainerEntry>, Status> {
        match &self.caller {
            Caller::Container { entry, .. } => Ok(entry),
            Caller::Client { .. } => Err(Status::permission_denied("only containers may send this request")),
        }
    }

    /// Refuses what only developers may do with an RPC that containers may send, too.
    pub(crate) fn check_developer(&self, what: &str) -> Result<(), Status> {
        match &self.caller {
            Caller::Client { .. } => Ok(()),
            Caller::Container { .. } => Err(Status::permission_denied(format!(
                "code in a container must not {what}; do it from outside, or give the code a token of its own"
            ))),
        }
    }

    /// Environment names from inside a container default to the container's own.
    pub(crate) fn environment<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.caller {
            Caller::Container { entry, .. } if name.is_empty() => &entry.environment_name,
            Caller::Container { .. } | Caller::Client { .. } => name,
        }
    }
}
