//! Recovery reads back what was written: random turns against a small model that applies one write
//! after the other, where the store folds and batches them.

use std::collections::BTreeMap;

use ionian_domain::call::{AttemptNumber, CallKind};
use ionian_domain::container::ContainerExit;
use ionian_domain::ids::{AppId, CallId, ContainerId, DefinitionId, FunctionId, InputId, WorkerId};
use ionian_domain::record::{NewInput, OutputRecord, PendingCall, PendingContainer, PendingInput, Recovered, Write};
use proptest::prelude::*;

use super::{TestStore, at, call, outcome, payload};

/// What to do next; the numbers pick among what exists.
#[derive(Debug, Clone)]
enum Step {
    Create { unary: bool },
    Put { call: usize, count: u32 },
    Start { input: usize, container: usize },
    Requeue { input: usize, retry: bool },
    Finish { input: usize },
    Close { call: usize },
    Consume { call: usize },
    CreateContainer,
    EndContainer { container: usize },
    EndTurn { restart: bool },
}

fn any_step() -> impl Strategy<Value = Step> {
    let pick = || any::<prop::sample::Index>().prop_map(|index| index.index(1 << 16));
    prop_oneof![
        2 => any::<bool>().prop_map(|unary| Step::Create { unary }),
        3 => (pick(), 1..80_u32).prop_map(|(call, count)| Step::Put { call, count }),
        4 => (pick(), pick()).prop_map(|(input, container)| Step::Start { input, container }),
        3 => (pick(), any::<bool>()).prop_map(|(input, retry)| Step::Requeue { input, retry }),
        6 => pick().prop_map(|input| Step::Finish { input }),
        1 => pick().prop_map(|call| Step::Close { call }),
        1 => pick().prop_map(|call| Step::Consume { call }),
        1 => Just(Step::CreateContainer),
        1 => pick().prop_map(|container| Step::EndContainer { container }),
        3 => prop::bool::weighted(0.1).prop_map(|restart| Step::EndTurn { restart }),
    ]
}

#[derive(Default)]
struct Model {
    time: i64,
    calls: Vec<ModelCall>,
    /// With whether it has finished.
    inputs: Vec<(PendingInput, bool)>,
    /// With whether it has ended.
    containers: Vec<(PendingContainer, bool)>,
    outputs: BTreeMap<CallId, Vec<OutputRecord>>,
}

struct ModelCall {
    pending: PendingCall,
    consumed: bool,
}

impl ModelCall {
    fn is_closed(&self) -> bool {
        self.consumed
            || self.pending.call.finished_inputs.is_some()
            || (self.is_unary() && self.pending.input_count > 0)
    }

    fn is_unary(&self) -> bool {
        self.pending.call.kind == CallKind::Unary
    }
}

impl Model {
    /// Turns a step into a write that the scheduler could make now, if there is one.
    fn write(&mut self, step: &Step) -> Option<Write> {
        self.time += 1;
        let now = at(self.time);
        let pick = |list: Vec<usize>, number: usize| (!list.is_empty()).then(|| list[number % list.len()]);
        let open_inputs = || {
            (0..self.inputs.len())
                .filter(|i| !self.inputs[*i].1)
                .collect::<Vec<_>>()
        };
        let live_containers = || {
            (0..self.containers.len())
                .filter(|i| !self.containers[*i].1)
                .collect::<Vec<_>>()
        };
        let all_calls = || (0..self.calls.len()).collect::<Vec<_>>();
        Some(match step {
            Step::Create { unary } => {
                let kind = if *unary { CallKind::Unary } else { CallKind::Map };
                Write::CallCreated { call: call(kind, now) }
            }
            Step::Put { call, count } => {
                let open = all_calls()
                    .into_iter()
                    .filter(|i| !self.calls[*i].is_closed())
                    .collect();
                let call = &self.calls[pick(open, *call)?];
                let first = call.pending.input_count;
                let count = if call.is_unary() { 1 } else { *count };
                Write::InputsCreated {
                    call_id: call.pending.call.id,
                    function_id: call.pending.call.function_id,
                    inputs: (first..first + count)
                        .map(|index| NewInput {
                            id: InputId::generate(),
                            index,
                            payload: payload("p"),
                        })
                        .collect(),
                    at: now,
                }
            }
            Step::Start { input, container } => {
                let input = &self.inputs[pick(open_inputs(), *input)?].0;
                let container = &self.containers[pick(live_containers(), *container)?].0;
                Write::InputStarted {
                    input_id: input.id,
                    container_id: container.id,
                    attempt: input.attempt,
                    at: now,
                }
            }
            Step::Requeue { input, retry } => {
                let input = &self.inputs[pick(open_inputs(), *input)?].0;
                Write::InputRequeued {
                    input_id: input.id,
                    attempt: input.attempt.next(),
                    not_before: at(self.time + 100),
                    retries_used: input.retries_used + u32::from(*retry),
                }
            }
            Step::Finish { input } => {
                let input = &self.inputs[pick(open_inputs(), *input)?].0;
                let call = self.calls.iter().find(|call| call.pending.call.id == input.call_id)?;
                Write::InputFinished {
                    input_id: input.id,
                    call_id: input.call_id,
                    sequence: call.pending.last_sequence + 1,
                    attempt: input.attempt,
                    container_id: input.running.map(|(container, _)| container),
                    outcome: outcome(&format!("output {}", input.index)),
                    started_at: input.running.map(|(_, at)| at),
                    at: now,
                }
            }
            Step::Close { call } => {
                let call = &self.calls[pick(all_calls(), *call)?].pending;
                Write::CallInputsFinished {
                    call_id: call.call.id,
                    count: call.input_count,
                }
            }
            Step::Consume { call } => Write::CallConsumed {
                call_id: self.calls[pick(all_calls(), *call)?].pending.call.id,
            },
            Step::CreateContainer => Write::ContainerCreated {
                container_id: ContainerId::generate(),
                worker_id: WorkerId::generate(),
                app_id: AppId::generate(),
                function_id: FunctionId::generate(),
                definition_id: DefinitionId::generate(),
                at: now,
            },
            Step::EndContainer { container } => Write::ContainerEnded {
                container_id: self.containers[pick(live_containers(), *container)?].0.id,
                exit: ContainerExit::Signaled { signal: 9 },
                at: now,
            },
            Step::EndTurn { .. } => return None,
        })
    }

    fn call(&mut self, id: CallId) -> &mut ModelCall {
        self.calls.iter_mut().find(|call| call.pending.call.id == id).unwrap()
    }

    fn input(&mut self, id: InputId) -> &mut (PendingInput, bool) {
        self.inputs.iter_mut().find(|(input, _)| input.id == id).unwrap()
    }

    fn apply(&mut self, write: &Write) {
        match write.clone() {
            Write::CallCreated { call } => self.calls.push(ModelCall {
                pending: PendingCall {
                    call,
                    input_count: 0,
                    finished_count: 0,
                    last_sequence: 0,
                },
                consumed: false,
            }),
            Write::InputsCreated {
                call_id,
                function_id,
                inputs,
                at,
            } => {
                for input in inputs {
                    self.call(call_id).pending.input_count += 1;
                    let pending = PendingInput {
                        id: input.id,
                        call_id,
                        function_id,
                        index: input.index,
                        attempt: AttemptNumber(0),
                        retries_used: 0,
                        running: None,
                        not_before: None,
                        created_at: at,
                    };
                    self.inputs.push((pending, false));
                }
            }
            Write::InputStarted {
                input_id,
                container_id,
                attempt,
                at,
            } => {
                let input = &mut self.input(input_id).0;
                (input.running, input.attempt, input.not_before) = (Some((container_id, at)), attempt, None);
            }
            Write::InputRequeued {
                input_id,
                attempt,
                not_before,
                retries_used,
            } => {
                let input = &mut self.input(input_id).0;
                (input.running, input.attempt) = (None, attempt);
                (input.not_before, input.retries_used) = (Some(not_before), retries_used);
            }
            Write::InputFinished {
                input_id,
                call_id,
                sequence,
                attempt,
                container_id,
                outcome,
                started_at,
                at,
            } => {
                self.input(input_id).1 = true;
                let index = self.input(input_id).0.index;
                self.call(call_id).pending.finished_count += 1;
                self.call(call_id).pending.last_sequence = sequence;
                let finished_at = at;
                let record = OutputRecord {
                    sequence,
                    input_id,
                    index,
                    attempt,
                    container_id,
                    outcome,
                    started_at,
                    finished_at,
                };
                self.outputs.entry(call_id).or_default().push(record);
            }
            Write::CallInputsFinished { call_id, count } => {
                self.call(call_id).pending.call.finished_inputs = Some(count);
            }
            Write::CallConsumed { call_id } => self.call(call_id).consumed = true,
            Write::ContainerCreated {
                container_id,
                worker_id,
                app_id,
                function_id,
                definition_id,
                at,
            } => {
                let pending = PendingContainer {
                    id: container_id,
                    origin: Some((worker_id, definition_id)),
                    app_id,
                    function_id,
                    created_at: at,
                    web_ready_at: None,
                };
                self.containers.push((pending, false));
            }
            Write::ContainerEnded { container_id, .. } => {
                self.containers
                    .iter_mut()
                    .find(|(container, _)| container.id == container_id)
                    .unwrap()
                    .1 = true;
            }
        }
    }

    fn recovered(&self) -> Recovered {
        let is_pending =
            |call: &&ModelCall| !call.is_closed() || call.pending.finished_count < call.pending.input_count;
        Recovered {
            calls: self
                .calls
                .iter()
                .filter(is_pending)
                .map(|call| call.pending.clone())
                .collect(),
            inputs: self
                .inputs
                .iter()
                .filter(|(_, finished)| !finished)
                .map(|(input, _)| input.clone())
                .collect(),
            containers: self
                .containers
                .iter()
                .filter(|(_, ended)| !ended)
                .map(|(c, _)| c.clone())
                .collect(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn recovery_equals_what_was_written(steps in proptest::collection::vec(any_step(), 1..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut test = TestStore::open().await;
            let mut model = Model::default();
            let mut turn = Vec::new();
            for step in steps.iter().chain([&Step::EndTurn { restart: true }]) {
                if let Some(write) = model.write(step) {
                    model.apply(&write);
                    turn.push(write);
                }
                if let Step::EndTurn { restart } = step {
                    test.store.calls().commit(std::mem::take(&mut turn), &[]).await.unwrap();
                    if *restart {
                        test.reopen().await;
                    }
                    prop_assert_eq!(test.store.calls().load_pending().await.unwrap(), model.recovered());
                }
            }
            for (call_id, outputs) in &model.outputs {
                let read = test.store.calls().outputs(*call_id, 0, u32::MAX, None).await.unwrap();
                prop_assert_eq!(&read, outputs);
                let ranged = test.store.calls().outputs(*call_id, 0, u32::MAX, Some((3, 7))).await.unwrap();
                let expected: Vec<_> = outputs.iter().filter(|output| (3..=7).contains(&output.index)).cloned().collect();
                prop_assert_eq!(ranged, expected);
            }
            for model_call in &model.calls {
                let summary = test.store.calls().call_summary(model_call.pending.call.id).await.unwrap().unwrap();
                prop_assert_eq!(summary.call, model_call.pending.call.clone());
                prop_assert_eq!(summary.input_count, model_call.pending.input_count);
                prop_assert_eq!(summary.finished_count, model_call.pending.finished_count);
                prop_assert_eq!(summary.last_sequence, model_call.pending.last_sequence);
                prop_assert_eq!(summary.consumed, model_call.consumed);
            }
            Ok(())
        })?;
    }
}
