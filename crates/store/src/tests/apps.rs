//! Apps, their versions, functions and classes.

use std::collections::BTreeMap;

use bytes::Bytes;
use ionian_domain::ErrorKind;
use ionian_domain::app::{AppLayout, AppState, AppVersion};
use ionian_domain::function::Binding;
use ionian_domain::ids::{AppId, ClassId, DefinitionId, FunctionId};

use super::{TestStore, app, at, environment, function};
use crate::apps::PublishRecord;
use crate::classes::Class;

#[tokio::test]
async fn apps_are_found_by_name_and_state() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let mut old = app(&main, Some("hello"), at(1));
    old.tags = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
    let new = app(&main, Some("hello"), at(2));
    let unnamed = app(&main, None, at(3));
    for app in [&old, &new, &unnamed] {
        test.store.apps().insert(app).await.unwrap();
    }
    test.reopen().await;
    let apps = test.store.apps();
    assert_eq!(apps.find(old.id).await.unwrap(), Some(old.clone()));
    assert_eq!(apps.find_by_name(main.id, "hello").await.unwrap(), Some(new.clone()));
    apps.set_state(new.id, AppState::Stopping, at(8)).await.unwrap();
    assert_eq!(apps.find(new.id).await.unwrap().unwrap().stopped_at, None);
    apps.set_state(new.id, AppState::Stopped, at(9)).await.unwrap();
    apps.set_state(new.id, AppState::Stopped, at(10)).await.unwrap();
    assert_eq!(apps.find_by_name(main.id, "hello").await.unwrap().unwrap().id, old.id);
    let last = apps.find_last_by_name(main.id, "hello").await.unwrap().unwrap();
    assert_eq!(
        (last.id, last.state, last.stopped_at),
        (new.id, AppState::Stopped, Some(at(9)))
    );
    let ids = |list: Vec<ionian_domain::app::App>| list.iter().map(|app| app.id).collect::<Vec<_>>();
    assert_eq!(
        ids(apps.list(main.id, 10).await.unwrap()),
        [unnamed.id, old.id, new.id],
        "live ones first"
    );
    assert_eq!(ids(apps.list(main.id, 1).await.unwrap()), [unnamed.id]);
    assert_eq!(ids(apps.list_all_live().await.unwrap()), [old.id, unnamed.id]);
    apps.set_tags(old.id, &BTreeMap::new()).await.unwrap();
    assert_eq!(apps.find(old.id).await.unwrap().unwrap().tags, BTreeMap::new());
    apps.set_state(old.id, AppState::Deployed, at(11)).await.unwrap();
    assert_eq!(apps.find(old.id).await.unwrap().unwrap().deployed_at, Some(at(11)));
    let missing = AppId::generate();
    assert_eq!(
        apps.set_state(missing, AppState::Stopped, at(1))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        apps.set_tags(missing, &BTreeMap::new()).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let nowhere = app(&environment("nowhere", false), None, at(1));
    assert_eq!(
        apps.insert(&nowhere).await.unwrap_err().kind(),
        ErrorKind::PreconditionFailed
    );
}

#[tokio::test]
async fn a_publish_and_a_rollback_move_all_pointers_at_once() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let app = app(&main, None, at(1));
    test.store.apps().insert(&app).await.unwrap();
    let first = function(&app, "f");
    test.store.functions().upsert(&first).await.unwrap();
    let definitions = test.store.functions().newest_definitions(app.id).await.unwrap();
    assert_eq!(definitions, BTreeMap::from([(first.id, first.definition_id)]));
    let publish = |number: u32, definition: DefinitionId| PublishRecord {
        state: Some(AppState::Deployed),
        name: Some("hello".to_owned()),
        version: AppVersion {
            app_id: app.id,
            version: number,
            layout: AppLayout {
                functions: BTreeMap::from([("f".to_owned(), first.id)]),
                classes: BTreeMap::from([("C".to_owned(), ClassId::generate())]),
            },
            deployed_at: at(10 + i64::from(number)),
            deployed_by: "me".to_owned(),
            client_version: "1.6.4".to_owned(),
            tag: format!("v{number}"),
        },
        definitions: BTreeMap::from([(first.id, definition)]),
    };
    let v1 = publish(1, first.definition_id);
    test.store.apps().publish(&v1).await.unwrap();

    // A draft is not what runs, until it is published.
    let mut second = first.clone();
    second.definition_id = DefinitionId::generate();
    second.spec.timeout = std::time::Duration::from_secs(1);
    second.spec.definition = Bytes::from_static(b"second");
    test.store.functions().upsert(&second).await.unwrap();
    test.reopen().await;
    let (apps, functions) = (test.store.apps(), test.store.functions());
    assert_eq!(functions.find(first.id).await.unwrap(), Some(second.clone()));
    assert_eq!(functions.find_published(first.id).await.unwrap(), Some(first.clone()));
    let v2 = publish(2, second.definition_id);
    apps.publish(&v2).await.unwrap();
    assert_eq!(functions.find_published(first.id).await.unwrap(), Some(second.clone()));

    let taken = apps.publish(&v2).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    let foreign = apps.publish(&publish(3, DefinitionId::generate())).await.unwrap_err();
    assert_eq!(foreign.kind(), ErrorKind::NotFound);
    let published = apps.find(app.id).await.unwrap().unwrap();
    assert_eq!(
        (published.version, published.deployed_at),
        (2, Some(at(12))),
        "nothing of a failed publish is seen"
    );
    assert_eq!(published.layout, v2.version.layout);
    assert_eq!(
        (published.name.as_deref(), published.state),
        (Some("hello"), AppState::Deployed)
    );

    let before = apps.find_version(app.id, 1).await.unwrap().unwrap();
    assert_eq!((&before.version, &before.definitions), (&v1.version, &v1.definitions));
    let rollback = PublishRecord {
        state: None,
        name: None,
        ..publish(3, first.definition_id)
    };
    apps.publish(&rollback).await.unwrap();
    assert_eq!(functions.find_published(first.id).await.unwrap(), Some(first.clone()));
    assert_eq!(functions.list_published_by_app(app.id).await.unwrap(), [first.clone()]);
    let rolled_back = apps.find(app.id).await.unwrap().unwrap();
    assert_eq!((rolled_back.version, rolled_back.deployed_at), (3, Some(at(13))));
    assert_eq!(rolled_back.name.as_deref(), Some("hello"));
    let numbers: Vec<u32> = apps
        .versions(app.id)
        .await
        .unwrap()
        .iter()
        .map(|v| v.version.version)
        .collect();
    assert_eq!(numbers, [3, 2, 1]);

    apps.set_state(app.id, AppState::Stopping, at(20)).await.unwrap();
    let stopped = apps.publish(&publish(4, first.definition_id)).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::PreconditionFailed);
    let unknown = PublishRecord {
        version: AppVersion {
            app_id: AppId::generate(),
            ..v1.version.clone()
        },
        ..publish(1, first.definition_id)
    };
    assert_eq!(apps.publish(&unknown).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn functions_and_their_definitions() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let app = app(&main, None, at(1));
    test.store.apps().insert(&app).await.unwrap();
    let base = function(&app, "C.*");
    let mut bound = function(&app, "C.*");
    bound.created_at = at(6);
    bound.binding = Some(Binding {
        base: base.id,
        serialized_params: Bytes::new(),
    });
    let orphan = test.store.functions().upsert(&bound).await.unwrap_err();
    assert_eq!(orphan.kind(), ErrorKind::PreconditionFailed, "a variant needs its base");
    for function in [&base, &bound] {
        test.store.functions().upsert(function).await.unwrap();
    }
    test.reopen().await;
    let functions = test.store.functions();
    assert_eq!(functions.find(base.id).await.unwrap(), Some(base.clone()));
    assert_eq!(functions.find_published(bound.id).await.unwrap(), Some(bound.clone()));
    assert_eq!(
        functions.list_by_app(app.id).await.unwrap(),
        [base.clone(), bound.clone()]
    );
    let wanted = [bound.id, FunctionId::generate(), base.id, bound.id];
    assert_eq!(
        functions.list(&wanted).await.unwrap(),
        [bound.clone(), base.clone(), bound.clone()]
    );
    assert_eq!(functions.list(&[]).await.unwrap(), []);

    let newer = ionian_domain::function::Function {
        definition_id: DefinitionId::generate(),
        ..base.clone()
    };
    functions.upsert(&newer).await.unwrap();
    let history = functions.find_definition(base.definition_id).await.unwrap();
    assert_eq!(history, Some((base.id, base.spec.clone())));
    assert_eq!(functions.find_definition(DefinitionId::generate()).await.unwrap(), None);

    let thief = ionian_domain::function::Function {
        definition_id: base.definition_id,
        ..bound.clone()
    };
    assert_eq!(
        functions.upsert(&thief).await.unwrap_err().kind(),
        ErrorKind::PreconditionFailed
    );
    let mut endless = base.clone();
    endless.spec.retry.backoff_coefficient = f32::NAN;
    assert_eq!(
        functions.upsert(&endless).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    assert_eq!(
        functions.find(base.id).await.unwrap(),
        Some(newer),
        "a refused write changes nothing"
    );
}

#[tokio::test]
async fn classes() {
    let mut test = TestStore::open().await;
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    let app = app(&main, None, at(1));
    test.store.apps().insert(&app).await.unwrap();
    let class = Class {
        id: ClassId::generate(),
        app_id: app.id,
        name: "C".to_owned(),
    };
    test.store.classes().upsert(&class).await.unwrap();
    test.store.classes().upsert(&class).await.unwrap();
    test.reopen().await;
    let classes = test.store.classes();
    assert_eq!(classes.find(class.id).await.unwrap(), Some(class.clone()));
    assert_eq!(classes.find_by_name(app.id, "C").await.unwrap(), Some(class.clone()));
    assert_eq!(classes.list_by_app(app.id).await.unwrap(), [class.clone()]);
    let other = Class {
        id: ClassId::generate(),
        ..class
    };
    assert_eq!(
        classes.upsert(&other).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
}
