//! Who may ask for what.

use ionian_domain::container::ContainerExit;
use ionian_domain::{ContainerId, Timestamp};
use ionian_proto::client as pb;
use tonic::Code;

use crate::support::{Platform, SECRET, assert_refused, client_of, eventually};

const HINT: &str = "`ionian token new`";

#[tokio::test]
async fn a_request_without_a_token_is_told_how_to_get_one() {
    let platform = Platform::start().await;
    let mut nobody = client_of(&platform.api, &[]);
    assert_refused(nobody.client_hello(()).await, Code::Unauthenticated, HINT);
}

#[tokio::test]
async fn a_wrong_token_is_refused_without_saying_what_is_wrong() {
    let platform = Platform::start().await;
    let id = platform.token_id.to_string();
    let other = ionian_domain::TokenId::generate().to_string();
    for (id, secret) in [
        (id.as_str(), "as-wrong"),
        (other.as_str(), SECRET),
        ("ak-short", SECRET),
        (id.as_str(), ""),
    ] {
        let headers = [("x-modal-token-id", id), ("x-modal-token-secret", secret)];
        let answer = client_of(&platform.api, &headers).client_hello(()).await;
        assert_refused(answer, Code::Unauthenticated, "the token is not valid on this server");
    }
}

#[tokio::test]
async fn a_revoked_token_is_worthless_at_once() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    client.client_hello(()).await.unwrap();
    platform
        .store
        .tokens()
        .revoke(platform.token_id, Timestamp::now())
        .await
        .unwrap();
    assert_refused(client.client_hello(()).await, Code::Unauthenticated, "was revoked");
}

#[tokio::test]
async fn the_token_and_the_workspace_are_told() {
    let platform = Platform::start().await;
    let info = platform
        .client()
        .token_info_get(pb::TokenInfoGetRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.token_id, platform.token_id.to_string());
    assert_eq!(
        (info.token_name.as_str(), info.workspace_name.as_str()),
        ("tester", "team")
    );
    let names = platform.client().workspace_name_lookup(()).await.unwrap().into_inner();
    assert_eq!(names.username, "team");
    let token = platform
        .client()
        .auth_token_get(pb::AuthTokenGetRequest::default())
        .await
        .unwrap()
        .into_inner()
        .token;
    assert_eq!(token.split('.').count(), 3);
}

#[tokio::test]
async fn what_is_not_implemented_says_so_before_anything_else() {
    let platform = Platform::start().await;
    let mut nobody = client_of(&platform.api, &[]);
    let flow = nobody.token_flow_create(pb::TokenFlowCreateRequest::default()).await;
    assert_refused(flow, Code::Unimplemented, HINT);
    for (path, words) in [
        (
            "/modal.client.ModalClient/SandboxCreate",
            "SandboxCreate: sandboxes are not available on this server yet",
        ),
        (
            "/modal.client.ModalClient/NoSuchRpc",
            "NoSuchRpc is not known to this server",
        ),
        (
            "/modal.task_command_router.TaskCommandRouter/TaskExecStart",
            "is not a service of this server",
        ),
    ] {
        let request = http::Request::post(path).body(String::new()).unwrap();
        let answer = platform.api.call(request).await;
        let headers = answer.headers();
        assert_eq!(headers["grpc-status"], "12");
        let message = headers["grpc-message"].to_str().unwrap().replace("%20", " ");
        assert!(message.contains(words), "{message}");
    }
}

#[tokio::test]
async fn a_container_does_what_its_code_may_and_no_more() {
    let platform = Platform::start().await;
    let app = platform.deploy("app").await.function("f").await.publish().await;
    let input = pb::FunctionMapRequest {
        function_id: app.function("f").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        pipelined_inputs: vec![crate::support::cbor_input(0, b"x")],
        ..Default::default()
    };
    platform.client().function_map(input.clone()).await.unwrap();
    let container = platform.container(app.function("f")).await;
    let mut inside = container.client.clone();
    inside.container_hello(()).await.unwrap();
    let lookup = pb::FunctionGetRequest {
        app_name: "app".to_owned(),
        object_tag: "f".to_owned(),
        ..Default::default()
    };
    inside.function_get(lookup).await.unwrap();
    inside.function_map(input).await.unwrap();

    let words = "is not allowed from inside a container";
    assert_refused(
        inside.secret_list(pb::SecretListRequest::default()).await,
        Code::PermissionDenied,
        words,
    );
    assert_refused(
        inside.app_list(pb::AppListRequest::default()).await,
        Code::PermissionDenied,
        words,
    );
    assert_refused(
        inside.app_stop(pb::AppStopRequest::default()).await,
        Code::PermissionDenied,
        words,
    );
    assert_refused(
        inside.token_info_get(pb::TokenInfoGetRequest::default()).await,
        Code::PermissionDenied,
        words,
    );
    let environment = pb::EnvironmentGetOrCreateRequest {
        deployment_name: "new".to_owned(),
        object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
    };
    let answer = inside.environment_get_or_create(environment).await;
    assert_refused(answer, Code::PermissionDenied, "must not create environments");
    let new_app = pb::AppGetOrCreateRequest {
        app_name: "new".to_owned(),
        object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
        ..Default::default()
    };
    assert_refused(
        inside.app_get_or_create(new_app).await,
        Code::PermissionDenied,
        "must not create apps",
    );
    let other = pb::ContainerStopRequest {
        task_id: ContainerId::generate().to_string(),
        ..Default::default()
    };
    assert_refused(
        inside.container_stop(other).await,
        Code::PermissionDenied,
        "a container may stop itself only",
    );
}

#[tokio::test]
async fn a_developer_does_not_speak_for_a_container() {
    let platform = Platform::start().await;
    let answer = platform
        .client()
        .function_get_inputs(pb::FunctionGetInputsRequest::default())
        .await;
    assert_refused(answer, Code::PermissionDenied, "only containers may send this request");
}

#[tokio::test]
async fn a_restricted_function_calls_nothing() {
    let platform = Platform::start().await;
    let deploy = platform
        .deploy("app")
        .await
        .function_with("f", |function| function.untrusted = true)
        .await;
    let app = deploy.publish().await;
    let request = pb::FunctionMapRequest {
        function_id: app.function("f").to_string(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        pipelined_inputs: vec![crate::support::cbor_input(0, b"x")],
        ..Default::default()
    };
    platform.client().function_map(request.clone()).await.unwrap();
    let container = platform.container(app.function("f")).await;
    let input = container.next().await;
    container.succeed(&input, b"y").await;
    let answer = container.client.clone().function_map(request).await;
    assert_refused(answer, Code::PermissionDenied, "restrict_modal_access=True");
}

#[tokio::test]
async fn a_credential_is_worth_nothing_after_its_container_has_ended() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let deploy = deploy.function_with("f", |function| function.warm_pool_size = 1).await;
    let app = deploy.publish().await;
    let container = platform.container(app.function("f")).await;
    container.client.clone().container_hello(()).await.unwrap();
    platform
        .worker
        .exit(container.id, ContainerExit::Signaled { signal: 9 })
        .await;
    eventually("the end of the container", || async {
        container.client.clone().container_hello(()).await.err()
    })
    .await;
    assert_refused(
        container.client.clone().container_hello(()).await,
        Code::Unauthenticated,
        "has ended",
    );
    let forged = client_of(
        &platform.api,
        &[("x-ionian-container", &format!("{}.00", container.id))],
    );
    assert_refused(
        forged.clone().container_hello(()).await,
        Code::Unauthenticated,
        "not valid",
    );
}
