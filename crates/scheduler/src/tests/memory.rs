//! What is remembered is bounded, and as long as it says.

use std::time::Duration;

use ionian_domain::record::Recovered;
use ionian_domain::worker::WorkerCapacity;
use ionian_domain::{InputId, Timestamp, WorkerId};

use super::ids::numbered;
use crate::event::Event;
use crate::state::{REMEMBERED, State};
use crate::workers::SILENT_WORKERS;
use crate::{Config, Scheduler};

#[test]
fn the_oldest_of_what_was_forgotten_goes_first() {
    let mut recent = State::new(Config::default()).recent_inputs;
    let ids: Vec<InputId> = (0..=REMEMBERED as u64).map(numbered).collect();
    for id in &ids {
        recent.note(*id);
        recent.note(*id);
    }
    assert!(!recent.contains(&ids[0]));
    assert!(ids[1..].iter().all(|id| recent.contains(id)));
}

/// One that is beyond the number has to connect again.
#[test]
fn the_longest_silent_worker_is_forgotten() {
    let capacity = WorkerCapacity {
        cpu_millis: 1_000,
        memory_mib: 1_000,
        max_starting: 1,
        runtimes: [ionian_domain::container::RuntimeKind::Runc].into(),
    };
    let mut scheduler = Scheduler::new(Config::default());
    let mut handle = |now: Timestamp, event: Event| {
        scheduler.handle(now, vec![event], &mut || unreachable!("nothing runs"));
        scheduler.runtimes()
    };
    let mut now = Timestamp(0);
    handle(now, Event::Recovered(Recovered::default()));
    for number in 0..=SILENT_WORKERS as u64 {
        let worker_id = numbered::<WorkerId>(number);
        handle(now, Event::WorkerConnected { worker_id, capacity });
        now = now + Duration::from_millis(1);
    }
    now = now + Config::default().worker_silence;
    let heard = |number| Event::WorkerHeard {
        worker_id: numbered(number),
    };
    assert_eq!(handle(now, Event::Tick), None);
    assert_eq!(handle(now, heard(0)), None);
    assert_eq!(handle(now, heard(1)), Some(capacity.runtimes));
}
