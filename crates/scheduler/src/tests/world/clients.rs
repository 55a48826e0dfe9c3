//! Clients: they start calls, repeat what was not answered, change their minds, and vanish.

use ionian_domain::call::{AttemptNumber, Call, CallKind, InputPayload, Invocation, Payload};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::NewInput;
use ionian_domain::{CallId, ContainerId, FunctionId, InputId, Outcome};

use super::containers::ContainerStep;
use super::ingress::IngressStep;
use super::{Action, Server, World};
use crate::event::{Event, Refusal, ReplyId};
use crate::tests::ids::numbered;

pub(super) struct ClientCall {
    id: CallId,
    function_id: FunctionId,
    kind: CallKind,
    inputs: Vec<InputId>,
    /// How many inputs each request carries: the first starts the call.
    requests: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClientStep {
    /// Sends request number so much.
    Send(usize),
    Close,
    Consume,
    Cancel,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask {
    Client(usize, ClientStep),
    /// A container that tells a result.
    Report(ContainerId, InputId, AttemptNumber, OutcomeStatus),
    /// A container, whose end ends its question, or somebody who does not care.
    Nobody,
}

impl World {
    pub(super) fn new_client(&mut self) {
        let function = self
            .random
            .below(u32::try_from(self.functions.len()).expect("some functions")) as usize;
        let (function_id, is_web) = (self.functions[function].id, self.functions[function].settings.is_web);
        if is_web {
            if self.server == Server::Up && self.functions[function].is_active {
                for _ in 0..=self.random.below(3) {
                    let delay = u64::from(self.random.below(50));
                    self.after_ms(delay, Action::Ingress(function_id, IngressStep::Request));
                }
            }
            return;
        }
        let kind = if self.random.percent(60) {
            CallKind::Unary
        } else {
            CallKind::Map
        };
        let requests: Vec<usize> = match kind {
            CallKind::Unary => vec![1],
            CallKind::Map => (0..=self.random.below(3))
                .map(|_| self.random.below(5) as usize)
                .collect(),
        };
        let count: usize = requests.iter().sum();
        let inputs = (0..count).map(|_| numbered(self.number())).collect();
        let id = numbered(self.number());
        self.calls.push(ClientCall {
            id,
            function_id,
            kind,
            inputs,
            requests,
        });
        let call = self.calls.len() - 1;
        self.after_ms(0, Action::Client(call, ClientStep::Send(0)));
        if self.random.percent(10) {
            let delay = u64::from(self.random.below(3_000));
            self.after_ms(delay, Action::Client(call, ClientStep::Cancel));
        }
    }

    pub(super) fn client_step(&mut self, index: usize, step: ClientStep) {
        if self.server != Server::Up {
            self.after_ms(500, Action::Client(index, step));
            return;
        }
        let call_id = self.calls[index].id;
        match step {
            ClientStep::Send(request) => self.send(index, request),
            ClientStep::Close => {
                let count = u32::try_from(self.calls[index].inputs.len()).expect("few inputs");
                let reply = self.ask(Ask::Client(index, step));
                self.after_ms(1, Action::Event(Event::CallInputsFinished { call_id, count, reply }));
            }
            ClientStep::Consume => self.after_ms(1, Action::Event(Event::CallConsumed { call_id })),
            ClientStep::Cancel => {
                let outcome = Outcome::decided(OutcomeStatus::Terminated, "cancelled");
                let terminate_containers = self.random.percent(30);
                let reply = self.ask(Ask::Client(index, step));
                let event = Event::CallCancelled {
                    call_id,
                    outcome,
                    terminate_containers,
                    reply,
                };
                self.after_ms(1, Action::Event(event));
            }
        }
    }

    /// Sends a request, or sends it again. What is recorded is known to `control`, which then answers
    /// without asking.
    fn send(&mut self, index: usize, request: usize) {
        let call = &self.calls[index];
        let first: usize = call.requests[..request].iter().sum();
        let inputs: Vec<NewInput> = (first..first + call.requests[request])
            .map(|position| NewInput {
                id: call.inputs[position],
                index: u32::try_from(position).expect("few inputs"),
                payload: InputPayload {
                    payload: Payload::EMPTY,
                    data_format: 1,
                    method_name: None,
                },
            })
            .collect();
        let is_recorded = inputs.iter().all(|input| self.record.knows_input(&input.id));
        if self.call_row_is_recorded(&call.id) && is_recorded {
            let accepted: Vec<InputId> = inputs.iter().map(|input| input.id).collect();
            self.sent(index, request, &accepted);
            return;
        }
        let (call_id, function_id, kind) = (call.id, call.function_id, call.kind);
        let times = if self.mishap(5) { 2 } else { 1 };
        for time in 0..times {
            // Only the first one's answer is heard.
            let reply = self.ask(if time == 0 {
                Ask::Client(index, ClientStep::Send(request))
            } else {
                Ask::Nobody
            });
            let inputs = inputs.clone();
            let event = if request == 0 {
                let call = Call {
                    id: call_id,
                    app_id: numbered(1),
                    function_id,
                    kind,
                    invocation: Invocation::Sync,
                    parent_input_id: None,
                    created_at: self.now,
                    finished_inputs: None,
                };
                Event::CallStarted { call, inputs, reply }
            } else {
                Event::InputsPut { call_id, inputs, reply }
            };
            let delay = u64::from(self.random.below(10));
            self.after_ms(delay, Action::Event(event));
        }
    }

    pub(super) fn answered(&mut self, reply: ReplyId, answer: Result<(), Refusal>) {
        let Some(Ask::Client(index, step)) = self.asks.remove(&reply) else {
            return;
        };
        match (answer, step) {
            (Ok(()), ClientStep::Send(request)) => {
                let call = &self.calls[index];
                let first: usize = call.requests[..request].iter().sum();
                let accepted: Vec<InputId> = call.inputs[first..first + call.requests[request]].to_vec();
                self.sent(index, request, &accepted);
            }
            (Ok(()), ClientStep::Close) => {
                let delay = u64::from(self.random.below(5_000));
                if self.random.percent(70) {
                    self.after_ms(delay, Action::Client(index, ClientStep::Consume));
                }
            }
            (Err(Refusal::QueueFull), step) => self.after_ms(1_000, Action::Client(index, step)),
            (Ok(()), ClientStep::Consume | ClientStep::Cancel)
            | (Err(Refusal::UnknownFunction | Refusal::UnknownCall | Refusal::UnknownContainer), _) => {}
        }
    }

    fn sent(&mut self, index: usize, request: usize, accepted: &[InputId]) {
        self.accepted.extend(accepted);
        let call = &self.calls[index];
        let is_last = request + 1 == call.requests.len();
        let next = match (call.kind, is_last) {
            (CallKind::Unary, _) => None,
            (CallKind::Map, true) => Some(ClientStep::Close),
            (CallKind::Map, false) => Some(ClientStep::Send(request + 1)),
        };
        if let Some(next) = next
            && !self.mishap(10)
        {
            let delay = u64::from(self.random.below(200));
            self.after_ms(delay, Action::Client(index, next));
        }
    }

    /// The server died: clients that wait for an answer ask again.
    pub(super) fn repeat_unanswered(&mut self) {
        for (_, ask) in std::mem::take(&mut self.asks) {
            match ask {
                Ask::Client(index, step) => self.after_ms(100, Action::Client(index, step)),
                Ask::Report(id, input_id, attempt, status) => {
                    let step = ContainerStep::Report(input_id, attempt, status);
                    self.after_ms(200, Action::Container(id, step));
                }
                Ask::Nobody => {}
            }
        }
    }
}
