//! What the official runtime is told at its start.

use ionian_control::Control;
use ionian_control::dispatch::ArgumentsRequest;
use ionian_domain::container::WebHookMode;
use ionian_proto::client as pb;
use prost::Message;

use crate::encode;

/// Encodes `ContainerArguments`.
pub fn encode(control: &Control, request: &ArgumentsRequest<'_>) -> bytes::Bytes {
    let mut definition = encode::definition(request.function);
    match request.web_hook {
        // The runtime's event loop spins between inputs only where inputs are concurrent, and the hook
        // serves on that loop. The ingress keeps to the real limit.
        WebHookMode::On => definition.max_concurrent_inputs = definition.max_concurrent_inputs.max(2),
        WebHookMode::Off => {}
    }
    // Without a checkpointing runtime these wishes must not reach the container.
    definition.checkpointing_enabled = false;
    let mut layout = encode::layout(control, request.app, request.environment, request.functions);
    // The runtime looks every dependency up in the layout, and dies without a word where one is missing.
    for id in &request.function.spec.object_dependencies {
        if !layout.objects.iter().any(|object| object.object_id == *id) {
            layout.objects.push(pb::Object {
                object_id: id.clone(),
                handle_metadata_oneof: None,
            });
        }
    }
    let own = request.function.id.to_string();
    if !layout.objects.iter().any(|object| object.object_id == own) {
        layout.objects.push(pb::Object {
            object_id: own.clone(),
            handle_metadata_oneof: Some(pb::object::HandleMetadataOneof::FunctionHandleMetadata(
                encode::handle_metadata(control, request.environment, request.function),
            )),
        });
    }
    let arguments = pb::ContainerArguments {
        task_id: request.container_id.to_string(),
        function_id: own,
        app_id: request.app.id.to_string(),
        function_def: Some(definition),
        serialized_params: request
            .function
            .binding
            .as_ref()
            .map(|binding| binding.serialized_params.clone())
            .unwrap_or_default(),
        environment_name: request.environment.name.clone(),
        app_layout: Some(layout),
        ..pb::ContainerArguments::default()
    };
    bytes::Bytes::from(arguments.encode_to_vec())
}
