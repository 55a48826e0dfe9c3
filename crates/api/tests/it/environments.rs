//! Environments.

use ionian_proto::client as pb;
use tonic::Code;

use crate::support::{Platform, assert_refused, tried};

#[tokio::test]
async fn there_is_a_default_environment_that_says_how_images_are_built() {
    let platform = Platform::start().await;
    let request = pb::EnvironmentGetOrCreateRequest::default();
    let answer = platform
        .client()
        .environment_get_or_create(request)
        .await
        .unwrap()
        .into_inner();
    let metadata = answer.metadata.unwrap();
    assert_eq!(metadata.name, "main");
    assert_eq!(metadata.settings.unwrap().image_builder_version, "2025.06");
    let listed = platform.client().environment_list(()).await.unwrap().into_inner().items;
    assert_eq!(listed.len(), 1);
    assert!(listed[0].default);
}

#[tokio::test]
async fn an_environment_is_created_once_and_its_request_may_be_repeated() {
    let platform = Platform::start().await;
    let request = || pb::EnvironmentCreateRequest {
        name: "staging".to_owned(),
        ..Default::default()
    };
    platform
        .client()
        .environment_create(tried(request(), "key", 0))
        .await
        .unwrap();
    platform
        .client()
        .environment_create(tried(request(), "key", 1))
        .await
        .unwrap();
    let again = platform.client().environment_create(tried(request(), "other", 0)).await;
    assert_refused(again, Code::AlreadyExists, "'staging' exists already");
    let invalid = pb::EnvironmentCreateRequest {
        name: "no spaces".to_owned(),
        ..Default::default()
    };
    assert_refused(
        platform.client().environment_create(invalid).await,
        Code::InvalidArgument,
        "'no spaces'",
    );
    let unknown = pb::EnvironmentGetOrCreateRequest {
        deployment_name: "nowhere".to_owned(),
        ..Default::default()
    };
    let answer = platform.client().environment_get_or_create(unknown).await;
    assert_refused(answer, Code::NotFound, "environment 'nowhere' does not exist");
}
