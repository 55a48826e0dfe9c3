//! A server that is killed loses no turn that it acknowledged, and shows no half turn.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use ionian_domain::call::CallKind;
use ionian_domain::ids::CallId;

use super::{at, call, call_with_inputs, finished, new_inputs, outcome};
use crate::Store;

const PATH_VARIABLE: &str = "IONIAN_STORE_CRASH_TEST";
const INPUTS: u32 = 70;

/// Not a test by itself: the process that gets killed. It prints the id of each call once the turn
/// that creates it is acknowledged.
#[tokio::test]
#[ignore = "run by the test below"]
async fn commits_until_killed() {
    let Some(path) = std::env::var_os(PATH_VARIABLE) else {
        return;
    };
    let store = Store::open(Path::new(&path)).await.unwrap();
    loop {
        let new = call(CallKind::Map, at(1));
        let inputs = new_inputs(INPUTS);
        let mut turn = call_with_inputs(&new, &inputs);
        turn.push(finished(&new, inputs[0].id, 1, outcome("r"), at(2)));
        store.calls().commit(turn, &[]).await.unwrap();
        println!("acknowledged {}", new.id);
        std::io::stdout().flush().unwrap();
    }
}

#[tokio::test]
async fn a_killed_process_loses_no_acknowledged_turn() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ionian.db");
    let mut all_acknowledged: Vec<CallId> = Vec::new();
    for turns in [1, 7, 40] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "tests::crash::commits_until_killed",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env(PATH_VARIABLE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        // The test harness may print its own words before the first one on the same line.
        let mut acknowledged = lines.filter_map(|line| {
            line.split_once("acknowledged ")
                .map(|(_, id)| id.parse::<CallId>().unwrap())
        });
        all_acknowledged.extend(acknowledged.by_ref().take(turns));
        child.kill().unwrap();
        // What it managed to say before the signal arrived counts too.
        all_acknowledged.extend(acknowledged);
        child.wait().unwrap();

        let store = Store::open(&path).await.unwrap();
        for id in &all_acknowledged {
            let summary = store.calls().call_summary(*id).await.unwrap().unwrap();
            assert_eq!((summary.input_count, summary.finished_count), (INPUTS, 1));
            assert_eq!(store.calls().outputs(*id, 0, 10, None).await.unwrap().len(), 1);
        }
        let recovered = store.calls().load_pending().await.unwrap();
        assert!(recovered.calls.len() >= all_acknowledged.len());
        assert_eq!(
            recovered.inputs.len(),
            recovered.calls.len() * (INPUTS as usize - 1),
            "half a turn is visible"
        );
        store.close().await;
    }
    assert!(all_acknowledged.len() >= 48);
}

/// `max_page_count` is a disk that is full, as far as `SQLite` can tell.
#[tokio::test]
async fn a_full_disk_loses_nothing_and_is_only_full_for_a_while() {
    let test = super::TestStore::open().await;
    let limit = async |pages: u32| {
        sqlx::query(sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}")))
            .execute(&test.store.writer)
            .await
            .unwrap();
    };
    let known = call(CallKind::Map, at(1));
    test.store
        .calls()
        .commit(call_with_inputs(&known, &new_inputs(1)), &[])
        .await
        .unwrap();
    limit(1).await;
    let new = call(CallKind::Map, at(2));
    // Several times: the first failure must not leave a connection that can never write again.
    for _ in 0..3 {
        let refused = test
            .store
            .calls()
            .commit(call_with_inputs(&new, &new_inputs(500)), &[])
            .await
            .unwrap_err();
        assert_eq!(
            refused.kind(),
            ionian_domain::ErrorKind::Exhausted,
            "{refused}: {:?}",
            refused.source
        );
        // A connection that was opened anew knows of no limit.
        limit(1).await;
    }
    assert!(test.store.calls().call_summary(known.id).await.unwrap().is_some());
    assert!(test.store.calls().call_summary(new.id).await.unwrap().is_none());
    limit(1 << 20).await;
    test.store
        .calls()
        .commit(call_with_inputs(&new, &new_inputs(500)), &[])
        .await
        .unwrap();
}
