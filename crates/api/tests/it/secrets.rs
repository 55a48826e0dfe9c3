//! Secrets: kept, listed, handed to containers, never shown.

use std::collections::BTreeMap;

use ionian_proto::client as pb;
use pb::ObjectCreationType as Creation;
use tonic::{Code, Status};

use crate::support::deploy::create_app;
use crate::support::{Client, Platform, assert_refused, eventually, tried};

fn values(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn named(name: &str, creation: Creation, pairs: &[(&str, &str)]) -> pb::SecretGetOrCreateRequest {
    pb::SecretGetOrCreateRequest {
        deployment_name: name.to_owned(),
        object_creation_type: creation.into(),
        env_dict: values(pairs),
        ..Default::default()
    }
}

async fn send(client: &mut Client, request: pb::SecretGetOrCreateRequest) -> Result<String, Status> {
    client
        .secret_get_or_create(request)
        .await
        .map(|answer| answer.into_inner().secret_id)
}

#[tokio::test]
async fn a_named_secret_is_created_overwritten_looked_up_and_deleted() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let missing = send(&mut client, named("keys", Creation::Unspecified, &[])).await;
    assert_refused(
        missing,
        Code::NotFound,
        "Secret 'keys' not found in environment 'main'; create it with",
    );
    let create = || named("keys", Creation::CreateFailIfExists, &[("A", "1")]);
    let id = client
        .secret_get_or_create(tried(create(), "key", 0))
        .await
        .unwrap()
        .into_inner()
        .secret_id;
    let again = client
        .secret_get_or_create(tried(create(), "key", 1))
        .await
        .unwrap()
        .into_inner()
        .secret_id;
    assert_eq!(id, again, "the same request, repeated");
    assert_refused(
        send(&mut client, create()).await,
        Code::AlreadyExists,
        "'keys' already exists",
    );
    let replaced = send(
        &mut client,
        named("keys", Creation::CreateOverwriteIfExists, &[("B", "2")]),
    )
    .await;
    assert_eq!(replaced.unwrap(), id);
    assert_eq!(
        send(&mut client, named("keys", Creation::CreateIfMissing, &[("C", "3")]))
            .await
            .unwrap(),
        id
    );
    let request = pb::SecretGetOrCreateRequest {
        required_keys: vec!["A".to_owned(), "B".to_owned()],
        ..named("keys", Creation::Unspecified, &[])
    };
    assert_refused(
        send(&mut client, request).await,
        Code::NotFound,
        "is missing the required key(s) A;",
    );
    let info = client
        .secret_get_info(pb::SecretGetInfoRequest { secret_id: id.clone() })
        .await
        .unwrap()
        .into_inner();
    let metadata = info.metadata.unwrap();
    assert_eq!(
        (metadata.keys, metadata.environment_name.as_str()),
        (vec!["B".to_owned()], "main")
    );
    let delete = || pb::SecretDeleteRequest { secret_id: id.clone() };
    client.secret_delete(tried(delete(), "d", 0)).await.unwrap();
    client.secret_delete(tried(delete(), "d", 1)).await.unwrap();
    assert_refused(client.secret_delete(delete()).await, Code::NotFound, &id);
}

#[tokio::test]
async fn secrets_are_listed_page_by_page_without_anonymous_ones() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    for name in ["one", "two", "three"] {
        send(&mut client, named(name, Creation::CreateFailIfExists, &[("A", "1")]))
            .await
            .unwrap();
    }
    send(&mut client, named("", Creation::Ephemeral, &[("A", "1")]))
        .await
        .unwrap();
    let mut listed = Vec::new();
    let mut created_before = 0.0;
    loop {
        let pagination = pb::ListPagination {
            max_objects: 2,
            created_before,
        };
        let request = pb::SecretListRequest {
            pagination: Some(pagination),
            ..Default::default()
        };
        let items = client.secret_list(request).await.unwrap().into_inner().items;
        let full = items.len() == 2;
        for item in items {
            assert!(item.secret_id.starts_with("st-"));
            created_before = item.metadata.unwrap().creation_info.unwrap().created_at;
            listed.push(item.label);
        }
        if !full {
            break;
        }
    }
    assert_eq!(listed, ["three", "two", "one"]);
}

#[tokio::test]
async fn equal_values_without_a_name_are_one_secret() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let mut anonymous = Vec::new();
    for value in ["1", "1", "2"] {
        let app_id = create_app(&mut client, "run", pb::AppState::Ephemeral).await;
        let request = pb::SecretGetOrCreateRequest {
            app_id,
            ..named("", Creation::AnonymousOwnedByApp, &[("A", value)])
        };
        anonymous.push(send(&mut client, request).await.unwrap());
    }
    assert_eq!(
        anonymous[0], anonymous[1],
        "an image that uses it is not built with every run"
    );
    assert_ne!(anonymous[0], anonymous[2]);
}

#[tokio::test]
async fn a_container_gets_the_values_and_the_secret_remembers_its_use() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    let one = send(
        &mut client,
        named("one", Creation::CreateFailIfExists, &[("A", "1"), ("B", "1")]),
    )
    .await
    .unwrap();
    let two = send(&mut client, named("two", Creation::CreateFailIfExists, &[("B", "2")]))
        .await
        .unwrap();
    let deploy = platform.deploy("app").await.function_with("f", |function| {
        function.secret_ids = vec![one.clone(), two];
        function.warm_pool_size = 1;
    });
    let app = deploy.await.publish().await;
    let container = platform.container(app.function("f")).await;
    let used = eventually("the use of the secret", || async {
        let info = client
            .clone()
            .secret_get_info(pb::SecretGetInfoRequest { secret_id: one.clone() })
            .await;
        let used = info.unwrap().into_inner().metadata.unwrap().last_used_at;
        (used > 0.0).then_some(used)
    })
    .await;
    assert!(used > 1e9);
    let spec = platform.worker.spec(container.id);
    let env: BTreeMap<String, String> = spec.secret_env.iter().cloned().collect();
    assert_eq!(env, values(&[("A", "1"), ("B", "2")]), "what comes later wins");
}

#[tokio::test]
async fn what_cannot_be_an_environment_variable_is_refused() {
    let platform = Platform::start().await;
    let mut client = platform.client();
    for (key, value) in [("", "x"), ("A=B", "x"), ("A", "x\0y")] {
        let answer = send(&mut client, named("s", Creation::CreateFailIfExists, &[(key, value)])).await;
        assert_refused(answer, Code::InvalidArgument, "cannot be an environment variable");
    }
    let large = "x".repeat(600_000);
    let answer = send(&mut client, named("s", Creation::CreateFailIfExists, &[("A", &large)])).await;
    assert_refused(answer, Code::InvalidArgument, "at most 524288");
    let answer = send(&mut client, named("a b", Creation::CreateFailIfExists, &[("A", "1")])).await;
    assert_refused(answer, Code::InvalidArgument, "'a b' is not a valid name");
}
