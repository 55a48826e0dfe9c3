//! Functions and classes.

use ionian_control::app::functions::WebWish;
use ionian_domain::app::App;
use ionian_domain::environment::Environment;
use ionian_domain::function::Function;
use ionian_domain::web::WebSpec;
use ionian_domain::{AppId, ErrorKind};
use ionian_proto::client as pb;
use prost::Message;
use tonic::Status;

use crate::context::Context;
use crate::reach;
use crate::service::Api;
use crate::{decode, encode, status};

async fn app_and_environment(api: &Api, app_id: AppId) -> Result<(App, Environment), Status> {
    let app = api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let environment = api
        .control
        .environments()
        .get_by_id(app.environment_id)
        .await
        .map_err(status::from_error)?;
    Ok((app, environment))
}

/// The web endpoints of a definition: of the function itself, and of its methods.
struct Endpoints {
    own: Option<WebSpec>,
    methods: Vec<(String, WebSpec)>,
}

fn endpoints(
    api: &Api,
    (app, environment): (&App, &Environment),
    tag: &str,
    own: Option<&pb::WebhookConfig>,
    methods: &std::collections::BTreeMap<String, pb::MethodDefinition>,
) -> Result<Endpoints, Status> {
    let functions = api.control.functions();
    let grant = |method: Option<&str>, wish: &WebWish| functions.grant(app, environment, tag, method, wish);
    let mut granted = Vec::new();
    for (name, method) in methods {
        if let Some(wish) = decode::web_wish(method.webhook_config.as_ref())? {
            granted.push((name.clone(), grant(Some(name), &wish)));
        }
    }
    Ok(Endpoints {
        own: decode::web_wish(own)?.map(|wish| grant(None, &wish)),
        methods: granted,
    })
}

pub(crate) async fn precreate(
    api: &Api,
    _: &Context,
    request: pb::FunctionPrecreateRequest,
) -> Result<pb::FunctionPrecreateResponse, Status> {
    let (app, environment) = app_and_environment(api, decode::id(&request.app_id)?).await?;
    let existing = decode::optional_id(&request.existing_function_id)?;
    let id = api
        .control
        .functions()
        .reserve(&app, existing, &request.function_name)
        .await
        .map_err(status::from_error)?;
    let granted = endpoints(
        api,
        (&app, &environment),
        &request.function_name,
        request.webhook_config.as_ref(),
        &request.method_definitions,
    )?;
    // A definition of what is known so far, only to make the handle from.
    let message = pb::Function {
        function_name: request.function_name.clone(),
        function_type: request.function_type,
        method_definitions: request.method_definitions,
        function_schema: request.function_schema,
        supported_input_formats: request.supported_input_formats,
        supported_output_formats: request.supported_output_formats,
        ..pb::Function::default()
    };
    let mut spec = decode::function(&message, "", api.control.config().default_scaledown_window)?;
    spec.web = granted.own;
    spec.web_methods = granted.methods;
    let draft = Function {
        id,
        app_id: app.id,
        definition_id: ionian_domain::DefinitionId::generate(),
        spec,
        binding: None,
        created_at: ionian_domain::Timestamp::now(),
    };
    Ok(pb::FunctionPrecreateResponse {
        function_id: id.to_string(),
        handle_metadata: Some(encode::handle_metadata(&api.control, &environment, &draft)),
    })
}

pub(crate) async fn create(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionCreateRequest,
) -> Result<pb::FunctionCreateResponse, Status> {
    let (app, environment) = app_and_environment(api, decode::id(&request.app_id)?).await?;
    // A list of fallback GPUs comes as ranked definitions; the first is the one that is wanted most.
    let message = match (request.function, request.function_data) {
        (Some(function), _) => function,
        (None, Some(data)) => {
            let ranked = data.ranked_functions.into_iter().min_by_key(|ranked| ranked.rank);
            let mut function = ranked
                .and_then(|ranked| ranked.function)
                .ok_or_else(|| status::invalid("the function has no definition"))?;
            // What holds for all ranks; some of it must not get lost, since it makes the function safer.
            for (name, value) in data.experimental_options {
                function.experimental_options.entry(name).or_insert(value);
            }
            function
        }
        (None, None) => return Err(status::invalid("the function has no definition")),
    };
    refuse_unsupported(&message)?;
    let tag = message.function_name.clone();
    let existing = decode::optional_id(&request.existing_function_id)?;
    let id = api
        .control
        .functions()
        .reserve(&app, existing, &tag)
        .await
        .map_err(status::from_error)?;
    let mut spec = decode::function(
        &message,
        ctx.caller.client_version(),
        api.control.config().default_scaledown_window,
    )?;
    let granted = endpoints(
        api,
        (&app, &environment),
        &tag,
        message.webhook_config.as_ref(),
        &message.method_definitions,
    )?;
    spec.web = granted.own;
    spec.web_methods = granted.methods;
    let server_warnings = warnings(&message);
    let function = api
        .control
        .functions()
        .create(&app, id, spec)
        .await
        .map_err(status::from_error)?;
    let mut echoed = encode::function(&api.control, &environment, &function);
    let takes_over = |web: &WebSpec| {
        let holder = api.control.web_label_holder(&environment, web);
        holder.is_some_and(|holder| holder != app.id)
    };
    if let (Some(web), Some(info)) = (&function.spec.web, &mut echoed.web_url_info) {
        info.label_stolen = takes_over(web);
    }
    Ok(pb::FunctionCreateResponse {
        function_id: function.id.to_string(),
        handle_metadata: Some(encode::handle_metadata(&api.control, &environment, &function)),
        function_data: Some(encode::function_data(&echoed)),
        function: Some(echoed),
        server_warnings,
        ..pb::FunctionCreateResponse::default()
    })
}

/// Refuses what the function could not do without, or what would be less safe than its author believes.
fn refuse_unsupported(message: &pb::Function) -> Result<(), Status> {
    let endpoints = message
        .method_definitions
        .values()
        .map(|method| method.webhook_config.as_ref());
    let is_web = endpoints
        .chain([message.webhook_config.as_ref()])
        .flatten()
        .any(|config| config.r#type() != pb::WebhookType::Unspecified);
    let reason = if message.is_server || message.http_config.is_some() {
        "server classes are not available on this server yet; use a web endpoint instead"
    } else if message.experimental_group_size > 1 {
        "clusters of several containers are not available on this server yet"
    } else if !message.proxy_id.as_deref().unwrap_or_default().is_empty() {
        "static IP proxies are not available on this server yet; requests leave from the addresses of its machines"
    } else if is_web && decode::is_single_use(message) {
        "single-use containers are not available for web endpoints on this server yet"
    } else {
        return Ok(());
    };
    Err(Status::unimplemented(format!("{}: {reason}", message.function_name)))
}

/// Settings that this server takes and does not act on yet, said to the user at deploy time.
fn warnings(message: &pb::Function) -> Vec<pb::Warning> {
    let mut sentences = Vec::new();
    if message.schedule.is_some() {
        sentences.push("schedules are not available on this server yet: the function runs only when it is called");
    }
    if message.checkpointing_enabled {
        sentences.push("memory snapshots are not available on this server: containers start without one");
    }
    if decode::isolation::has_ipv6_ranges(message) {
        sentences.push("containers have no IPv6, so the IPv6 ranges of the function's allow list allow nothing");
    }
    if !message.volume_mounts.is_empty() {
        sentences.push("volumes are not available on this server yet: the function's containers cannot start");
    }
    let gpu = message
        .resources
        .as_ref()
        .and_then(|resources| resources.gpu_config.as_ref());
    if gpu.is_some_and(|gpu| gpu.count > 0) {
        sentences.push("this server has no GPU: the function's containers cannot start");
    }
    sentences
        .into_iter()
        .map(|sentence| pb::Warning {
            r#type: pb::warning::WarningType::FunctionConfiguration.into(),
            message: format!("{}: {sentence}", message.function_name),
        })
        .collect()
}

pub(crate) async fn get(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionGetRequest,
) -> Result<pb::FunctionGetResponse, Status> {
    if request.app_version != 0 {
        return Err(Status::unimplemented(
            "calling an older version of an app is not available on this server yet",
        ));
    }
    let name = ctx.environment(&request.environment_name);
    let found = api
        .control
        .functions()
        .get_by_name(name, &request.app_name, &request.object_tag)
        .await;
    let (app, function) = match found {
        Ok(found) => found,
        Err(error) => return Err(lookup_error(api, name, &request, error).await),
    };
    let environment = api
        .control
        .environments()
        .get_by_id(app.environment_id)
        .await
        .map_err(status::from_error)?;
    let mut echoed = encode::function(&api.control, &environment, &function);
    reach::hide_from_containers(ctx, &mut echoed);
    Ok(pb::FunctionGetResponse {
        function_id: function.id.to_string(),
        handle_metadata: Some(encode::handle_metadata(&api.control, &environment, &function)),
        server_warnings: Vec::new(),
        function: Some(encode::function_data(&echoed)),
    })
}

/// A class's name where a function was looked up gets a reason that the client turns into a hint.
async fn lookup_error(
    api: &Api,
    environment: &str,
    request: &pb::FunctionGetRequest,
    error: ionian_control::Error,
) -> Status {
    let is_class = error.kind() == ErrorKind::NotFound
        && api
            .control
            .functions()
            .get_class(environment, &request.app_name, &request.object_tag)
            .await
            .is_ok();
    let status = status::from_error(error);
    if !is_class {
        return status;
    }
    let detail = pb::FunctionLookupError {
        reason: pb::function_lookup_error::Reason::ClassNameUsed.into(),
    };
    status::with_detail(&status, &detail)
}

pub(crate) async fn get_by_id(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionGetByIdRequest,
) -> Result<pb::FunctionGetByIdResponse, Status> {
    let function = api
        .control
        .functions()
        .get_running(decode::id(&request.function_id)?)
        .await
        .map_err(status::from_error)?;
    let (_, environment) = app_and_environment(api, function.app_id).await?;
    let mut echoed = encode::function(&api.control, &environment, &function);
    reach::hide_from_containers(ctx, &mut echoed);
    Ok(pb::FunctionGetByIdResponse {
        function: Some(encode::function_data(&echoed)),
        handle_metadata: Some(encode::handle_metadata(&api.control, &environment, &function)),
    })
}

pub(crate) async fn class_create(
    api: &Api,
    _: &Context,
    request: pb::ClassCreateRequest,
) -> Result<pb::ClassCreateResponse, Status> {
    let app = api
        .control
        .apps()
        .get(decode::id(&request.app_id)?)
        .await
        .map_err(status::from_error)?;
    let existing: Option<ionian_domain::ClassId> = decode::optional_id(&request.existing_class_id)?;
    // The request has no name; the id is what the app's layout will name when it is published.
    let name = existing.map_or_else(|| ionian_domain::ClassId::generate().to_string(), |id| id.to_string());
    let id = api
        .control
        .functions()
        .create_class(&app, existing, &name)
        .await
        .map_err(status::from_error)?;
    Ok(pb::ClassCreateResponse {
        class_id: id.to_string(),
        handle_metadata: Some(pb::ClassHandleMetadata::default()),
    })
}

pub(crate) async fn class_get(
    api: &Api,
    ctx: &Context,
    request: pb::ClassGetRequest,
) -> Result<pb::ClassGetResponse, Status> {
    let environment = ctx.environment(&request.environment_name);
    let (_, id) = api
        .control
        .functions()
        .get_class(environment, &request.app_name, &request.object_tag)
        .await
        .map_err(status::from_error)?;
    Ok(pb::ClassGetResponse {
        class_id: id.to_string(),
        handle_metadata: Some(pb::ClassHandleMetadata::default()),
        server_warnings: Vec::new(),
    })
}

pub(crate) async fn bind_params(
    api: &Api,
    ctx: &Context,
    request: pb::FunctionBindParamsRequest,
) -> Result<pb::FunctionBindParamsResponse, Status> {
    let base = api
        .control
        .functions()
        .get_running(decode::id(&request.function_id)?)
        .await
        .map_err(status::from_error)?;
    let options = request.function_options.unwrap_or_default();
    reach::check_options(ctx, &options)?;
    let mut message = encode::definition(&base);
    apply_options(&mut message, &options)?;
    let mut spec = decode::function(
        &message,
        &base.spec.client_version,
        api.control.config().default_scaledown_window,
    )?;
    spec.web.clone_from(&base.spec.web);
    spec.web_methods.clone_from(&base.spec.web_methods);
    let bound = api
        .control
        .functions()
        .bind(&base, spec, request.serialized_params, &options.encode_to_vec())
        .await
        .map_err(status::from_error)?;
    let (_, environment) = app_and_environment(api, bound.app_id).await?;
    Ok(pb::FunctionBindParamsResponse {
        bound_function_id: bound.id.to_string(),
        handle_metadata: Some(encode::handle_metadata(&api.control, &environment, &bound)),
    })
}

/// What `with_options`, `with_concurrency` and `with_batching` change; what they leave out stays.
fn apply_options(message: &mut pb::Function, options: &pb::FunctionOptions) -> Result<(), Status> {
    if options.pinned_app_version.is_some() {
        return Err(Status::unimplemented(
            "calling an older version of an app is not available on this server yet",
        ));
    }
    if options.replace_secret_ids {
        message.secret_ids.clone_from(&options.secret_ids);
    } else {
        message.secret_ids.extend(options.secret_ids.iter().cloned());
    }
    message.mount_ids.extend(options.mount_ids.iter().cloned());
    if options.replace_volume_mounts {
        message.volume_mounts.clone_from(&options.volume_mounts);
    }
    if let Some(resources) = &options.resources {
        message.resources = Some(resources.clone());
    }
    if let Some(policy) = &options.retry_policy {
        message.retry_policy = Some(*policy);
    }
    if let Some(seconds) = options.timeout_secs {
        message.timeout_secs = seconds;
    }
    let settings = message.autoscaler_settings.get_or_insert_default();
    if let Some(limit) = options.concurrency_limit {
        settings.max_containers = Some(limit);
    }
    if let Some(seconds) = options.task_idle_timeout_secs {
        settings.scaledown_window = Some(seconds);
    }
    if let Some(count) = options.warm_pool_size {
        settings.min_containers = Some(count);
    }
    if let Some(count) = options.buffer_containers {
        settings.buffer_containers = Some(count);
    }
    if let Some(inputs) = options.max_concurrent_inputs {
        message.max_concurrent_inputs = inputs;
    }
    if let Some(inputs) = options.target_concurrent_inputs {
        message.target_concurrent_inputs = inputs;
    }
    if let Some(size) = options.batch_max_size {
        message.batch_max_size = size;
    }
    if let Some(linger) = options.batch_linger_ms {
        message.batch_linger_ms = linger;
    }
    Ok(())
}

pub(crate) async fn current_stats(
    api: &Api,
    _: &Context,
    request: pb::FunctionGetCurrentStatsRequest,
) -> Result<pb::FunctionStats, Status> {
    let stats = api
        .control
        .functions()
        .stats(decode::id(&request.function_id)?)
        .await
        .map_err(status::from_error)?;
    Ok(pb::FunctionStats {
        backlog: stats.backlog,
        num_total_tasks: stats.containers,
        num_running_inputs: stats.running_inputs,
        input_headroom: stats.free_slots,
    })
}

pub(crate) async fn update_scheduling(
    api: &Api,
    _: &Context,
    request: pb::FunctionUpdateSchedulingParamsRequest,
) -> Result<pb::FunctionUpdateSchedulingParamsResponse, Status> {
    let id = decode::id(&request.function_id)?;
    let function = api
        .control
        .functions()
        .get_running(id)
        .await
        .map_err(status::from_error)?;
    let wanted = request.settings.unwrap_or_default();
    // What is left out stays as it is, be it from the decorator or from an earlier update.
    let mut autoscaler = api.control.functions().autoscaler(&function);
    if let Some(count) = wanted.min_containers {
        autoscaler.min_containers = count;
    }
    if let Some(count) = wanted.max_containers {
        autoscaler.max_containers = (count > 0).then_some(count);
    }
    if let Some(count) = wanted.buffer_containers {
        autoscaler.buffer_containers = count;
    }
    if let Some(seconds) = wanted.scaledown_window {
        autoscaler.scaledown_window = std::time::Duration::from_secs(u64::from(seconds));
    }
    if autoscaler
        .max_containers
        .is_some_and(|max| autoscaler.min_containers > max)
    {
        return Err(status::invalid(format!(
            "min_containers ({}) is greater than max_containers ({})",
            autoscaler.min_containers,
            autoscaler.max_containers.unwrap_or(0)
        )));
    }
    api.control
        .functions()
        .update_autoscaler(&function, autoscaler.clone())
        .await
        .map_err(status::from_error)?;
    Ok(pb::FunctionUpdateSchedulingParamsResponse {
        current_settings: Some(pb::AutoscalerSettings {
            min_containers: Some(autoscaler.min_containers),
            max_containers: Some(autoscaler.max_containers.unwrap_or(0)),
            buffer_containers: Some(autoscaler.buffer_containers),
            scaledown_window: Some(u32::try_from(autoscaler.scaledown_window.as_secs()).unwrap_or(u32::MAX)),
            ..pb::AutoscalerSettings::default()
        }),
    })
}
