//! What a client gets beyond a limit. The limits are listed in `docs/limits.md`.

use ionian_proto::client as pb;
use tonic::Code;

use crate::support::deploy::definition;
use crate::support::{Platform, assert_refused};

type Change = fn(&mut pb::Function);

#[tokio::test]
async fn names_that_are_too_long_are_refused() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let long = "a".repeat(65);
    let app = pb::AppGetOrCreateRequest {
        app_name: long.clone(),
        object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
        ..Default::default()
    };
    assert_refused(client.app_get_or_create(app).await, Code::InvalidArgument, "up to 64");
    let described = pb::AppCreateRequest {
        description: "a".repeat(1_001),
        app_state: pb::AppState::Ephemeral.into(),
        ..Default::default()
    };
    assert_refused(client.app_create(described).await, Code::InvalidArgument, "up to 1000");
    let environment = pb::EnvironmentCreateRequest {
        name: long.clone(),
        ..Default::default()
    };
    assert_refused(
        client.environment_create(environment).await,
        Code::InvalidArgument,
        "up to 64",
    );
    let secret = pb::SecretGetOrCreateRequest {
        deployment_name: long,
        object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
        ..Default::default()
    };
    assert_refused(
        client.secret_get_or_create(secret).await,
        Code::InvalidArgument,
        "up to 64",
    );
}

#[tokio::test]
async fn a_secret_that_fits_no_environment_is_refused() {
    let platform = Platform::start().await;
    let secret = pb::SecretGetOrCreateRequest {
        object_creation_type: pb::ObjectCreationType::Ephemeral.into(),
        env_dict: [("A".to_owned(), "a".repeat(512 * 1024))].into(),
        ..Default::default()
    };
    assert_refused(
        platform.client().secret_get_or_create(secret).await,
        Code::InvalidArgument,
        "at most 524288 fit",
    );
}

#[tokio::test]
async fn too_many_files_of_a_mount_are_refused() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let asked = pb::MountBatchedCheckExistenceRequest {
        sha256_hex_hashes: vec!["0".repeat(64); 10_001],
    };
    assert_refused(
        client.mount_batched_check_existence(asked).await,
        Code::InvalidArgument,
        "at most 10000 files",
    );
    let many = pb::MountGetOrCreateRequest {
        files: vec![pb::MountFile::default(); 200_001],
        ..Default::default()
    };
    assert_refused(
        client.mount_get_or_create(many).await,
        Code::InvalidArgument,
        "at most 200000 are supported",
    );
    let deep = pb::MountGetOrCreateRequest {
        files: vec![pb::MountFile {
            filename: format!("/{}", "a".repeat(4_096)),
            ..Default::default()
        }],
        ..Default::default()
    };
    let refused = client.mount_get_or_create(deep).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn numbers_of_a_function_that_are_too_large_are_refused() {
    let platform = Platform::start().await;
    let deploy = platform.deploy("app").await;
    let changes: [(Change, &str); 4] = [
        (
            |f| {
                f.retry_policy = Some(pb::FunctionRetryPolicy {
                    retries: 101,
                    ..Default::default()
                });
            },
            "101 retries; at most 100",
        ),
        (|f| f.batch_max_size = 1_001, "1001 inputs in a batch; at most 1000"),
        (
            |f| {
                f.batch_max_size = 2;
                f.batch_linger_ms = 600_001;
            },
            "600001 milliseconds",
        ),
        (
            |f| f.max_concurrent_inputs = 10_001,
            "10001 concurrent inputs; at most 10000",
        ),
    ];
    for (change, words) in changes {
        let mut function = definition("f");
        change(&mut function);
        let request = pb::FunctionCreateRequest {
            app_id: deploy.app_id.clone(),
            function: Some(function),
            ..Default::default()
        };
        let answer = Box::pin(platform.client().function_create(request)).await;
        assert_refused(answer, Code::InvalidArgument, words);
    }
}

#[tokio::test]
async fn more_builds_than_a_machine_can_bear_are_refused() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let build = |number: u32| pb::ImageGetOrCreateRequest {
        image: Some(pb::Image {
            dockerfile_commands: vec![format!("FROM base{number}"), "RUN wait".to_owned()],
            ..Default::default()
        }),
        ..Default::default()
    };
    for number in 0..32 {
        client.image_get_or_create(build(number)).await.unwrap();
    }
    assert_refused(
        client.image_get_or_create(build(32)).await,
        Code::ResourceExhausted,
        "32 images are being built",
    );
    // Whoever asks for one of those that are built waits with the others.
    client.image_get_or_create(build(0)).await.unwrap();
}
