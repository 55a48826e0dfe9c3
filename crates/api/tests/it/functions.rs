//! Functions: created, looked up, bound to parameters.

use std::collections::BTreeMap;

use ionian_proto::client as pb;
use prost::Message as _;
use tonic::Code;

use crate::support::deploy::definition;
use crate::support::{Platform, assert_refused, cbor_input};

fn get(app: &str, tag: &str) -> pb::FunctionGetRequest {
    pb::FunctionGetRequest {
        app_name: app.to_owned(),
        object_tag: tag.to_owned(),
        ..Default::default()
    }
}

fn asgi(label: &str) -> pb::WebhookConfig {
    pb::WebhookConfig {
        r#type: pb::WebhookType::AsgiApp.into(),
        requested_suffix: label.to_owned(),
        ..Default::default()
    }
}

fn method(name: &str) -> (String, pb::MethodDefinition) {
    let definition = pb::MethodDefinition {
        function_name: format!("C.{name}"),
        ..Default::default()
    };
    (name.to_owned(), definition)
}

#[tokio::test]
async fn a_function_is_looked_up_with_all_that_the_client_asserts() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let found = platform
        .client()
        .function_get(get("app", "f"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(found.function_id, app.function("f").to_string());
    let handle = found.handle_metadata.unwrap();
    assert_eq!(
        (handle.function_name.as_str(), handle.app_id),
        ("f", app.id.to_string())
    );
    assert_eq!(handle.supported_input_formats, definition("f").supported_input_formats);
    assert!(handle.input_plane_url.unwrap_or_default().is_empty());
    let ranked = found.function.unwrap().ranked_functions;
    assert_eq!(ranked[0].function.as_ref().unwrap().function_name, "f");
    let request = pb::FunctionGetByIdRequest {
        function_id: app.function("f").to_string(),
    };
    let by_id = platform
        .client()
        .function_get_by_id(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(by_id.function.unwrap().ranked_functions.len(), 1);
    assert!(by_id.handle_metadata.is_some());
}

#[tokio::test]
async fn a_function_that_is_not_there_is_named_with_what_is() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await.function("f").await;
    deploy
        .function_with("C.*", |function| function.is_class = true)
        .await
        .class("C")
        .await
        .publish()
        .await;
    let answer = platform.client().function_get(get("app", "g")).await;
    assert_refused(
        answer,
        Code::NotFound,
        "Function 'g' not found in app 'app'; it has: C.*, f",
    );
    assert_refused(
        platform.client().function_get(get("nowhere", "f")).await,
        Code::NotFound,
        "App 'nowhere' not found",
    );
    let class = platform.client().function_get(get("app", "C")).await.unwrap_err();
    let details = pb::RpcStatus::decode(class.details()).unwrap();
    assert!(
        details.details[0].type_url.ends_with("FunctionLookupError"),
        "{:?}",
        details.details
    );
    let old = pb::FunctionGetRequest {
        app_version: 1,
        ..get("app", "f")
    };
    assert_refused(
        platform.client().function_get(old).await,
        Code::Unimplemented,
        "older version",
    );
}

#[tokio::test]
async fn an_unchanged_definition_keeps_its_id_however_its_mounts_are_ordered() {
    let platform = Platform::start().await;
    let mounts: Vec<String> = (0..3).map(|_| ionian_domain::MountId::generate().to_string()).collect();
    let definition_id = |reverse: bool| {
        let mut mounts = mounts.clone();
        if reverse {
            mounts.reverse();
        }
        let platform = &platform;
        async move {
            let mut deploy = platform.deploy("app").await;
            let created = deploy.create("f", |function| function.mount_ids = mounts).await;
            deploy.publish().await;
            created.handle_metadata.unwrap().definition_id
        }
    };
    let first = definition_id(false).await;
    assert_eq!(definition_id(true).await, first);
}

#[tokio::test]
async fn web_urls_are_stable_and_said_everywhere() {
    let platform = Platform::start().await;
    let mut deploy = platform.deploy("My-App").await;
    let created = deploy
        .create("web_app", |function| function.webhook_config = Some(asgi("")))
        .await;
    let url = "http://team--my-app-web-app.example.test:8080";
    assert_eq!(created.handle_metadata.unwrap().web_url, url);
    assert_eq!(created.function.unwrap().web_url, url);
    deploy.publish().await;
    assert!(
        platform
            .web
            .routes
            .borrow()
            .by_host_label
            .contains_key("team--my-app-web-app")
    );

    // Another app that asks for the same label takes it over, and is told so.
    let mut other = platform.deploy("other").await;
    let created = other
        .create("f", |function| function.webhook_config = Some(asgi("my-app-web-app")))
        .await;
    let info = created.function.unwrap().web_url_info.unwrap();
    assert!(info.label_stolen);
}

#[tokio::test]
async fn a_class_has_its_methods_and_refuses_others() {
    let platform = Platform::start().await;
    let mut deploy = platform.deploy("app").await;
    let created = deploy
        .create("C.*", |function| {
            function.is_class = true;
            function.method_definitions = [method("run"), method("web")].into();
            function.method_definitions.get_mut("web").unwrap().webhook_config = Some(asgi(""));
        })
        .await;
    let handle = created.handle_metadata.unwrap();
    let run = &handle.method_handle_metadata["run"];
    assert_eq!((run.use_method_name.as_str(), run.is_method), ("run", true));
    let url = "http://team--app-c-web.example.test:8080";
    assert_eq!(handle.method_handle_metadata["web"].web_url, url);
    assert_eq!(created.function.unwrap().method_definitions["web"].web_url, url);
    let app = deploy.class("C").await.publish().await;
    let request = pb::ClassGetRequest {
        app_name: "app".to_owned(),
        object_tag: "C".to_owned(),
        ..Default::default()
    };
    assert!(
        platform
            .client()
            .class_get(request)
            .await
            .unwrap()
            .into_inner()
            .handle_metadata
            .is_some()
    );
    let request = pb::ClassGetRequest {
        app_name: "app".to_owned(),
        object_tag: "D".to_owned(),
        ..Default::default()
    };
    assert_refused(
        platform.client().class_get(request).await,
        Code::NotFound,
        "Class 'D' not found in app 'app'",
    );

    let mut input = cbor_input(0, b"");
    input.input.as_mut().unwrap().method_name = Some("missing".to_owned());
    let call = pb::FunctionMapRequest {
        function_id: app.function("C.*").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        pipelined_inputs: vec![input],
        ..Default::default()
    };
    assert_refused(
        platform.client().function_map(call).await,
        Code::InvalidArgument,
        "'C' has no method 'missing'",
    );
}

#[tokio::test]
async fn bindings_are_the_same_for_equal_parameters_and_follow_their_base() {
    let platform = Platform::start().await;
    let deploy = platform
        .deploy("app")
        .await
        .function_with("C.*", |function| function.is_class = true)
        .await;
    let app = deploy.publish().await;
    let bind = |params: &'static [u8], max: Option<u32>| {
        let request = pb::FunctionBindParamsRequest {
            function_id: app.function("C.*").to_string(),
            serialized_params: params.into(),
            function_options: max.map(|max| pb::FunctionOptions {
                concurrency_limit: Some(max),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut client = platform.client();
        async move { client.function_bind_params(request).await.unwrap().into_inner() }
    };
    let one = bind(b"1", None).await;
    assert_eq!(bind(b"1", None).await.bound_function_id, one.bound_function_id);
    assert_ne!(bind(b"2", None).await.bound_function_id, one.bound_function_id);
    assert_ne!(bind(b"1", Some(3)).await.bound_function_id, one.bound_function_id);
    let metadata = one.handle_metadata.unwrap();
    assert_eq!(metadata.base_function_id, app.function("C.*").to_string());

    let changed = platform.deploy("app").await.function_with("C.*", |function| {
        function.is_class = true;
        function.timeout_secs = 77;
    });
    changed.await.publish().await;
    let request = pb::FunctionGetByIdRequest {
        function_id: one.bound_function_id.clone(),
    };
    let followed = platform
        .client()
        .function_get_by_id(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(followed.function.unwrap().timeout_secs, 77);

    let again = pb::FunctionBindParamsRequest {
        function_id: one.bound_function_id,
        ..Default::default()
    };
    assert_refused(
        platform.client().function_bind_params(again).await,
        Code::InvalidArgument,
        "is a variant already",
    );
}

#[tokio::test]
async fn what_a_function_could_not_do_without_is_refused_at_deployment() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let refused = |change: fn(&mut pb::Function), words: &'static str| {
        let (mut client, app_id) = (platform.client(), deploy.app_id.clone());
        async move {
            let mut function = definition("f");
            change(&mut function);
            let request = pb::FunctionCreateRequest {
                app_id,
                function: Some(function),
                ..Default::default()
            };
            let answer = Box::pin(client.function_create(request)).await;
            assert_refused(answer, Code::Unimplemented, words);
        }
    };
    refused(|f| f.is_server = true, "server classes are not available").await;
    refused(|f| f.experimental_group_size = 2, "clusters").await;
    refused(
        |f| f.cloud_bucket_mounts = vec![pb::CloudBucketMount::default()],
        "cloud bucket mounts",
    )
    .await;
    let single_use_web: fn(&mut pb::Function) = |f| {
        f.webhook_config = Some(asgi(""));
        f.max_inputs = 1;
    };
    refused(single_use_web, "single-use containers").await;
}

fn option(name: &str, value: &str) -> BTreeMap<String, String> {
    [(name.to_owned(), value.to_owned())].into()
}

/// Never weakened in silence: a function that cannot be kept apart as it asks is not deployed.
#[tokio::test]
async fn isolation_that_cannot_be_had_is_refused_at_deployment() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let refused = |change: fn(&mut pb::Function), words: &'static str| {
        let (mut client, app_id) = (platform.client(), deploy.app_id.clone());
        async move {
            let mut function = definition("f");
            change(&mut function);
            // The older form of a declaration, the newer, and what only the newer says.
            let options = std::mem::take(&mut function.experimental_options);
            let ranked = pb::function_data::RankedFunction {
                rank: 1,
                function: Some(function.clone()),
            };
            let data = pb::FunctionData {
                ranked_functions: vec![ranked],
                experimental_options: options.clone(),
                ..Default::default()
            };
            function.experimental_options = options;
            for (function, function_data) in [(Some(function), None), (None, Some(data))] {
                let request = pb::FunctionCreateRequest {
                    app_id: app_id.clone(),
                    function,
                    function_data,
                    ..Default::default()
                };
                let answer = Box::pin(client.function_create(request)).await;
                assert_refused(answer, Code::InvalidArgument, words);
            }
        }
    };
    refused(
        |f| f.block_network = true,
        "f: the process runtime of this server cannot limit",
    )
    .await;
    refused(
        |f| f.experimental_options = option("ionian.outbound_cidr_allowlist", "10.0.0.0/8"),
        "f: the process runtime of this server cannot limit",
    )
    .await;
    refused(
        |f| f.experimental_options = option("ionian.outbound_cidr_allowlist", "10.0.0.0/33"),
        "f: '10.0.0.0/33' on the allow list",
    )
    .await;
    refused(
        |f| f.experimental_options = option("ionian.runtime", "gvisor"),
        "f: no worker of this server has the runtime gvisor; there is process",
    )
    .await;
    refused(
        |f| f.experimental_options = option("ionian.runtime", "kata"),
        "f: there is no runtime 'kata'",
    )
    .await;
}

#[tokio::test]
async fn what_is_not_acted_on_is_a_warning() {
    let platform = Platform::start().await;
    let mut deploy = platform.deploy("app").await;
    let created = deploy.create("f", |function| {
        function.schedule = Some(pb::Schedule::default());
        function.checkpointing_enabled = true;
    });
    let warnings: Vec<String> = created
        .await
        .server_warnings
        .into_iter()
        .map(|warning| warning.message)
        .collect();
    assert!(
        warnings[0].starts_with("f: schedules are not available"),
        "{warnings:?}"
    );
    assert!(
        warnings[1].starts_with("f: memory snapshots are not available"),
        "{warnings:?}"
    );
}

#[tokio::test]
async fn autoscaler_settings_change_one_by_one() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let update = |settings: pb::AutoscalerSettings| {
        let request = pb::FunctionUpdateSchedulingParamsRequest {
            function_id: app.function("f").to_string(),
            settings: Some(settings),
            ..Default::default()
        };
        let mut client = platform.client();
        async move { client.function_update_scheduling_params(request).await }
    };
    let max = pb::AutoscalerSettings {
        max_containers: Some(2),
        ..Default::default()
    };
    update(max).await.unwrap();
    let min = pb::AutoscalerSettings {
        min_containers: Some(1),
        ..Default::default()
    };
    let current = update(min).await.unwrap().into_inner().current_settings.unwrap();
    assert_eq!((current.min_containers, current.max_containers), (Some(1), Some(2)));
    platform.container(app.function("f")).await;
    let wrong = pb::AutoscalerSettings {
        min_containers: Some(3),
        ..Default::default()
    };
    assert_refused(
        update(wrong).await,
        Code::InvalidArgument,
        "min_containers (3) is greater than max_containers (2)",
    );
    let request = pb::FunctionGetCurrentStatsRequest {
        function_id: app.function("f").to_string(),
    };
    let stats = platform
        .client()
        .function_get_current_stats(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!((stats.backlog, stats.num_total_tasks), (0, 1));
}
