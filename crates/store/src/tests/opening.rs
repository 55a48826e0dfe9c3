//! Opening: permissions, settings, old and new schemas, two openers at once.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use ionian_domain::app::AppState;
use ionian_domain::call::{AttemptNumber, Payload};
use ionian_domain::container::ContainerExit;
use ionian_domain::image::ImageState;
use ionian_domain::network::Egress;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Write;
use ionian_domain::{ErrorKind, Timestamp};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use sqlx::{Row as _, raw_sql};

use super::{TestStore, at, environment};
use crate::open::MIGRATOR;
use crate::{Failure, Store};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn only_the_owner_can_read_the_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data/ionian.db");
    let store = Store::open(&path).await.unwrap();
    store.meta().set("a", b"b").await.unwrap();
    for name in ["ionian.db", "ionian.db-wal", "ionian.db-shm", "ionian.db.lock"] {
        assert_eq!(mode(&path.with_file_name(name)), 0o600, "{name}");
    }
    assert_eq!(mode(path.parent().unwrap()), 0o700);
}

#[tokio::test]
async fn a_file_that_everybody_could_read_is_closed_to_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    std::fs::write(&path, b"").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let _store = Store::open(&path).await.unwrap();
    assert_eq!(mode(&path), 0o600);
}

#[tokio::test]
async fn a_commit_is_synced_and_references_are_checked() {
    let test = TestStore::open().await;
    for (pragma, expected) in [("synchronous", "2"), ("foreign_keys", "1"), ("journal_mode", "wal")] {
        let row = raw_sql(sqlx::AssertSqlSafe(format!(
            "SELECT CAST({pragma} AS TEXT) AS v FROM pragma_{pragma}"
        )))
        .fetch_one(&test.store.writer)
        .await
        .unwrap();
        assert_eq!(row.get::<String, _>("v"), expected, "{pragma}");
    }
}

#[tokio::test]
async fn readers_cannot_write() {
    let test = TestStore::open().await;
    let error = raw_sql("DELETE FROM meta")
        .execute(&test.store.readers)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("readonly"), "{error}");
}

#[tokio::test]
async fn two_openers_at_once_agree() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    let (first, second) = tokio::join!(Store::open(&path), Store::open(&path));
    let (first, second) = (first.unwrap(), second.unwrap());
    let (one, other) = (first.meta(), second.meta());
    let (one, other) = tokio::join!(one.ensure("workspace", b"1"), other.ensure("workspace", b"2"));
    assert_eq!(one.unwrap(), other.unwrap());
}

#[tokio::test]
async fn writes_of_another_process_are_seen() {
    let test = TestStore::open().await;
    let other = Store::open(&test.path).await.unwrap();
    let main = environment("main", true);
    test.store.environments().insert(&main).await.unwrap();
    assert_eq!(other.environments().find_default().await.unwrap(), Some(main));
}

#[tokio::test]
async fn what_is_not_a_database_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    std::fs::write(
        &path,
        "not a database, but longer than a header of one hundred bytes ".repeat(4),
    )
    .unwrap();
    let error = Store::open(&path).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert_eq!(std::fs::read(&path).unwrap().len(), 248, "the file was not touched");
}

#[tokio::test]
async fn a_newer_schema_is_refused_with_advice() {
    let test = TestStore::open().await;
    raw_sql(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES (9999, 'from the future', TRUE, x'00', 1)",
    )
    .execute(&test.store.writer)
    .await
    .unwrap();
    let error = Store::open(&test.path).await.unwrap_err();
    assert!(matches!(error.source, Failure::Newer { schema: 9999, .. }), "{error:?}");
    assert!(error.source.to_string().contains("newer version"), "{}", error.source);
}

/// A database as an older version of the program left it: its schema, and rows in it.
async fn written_by_schema(schema: i64, path: &Path, rows: &[&'static str]) {
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let old = SqlitePool::connect_with(options).await.unwrap();
    MIGRATOR.run_to(schema, &old).await.unwrap();
    for text in rows {
        raw_sql(*text).execute(&old).await.unwrap();
    }
    old.close().await;
}

/// Every row here was written by the first schema, in the JSON of its time. Never change what is
/// inserted: when this test fails, a data directory of a user would no longer open.
#[tokio::test]
async fn a_data_directory_of_the_first_schema_opens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    written_by_schema(1, &path, &[include_str!("first_schema.sql")]).await;

    let store = Store::open(&path).await.unwrap();
    assert_eq!(store.meta().find("workspace").await.unwrap().unwrap().as_ref(), b"ac-1");
    assert_eq!(store.tokens().list().await.unwrap().len(), 1);
    let main = store.environments().find_default().await.unwrap().unwrap();
    let app = store.apps().find_by_name(main.id, "hello").await.unwrap().unwrap();
    assert_eq!((app.state, app.version), (AppState::Deployed, 1));
    let function_id = app.layout.functions["f"];
    let published = store.apps().find_version(app.id, 1).await.unwrap().unwrap();
    assert!(published.definitions.contains_key(&function_id));
    let function = store.functions().find_published(function_id).await.unwrap().unwrap();
    assert_eq!(function.spec.web.as_ref().unwrap().label, "hello-f");
    assert_eq!(function.spec.definition.as_ref(), b"\x01\x02");
    // Before functions could choose, all were like this.
    assert_eq!((function.spec.runtime, &function.spec.egress), (None, &Egress::Open));
    assert_eq!(store.classes().list_by_app(app.id).await.unwrap().len(), 1);
    let images = store.images().list(10).await.unwrap();
    assert!(matches!(&images[0].state, ImageState::Ready { image } if image.layers == ["layer-1"]));
    let mount = store
        .mounts()
        .find_named("modal-client-mount-1.6.4")
        .await
        .unwrap()
        .unwrap();
    assert_eq!(mount.files[0].mode, Some(0o644));
    assert_eq!(
        store
            .secrets()
            .find_by_name(main.id, "key")
            .await
            .unwrap()
            .unwrap()
            .keys,
        ["API_KEY"]
    );
    assert_eq!(store.labels().list().await.unwrap()[0].function_id, function_id);
    assert_eq!(
        store
            .idempotency()
            .recall("k", "FunctionMap")
            .await
            .unwrap()
            .unwrap()
            .as_ref(),
        b"\x03"
    );

    let recovered = store.calls().load_pending().await.unwrap();
    assert_eq!(recovered.calls.len(), 1);
    assert_eq!(recovered.inputs[0].attempt, AttemptNumber(1));
    let inputs = store.calls().input_payloads(&[recovered.inputs[0].id]).await.unwrap();
    assert_eq!(
        inputs[&recovered.inputs[0].id].payload,
        Payload::Blob("bl-1".to_owned())
    );
    let outputs = store
        .calls()
        .outputs(recovered.calls[0].call.id, 0, 10, None)
        .await
        .unwrap();
    assert_eq!(outputs[0].outcome.status, OutcomeStatus::Failure);
    let containers = store.containers().list_by_app(app.id, 10).await.unwrap();
    assert_eq!(containers[0].ended, Some((ContainerExit::Exited { code: 1 }, at(9))));
}

/// Before containers outlived the server, nothing was noted of where they run: such a container is lost.
#[tokio::test]
async fn a_container_that_the_first_schema_left_running_has_no_origin() {
    const RUNNING: &str = "INSERT INTO containers (id, app_id, function_id, created_at) VALUES \
        ('ta-0000000000000000000002', 'ap-0000000000000000000001', 'fu-0000000000000000000001', 4)";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    written_by_schema(1, &path, &[include_str!("first_schema.sql"), RUNNING]).await;

    let store = Store::open(&path).await.unwrap();
    let recovered = store.calls().load_pending().await.unwrap();
    let [container] = recovered.containers.as_slice() else {
        panic!("one container runs, not {:?}", recovered.containers);
    };
    assert_eq!((container.origin, container.web_ready_at), (None, None));
    let ended = Write::ContainerEnded {
        container_id: container.id,
        exit: ContainerExit::Lost,
        at: at(10),
    };
    store.calls().commit(vec![ended], &[]).await.unwrap();
    assert_eq!(store.calls().load_pending().await.unwrap().containers, []);
}

/// The same for the second schema, which notes where containers run. Never change what is inserted.
#[tokio::test]
async fn a_data_directory_of_the_second_schema_opens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    let rows = [include_str!("first_schema.sql"), include_str!("second_schema.sql")];
    written_by_schema(2, &path, &rows).await;

    let store = Store::open(&path).await.unwrap();
    let recovered = store.calls().load_pending().await.unwrap();
    assert_eq!((recovered.calls.len(), recovered.inputs.len()), (1, 2));
    let running = recovered.inputs[1].running.unwrap();
    let [adoptable, web] = recovered.containers.as_slice() else {
        panic!("two containers run, not {:?}", recovered.containers);
    };
    assert_eq!(running, (adoptable.id, Timestamp(6)));
    let origin = adoptable
        .origin
        .map(|(worker, definition)| (worker.to_string(), definition.to_string()));
    let expected = ("wk-0000000000000000000001", "de-0000000000000000000001");
    assert_eq!(origin, Some((expected.0.to_owned(), expected.1.to_owned())));
    assert_eq!((adoptable.web_ready_at, web.web_ready_at), (None, Some(Timestamp(7))));
    assert_eq!(store.meta().check_integrity().await.unwrap(), [""; 0]);
}
