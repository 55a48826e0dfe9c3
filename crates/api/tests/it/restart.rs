//! What a restart keeps.

use ionian_domain::FunctionId;
use ionian_proto::client as pb;
use pb::generic_result::GenericStatus;

use crate::support::deploy::image;
use crate::support::{Platform, Survivors, cbor_input, eventually, within};

pub(crate) fn spawn(function_id: FunctionId, args: &[u8]) -> pb::FunctionMapRequest {
    pb::FunctionMapRequest {
        function_id: function_id.to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        pipelined_inputs: vec![cbor_input(0, args)],
        ..Default::default()
    }
}

pub(crate) async fn result(platform: &Platform, call_id: &str) -> pb::GenericResult {
    let request = pb::FunctionGetOutputsRequest {
        function_call_id: call_id.to_owned(),
        timeout: 55.0,
        ..Default::default()
    };
    let page = within(platform.client().function_get_outputs(request))
        .await
        .unwrap()
        .into_inner();
    page.outputs[0].result.clone().unwrap()
}

#[tokio::test]
async fn inputs_that_wait_or_run_go_on_after_a_restart() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let app = deploy
        .function_with("f", |function| function.concurrency_limit = 1)
        .await
        .publish()
        .await;
    let start = |args: &'static [u8]| {
        let mut client = platform.client();
        let request = spawn(app.function("f"), args);
        async move {
            client
                .function_map(request)
                .await
                .unwrap()
                .into_inner()
                .function_call_id
        }
    };
    let finished = start(b"finished").await;
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    container.succeed(&input, b"before").await;
    let running = start(b"running").await;
    let input = container.next().await;
    let waiting = start(b"waiting").await;

    let platform = platform.restart_with(Survivors::Gone, |_| ()).await;
    let old = container.id;
    let container = platform.container_but(app.function("f"), &[old]).await;
    let again = container.next().await;
    assert_eq!(again.input_id, input.input_id, "what ran goes first");
    assert_eq!(again.retry_count, 1);
    let echo = tokio::spawn(async move {
        container.succeed(&again, b"after").await;
        container.echo().await;
    });
    for call in [finished, running, waiting] {
        assert_eq!(result(&platform, &call).await.status(), GenericStatus::Success);
    }
    echo.abort();
}

#[tokio::test]
async fn apps_images_secrets_tokens_and_urls_are_still_there_after_a_restart() {
    let platform = Platform::start().await;
    let secret = pb::SecretGetOrCreateRequest {
        deployment_name: "keys".to_owned(),
        object_creation_type: pb::ObjectCreationType::CreateFailIfExists.into(),
        env_dict: [("A".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    };
    let secret_id = platform
        .client()
        .secret_get_or_create(secret)
        .await
        .unwrap()
        .into_inner()
        .secret_id;
    let deploy = platform.deploy("app").await.function_with("web", |function| {
        function.secret_ids = vec![secret_id];
        function.warm_pool_size = 1;
        function.webhook_config = Some(pb::WebhookConfig {
            r#type: pb::WebhookType::AsgiApp.into(),
            ..Default::default()
        });
    });
    let app = deploy.await.publish().await;
    let built = image(&mut platform.client(), "FROM python:3.11").await;

    let platform = platform.restart_with(Survivors::Gone, |_| ()).await;
    assert!(platform.web.routes.borrow().by_host_label.contains_key("team--app-web"));
    // Of the container that takes the place of the one that is gone, which is still listed for a moment.
    let web = app.function("web");
    let spec = eventually("the specification", || async {
        let seen = platform.worker.seen.lock();
        seen.specs
            .iter()
            .find(|(_, spec)| spec.function_id == web)
            .map(|(_, spec)| std::sync::Arc::clone(spec))
    })
    .await;
    assert_eq!(spec.secret_env, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(image(&mut platform.client(), "FROM python:3.11").await, built);
    assert_eq!(platform.builder.count(), 0, "nothing is built again");
}

#[tokio::test]
async fn a_build_that_a_restart_interrupted_says_so_and_starts_anew() {
    let platform = Platform::start().await;
    let request = || pb::ImageGetOrCreateRequest {
        image: Some(pb::Image {
            dockerfile_commands: vec!["RUN wait".to_owned()],
            ..Default::default()
        }),
        ..Default::default()
    };
    let id = platform
        .client()
        .image_get_or_create(request())
        .await
        .unwrap()
        .into_inner()
        .image_id;
    let platform = platform.restart().await;
    let join = pb::ImageJoinStreamingRequest {
        image_id: id.clone(),
        timeout: 55.0,
        ..Default::default()
    };
    let mut stream = platform.client().image_join_streaming(join).await.unwrap().into_inner();
    let result = within(stream.message()).await.unwrap().unwrap().result.unwrap();
    assert!(
        result.exception.contains("interrupted by a server restart"),
        "{}",
        result.exception
    );
    let again = platform
        .client()
        .image_get_or_create(request())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((again.image_id.as_str(), again.result), (id.as_str(), None));
    eventually("the new build", || async {
        (platform.builder.count() == 1).then_some(())
    })
    .await;
}
