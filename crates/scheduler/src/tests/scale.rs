//! Costs: what is done for one input must not grow with the number of inputs, and what is done in one
//! turn must not grow with the number of functions.
//!
//! Times are compared with each other in one run, the best of several, with room for a busy machine:
//! linear work on four times as much takes four times as long, quadratic work sixteen times.

use std::time::{Duration, Instant};

use ionian_domain::call::{Call, CallKind, InputPayload, Invocation, Payload};
use ionian_domain::container::RuntimeKind;
use ionian_domain::function::{Autoscaler, RetryPolicy};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{NewInput, Recovered};
use ionian_domain::{ContainerId, FunctionId, Outcome, Timestamp};

use super::ids::numbered;
use crate::event::{Event, PoolSettings, ReplyId};
use crate::{Config, Scheduler};

const SMALL: u64 = 10_000;
const LARGE: u64 = 4 * SMALL;
const MOST_FOR_LINEAR: u32 = 10;
const TRIES: usize = 5;

fn activated(function_id: FunctionId) -> Event {
    let settings = PoolSettings {
        app_id: numbered(1),
        definition_id: numbered(1),
        is_web: false,
        autoscaler: Autoscaler {
            min_containers: 0,
            max_containers: Some(1),
            buffer_containers: 0,
            scaledown_window: Duration::from_mins(1),
        },
        slots: 1,
        target_slots: 1,
        batching: None,
        retry: RetryPolicy::NONE,
        timeout: Duration::from_mins(5),
        startup_timeout: Duration::from_mins(5),
        single_use: false,
        cpu_millis: 1,
        memory_mib: 1,
        runtime: RuntimeKind::Runc,
    };
    Event::FunctionActivated { function_id, settings }
}

fn map(function_id: FunctionId, inputs: u64) -> Event {
    let call = Call {
        id: numbered(1),
        app_id: numbered(1),
        function_id,
        kind: CallKind::Map,
        invocation: Invocation::Sync,
        parent_input_id: None,
        created_at: Timestamp(0),
        finished_inputs: None,
    };
    let inputs = (0..inputs)
        .map(|number| NewInput {
            id: numbered(number),
            index: u32::try_from(number).unwrap(),
            payload: InputPayload {
                payload: Payload::EMPTY,
                data_format: 1,
                method_name: None,
            },
        })
        .collect();
    Event::CallStarted {
        call,
        inputs,
        reply: ReplyId(1),
    }
}

/// Best of several, so that a busy machine does not count.
fn best(mut measure: impl FnMut() -> Duration) -> Duration {
    (0..TRIES).map(|_| measure()).min().unwrap()
}

#[test]
fn cancelling_a_large_map_is_not_quadratic() {
    let cancel = |inputs: u64| {
        let config = Config {
            max_queued_inputs: usize::MAX,
            ..Config::default()
        };
        let mut scheduler = Scheduler::new(config);
        let mut fresh = || -> ContainerId { numbered(1) };
        let function_id = numbered(1);
        scheduler.handle(
            Timestamp(0),
            vec![
                Event::Recovered(Recovered::default()),
                activated(function_id),
                map(function_id, inputs),
            ],
            &mut fresh,
        );
        let outcome = Outcome::decided(OutcomeStatus::Terminated, "cancelled");
        let event = Event::CallCancelled {
            call_id: numbered(1),
            outcome,
            terminate_containers: false,
            reply: ReplyId(2),
        };
        let started = Instant::now();
        let turn = scheduler.handle(Timestamp(1), vec![event], &mut fresh);
        let took = started.elapsed();
        assert_eq!(turn.writes.len() as u64, inputs + 1);
        took
    };
    let (small, large) = (best(|| cancel(SMALL)), best(|| cancel(LARGE)));
    println!("cancelling {SMALL} inputs took {small:?}, {LARGE} took {large:?}");
    assert!(
        large < small * MOST_FOR_LINEAR,
        "{LARGE} inputs took {large:?}, and {SMALL} took {small:?}"
    );
}

#[test]
fn a_turn_does_not_cost_more_where_there_are_more_functions() {
    let tick = |functions: u64| {
        let mut scheduler = Scheduler::new(Config::default());
        let mut fresh = || -> ContainerId { unreachable!("nothing asks for a container") };
        let mut events: Vec<Event> = (0..functions).map(|number| activated(numbered(number))).collect();
        events.push(Event::Recovered(Recovered::default()));
        scheduler.handle(Timestamp(0), events, &mut fresh);
        let started = Instant::now();
        for number in 0..200 {
            scheduler.handle(Timestamp(number), vec![Event::Tick], &mut fresh);
        }
        started.elapsed()
    };
    let (few, many) = (best(|| tick(50)), best(|| tick(5_000)));
    println!("200 turns took {few:?} with 50 functions, and {many:?} with 5,000");
    assert!(
        many < few * MOST_FOR_LINEAR,
        "200 turns took {many:?} with 5,000 functions, and {few:?} with 50"
    );
}
