//! Wire to domain. Everything that comes in is checked here or below, never trusted.

pub(crate) mod isolation;

use std::time::Duration;

use bytes::Bytes;
use ionian_control::app::functions::WebWish;
use ionian_domain::call::{CallKind, InputPayload, Invocation, Payload};
use ionian_domain::function::{
    Autoscaler, Batching, Concurrency, ContainerUse, FunctionKind, FunctionSpec, GpuRequest, Resources, RetryPolicy,
    VolumeMount,
};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::web::WebKind;
use ionian_domain::{Outcome, Timestamp};
use ionian_proto::client as pb;
use prost::Message;
use tonic::Status;

use crate::status::invalid;

/// What the hosted product takes where a function says nothing.
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(5);
/// The longest time that a function may ask for.
const MAX_TIMEOUT: Duration = Duration::from_hours(168);
/// Retries of one input; the client allows 10.
const MAX_RETRIES: u32 = 100;
/// Inputs in one batch of `@modal.batched`, and how long it waits for more: as the client has them.
const MAX_BATCH_INPUTS: u32 = 1_000;
const MAX_BATCH_WAIT: Duration = Duration::from_mins(10);
/// Inputs that one container may run at once. Each costs the runtime a task; a thousand are common.
const MAX_CONCURRENT_INPUTS: u32 = 10_000;

pub(crate) fn id<T: std::str::FromStr<Err = ionian_domain::InvalidId>>(text: &str) -> Result<T, Status> {
    text.parse()
        .map_err(|error: ionian_domain::InvalidId| invalid(error.to_string()))
}

/// An id that may be missing.
pub(crate) fn optional_id<T: std::str::FromStr<Err = ionian_domain::InvalidId>>(
    text: &str,
) -> Result<Option<T>, Status> {
    if text.is_empty() { Ok(None) } else { id(text).map(Some) }
}

pub(crate) fn ids<T: std::str::FromStr<Err = ionian_domain::InvalidId>>(texts: &[String]) -> Result<Vec<T>, Status> {
    texts.iter().map(|text| id(text)).collect()
}

pub(crate) fn timestamp(time: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    time.map(|time| {
        Timestamp(
            time.seconds
                .saturating_mul(1_000_000)
                .saturating_add(i64::from(time.nanos) / 1_000),
        )
    })
}

/// Seconds from the wire; negative, absurd and not-a-number ones become something usable.
pub(crate) fn seconds(value: f32) -> Duration {
    if value.is_finite() {
        Duration::from_secs_f32(value.clamp(0.0, 86_400.0))
    } else {
        Duration::ZERO
    }
}

pub(crate) fn payload(args: Option<Bytes>, blob_id: Option<String>) -> Payload {
    match (args, blob_id) {
        (_, Some(blob_id)) => Payload::Blob(blob_id),
        (Some(bytes), None) => Payload::Inline(bytes),
        (None, None) => Payload::EMPTY,
    }
}

pub(crate) fn input(input: Option<pb::FunctionInput>) -> Result<InputPayload, Status> {
    let input = input.ok_or_else(|| invalid("an input has no content"))?;
    let payload = match input.args_oneof {
        Some(pb::function_input::ArgsOneof::Args(bytes)) => Payload::Inline(bytes),
        Some(pb::function_input::ArgsOneof::ArgsBlobId(blob_id)) => {
            id::<ionian_domain::BlobId>(&blob_id)?;
            Payload::Blob(blob_id)
        }
        None => Payload::EMPTY,
    };
    Ok(InputPayload {
        payload,
        data_format: input.data_format,
        method_name: input.method_name,
    })
}

pub(crate) fn call_kind(number: i32) -> Result<CallKind, Status> {
    match pb::FunctionCallType::try_from(number) {
        Ok(pb::FunctionCallType::Unary) => Ok(CallKind::Unary),
        Ok(pb::FunctionCallType::Map) => Ok(CallKind::Map),
        Ok(pb::FunctionCallType::Unspecified) | Err(_) => Err(invalid("the call has no type")),
    }
}

pub(crate) fn invocation(number: i32) -> Invocation {
    match pb::FunctionCallInvocationType::try_from(number) {
        Ok(pb::FunctionCallInvocationType::AsyncLegacy) => Invocation::AsyncLegacy,
        Ok(pb::FunctionCallInvocationType::Async) => Invocation::Async,
        Ok(pb::FunctionCallInvocationType::Sync) => Invocation::Sync,
        Ok(pb::FunctionCallInvocationType::SyncLegacy | pb::FunctionCallInvocationType::Unspecified) | Err(_) => {
            Invocation::SyncLegacy
        }
    }
}

pub(crate) fn outcome(result: Option<pb::GenericResult>, data_format: i32) -> Result<Outcome, Status> {
    let result = result.ok_or_else(|| invalid("an output has no result"))?;
    let status = OutcomeStatus::from_wire(result.status).ok_or_else(|| invalid("an output has no status"))?;
    let payload = match result.data_oneof {
        Some(pb::generic_result::DataOneof::Data(bytes)) => Payload::Inline(bytes),
        Some(pb::generic_result::DataOneof::DataBlobId(blob_id)) => {
            id::<ionian_domain::BlobId>(&blob_id)?;
            Payload::Blob(blob_id)
        }
        None => Payload::EMPTY,
    };
    Ok(Outcome {
        status,
        payload,
        data_format,
        exception: result.exception,
        traceback: result.traceback,
        serialized_traceback: result.serialized_tb,
        traceback_line_cache: result.tb_line_cache,
        exit_code: result.exitcode,
    })
}

/// The wish of a web endpoint, `None` where the config is of no type.
pub(crate) fn web_wish(config: Option<&pb::WebhookConfig>) -> Result<Option<WebWish>, Status> {
    let Some(config) = config else { return Ok(None) };
    let kind = match pb::WebhookType::try_from(config.r#type) {
        Ok(pb::WebhookType::AsgiApp) => WebKind::AsgiApp,
        Ok(pb::WebhookType::Function) => WebKind::FastapiEndpoint,
        Ok(pb::WebhookType::WsgiApp) => WebKind::WsgiApp,
        Ok(pb::WebhookType::WebServer) => WebKind::WebServer,
        Ok(pb::WebhookType::Unspecified) => return Ok(None),
        Err(_) => return Err(invalid("the web endpoint is of a kind that this server does not know")),
    };
    let port = match kind {
        WebKind::WebServer => Some(
            u16::try_from(config.web_server_port)
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| invalid(format!("{} is not a port for a web server", config.web_server_port)))?,
        ),
        WebKind::AsgiApp | WebKind::FastapiEndpoint | WebKind::WsgiApp => None,
    };
    Ok(Some(WebWish {
        kind,
        label: config.requested_suffix.clone(),
        ephemeral_suffix: config.ephemeral_suffix.clone(),
        requires_proxy_auth: config.requires_proxy_auth,
        port,
        startup_timeout: seconds(config.web_server_startup_timeout),
    }))
}

fn non_zero(value: u32) -> Option<u32> {
    (value > 0).then_some(value)
}

fn resources(resources: Option<&pb::Resources>) -> Resources {
    let Some(resources) = resources else {
        return Resources::default();
    };
    Resources {
        memory_mib: non_zero(resources.memory_mb),
        memory_limit_mib: non_zero(resources.memory_mb_max),
        cpu_millis: non_zero(resources.milli_cpu),
        cpu_limit_millis: non_zero(resources.milli_cpu_max),
        ephemeral_disk_mib: non_zero(resources.ephemeral_disk_mb),
        gpu: resources
            .gpu_config
            .as_ref()
            .filter(|gpu| gpu.count > 0)
            .map(|gpu| GpuRequest {
                kind: gpu.gpu_type.to_uppercase(),
                count: gpu.count,
            }),
    }
}

fn autoscaler(function: &pb::Function, default_window: Duration) -> Autoscaler {
    let settings = function.autoscaler_settings.unwrap_or_default();
    let window = settings.scaledown_window.or(non_zero(function.task_idle_timeout_secs));
    Autoscaler {
        min_containers: settings.min_containers.unwrap_or(function.warm_pool_size),
        max_containers: settings
            .max_containers
            .and_then(non_zero)
            .or(non_zero(function.concurrency_limit)),
        buffer_containers: settings
            .buffer_containers
            .unwrap_or(function.experimental_buffer_containers),
        scaledown_window: window.map_or(default_window, |seconds| Duration::from_secs(u64::from(seconds))),
    }
}

pub(crate) fn retry_policy(policy: Option<&pb::FunctionRetryPolicy>) -> RetryPolicy {
    policy.map_or(RetryPolicy::NONE, |policy| RetryPolicy {
        max_retries: policy.retries,
        backoff_coefficient: if policy.backoff_coefficient.is_finite() {
            policy.backoff_coefficient
        } else {
            1.0
        },
        initial_delay: Duration::from_millis(u64::from(policy.initial_delay_ms)),
        max_delay: Duration::from_millis(u64::from(policy.max_delay_ms)),
    })
}

fn timeout(seconds: u32) -> Duration {
    match seconds {
        0 => DEFAULT_TIMEOUT,
        seconds => Duration::from_secs(u64::from(seconds)).min(MAX_TIMEOUT),
    }
}

/// The runtime ends its container after one input. Older clients said it as a number of inputs.
pub(crate) fn is_single_use(function: &pb::Function) -> bool {
    function.single_use_containers || function.max_inputs == 1
}

/// Numbers that the client checks, too, but not every sender is the client.
fn check_numbers(function: &pb::Function) -> Result<(), Status> {
    let name = &function.function_name;
    let checks = [
        (
            "retries",
            function.retry_policy.as_ref().map_or(0, |policy| policy.retries).into(),
            MAX_RETRIES.into(),
        ),
        (
            "inputs in a batch",
            function.batch_max_size.into(),
            MAX_BATCH_INPUTS.into(),
        ),
        (
            "milliseconds of waiting for a batch",
            function.batch_linger_ms,
            MAX_BATCH_WAIT.as_millis() as u64,
        ),
        (
            "concurrent inputs",
            function.max_concurrent_inputs.into(),
            MAX_CONCURRENT_INPUTS.into(),
        ),
    ];
    for (what, wanted, limit) in checks {
        if wanted > limit {
            return Err(crate::status::invalid(format!(
                "function '{name}' wants {wanted} {what}; at most {limit} are supported"
            )));
        }
    }
    Ok(())
}

/// A function's definition without its web endpoints, which need a label first.
pub(crate) fn function(
    function: &pb::Function,
    client_version: &str,
    default_window: Duration,
) -> Result<FunctionSpec, Status> {
    if !function.cloud_bucket_mounts.is_empty() || !function.s3_mounts.is_empty() {
        return Err(Status::unimplemented(
            "cloud bucket mounts are not available on this server yet",
        ));
    }
    if !function.shared_volume_mounts.is_empty() {
        return Err(Status::unimplemented(
            "network file systems are not available on this server; use a Volume",
        ));
    }
    check_numbers(function)?;
    let timeout_after = timeout(function.timeout_secs);
    // Mount ids come from a set: their order means nothing and must not make a definition look changed.
    let mut kept = function.clone();
    kept.mount_ids.sort();
    let max_inputs = function.max_concurrent_inputs.max(1);
    Ok(FunctionSpec {
        name: function.function_name.clone(),
        kind: if function.function_type() == pb::function::FunctionType::Generator {
            FunctionKind::Generator
        } else {
            FunctionKind::Function
        },
        is_class: function.is_class,
        is_server: function.is_server,
        container_use: if is_single_use(function) {
            ContainerUse::Single
        } else {
            ContainerUse::Repeated
        },
        image_id: optional_id(&function.image_id)?,
        mount_ids: ids(&kept.mount_ids)?,
        secret_ids: ids(&function.secret_ids)?,
        volume_mounts: function
            .volume_mounts
            .iter()
            .map(|mount| {
                Ok(VolumeMount {
                    volume_id: id(&mount.volume_id)?,
                    path: mount.mount_path.clone(),
                    read_only: mount.read_only,
                    sub_path: mount.sub_path.clone().filter(|path| !path.is_empty()),
                })
            })
            .collect::<Result<_, Status>>()?,
        object_dependencies: function
            .object_dependencies
            .iter()
            .map(|object| object.object_id.clone())
            .collect(),
        resources: resources(function.resources.as_ref()),
        timeout: timeout_after,
        startup_timeout: if function.startup_timeout_secs == 0 {
            timeout_after
        } else {
            timeout(function.startup_timeout_secs)
        },
        autoscaler: autoscaler(function, default_window),
        concurrency: Concurrency {
            max_inputs,
            target_inputs: function.target_concurrent_inputs.min(max_inputs),
        },
        batching: (function.batch_max_size > 0).then(|| Batching {
            max_size: function.batch_max_size,
            wait: Duration::from_millis(function.batch_linger_ms),
        }),
        retry: retry_policy(function.retry_policy.as_ref()),
        web: None,
        web_methods: Vec::new(),
        methods: function.method_definitions.keys().cloned().collect(),
        runtime: isolation::runtime(function)?,
        egress: isolation::egress(function)?,
        mount_client_dependencies: function.mount_client_dependencies,
        client_version: client_version.to_owned(),
        definition: Bytes::from(kept.encode_to_vec()),
    })
}
