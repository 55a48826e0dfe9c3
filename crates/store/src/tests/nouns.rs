//! Every noun comes back as it was written, also after the file was opened again.

use std::collections::BTreeMap;

use bytes::Bytes;
use ionian_domain::ErrorKind;
use ionian_domain::app::AppState;
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{
    AppId, ContainerId, DefinitionId, EnvironmentId, FunctionId, ImageId, MountId, SecretId, TokenId, WorkerId,
};
use ionian_domain::image::{
    BuiltImage, ContextFile, Image, ImageConfig, ImageMetadata, ImageSpec, ImageState, RegistryAuth,
};
use ionian_domain::mount::{Mount, MountFile};
use ionian_domain::record::Write;
use ionian_domain::secret::Secret;
use ionian_domain::web::AnnouncedEndpoint;

use super::{TestStore, app, at, environment};
use crate::idempotency::IdempotencyRecord;
use crate::labels::{LabelClaim, OnHeld, WebLabel};
use crate::tokens::TokenRecord;

#[tokio::test]
async fn environments() {
    let mut test = TestStore::open().await;
    let (main, mut dev) = (environment("main", true), environment("dev", false));
    test.store.environments().insert(&main).await.unwrap();
    test.store.environments().insert(&dev).await.unwrap();
    let second_default = test
        .store
        .environments()
        .insert(&environment("other", true))
        .await
        .unwrap_err();
    assert_eq!(second_default.kind(), ErrorKind::AlreadyExists);
    let same_name = test
        .store
        .environments()
        .insert(&environment("dev", false))
        .await
        .unwrap_err();
    assert_eq!(same_name.kind(), ErrorKind::AlreadyExists);

    dev.web_suffix = "d".to_owned();
    test.store.environments().update(&dev).await.unwrap();
    test.reopen().await;
    let environments = test.store.environments();
    assert_eq!(environments.list().await.unwrap(), [dev.clone(), main.clone()]);
    assert_eq!(environments.find_default().await.unwrap(), Some(main.clone()));
    assert_eq!(environments.find_by_name("dev").await.unwrap(), Some(dev.clone()));
    assert_eq!(environments.find(dev.id).await.unwrap(), Some(dev.clone()));
    let missing = environments.update(&environment("x", false)).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);

    assert_eq!(
        environments.delete(main.id).await.unwrap_err().kind(),
        ErrorKind::PreconditionFailed
    );
    assert_eq!(
        environments.delete(EnvironmentId::generate()).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let app = app(&dev, Some("hello"), at(2));
    test.store.apps().insert(&app).await.unwrap();
    let refused = environments.delete(dev.id).await.unwrap_err();
    assert_eq!(
        refused.source.to_string(),
        "app 'hello' in environment 'dev' is not stopped"
    );
    test.store
        .apps()
        .set_state(app.id, AppState::Stopped, at(3))
        .await
        .unwrap();
    environments.delete(dev.id).await.unwrap();
    assert_eq!(environments.list().await.unwrap(), [main]);
    assert_eq!(test.store.apps().find(app.id).await.unwrap(), None);
}

#[tokio::test]
async fn tokens() {
    let mut test = TestStore::open().await;
    let token = TokenRecord {
        id: TokenId::generate(),
        name: "laptop".to_owned(),
        secret_hash: [0xAB; 32],
        created_at: at(1),
        revoked_at: None,
        last_used_at: None,
    };
    test.store.tokens().insert(&token).await.unwrap();
    assert!(!format!("{token:?}").contains("171"), "the hash must not reach a log");
    test.reopen().await;
    let tokens = test.store.tokens();
    assert_eq!(tokens.find(token.id).await.unwrap(), Some(token.clone()));
    tokens.touch(token.id, at(5)).await.unwrap();
    tokens.revoke(token.id, at(6)).await.unwrap();
    tokens.revoke(token.id, at(7)).await.unwrap();
    let revoked = TokenRecord {
        last_used_at: Some(at(5)),
        revoked_at: Some(at(6)),
        ..token
    };
    assert_eq!(tokens.list().await.unwrap(), [revoked]);
    assert_eq!(
        tokens.revoke(TokenId::generate(), at(6)).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn images() {
    let mut test = TestStore::open().await;
    let image = |state: ImageState, micros: i64| Image {
        id: ImageId::generate(),
        app_id: Some(AppId::generate()),
        spec: ImageSpec {
            base_images: vec![("base".to_owned(), ImageId::generate())],
            dockerfile_commands: vec!["FROM base".to_owned(), "RUN true".to_owned()],
            context_files: vec![ContextFile {
                name: "/a".to_owned(),
                sha256_hex: "00".to_owned(),
            }],
            context_mount_id: Some(MountId::generate()),
            secret_ids: vec![SecretId::generate()],
            build_args: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            registry_auth: RegistryAuth::Aws(SecretId::generate()),
            gpu: Some("T4".to_owned()),
            build_function_id: Some(FunctionId::generate()),
            builder_version: "2025.06".to_owned(),
        },
        state,
        created_at: at(micros),
    };
    let mut building = image(ImageState::Building, 1);
    let failed = image(
        ImageState::Failed {
            message: "pip said no".to_owned(),
        },
        2,
    );
    for image in [&building, &failed] {
        test.store.images().upsert(image).await.unwrap();
    }
    test.reopen().await;
    let images = test.store.images();
    assert_eq!(images.list_building().await.unwrap(), [building.clone()]);
    building.state = ImageState::Ready {
        image: BuiltImage {
            layers: vec!["a".to_owned(), "b".to_owned()],
            config: ImageConfig {
                env: vec![("A".to_owned(), "b".to_owned())],
                ..ImageConfig::default()
            },
            metadata: ImageMetadata {
                python_packages: BTreeMap::from([("fastapi".to_owned(), "1".to_owned())]),
                ..ImageMetadata::default()
            },
        },
    };
    images.set_state(building.id, &building.state).await.unwrap();
    assert_eq!(images.find(building.id).await.unwrap(), Some(building.clone()));
    assert_eq!(images.list_building().await.unwrap(), []);
    assert_eq!(images.list(10).await.unwrap(), [failed.clone(), building]);
    assert_eq!(images.list(1).await.unwrap(), [failed.clone()]);
    let missing = images.set_state(ImageId::generate(), &failed.state).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn mounts() {
    let mut test = TestStore::open().await;
    let mount = |path: &str| Mount {
        id: MountId::generate(),
        checksum_hex: "ff".to_owned(),
        files: vec![MountFile {
            path: path.to_owned(),
            sha256_hex: "00".to_owned(),
            mode: None,
        }],
    };
    let (first, second) = (mount("/a"), mount("/ä \u{1F600}"));
    for mount in [&first, &second, &first] {
        test.store.mounts().upsert(mount).await.unwrap();
    }
    test.store.mounts().set_named("client", first.id).await.unwrap();
    test.reopen().await;
    let mounts = test.store.mounts();
    assert_eq!(mounts.find_named("client").await.unwrap(), Some(first));
    mounts.set_named("client", second.id).await.unwrap();
    assert_eq!(mounts.find_named("client").await.unwrap(), Some(second.clone()));
    assert_eq!(mounts.find(second.id).await.unwrap(), Some(second));
    assert_eq!(mounts.find_named("other").await.unwrap(), None);
    let dangling = mounts.set_named("other", MountId::generate()).await.unwrap_err();
    assert_eq!(dangling.kind(), ErrorKind::PreconditionFailed);
}

#[tokio::test]
async fn secrets() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let secret = |name: Option<&str>, micros: i64| Secret {
        id: SecretId::generate(),
        environment_id: main.id,
        name: name.map(str::to_owned),
        app_id: name.is_none().then(AppId::generate),
        keys: vec!["A".to_owned()],
        sealed: vec![0, 1, 255],
        created_at: at(micros),
        updated_at: at(micros),
        last_used_at: None,
    };
    let (mut a, b, anonymous, other) = (
        secret(Some("a"), 1),
        secret(Some("b"), 2),
        secret(None, 3),
        secret(None, 4),
    );
    for secret in [&a, &b, &anonymous, &other] {
        test.store.secrets().insert(secret).await.unwrap();
    }
    let taken = test.store.secrets().insert(&secret(Some("a"), 9)).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    test.reopen().await;
    let secrets = test.store.secrets();
    assert_eq!(secrets.find(anonymous.id).await.unwrap(), Some(anonymous.clone()));
    assert_eq!(secrets.find_by_name(main.id, "a").await.unwrap(), Some(a.clone()));
    assert_eq!(
        secrets.list(main.id, at(100), 10).await.unwrap(),
        [b.clone(), a.clone()]
    );
    assert_eq!(secrets.list(main.id, at(2), 10).await.unwrap(), [a.clone()]);
    assert_eq!(secrets.list(main.id, at(100), 1).await.unwrap(), [b.clone()]);
    let many = secrets.get_many(&[b.id, anonymous.id, a.id]).await.unwrap();
    assert_eq!(many, [b.clone(), anonymous.clone(), a.clone()]);
    let missing = SecretId::generate();
    let error = secrets.get_many(&[a.id, missing]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.source.to_string(), format!("secret {missing} does not exist"));

    (a.keys, a.sealed, a.updated_at) = (vec!["B".to_owned(), "C".to_owned()], vec![9], at(20));
    secrets.update_sealed(a.id, &a.keys, &a.sealed, at(20)).await.unwrap();
    secrets.touch(&[a.id], at(21)).await.unwrap();
    secrets.touch(&[], at(22)).await.unwrap();
    a.last_used_at = Some(at(21));
    assert_eq!(secrets.find(a.id).await.unwrap(), Some(a.clone()));
    assert_eq!(secrets.find(b.id).await.unwrap(), Some(b));
    assert!(secrets.delete(a.id).await.unwrap());
    assert!(!secrets.delete(a.id).await.unwrap());
    assert_eq!(
        secrets.update_sealed(a.id, &[], &[], at(1)).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn web_labels_have_one_holder() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let (ours, theirs) = (app(&main, Some("a"), at(1)), app(&main, Some("b"), at(2)));
    for app in [&ours, &theirs] {
        test.store.apps().insert(app).await.unwrap();
    }
    let label = |app: AppId, method: Option<&str>| WebLabel {
        environment_id: main.id,
        label: "hello".to_owned(),
        app_id: app,
        function_id: FunctionId::generate(),
        method: method.map(str::to_owned),
    };
    let labels = test.store.labels();
    let (mine, mine_moved, foreign) = (label(ours.id, None), label(ours.id, Some("m")), label(theirs.id, None));
    assert_eq!(labels.claim(&mine, OnHeld::Keep).await.unwrap(), LabelClaim::Granted);
    assert_eq!(
        labels.claim(&mine_moved, OnHeld::Keep).await.unwrap(),
        LabelClaim::Granted
    );
    assert_eq!(
        labels.claim(&foreign, OnHeld::Keep).await.unwrap(),
        LabelClaim::Held(mine_moved.clone())
    );
    test.reopen().await;
    let labels = test.store.labels();
    assert_eq!(labels.list().await.unwrap(), [mine_moved.clone()]);
    assert_eq!(
        labels.claim(&foreign, OnHeld::Steal).await.unwrap(),
        LabelClaim::Stolen(mine_moved)
    );
    assert_eq!(labels.find(main.id, "hello").await.unwrap(), Some(foreign.clone()));
    assert_eq!(labels.release_app(ours.id).await.unwrap(), 0);
    assert!(!labels.release(main.id, "hello", ours.id).await.unwrap());
    assert_eq!(labels.release_app(theirs.id).await.unwrap(), 1);
    assert_eq!(labels.claim(&mine, OnHeld::Keep).await.unwrap(), LabelClaim::Granted);
    assert!(labels.release(main.id, "hello", ours.id).await.unwrap());
}

#[tokio::test]
async fn facts_and_answers() {
    let mut test = TestStore::open().await;
    test.store.meta().set("key check", b"\x00\xff").await.unwrap();
    assert_eq!(
        test.store.meta().ensure("key check", b"other").await.unwrap().as_ref(),
        b"\x00\xff"
    );
    assert_eq!(test.store.meta().ensure("instance", b"").await.unwrap().as_ref(), b"");
    let answer = |key: &str, rpc: &str, response: &'static [u8], micros: i64| IdempotencyRecord {
        key: key.to_owned(),
        rpc: rpc.to_owned(),
        response: Bytes::from_static(response),
        at: at(micros),
    };
    for record in [
        answer("k", "A", b"1", 1),
        answer("k", "B", b"2", 2),
        answer("k", "A", b"late", 3),
    ] {
        test.store.idempotency().remember(&record).await.unwrap();
    }
    test.reopen().await;
    assert_eq!(
        test.store.meta().find("key check").await.unwrap().unwrap().as_ref(),
        b"\x00\xff"
    );
    assert_eq!(test.store.meta().find("nothing").await.unwrap(), None);
    let idempotency = test.store.idempotency();
    assert_eq!(
        idempotency.recall("k", "A").await.unwrap().unwrap().as_ref(),
        b"1",
        "the first answer stays"
    );
    assert_eq!(idempotency.recall("k", "C").await.unwrap(), None);
    assert_eq!(idempotency.sweep(at(3), 1).await.unwrap(), 1);
    assert_eq!(idempotency.recall("k", "A").await.unwrap(), None);
    assert_eq!(idempotency.recall("k", "B").await.unwrap().unwrap().as_ref(), b"2");
    assert_eq!(idempotency.sweep(at(3), 10).await.unwrap(), 1);
}

#[tokio::test]
async fn web_endpoints_of_live_containers() {
    let mut test = TestStore::open().await;
    let (live, ended) = (ContainerId::generate(), ContainerId::generate());
    let created = |container_id| Write::ContainerCreated {
        container_id,
        worker_id: WorkerId::generate(),
        app_id: AppId::generate(),
        function_id: FunctionId::generate(),
        definition_id: DefinitionId::generate(),
        at: at(1),
    };
    let writes = vec![
        created(live),
        created(ended),
        Write::ContainerEnded {
            container_id: ended,
            exit: ContainerExit::Lost,
            at: at(2),
        },
    ];
    test.store.calls().commit(writes, &[]).await.unwrap();
    let endpoints = vec![
        AnnouncedEndpoint { method: None, port: 1 },
        AnnouncedEndpoint {
            method: Some("m".to_owned()),
            port: 65_535,
        },
    ];
    assert!(test.store.containers().live_web_endpoints().await.unwrap().is_empty());
    for id in [live, ended, ContainerId::generate()] {
        test.store
            .containers()
            .note_web_endpoints(id, &endpoints, at(3))
            .await
            .unwrap();
    }
    test.reopen().await;
    let noted = test.store.containers().live_web_endpoints().await.unwrap();
    assert_eq!(noted, [(live, endpoints)].into());
    let pending = test.store.calls().load_pending().await.unwrap().containers;
    assert_eq!(pending.len(), 1);
    assert_eq!(pending[0].web_ready_at, Some(at(3)));
}
