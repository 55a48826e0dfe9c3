use std::fs::File;
use std::io::Write as _;

use super::*;

fn entry(app_id: AppId, text: &str) -> LogEntry {
    LogEntry {
        at: Timestamp::now(),
        app_id,
        function_id: FunctionId::generate(),
        container_id: ContainerId::generate(),
        stream: LogStream::Stdout,
        text: text.to_owned(),
    }
}

fn texts(entries: &[Numbered]) -> Vec<&str> {
    entries.iter().map(|(_, entry)| entry.text.as_str()).collect()
}

fn numbers(entries: &[Numbered]) -> Vec<u64> {
    entries.iter().map(|(number, _)| *number).collect()
}

fn opened() -> (tempfile::TempDir, AppId, Logs) {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::open(dir.path().to_owned()).unwrap();
    (dir, AppId::generate(), logs)
}

fn all() -> LogFilter {
    LogFilter::default()
}

#[tokio::test]
async fn entries_are_followed() {
    let (_dir, app, logs) = opened();
    logs.append(vec![entry(app, "one\n"), entry(app, "two\n")]).await;
    let (page, next, mut news) = logs.after(app, 0, &all()).await;
    assert_eq!((texts(&page).as_slice(), next), (["one\n", "two\n"].as_slice(), 2));
    logs.append(vec![entry(app, "three\n")]).await;
    news.changed().await.unwrap();
    let (page, next, _) = logs.after(app, next, &all()).await;
    assert_eq!((texts(&page).as_slice(), next), (["three\n"].as_slice(), 3));
}

#[tokio::test]
async fn entries_survive_a_restart_and_keep_their_numbers() {
    let (dir, app, logs) = opened();
    logs.append(vec![entry(app, "one\n"), entry(app, "two\n"), entry(app, "three\n")])
        .await;
    let reopened = Logs::open(dir.path().to_owned()).unwrap();
    assert_eq!(reopened.newest(app).await, 3);
    // A follower that reconnects after the restart gets what it missed before it.
    let (page, next, _) = reopened.after(app, 1, &all()).await;
    assert_eq!((numbers(&page).as_slice(), next), ([2, 3].as_slice(), 3));
    assert_eq!(texts(&reopened.last(app, all(), 2).await), ["two\n", "three\n"]);
    reopened.append(vec![entry(app, "four\n")]).await;
    let (page, next, _) = reopened.after(app, 1, &all()).await;
    assert_eq!((numbers(&page).as_slice(), next), ([2, 3, 4].as_slice(), 4));
}

#[tokio::test]
async fn old_entries_leave_memory_but_not_the_disk() {
    let (_dir, app, logs) = opened();
    let long = "x".repeat(100_000);
    for _ in 0..60 {
        logs.append(vec![entry(app, &long)]).await;
    }
    let (page, _, _) = logs.after(app, 0, &all()).await;
    assert_eq!(numbers(&page), (1..=60).collect::<Vec<u64>>());
    assert_eq!(logs.last(app, all(), 100).await.len(), 60);
}

#[tokio::test]
async fn a_line_cut_by_a_crash_ends_its_segment() {
    let (dir, app, logs) = opened();
    logs.append(vec![entry(app, "whole\n")]).await;
    let segment = fs::read_dir(dir.path().join(app.to_string()))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    File::options()
        .append(true)
        .open(&segment)
        .unwrap()
        .write_all(b"{\"at\":12")
        .unwrap();
    let reopened = Logs::open(dir.path().to_owned()).unwrap();
    reopened.append(vec![entry(app, "after\n")]).await;
    let last = reopened.last(app, all(), 10).await;
    assert_eq!((texts(&last), numbers(&last)), (vec!["whole\n", "after\n"], vec![1, 2]));
}

#[tokio::test]
async fn entries_are_filtered_and_counted() {
    let (_dir, app, logs) = opened();
    let mut entries: Vec<LogEntry> = ["a one\n", "b two\n", "a three\n"].map(|text| entry(app, text)).into();
    for (second, entry) in (0..).zip(&mut entries) {
        entry.at = Timestamp((100 + second) * 1_000_000);
    }
    entries[1].stream = LogStream::Stderr;
    let function_id = entries[0].function_id;
    logs.append(entries).await;
    let found = |filter: LogFilter| {
        let logs = logs.clone();
        async move { numbers(&logs.last(app, filter, 10).await) }
    };
    assert_eq!(
        found(LogFilter {
            function_ids: vec![function_id],
            ..all()
        })
        .await,
        [1]
    );
    assert_eq!(
        found(LogFilter {
            stream: Some(LogStream::Stderr),
            ..all()
        })
        .await,
        [2]
    );
    assert_eq!(
        found(LogFilter {
            text: "a ".to_owned(),
            ..all()
        })
        .await,
        [1, 3]
    );
    let range = LogFilter {
        since: Some(Timestamp(101_000_000)),
        until: Some(Timestamp(102_000_000)),
        ..all()
    };
    assert_eq!(found(range).await, [2]);
    let counts = logs.count(app, all(), Duration::from_secs(2)).await;
    let expected = BTreeMap::from([
        (
            Timestamp(100_000_000),
            LogCount {
                stdout: 1,
                stderr: 1,
                info: 0,
            },
        ),
        (
            Timestamp(102_000_000),
            LogCount {
                stdout: 1,
                stderr: 0,
                info: 0,
            },
        ),
    ]);
    assert_eq!(counts, expected);
}

#[tokio::test]
async fn apps_that_nobody_uses_leave_memory() {
    let (_dir, app, logs) = opened();
    logs.append(vec![entry(app, "one\n")]).await;
    let (_, _, news) = logs.after(app, 0, &all()).await;
    logs.load(app).log.lock().last_used = Instant::now().checked_sub(IDLE * 2).unwrap();
    logs.forget_idle();
    assert!(logs.loaded(app).is_some(), "somebody follows it");
    drop(news);
    logs.forget_idle();
    assert!(logs.loaded(app).is_none());
    logs.append(vec![entry(app, "two\n")]).await;
    assert_eq!(numbers(&logs.last(app, all(), 10).await), [1, 2]);
}

#[tokio::test]
async fn entries_that_are_too_old_are_removed() {
    let (dir, app, logs) = opened();
    logs.append(vec![entry(app, "old\n")]).await;
    let app_dir = dir.path().join(app.to_string());
    let segment = fs::read_dir(&app_dir).unwrap().next().unwrap().unwrap().path();
    let long_ago = std::time::SystemTime::now() - RETENTION * 2;
    File::options()
        .append(true)
        .open(&segment)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    let reopened = Logs::open(dir.path().to_owned()).unwrap();
    // Makes the next entry begin a segment of its own.
    reopened.append(vec![entry(app, &"x".repeat(5 * 1024 * 1024))]).await;
    File::options()
        .append(true)
        .open(&segment)
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    let reopened = Logs::open(dir.path().to_owned()).unwrap();
    reopened.append(vec![entry(app, "new\n")]).await;
    reopened.sweep().await;
    assert_eq!(texts(&reopened.last(app, all(), 10).await), ["new\n"]);

    File::options()
        .append(true)
        .open(fs::read_dir(&app_dir).unwrap().next().unwrap().unwrap().path())
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    Logs::open(dir.path().to_owned()).unwrap().sweep().await;
    assert!(!app_dir.exists());
}

#[tokio::test]
async fn entries_that_could_not_be_written_leave_the_others_in_their_places() {
    let (dir, app, logs) = opened();
    let large = "x".repeat(usize::try_from(segments::SEGMENT_BYTES).unwrap());
    logs.append(vec![entry(app, &large)]).await;
    // The next segment will be a file on a disk that is full.
    let next = dir.path().join(app.to_string()).join(format!("{:020}.jsonl", 2));
    std::os::unix::fs::symlink("/dev/full", &next).unwrap();
    logs.append(vec![entry(app, "lost\n")]).await;
    std::fs::remove_file(&next).unwrap();
    logs.append(vec![entry(app, "three\n")]).await;
    // Followers have seen the lost one; its number is not given again.
    let (page, ..) = logs.after(app, 1, &all()).await;
    assert_eq!(texts(&page), ["lost\n", "three\n"]);
    let reopened = Logs::open(dir.path().to_owned()).unwrap();
    let (page, ..) = reopened.after(app, 1, &all()).await;
    assert_eq!((numbers(&page), texts(&page)), (vec![3], vec!["three\n"]));
}
