//! The journal of a simulated life, replayed; and of a real one, where it is named:
//! `IONIAN_REPLAY=<file> cargo nextest run -p ionian-scheduler replays_the_named_journal --no-capture`.

use ionian_domain::call::{CallKind, Payload};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::Recovered;
use ionian_domain::{ContainerId, Outcome, Timestamp};

use super::ids::numbered;
use super::wording::{call, id, input};
use super::world;
use crate::event::{Event, ReplyId};
use crate::journal::{self, Divergence, Entry};
use crate::{Config, Scheduler};

const SEEDS: u64 = 40;

#[test]
fn a_simulated_life_is_decided_the_same_again() {
    let (mut lives, mut turns) = (0, 0);
    for seed in 0..SEEDS {
        let text = world::journal(seed).unwrap();
        let report = journal::replay(text.lines()).unwrap_or_else(|divergence| panic!("seed {seed}: {divergence}"));
        assert!(
            report.writes > 0 && report.events >= 200 && !report.is_torn,
            "{report:?}"
        );
        lives += report.lives;
        turns += report.turns;
    }
    assert!(lives > SEEDS as usize, "some of the servers crash");
    println!("{SEEDS} seeds, {lives} lives of the server, {turns} turns replayed");
}

#[test]
fn another_decision_is_noticed() {
    let text = world::journal(3).unwrap();
    let position = text.rfind("\"attempt\":0").unwrap();
    let changed = format!("{}\"attempt\":7{}", &text[..position], &text[position + 11..]);
    assert!(matches!(
        journal::replay(changed.lines()),
        Err(Divergence::Differs { .. })
    ));
    let later = text.replacen("\"desired_changed\":true", "\"desired_changed\":false", 1);
    assert!(matches!(
        journal::replay(later.lines()),
        Err(Divergence::Differs { .. })
    ));
}

#[test]
fn a_line_that_was_cut_off_ends_a_journal() {
    let text = world::journal(3).unwrap();
    let whole = journal::replay(text.lines()).unwrap();
    let torn = journal::replay(text[..text.len() - 10].lines()).unwrap();
    assert!(torn.is_torn && torn.turns == whole.turns - 1, "{torn:?} and {whole:?}");
    let without_opening = text.lines().skip(1);
    assert!(matches!(
        journal::replay(without_opening),
        Err(Divergence::NotOpened { line: 1 })
    ));
    assert!(matches!(
        journal::replay([text.lines().next().unwrap().replace("\"version\":1", "\"version\":2")]),
        Err(Divergence::OtherFormat { found: 2, .. })
    ));
    assert!(matches!(
        journal::replay(["{}", "{}"]),
        Err(Divergence::Unreadable { line: 1, .. })
    ));
    let opening = text.lines().next().unwrap();
    assert!(matches!(
        journal::replay([&opening[..20], opening]),
        Err(Divergence::Unreadable { line: 1, .. })
    ));
    assert!(matches!(
        journal::replay([opening, "nonsense"]),
        Err(Divergence::Unreadable { line: 2, .. })
    ));
}

/// A journal can be shown to others.
#[test]
fn contents_stay_out_of_it() {
    const SECRET: &str = "my mother's maiden name";
    let mut scheduler = Scheduler::new(Config::default());
    let now = Timestamp(0);
    let mut sent = input("c", 0);
    let bytes = SECRET.into();
    let hexadecimal = format!("{bytes:x}");
    sent.payload.payload = Payload::Inline(bytes);
    let events = vec![
        Event::Recovered(Recovered::default()),
        Event::CallStarted {
            call: call("c", "f", CallKind::Unary, now),
            inputs: vec![sent],
            reply: ReplyId(1),
        },
        Event::ContainerFailed {
            container_id: id("A"),
            outcome: Outcome::decided(OutcomeStatus::Failure, SECRET),
            reply: ReplyId(2),
        },
    ];
    let mut entry = Entry::begin(now, &events);
    let turn = scheduler.handle(now, events, &mut || entry.drew(numbered::<ContainerId>(1)));
    let text = String::from_utf8(entry.end(&turn)).unwrap();
    assert!(text.contains("\"call_started\"") || text.contains("CallStarted"));
    assert!(!text.contains(SECRET) && !text.contains(&hexadecimal));
}

#[test]
fn replays_the_named_journal() {
    let Ok(path) = std::env::var("IONIAN_REPLAY") else {
        println!("skipped: IONIAN_REPLAY names no journal");
        return;
    };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"));
    let report = journal::replay(text.lines()).unwrap_or_else(|divergence| panic!("{path}: {divergence}"));
    println!("{path}: {report:?}");
}
