//! Replays the checked-in corpora: every input that once found a new way through the code, and every fixed finding.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Panics in tasks are lost with their tasks; a fuzzer counts them, too.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn replay(target: &str) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
    let (_, run) = ionian_fuzz_harness::TARGETS
        .iter()
        .find(|(name, _)| *name == target)
        .expect("the target exists");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let mut inputs: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("the corpus can be listed").path())
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "the corpus of {target} is empty");
    for input in inputs {
        run(&std::fs::read(&input).expect("the corpus can be read"));
        assert_eq!(
            PANICS.load(Ordering::SeqCst),
            0,
            "{} made a task panic",
            input.display()
        );
    }
}

macro_rules! replays {
    ($($target:ident)*) => {$(
        #[test]
        fn $target() {
            replay(stringify!($target));
        }
    )*};
}

replays! { archive blobs dockerfile grpc http_front messages oci }
