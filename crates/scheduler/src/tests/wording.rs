//! How scenarios name things, and how they say what was decided.

use std::fmt::Write as _;

use ionian_domain::call::{AttemptNumber, Call, CallKind, InputPayload, Invocation, Payload};
use ionian_domain::record::{NewInput, Write};
use ionian_domain::{InputId, Timestamp};

use super::ids::Prefixed;
use crate::turn::Command;

pub(super) fn written(write: &Write) -> String {
    match write {
        Write::CallCreated { call } => format!("call {}", name(call.id)),
        Write::InputsCreated { inputs, .. } => {
            let names: Vec<String> = inputs.iter().map(|input| name(input.id)).collect();
            format!("{} waits", names.join(" "))
        }
        Write::InputStarted {
            input_id,
            container_id,
            attempt: number,
            ..
        } => {
            format!("{} on {}", attempt(*input_id, *number), name(*container_id))
        }
        Write::InputRequeued {
            input_id,
            attempt: number,
            not_before,
            retries_used,
        } => {
            format!(
                "{} waits from {}s, {retries_used} retries",
                attempt(*input_id, *number),
                not_before.as_unix_seconds()
            )
        }
        Write::InputFinished {
            input_id,
            attempt: number,
            outcome,
            sequence,
            ..
        } => {
            let mut text = format!(
                "{} is {:?} (output {sequence})",
                attempt(*input_id, *number),
                outcome.status
            );
            if !outcome.exception.is_empty() {
                write!(text, " '{}'", outcome.exception).unwrap();
            }
            text
        }
        Write::CallInputsFinished { call_id, count } => format!("{} has {count} inputs", name(*call_id)),
        Write::CallConsumed { call_id } => format!("{} was read", name(*call_id)),
        Write::ContainerCreated {
            container_id,
            worker_id,
            function_id,
            ..
        } => {
            let worker = name(*worker_id);
            let place = if worker == "w" {
                String::new()
            } else {
                format!(" on {worker}")
            };
            format!("{} for {}{place}", name(*container_id), name(*function_id))
        }
        Write::ContainerEnded { container_id, .. } => format!("{} ended", name(*container_id)),
    }
}

pub(super) fn ordered(command: &Command) -> Option<String> {
    Some(match command {
        // Follow from what is recorded.
        Command::OutputsReady { .. } | Command::Forget { .. } => return None,
        Command::CancelInputs {
            container_id,
            input_ids,
        } => {
            let inputs: Vec<String> = input_ids.iter().map(|id| name(*id)).collect();
            format!("{} lets go of {}", name(*container_id), inputs.join(" "))
        }
        Command::WebReady { container_id, .. } => format!("requests to {}", name(*container_id)),
        Command::WebDraining { container_id, .. } => format!("no more requests to {}", name(*container_id)),
        Command::WebGone { container_id, .. } => format!("{} is gone", name(*container_id)),
        Command::WebStartFailed { message, .. } => format!("requests fail: '{message}'"),
        Command::BackedOff { failures, until, .. } => {
            format!("{failures} failures, pause until {}s", until.as_unix_seconds())
        }
        Command::RuntimeMissing { function_id, runtime } => format!("no {runtime} for {}", name(*function_id)),
    })
}

pub(super) fn attempt(input_id: InputId, number: AttemptNumber) -> String {
    if number.0 == 0 {
        name(input_id)
    } else {
        format!("{}#{}", name(input_id), number.0)
    }
}

/// The name that a story gives an id: padded to the length of ids with a letter that names do not have.
pub(super) fn id<T: Prefixed>(name: &str) -> T {
    format!("{}-{name:z<22}", T::PREFIX).parse().unwrap()
}

pub(super) fn name(id: impl std::fmt::Display) -> String {
    let text = id.to_string();
    let (_, name) = text.split_once('-').unwrap();
    name.trim_end_matches('z').replace('x', ".")
}

pub(super) fn input_id(name: &str) -> InputId {
    id(&name.replace('.', "x"))
}

pub(super) fn input(call: &str, index: u32) -> NewInput {
    NewInput {
        id: input_id(&format!("{call}.{index}")),
        index,
        payload: InputPayload {
            payload: Payload::EMPTY,
            data_format: 1,
            method_name: None,
        },
    }
}

pub(super) fn call(name: &str, function: &str, kind: CallKind, now: Timestamp) -> Call {
    Call {
        id: id(name),
        app_id: id("app"),
        function_id: id(function),
        kind,
        invocation: Invocation::Sync,
        parent_input_id: None,
        created_at: now,
        finished_inputs: None,
    }
}
