use super::*;

struct Trace(Vec<Record>);

impl Trace {
    /// Something that happens between `2 n` and `2 n + 1`.
    fn then(mut self, path: &str, inode: u64, operation: Operation) -> Self {
        let begun = self.0.len() as u64 * 2;
        self.0.push(Record {
            begun,
            ended: begun + 1,
            inode,
            path: path.to_owned(),
            operation,
        });
        self
    }

    fn disk(&self) -> Disk {
        let mut disk = Disk::default();
        for moment in moments(&self.0) {
            disk.pass(&self.0, &moment, |_, _| false).unwrap();
        }
        disk
    }
}

fn write(offset: u64, data: &[u8]) -> Operation {
    Operation::Write {
        offset,
        data: data.to_vec(),
    }
}

fn text(files: &Files) -> Vec<(String, String)> {
    let content = |content: &Option<Arc<Vec<u8>>>| match content {
        None => "/".to_owned(),
        Some(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
    };
    files
        .iter()
        .map(|(path, bytes)| (path.clone(), content(bytes)))
        .collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected
        .iter()
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect()
}

#[test]
fn a_file_needs_its_own_sync_and_its_directorys() {
    let written = Trace(Vec::new())
        .then("f", 1, Operation::Create)
        .then("f", 1, write(0, b"ab"));
    assert_eq!(text(&written.disk().dropped()), []);
    let synced = written.then("f", 1, Operation::Sync);
    assert_eq!(text(&synced.disk().dropped()), []);
    let named = synced.then("", 0, Operation::Sync).then("f", 1, write(1, b"cd"));
    assert_eq!(text(&named.disk().dropped()), pairs(&[("f", "ab")]));
    let unsynced_content = Trace(Vec::new())
        .then("f", 1, Operation::Create)
        .then("f", 1, write(0, b"ab"))
        .then("", 0, Operation::Sync);
    assert_eq!(text(&unsynced_content.disk().dropped()), pairs(&[("f", "")]));
}

#[test]
fn a_sync_does_not_cover_what_ended_after_it_began() {
    let mut trace = Trace(Vec::new())
        .then("f", 1, Operation::Create)
        .then("", 0, Operation::Sync)
        .then("f", 1, write(0, b"ab"))
        .then("f", 1, Operation::Sync);
    trace.0[3].begun = 4;
    assert_eq!(text(&trace.disk().dropped()), pairs(&[("f", "")]));
}

#[test]
fn a_rename_is_whole() {
    let trace = Trace(Vec::new())
        .then("a", 7, Operation::MakeDirectory)
        .then("b", 8, Operation::MakeDirectory)
        .then("a/f", 1, Operation::Create)
        .then("a", 0, Operation::Sync)
        .then("b", 0, Operation::Sync)
        .then("", 0, Operation::Sync)
        .then("a/f", 1, Operation::Rename { to: "b/g".to_owned() });
    assert_eq!(
        text(&trace.disk().dropped()),
        pairs(&[("a", "/"), ("a/f", ""), ("b", "/")])
    );
    let synced = trace.then("b", 0, Operation::Sync);
    assert_eq!(
        text(&synced.disk().dropped()),
        pairs(&[("a", "/"), ("b", "/"), ("b/g", "")])
    );
}

#[test]
fn what_is_torn_lies_between_what_was_synced_and_what_was_written() {
    let trace = Trace(Vec::new())
        .then("f", 1, Operation::Create)
        .then("f", 1, write(0, &[b'a'; 2048]))
        .then("f", 1, Operation::Sync)
        .then("", 0, Operation::Sync)
        .then("f", 1, write(0, &[b'b'; 2048]));
    let disk = trace.disk();
    let mut random = Random::new(1);
    let mut mixed = 0;
    for _ in 0..100 {
        let files = disk.torn(&mut random);
        let content = files["f"].as_ref().unwrap();
        assert_eq!(content.len(), 2048);
        for sector in content.chunks(512) {
            assert!(sector.iter().all(|byte| *byte == sector[0]));
        }
        mixed += usize::from(content.contains(&b'a') && content.contains(&b'b'));
    }
    assert!(mixed > 10, "{mixed}");
}
