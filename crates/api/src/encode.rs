//! Domain to wire.

use std::collections::BTreeMap;

use ionian_control::Control;
use ionian_control::app::images::BuildLine;
use ionian_domain::app::{App, AppState};
use ionian_domain::call::{InputPayload, Invocation, Payload};
use ionian_domain::environment::Environment;
use ionian_domain::function::Function;
use ionian_domain::image::{BuiltImage, ImageState};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::web::WebSpec;
use ionian_domain::{Outcome, Timestamp};
use ionian_proto::client as pb;
use prost::Message;

pub(crate) fn app_state(state: AppState) -> pb::AppState {
    match state {
        AppState::Initializing => pb::AppState::Initializing,
        AppState::Ephemeral => pb::AppState::Ephemeral,
        AppState::Detached => pb::AppState::Detached,
        AppState::Deployed => pb::AppState::Deployed,
        AppState::Stopping => pb::AppState::Stopping,
        AppState::Stopped => pb::AppState::Stopped,
    }
}

fn seconds(time: Option<Timestamp>) -> f64 {
    time.map_or(0.0, Timestamp::as_unix_seconds)
}

pub(crate) fn proto_timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.micros().div_euclid(1_000_000),
        nanos: (time.micros().rem_euclid(1_000_000) * 1_000) as i32,
    }
}

pub(crate) fn lifecycle(app: &App) -> pb::AppLifecycle {
    pb::AppLifecycle {
        app_state: app_state(app.state).into(),
        created_at: seconds(Some(app.created_at)),
        created_by: String::new(),
        deployed_at: seconds(app.deployed_at),
        deployed_by: String::new(),
        version: app.version as i32,
        stopped_at: seconds(app.stopped_at),
        stopped_by: String::new(),
    }
}

pub(crate) fn app_metadata(app: &App, environment: &Environment) -> pb::AppHandleMetadata {
    pb::AppHandleMetadata {
        description: app.description.clone(),
        app_id: app.id.to_string(),
        environment_name: environment.name.clone(),
        lifecycle: Some(lifecycle(app)),
        functions: app
            .layout
            .functions
            .iter()
            .map(|(tag, id)| (tag.clone(), id.to_string()))
            .collect(),
        servers: BTreeMap::new(),
    }
}

pub(crate) fn web_url_info(web: &WebSpec) -> pb::WebUrlInfo {
    pb::WebUrlInfo {
        truncated: web.label_truncated,
        has_unique_hash: false,
        label_stolen: false,
    }
}

/// The definition as its client sent it. It was encoded by us, so it decodes.
pub(crate) fn definition(function: &Function) -> pb::Function {
    pb::Function::decode(function.spec.definition.clone()).unwrap_or_else(|error| {
        tracing::error!(function = %function.id, %error, "a stored definition does not decode");
        pb::Function {
            function_name: function.spec.name.clone(),
            ..pb::Function::default()
        }
    })
}

/// The definition with its URLs filled in.
pub(crate) fn function(control: &Control, environment: &Environment, function: &Function) -> pb::Function {
    let mut message = definition(function);
    if let Some(web) = &function.spec.web {
        message.web_url = control.web_url_of(environment, web);
        message.web_url_info = Some(web_url_info(web));
    }
    for (method, web) in &function.spec.web_methods {
        if let Some(definition) = message.method_definitions.get_mut(method) {
            definition.web_url = control.web_url_of(environment, web);
            definition.web_url_info = Some(web_url_info(web));
        }
    }
    message
}

pub(crate) fn handle_metadata(
    control: &Control,
    environment: &Environment,
    function_: &Function,
) -> pb::FunctionHandleMetadata {
    let message = definition(function_);
    let app_id = function_.app_id.to_string();
    let definition_id = function_.definition_id.to_string();
    let web_url = |web: Option<&WebSpec>| web.map(|web| control.web_url_of(environment, web)).unwrap_or_default();
    let method_handle_metadata = message
        .method_definitions
        .iter()
        .map(|(name, method)| {
            let web = function_
                .spec
                .web_methods
                .iter()
                .find(|(method, _)| method == name)
                .map(|(_, web)| web);
            let metadata = pb::FunctionHandleMetadata {
                function_name: method.function_name.clone(),
                function_type: method.function_type,
                web_url: web_url(web),
                is_method: true,
                use_method_name: name.clone(),
                definition_id: definition_id.clone(),
                function_schema: method.function_schema.clone(),
                supported_input_formats: method.supported_input_formats.clone(),
                supported_output_formats: method.supported_output_formats.clone(),
                app_id: app_id.clone(),
                ..pb::FunctionHandleMetadata::default()
            };
            (name.clone(), metadata)
        })
        .collect();
    pb::FunctionHandleMetadata {
        function_name: function_.spec.name.clone(),
        function_type: message.function_type,
        web_url: web_url(function_.spec.web.as_ref()),
        is_method: message.is_method,
        definition_id,
        class_parameter_info: message.class_parameter_info,
        method_handle_metadata,
        function_schema: message.function_schema,
        supported_input_formats: message.supported_input_formats,
        supported_output_formats: message.supported_output_formats,
        app_id,
        base_function_id: function_
            .binding
            .as_ref()
            .map(|binding| binding.base.to_string())
            .unwrap_or_default(),
        ..pb::FunctionHandleMetadata::default()
    }
}

/// The client refuses a `FunctionData` without a ranked function.
pub(crate) fn function_data(message: &pb::Function) -> pb::FunctionData {
    pb::FunctionData {
        module_name: message.module_name.clone(),
        function_name: message.function_name.clone(),
        function_type: message.function_type,
        warm_pool_size: message.warm_pool_size,
        concurrency_limit: message.concurrency_limit,
        task_idle_timeout_secs: message.task_idle_timeout_secs,
        timeout_secs: message.timeout_secs,
        web_url: message.web_url.clone(),
        web_url_info: message.web_url_info,
        webhook_config: message.webhook_config.clone(),
        custom_domain_info: message.custom_domain_info.clone(),
        is_class: message.is_class,
        class_parameter_info: message.class_parameter_info.clone(),
        is_method: message.is_method,
        schedule: message.schedule.clone(),
        method_definitions: message.method_definitions.clone(),
        method_definitions_set: message.method_definitions_set,
        untrusted: message.untrusted,
        autoscaler_settings: message.autoscaler_settings,
        function_schema: message.function_schema.clone(),
        experimental_options: message.experimental_options.clone(),
        startup_timeout_secs: message.startup_timeout_secs,
        supported_input_formats: message.supported_input_formats.clone(),
        supported_output_formats: message.supported_output_formats.clone(),
        http_config: message.http_config.clone(),
        implementation_name: message.implementation_name.clone(),
        is_server: message.is_server,
        routing_region: message.routing_region.clone(),
        is_sessioned: message.is_sessioned,
        ranked_functions: vec![pb::function_data::RankedFunction {
            rank: 0,
            function: Some(message.clone()),
        }],
        ..pb::FunctionData::default()
    }
}

/// What an app consists of, with enough about each function to call it without another request.
pub(crate) fn layout(control: &Control, app: &App, environment: &Environment, functions: &[Function]) -> pb::AppLayout {
    let mut objects: Vec<pb::Object> = functions
        .iter()
        .map(|function| pb::Object {
            object_id: function.id.to_string(),
            handle_metadata_oneof: Some(pb::object::HandleMetadataOneof::FunctionHandleMetadata(
                handle_metadata(control, environment, function),
            )),
        })
        .collect();
    objects.extend(app.layout.classes.values().map(|id| pb::Object {
        object_id: id.to_string(),
        handle_metadata_oneof: Some(pb::object::HandleMetadataOneof::ClassHandleMetadata(
            pb::ClassHandleMetadata::default(),
        )),
    }));
    pb::AppLayout {
        objects,
        function_ids: app
            .layout
            .functions
            .iter()
            .map(|(tag, id)| (tag.clone(), id.to_string()))
            .collect(),
        class_ids: app
            .layout
            .classes
            .iter()
            .map(|(name, id)| (name.clone(), id.to_string()))
            .collect(),
    }
}

pub(crate) fn input(input: InputPayload) -> pb::FunctionInput {
    let args_oneof = match input.payload {
        Payload::Inline(bytes) => pb::function_input::ArgsOneof::Args(bytes),
        Payload::Blob(blob_id) => pb::function_input::ArgsOneof::ArgsBlobId(blob_id),
    };
    pb::FunctionInput {
        args_oneof: Some(args_oneof),
        final_input: false,
        data_format: input.data_format,
        method_name: input.method_name,
    }
}

pub(crate) fn invocation(invocation: Invocation) -> i32 {
    match invocation {
        Invocation::SyncLegacy => pb::FunctionCallInvocationType::SyncLegacy,
        Invocation::AsyncLegacy => pb::FunctionCallInvocationType::AsyncLegacy,
        Invocation::Async => pb::FunctionCallInvocationType::Async,
        Invocation::Sync => pb::FunctionCallInvocationType::Sync,
    }
    .into()
}

pub(crate) fn result(outcome: Outcome) -> pb::GenericResult {
    let data_oneof = match outcome.payload {
        Payload::Inline(bytes) if bytes.is_empty() && outcome.status != OutcomeStatus::Success => None,
        Payload::Inline(bytes) => Some(pb::generic_result::DataOneof::Data(bytes)),
        Payload::Blob(blob_id) => Some(pb::generic_result::DataOneof::DataBlobId(blob_id)),
    };
    pb::GenericResult {
        status: outcome.status.wire(),
        exception: outcome.exception,
        exitcode: outcome.exit_code,
        traceback: outcome.traceback,
        data_oneof,
        serialized_tb: outcome.serialized_traceback,
        tb_line_cache: outcome.traceback_line_cache,
        propagation_reason: String::new(),
    }
}

pub(crate) fn image_metadata(image: &BuiltImage, builder_version: &str) -> pb::ImageMetadata {
    pb::ImageMetadata {
        python_version_info: image.metadata.python_version_info.clone(),
        python_packages: image.metadata.python_packages.clone(),
        workdir: image.config.workdir.clone(),
        libc_version_info: image.metadata.libc_version_info.clone(),
        image_builder_version: Some(builder_version.to_owned()),
    }
}

/// How a build ended, `None` while it runs.
pub(crate) fn image_result(state: &ImageState) -> Option<pb::GenericResult> {
    match state {
        ImageState::Building => None,
        ImageState::Ready { .. } => Some(pb::GenericResult {
            status: OutcomeStatus::Success.wire(),
            ..pb::GenericResult::default()
        }),
        ImageState::Failed { message } => Some(pb::GenericResult {
            status: OutcomeStatus::Failure.wire(),
            exception: message.clone(),
            ..pb::GenericResult::default()
        }),
    }
}

pub(crate) fn build_line(line: BuildLine) -> pb::TaskLogs {
    pb::TaskLogs {
        data: line.text,
        timestamp: line.at.as_unix_seconds(),
        timestamp_ns: u64::try_from(line.at.micros()).unwrap_or(0) * 1_000,
        file_descriptor: line.stream.wire(),
        ..pb::TaskLogs::default()
    }
}
