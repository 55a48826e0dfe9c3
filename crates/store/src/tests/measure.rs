//! What turns cost on this machine's disk. Run with
//! `cargo nextest run -p ionian-store --run-ignored only --no-capture measure`.

use std::time::{Duration, Instant};

use ionian_domain::call::{AttemptNumber, Call, CallKind};
use ionian_domain::ids::{ContainerId, InputId};
use ionian_domain::record::Write;

use super::{TestStore, at, call, call_with_inputs, finished, new_inputs, outcome};

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let total: Duration = times.iter().sum();
    println!(
        "{what}: {} turns, {:.0}/s, median {:?}, p99 {:?}, worst {:?}",
        times.len(),
        times.len() as f64 / total.as_secs_f64(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times[times.len() - 1],
    );
}

async fn commit(test: &TestStore, turn: Vec<Write>) -> Duration {
    let begun = Instant::now();
    test.store.calls().commit(turn, &[]).await.unwrap();
    begun.elapsed()
}

fn started(input_id: InputId) -> Write {
    Write::InputStarted {
        input_id,
        container_id: ContainerId::generate(),
        attempt: AttemptNumber(0),
        at: at(2),
    }
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure_turns() {
    let directory = std::env::var_os("IONIAN_MEASURE_DIR");
    let mut test = TestStore::open().await;
    if let Some(directory) = directory {
        test.store = crate::Store::open(&std::path::Path::new(&directory).join("measure.db"))
            .await
            .unwrap();
    }

    let mut times = Vec::new();
    for _ in 0..2_000 {
        let new = call(CallKind::Unary, at(1));
        times.push(commit(&test, call_with_inputs(&new, &new_inputs(1))).await);
    }
    report("a call with one input", times);

    let mut times = Vec::new();
    for _ in 0..1_000 {
        let turn = (0..32).flat_map(|_| call_with_inputs(&call(CallKind::Unary, at(1)), &new_inputs(1)));
        times.push(commit(&test, turn.collect()).await);
    }
    report("32 calls with one input each", times);

    let (mut times, mut start_times, mut finish_times) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..20 {
        let new: Call = call(CallKind::Map, at(1));
        let inputs = new_inputs(1_000);
        times.push(commit(&test, call_with_inputs(&new, &inputs)).await);
        start_times.push(commit(&test, inputs.iter().map(|input| started(input.id)).collect()).await);
        let finish = inputs
            .iter()
            .zip(1..)
            .map(|(input, n)| finished(&new, input.id, n, outcome("r"), at(3)));
        finish_times.push(commit(&test, finish.collect()).await);
    }
    report("a call with 1,000 inputs", times);
    report("1,000 inputs started", start_times);
    report("1,000 inputs finished", finish_times);

    let mut times = Vec::new();
    for _ in 0..200 {
        let begun = Instant::now();
        test.store
            .calls()
            .call_summary(call(CallKind::Map, at(1)).id)
            .await
            .unwrap();
        times.push(begun.elapsed());
    }
    report("a read", times);
    let begun = Instant::now();
    let recovered = test.store.calls().load_pending().await.unwrap();
    println!("recovery of {} calls: {:?}", recovered.calls.len(), begun.elapsed());
}
