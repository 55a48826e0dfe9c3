//! The call lane: atomic turns, pages of outputs, listings, the sweep.

use std::time::Duration;

use bytes::Bytes;
use ionian_domain::ErrorKind;
use ionian_domain::call::{AttemptNumber, CallKind, Payload};
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, WorkerId};
use ionian_domain::outcome::{Outcome, OutcomeStatus};
use ionian_domain::record::{PendingContainer, Recovered, Write};
use sqlx::Row as _;

use super::{TestStore, at, call, call_with_inputs, finished, new_inputs, outcome};
use crate::calls::{EXPIRED_CALLS, Expiry, InputStatus, OUTPUT_PAGE_BYTES, OUTPUTS_BY_INDEX, OUTPUTS_BY_SEQUENCE};
use crate::idempotency::IdempotencyRecord;
use crate::recovery::{LIVE_CONTAINERS, PENDING_CALLS, PENDING_INPUTS};

fn answer(key: &str) -> IdempotencyRecord {
    IdempotencyRecord {
        key: key.to_owned(),
        rpc: "FunctionMap".to_owned(),
        response: Bytes::from_static(b"r"),
        at: at(1),
    }
}

#[tokio::test]
async fn a_turn_that_fails_leaves_nothing() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    let before = call(CallKind::Map, at(1));
    let inputs = new_inputs(2);
    let mut first = call_with_inputs(&before, &inputs);
    first.push(finished(&before, inputs[0].id, 1, outcome("r"), at(2)));
    calls.commit(first, &[]).await.unwrap();
    let recovered = calls.load_pending().await.unwrap();

    let unknown = InputId::generate();
    let started = |input_id: InputId| Write::InputStarted {
        input_id,
        container_id: ContainerId::generate(),
        attempt: AttemptNumber(0),
        at: at(3),
    };
    let bad_ends = [
        vec![started(unknown)],
        vec![started(inputs[0].id)],
        vec![Write::InputRequeued {
            input_id: unknown,
            attempt: AttemptNumber(1),
            not_before: at(3),
            retries_used: 0,
        }],
        // A second outcome, in a later turn and within one.
        vec![finished(&before, inputs[0].id, 2, outcome("again"), at(3))],
        vec![
            finished(&before, inputs[1].id, 2, outcome("r"), at(3)),
            finished(&before, inputs[1].id, 3, outcome("again"), at(3)),
        ],
        // A sequence number that is taken.
        vec![finished(&before, inputs[1].id, 1, outcome("r"), at(3))],
        vec![Write::ContainerEnded {
            container_id: ContainerId::generate(),
            exit: ContainerExit::Lost,
            at: at(3),
        }],
        vec![Write::InputsCreated {
            call_id: CallId::generate(),
            function_id: before.function_id,
            inputs: new_inputs(1),
            at: at(3),
        }],
        vec![Write::CallCreated { call: before.clone() }],
    ];
    for (number, bad_end) in bad_ends.into_iter().enumerate() {
        let new = call(CallKind::Map, at(3));
        let mut turn = call_with_inputs(&new, &new_inputs(100));
        turn.push(Write::ContainerCreated {
            container_id: ContainerId::generate(),
            worker_id: WorkerId::generate(),
            app_id: new.app_id,
            function_id: new.function_id,
            definition_id: DefinitionId::generate(),
            at: at(3),
        });
        turn.extend(bad_end);
        let error = calls.commit(turn, &[answer("key")]).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Unavailable, "turn {number}: {error:?}");
        assert_eq!(calls.load_pending().await.unwrap(), recovered, "turn {number}");
        assert_eq!(calls.call_summary(new.id).await.unwrap(), None, "turn {number}");
        assert_eq!(
            test.store.idempotency().recall("key", "FunctionMap").await.unwrap(),
            None,
            "turn {number}"
        );
    }
    // The store still works.
    calls
        .commit(call_with_inputs(&call(CallKind::Map, at(4)), &[]), &[answer("key")])
        .await
        .unwrap();
    assert!(
        test.store
            .idempotency()
            .recall("key", "FunctionMap")
            .await
            .unwrap()
            .is_some()
    );
}

#[tokio::test]
async fn a_turn_whose_caller_went_away_is_whole_or_absent() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    for micros in (0..20_000).step_by(500) {
        let new = call(CallKind::Map, at(1));
        let turn = call_with_inputs(&new, &new_inputs(200));
        let _ = tokio::time::timeout(Duration::from_micros(micros), calls.commit(turn, &[])).await;
    }
    let last = call(CallKind::Map, at(2));
    calls
        .commit(call_with_inputs(&last, &new_inputs(200)), &[])
        .await
        .unwrap();
    let recovered = calls.load_pending().await.unwrap();
    assert_eq!(recovered.inputs.len(), recovered.calls.len() * 200);
    assert_eq!(recovered.calls.last().unwrap().call, last);
}

#[tokio::test]
async fn late_words_about_a_swept_call_are_no_error() {
    let test = TestStore::open().await;
    let call_id = CallId::generate();
    let late = vec![
        Write::CallConsumed { call_id },
        Write::CallInputsFinished { call_id, count: 3 },
    ];
    test.store.calls().commit(late, &[]).await.unwrap();
    assert_eq!(test.store.calls().load_pending().await.unwrap(), Recovered::default());
}

#[tokio::test]
async fn a_call_is_finished_by_the_rule() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    for kind in [CallKind::Unary, CallKind::Map] {
        for close in [None, Some(false), Some(true)] {
            let call = call(kind, at(1));
            let inputs = new_inputs(2);
            let is_finished = async || calls.call_summary(call.id).await.unwrap().unwrap().finished;
            calls
                .commit(vec![Write::CallCreated { call: call.clone() }], &[])
                .await
                .unwrap();
            assert!(!is_finished().await, "no input has come yet");
            calls
                .commit(call_with_inputs(&call, &inputs).split_off(1), &[])
                .await
                .unwrap();
            let close_write = match close {
                None => vec![],
                Some(true) => vec![Write::CallConsumed { call_id: call.id }],
                Some(false) => vec![Write::CallInputsFinished {
                    call_id: call.id,
                    count: 2,
                }],
            };
            calls.commit(close_write, &[]).await.unwrap();
            calls
                .commit(vec![finished(&call, inputs[0].id, 1, outcome("r"), at(2))], &[])
                .await
                .unwrap();
            assert!(!is_finished().await, "one is still open");
            calls
                .commit(vec![finished(&call, inputs[1].id, 2, outcome("r"), at(3))], &[])
                .await
                .unwrap();
            assert_eq!(
                is_finished().await,
                kind == CallKind::Unary || close.is_some(),
                "{kind:?} {close:?}"
            );
        }
    }
}

#[tokio::test]
async fn outputs_are_read_in_pages_and_by_index() {
    let mut test = TestStore::open().await;
    let map = call(CallKind::Map, at(1));
    let inputs = new_inputs(150);
    test.store
        .calls()
        .commit(call_with_inputs(&map, &inputs), &[])
        .await
        .unwrap();
    // Inputs finish in the reverse order.
    let writes = inputs
        .iter()
        .rev()
        .zip(1..)
        .map(|(input, sequence)| finished(&map, input.id, sequence, outcome(&format!("{}", input.index)), at(5)))
        .collect();
    test.store.calls().commit(writes, &[]).await.unwrap();
    test.reopen().await;
    let calls = test.store.calls();
    let page = calls.outputs(map.id, 0, 100, None).await.unwrap();
    assert_eq!(
        page.iter().map(|output| output.sequence).collect::<Vec<_>>(),
        (1..=100).collect::<Vec<_>>()
    );
    assert_eq!((page[0].index, page[0].input_id), (149, inputs[149].id));
    assert_eq!(page[0].outcome, outcome("149"));
    assert_eq!((page[0].started_at, page[0].finished_at), (Some(at(1)), at(5)));
    assert_eq!(calls.outputs(map.id, 100, 100, None).await.unwrap().len(), 50);
    assert_eq!(calls.outputs(map.id, 150, 100, None).await.unwrap(), []);
    let indexes = |page: Vec<ionian_domain::record::OutputRecord>| page.iter().map(|o| o.index).collect::<Vec<_>>();
    assert_eq!(indexes(calls.outputs(map.id, 0, 100, Some((0, 0))).await.unwrap()), [0]);
    assert_eq!(
        indexes(calls.outputs(map.id, 0, 2, Some((10, 20))).await.unwrap()),
        [20, 19]
    );
    assert_eq!(
        indexes(calls.outputs(map.id, 130, 100, Some((10, 20))).await.unwrap()),
        [19, 18, 17, 16, 15, 14, 13, 12, 11, 10]
    );
    let summary = calls.call_summary(map.id).await.unwrap().unwrap();
    assert_eq!(
        (summary.input_count, summary.finished_count, summary.last_sequence),
        (150, 150, 150)
    );
    assert_eq!(calls.outputs(CallId::generate(), 0, 10, None).await.unwrap(), []);
    assert_eq!(calls.find_call_of_input(inputs[3].id).await.unwrap(), Some(map.id));
}

#[tokio::test]
async fn a_page_of_outputs_is_bounded_in_bytes() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    let map = call(CallKind::Map, at(1));
    let inputs = new_inputs(3);
    let big = Outcome {
        payload: Payload::Inline(vec![7; OUTPUT_PAGE_BYTES * 2 / 3].into()),
        ..outcome("")
    };
    let mut writes = call_with_inputs(&map, &inputs);
    writes.extend(
        inputs
            .iter()
            .zip(1..)
            .map(|(input, sequence)| finished(&map, input.id, sequence, big.clone(), at(2))),
    );
    calls.commit(writes, &[]).await.unwrap();
    for sequence in 1..=3 {
        let page = calls.outputs(map.id, sequence - 1, 10, None).await.unwrap();
        assert_eq!(
            page.iter().map(|output| output.sequence).collect::<Vec<_>>(),
            [sequence]
        );
    }
}

#[tokio::test]
async fn recovery_pages_and_the_sweep_use_their_indexes() {
    let test = TestStore::open().await;
    let plans = [
        (
            OUTPUTS_BY_SEQUENCE,
            &["SEARCH o USING INDEX sqlite_autoindex_outputs_2 (call_id=? AND sequence>?)"][..],
        ),
        (
            OUTPUTS_BY_INDEX,
            &["SEARCH i USING INDEX inputs_by_call (call_id=? AND input_index>? AND input_index<?)"][..],
        ),
        (
            EXPIRED_CALLS,
            &["USING INDEX calls_finished", "USING INDEX calls_consumed"][..],
        ),
        (PENDING_CALLS, &["USING INDEX calls_pending"][..]),
        (PENDING_INPUTS, &["USING INDEX inputs_pending"][..]),
        (LIVE_CONTAINERS, &["USING INDEX containers_live"][..]),
    ];
    for (statement, expected) in plans {
        let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")))
            .fetch_all(&test.store.readers)
            .await
            .unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
        for part in expected {
            assert!(plan.iter().any(|step| step.contains(part)), "{statement}\n{plan:#?}");
        }
    }
}

#[tokio::test]
async fn listings() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    let old = call(CallKind::Map, at(1));
    let new = ionian_domain::call::Call {
        app_id: old.app_id,
        ..call(CallKind::Unary, at(2))
    };
    let inputs = new_inputs(3);
    let container_id = ContainerId::generate();
    let mut writes = call_with_inputs(&old, &inputs);
    writes.extend(call_with_inputs(&new, &new_inputs(1)));
    calls.commit(writes, &[]).await.unwrap();
    let done = finished(
        &old,
        inputs[2].id,
        1,
        Outcome::decided(OutcomeStatus::Timeout, "late"),
        at(9),
    );
    let Write::InputFinished {
        container_id: Some(done_by),
        ..
    } = done
    else {
        unreachable!()
    };
    let writes = vec![
        Write::InputStarted {
            input_id: inputs[1].id,
            container_id,
            attempt: AttemptNumber(1),
            at: at(5),
        },
        done,
    ];
    calls.commit(writes, &[]).await.unwrap();

    let ids = |list: Vec<crate::calls::CallSummary>| list.iter().map(|summary| summary.call.id).collect::<Vec<_>>();
    assert_eq!(ids(calls.calls_by_app(old.app_id, 10).await.unwrap()), [new.id, old.id]);
    assert_eq!(ids(calls.calls_by_app(old.app_id, 1).await.unwrap()), [new.id]);
    assert_eq!(
        ids(calls.calls_by_function(old.function_id, 10).await.unwrap()),
        [old.id]
    );
    let listed = calls.inputs(old.id, 0, 10).await.unwrap();
    assert_eq!(
        listed.iter().map(|input| input.id).collect::<Vec<_>>(),
        inputs.iter().map(|i| i.id).collect::<Vec<_>>()
    );
    assert_eq!(listed[0].status, InputStatus::Queued { not_before: None });
    assert_eq!(
        listed[1].status,
        InputStatus::Running {
            container_id,
            started_at: at(5)
        }
    );
    assert_eq!(listed[1].attempt, AttemptNumber(1));
    assert_eq!(
        listed[2].status,
        InputStatus::Finished {
            status: OutcomeStatus::Timeout,
            container_id: Some(done_by),
            finished_at: at(9)
        }
    );
    assert_eq!(calls.inputs(old.id, 1, 1).await.unwrap(), [listed[1].clone()]);
}

#[tokio::test]
async fn containers() {
    let test = TestStore::open().await;
    let (app_id, function_id) = (AppId::generate(), FunctionId::generate());
    let (worker_id, definition_id) = (WorkerId::generate(), DefinitionId::generate());
    let ids: Vec<ContainerId> = (0..3).map(|_| ContainerId::generate()).collect();
    let mut writes: Vec<Write> = ids
        .iter()
        .map(|id| Write::ContainerCreated {
            container_id: *id,
            worker_id,
            app_id,
            function_id,
            definition_id,
            at: at(1),
        })
        .collect();
    let end = |container_id, at| Write::ContainerEnded {
        container_id,
        exit: ContainerExit::OutOfMemory,
        at,
    };
    writes.push(end(ids[0], at(5)));
    test.store.calls().commit(writes, &[]).await.unwrap();
    test.store.calls().commit(vec![end(ids[1], at(6))], &[]).await.unwrap();
    assert!(
        test.store.calls().commit(vec![end(ids[1], at(7))], &[]).await.is_err(),
        "it ended already"
    );
    let live = PendingContainer {
        id: ids[2],
        origin: Some((worker_id, definition_id)),
        app_id,
        function_id,
        created_at: at(1),
        web_ready_at: None,
    };
    assert_eq!(test.store.calls().load_pending().await.unwrap().containers, [live]);
    let containers = test.store.containers();
    let found = containers.find(ids[0]).await.unwrap().unwrap();
    assert_eq!(found.ended, Some((ContainerExit::OutOfMemory, at(5))));
    assert_eq!(containers.find(ids[2]).await.unwrap().unwrap().ended, None);
    assert_eq!(containers.sweep(at(6), 10).await.unwrap(), 1);
    let left: Vec<ContainerId> = containers
        .list_by_app(app_id, 10)
        .await
        .unwrap()
        .iter()
        .map(|c| c.id)
        .collect();
    assert_eq!(left, [ids[2], ids[1]]);
}

#[tokio::test]
async fn the_sweep_takes_expired_calls_whole() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    let finish_all = |call: &ionian_domain::call::Call, count: u32, at| {
        let inputs = new_inputs(count);
        let mut writes = call_with_inputs(call, &inputs);
        writes.extend(
            inputs
                .iter()
                .zip(1..)
                .map(|(input, n)| finished(call, input.id, n, outcome("r"), at)),
        );
        writes.push(Write::CallInputsFinished {
            call_id: call.id,
            count,
        });
        writes
    };
    let (old, young, consumed, open) = (
        call(CallKind::Map, at(1)),
        call(CallKind::Map, at(1)),
        call(CallKind::Map, at(1)),
        call(CallKind::Map, at(1)),
    );
    // More than two slices of the sweep.
    calls.commit(finish_all(&old, 1_203, at(100)), &[]).await.unwrap();
    calls.commit(finish_all(&young, 2, at(200)), &[]).await.unwrap();
    calls.commit(finish_all(&consumed, 2, at(200)), &[]).await.unwrap();
    calls
        .commit(vec![Write::CallConsumed { call_id: consumed.id }], &[])
        .await
        .unwrap();
    calls
        .commit(call_with_inputs(&open, &new_inputs(1)), &[])
        .await
        .unwrap();

    let expiry = Expiry {
        finished_before: at(150),
        consumed_before: at(200),
    };
    assert_eq!(calls.delete_expired(expiry, 10).await.unwrap(), [old.id]);
    let expiry = Expiry {
        consumed_before: at(201),
        ..expiry
    };
    assert_eq!(calls.delete_expired(expiry, 10).await.unwrap(), [consumed.id]);
    assert_eq!(calls.delete_expired(expiry, 10).await.unwrap(), []);
    for (table, left) in [("calls", 2), ("inputs", 3), ("input_payloads", 3), ("outputs", 2)] {
        let row = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("SELECT COUNT(*) AS n FROM {table}")))
            .fetch_one(&test.store.readers)
            .await
            .unwrap();
        assert_eq!(row.get::<i64, _>("n"), left, "{table}");
    }
    let everything = Expiry {
        finished_before: at(1_000),
        consumed_before: at(1_000),
    };
    assert_eq!(
        calls.delete_expired(everything, 10).await.unwrap(),
        [young.id],
        "an open call stays"
    );
}

#[tokio::test]
async fn abandoned_calls_are_found() {
    let test = TestStore::open().await;
    let calls = test.store.calls();
    let (empty, quiet, busy, recent) = (
        call(CallKind::Map, at(1)),
        call(CallKind::Map, at(2)),
        call(CallKind::Map, at(3)),
        call(CallKind::Map, at(100)),
    );
    let inputs = new_inputs(1);
    let mut writes = call_with_inputs(&empty, &[]);
    writes.extend(call_with_inputs(&quiet, &inputs));
    writes.push(finished(&quiet, inputs[0].id, 1, outcome("r"), at(4)));
    writes.extend(call_with_inputs(&busy, &new_inputs(1)));
    writes.extend(call_with_inputs(&recent, &[]));
    calls.commit(writes, &[]).await.unwrap();
    assert_eq!(calls.open_and_quiet(at(50), 10).await.unwrap(), [empty.id, quiet.id]);
    assert_eq!(calls.open_and_quiet(at(50), 1).await.unwrap(), [empty.id]);
    calls
        .commit(
            vec![Write::CallInputsFinished {
                call_id: quiet.id,
                count: 1,
            }],
            &[],
        )
        .await
        .unwrap();
    assert_eq!(calls.open_and_quiet(at(50), 10).await.unwrap(), [empty.id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_whole_turns_while_the_writer_works() {
    const TURNS: usize = 60;
    let test = TestStore::open().await;
    let write = async {
        for _ in 0..TURNS {
            let inputs = new_inputs(20);
            let new = call(CallKind::Map, at(1));
            let mut turn = call_with_inputs(&new, &inputs);
            turn.push(finished(&new, inputs[0].id, 1, outcome("r"), at(2)));
            test.store.calls().commit(turn, &[]).await.unwrap();
        }
    };
    let read = async || {
        let mut reads = 0;
        loop {
            let recovered = test.store.calls().load_pending().await.unwrap();
            for call in &recovered.calls {
                let open = recovered
                    .inputs
                    .iter()
                    .filter(|input| input.call_id == call.call.id)
                    .count();
                assert_eq!(open, 19, "a snapshot shows a turn whole or not at all");
            }
            reads += 1;
            if recovered.calls.len() == TURNS {
                return reads;
            }
        }
    };
    let ((), reads, more_reads) = tokio::join!(write, read(), read());
    assert!(
        reads > 1 && more_reads > 1,
        "reads and writes overlapped: {reads}, {more_reads}"
    );
}

#[tokio::test]
async fn calls_are_found_whether_or_not_all_of_them_are_remembered() {
    let mut test = TestStore::open().await;
    let before = call(CallKind::Unary, at(1));
    let turn = call_with_inputs(&before, &new_inputs(1));
    test.store.calls().commit(turn, &[]).await.unwrap();
    test.reopen().await;
    let unknown = call(CallKind::Unary, at(1)).id;
    let calls = test.store.calls();
    assert!(calls.call_summary(before.id).await.unwrap().is_some());
    calls.remember_calls().await.unwrap();
    let after = call(CallKind::Unary, at(2));
    let turn = call_with_inputs(&after, &new_inputs(1));
    calls.commit(turn, &[]).await.unwrap();
    assert!(calls.call_summary(before.id).await.unwrap().is_some());
    assert!(calls.call_summary(after.id).await.unwrap().is_some());
    assert!(calls.call_summary(unknown).await.unwrap().is_none());
}

/// As many rows as make every way of sending statements happen: joined, in bulk, and more than one text holds.
#[tokio::test]
async fn a_turn_of_any_size_is_recorded() {
    let test = TestStore::open().await;
    for size in [1, 2, 63, 64, 65, 128, 200, 600] {
        let calls: Vec<_> = (0..size).map(|n| call(CallKind::Unary, at(n))).collect();
        let inputs: Vec<_> = calls.iter().map(|_| new_inputs(1)).collect();
        let created = calls.iter().zip(&inputs);
        let turn = created.flat_map(|(call, inputs)| call_with_inputs(call, inputs));
        test.store.calls().commit(turn.collect(), &[]).await.unwrap();
        let started = inputs.iter().map(|inputs| Write::InputStarted {
            input_id: inputs[0].id,
            container_id: ContainerId::generate(),
            attempt: AttemptNumber(1),
            at: at(2),
        });
        test.store.calls().commit(started.collect(), &[]).await.unwrap();
        let recovered = test.store.calls().load_pending().await.unwrap();
        assert_eq!(recovered.inputs.len(), calls.len(), "{size}");
        assert!(recovered.inputs.iter().all(|input| input.running.is_some()), "{size}");
        let finish = calls
            .iter()
            .zip(&inputs)
            .map(|(call, inputs)| finished(call, inputs[0].id, 1, outcome("r"), at(3)));
        test.store.calls().commit(finish.collect(), &[]).await.unwrap();
        assert_eq!(test.store.calls().load_pending().await.unwrap().calls, [], "{size}");
        let last = test
            .store
            .calls()
            .call_summary(calls[calls.len() - 1].id)
            .await
            .unwrap();
        assert_eq!(last.unwrap().finished_count, 1, "{size}");
    }
}
