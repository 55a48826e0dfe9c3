//! What users send and return comes back byte for byte.

use bytes::Bytes;
use ionian_domain::call::{CallKind, InputPayload, Payload};
use ionian_domain::ids::InputId;
use ionian_domain::outcome::{Outcome, OutcomeStatus};
use ionian_domain::record::NewInput;
use proptest::prelude::*;

use super::{TestStore, at, call, call_with_inputs, finished};

fn any_bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        Just(Bytes::new()),
        proptest::collection::vec(any::<u8>(), 0..64).prop_map(Bytes::from),
        Just(Bytes::from(vec![0; 100_000])),
    ]
}

/// Text as users make it: empty, with NUL characters, with characters of four bytes.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("a\0b\0".to_owned()),
        Just("\u{1F600}'\";--".to_owned()),
        any::<String>()
    ]
}

fn any_payload() -> impl Strategy<Value = Payload> {
    prop_oneof![
        any_bytes().prop_map(Payload::Inline),
        any_text().prop_map(Payload::Blob)
    ]
}

prop_compose! {
    fn any_outcome()(
        status in (1..=7).prop_map(|number| OutcomeStatus::from_wire(number).unwrap()),
        payload in any_payload(),
        (data_format, exit_code) in any::<(i32, i32)>(),
        (exception, traceback) in (any_text(), any_text()),
        (serialized_traceback, traceback_line_cache) in (any_bytes(), any_bytes()),
    ) -> Outcome {
        Outcome {
            status, payload, data_format, exception, traceback, serialized_traceback, traceback_line_cache, exit_code,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn payloads_and_outcomes_come_back_as_they_were(
        pairs in proptest::collection::vec((any_payload(), any_text(), any::<i32>(), any_outcome()), 1..5),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut test = TestStore::open().await;
            let map = call(CallKind::Map, at(1));
            let inputs: Vec<NewInput> = pairs.iter().zip(0..).map(|((payload, method, data_format, _), index)| NewInput {
                id: InputId::generate(),
                index,
                payload: InputPayload {
                    payload: payload.clone(),
                    data_format: *data_format,
                    method_name: (!method.is_empty()).then(|| method.clone()),
                },
            }).collect();
            let mut writes = call_with_inputs(&map, &inputs);
            for (((.., outcome), input), sequence) in pairs.iter().zip(&inputs).zip(1..) {
                writes.push(finished(&map, input.id, sequence, outcome.clone(), at(2)));
            }
            test.store.calls().commit(writes, &[]).await.unwrap();
            test.reopen().await;
            let ids: Vec<InputId> = inputs.iter().map(|input| input.id).collect();
            let payloads = test.store.calls().input_payloads(&ids).await.unwrap();
            let outputs = test.store.calls().outputs(map.id, 0, 100, None).await.unwrap();
            prop_assert_eq!(outputs.len(), inputs.len());
            for ((input, output), (.., outcome)) in inputs.iter().zip(&outputs).zip(&pairs) {
                prop_assert_eq!(&payloads[&input.id], &input.payload);
                prop_assert_eq!(&output.outcome, outcome);
            }
            Ok(())
        })?;
    }
}
