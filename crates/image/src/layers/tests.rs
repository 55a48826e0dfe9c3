use super::*;

fn store() -> (tempfile::TempDir, LayerStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = LayerStore::open(dir.path().join("layers")).unwrap();
    (dir, store)
}

fn note() -> LayerNote {
    LayerNote {
        made_by: "test".to_owned(),
        parent: None,
    }
}

async fn draft(store: &LayerStore, key: &str) -> LayerDraft {
    match store.begin(key).await.unwrap() {
        Begin::Build(draft) => draft,
        Begin::Exists => panic!("the layer exists already"),
    }
}

#[test]
fn a_key_depends_on_where_its_parts_end() {
    assert_ne!(layer_key(&["ab", "c"]), layer_key(&["a", "bc"]));
    assert_ne!(layer_key(&["a", ""]), layer_key(&["a"]));
    assert!(is_key(&layer_key::<&str>(&[])));
}

#[tokio::test]
async fn a_committed_layer_exists_and_is_described() {
    let (_dir, store) = store();
    let key = layer_key(&["one"]);
    let made = draft(&store, &key).await;
    fs::write(made.fs().join("file"), "content").unwrap();
    assert!(!store.contains(&key));
    made.commit(note()).await.unwrap();
    assert!(store.contains(&key));
    assert!(matches!(store.begin(&key).await.unwrap(), Begin::Exists));
    assert_eq!(fs::read_to_string(store.fs_path(&key).join("file")).unwrap(), "content");
    let record = store.describe(&key).unwrap();
    assert_eq!((record.entries, record.note), (1, note()));
    assert!(record.size_bytes >= 4096);
    assert_eq!(fs::metadata(store.fs_path(&key)).unwrap().mode() & 0o7777, 0o755);
}

#[tokio::test]
async fn a_dropped_draft_leaves_nothing_and_the_next_maker_starts_clean() {
    let (dir, store) = store();
    let key = layer_key(&["one"]);
    let made = draft(&store, &key).await;
    fs::write(made.fs().join("half"), "half").unwrap();
    drop(made);
    assert!(!store.contains(&key));
    let again = draft(&store, &key).await;
    assert_eq!(fs::read_dir(again.fs()).unwrap().count(), 0);
    drop(again);
    let drafts = dir.path().join("layers/d");
    for _ in 0..200 {
        if fs::read_dir(&drafts).unwrap().count() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the discarded drafts are still there");
}

#[tokio::test]
async fn a_second_maker_waits_for_the_first() {
    let (_dir, store) = store();
    let key = layer_key(&["one"]);
    let first = draft(&store, &key).await;
    let waiting = store.begin(&key);
    tokio::pin!(waiting);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut waiting)
            .await
            .is_err()
    );
    first.commit(note()).await.unwrap();
    assert!(matches!(waiting.await.unwrap(), Begin::Exists));
}

#[tokio::test]
async fn two_stores_on_one_directory_exclude_each_other() {
    let (dir, store) = store();
    // A second store stands for a second process: its gates are its own, so only flock is left.
    let other = LayerStore::open(dir.path().join("layers")).unwrap();
    let key = layer_key(&["one"]);
    let first = draft(&store, &key).await;
    let waiting = other.begin(&key);
    tokio::pin!(waiting);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut waiting)
            .await
            .is_err()
    );
    first.commit(note()).await.unwrap();
    assert!(matches!(waiting.await.unwrap(), Begin::Exists));
}

#[tokio::test]
async fn opening_sweeps_dead_drafts_and_leaves_live_ones() {
    let (dir, store) = store();
    let live = draft(&store, &layer_key(&["live"])).await;
    let dead = dir
        .path()
        .join("layers/d")
        .join(format!("{}.1.0", &layer_key(&["dead"])[..NAME_LENGTH]));
    fs::create_dir_all(dead.join("fs")).unwrap();
    LayerStore::open(dir.path().join("layers")).unwrap();
    assert!(!dead.exists());
    assert!(live.fs().exists());
}

#[tokio::test]
async fn an_odd_key_is_refused() {
    let (_dir, store) = store();
    for key in ["", "../../etc", "ABC", &"g".repeat(64)] {
        assert!(!store.contains(key));
        assert!(matches!(store.begin(key).await, Err(LayerError::InvalidKey { .. })));
    }
}

#[test]
fn notes_are_kept() {
    let (_dir, store) = store();
    let key = layer_key(&["note"]);
    assert_eq!(store.find_note(&key).unwrap(), None);
    store.put_note(&key, b"text").unwrap();
    assert_eq!(store.find_note(&key).unwrap().as_deref(), Some(&b"text"[..]));
}
