//! The simulation: seeds through [`super::world`], and the deliberate mistakes that it must catch.
//!
//! `IONIAN_SIM_SEED=7` runs one seed; `IONIAN_SIM_SEEDS=200000` runs more of them than a test run does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use super::world;
use crate::breaks::Break;

/// Seeds of a normal test run: seconds without optimization, on a machine that does other things too.
const SEEDS: u64 = 2_000;
/// Seeds within which every mistake is caught.
const SEEDS_TO_CATCH: u64 = 300;

#[derive(Default)]
struct Totals {
    events: usize,
    turns: usize,
    crashes: usize,
    troubles: usize,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.turns += other.turns;
        self.crashes += other.crashes;
        self.troubles += other.troubles;
    }
}

fn replay(seed: u64) -> String {
    format!("IONIAN_SIM_SEED={seed} cargo nextest run -p ionian-scheduler simulation::every_seed --no-capture")
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn every_seed_keeps_the_invariants_and_comes_to_rest() {
    let seeds = match number("IONIAN_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("IONIAN_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let started = std::time::Instant::now();
    let threads = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let mut totals = Totals::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                let seeds = seeds.clone();
                scope.spawn(move || {
                    let mut totals = Totals::default();
                    for seed in seeds.filter(|seed| seed % threads == worker) {
                        match catch_unwind(|| world::run(seed, None)).unwrap_or_else(|_| Err("a panic".to_owned())) {
                            Ok(world) => {
                                assert!(world.events >= 200, "seed {seed} saw only {} events", world.events);
                                totals.add(&Totals {
                                    events: world.events,
                                    turns: world.turns,
                                    crashes: world.crashes,
                                    troubles: world.troubles,
                                });
                            }
                            Err(sentence) => {
                                let story = world::story(seed, None);
                                panic!("{story}\nseed {seed}: {sentence}\nreplay: {}", replay(seed));
                            }
                        }
                    }
                    totals
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(its) => totals.add(&its),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let seeds = seeds.end - seeds.start;
    let seconds = started.elapsed().as_secs_f64();
    let Totals {
        events,
        turns,
        crashes,
        troubles,
    } = totals;
    println!(
        "{seeds} seeds, {events} events in {turns} turns, {crashes} crashes of the server, \
         {troubles} outages of workers: {seconds:.0} s, {:.0} seeds/s",
        seeds as f64 / seconds
    );
}

#[test]
fn equal_seeds_give_equal_worlds() {
    let runs: Vec<_> = (0..2)
        .map(|_| world::run(11, None).map(|world| (world.events, world.turns)))
        .collect();
    assert_eq!(runs[0], runs[1]);
}

/// Each mistake is caught, by the invariant that is meant for it.
fn caught(mistake: Break, sentence: &str) {
    let mut others = Vec::new();
    for seed in 0..SEEDS_TO_CATCH {
        match catch_unwind(AssertUnwindSafe(|| world::run(seed, Some(mistake)))) {
            Ok(Ok(_)) => {}
            Ok(Err(found)) => {
                let first = found.lines().next().unwrap_or_default().to_owned();
                if first.contains(sentence) {
                    return;
                }
                others.push(first);
            }
            Err(_) => others.push("a panic".to_owned()),
        }
        if others.len() > 20 {
            break;
        }
    }
    panic!("{mistake:?} was not caught by '{sentence}', but by {others:#?}");
}

macro_rules! catches {
    ($($name:ident: $mistake:ident => $sentence:literal;)*) => {
        mod catches {
            $(#[test]
            fn $name() {
                super::caught(crate::breaks::Break::$mistake, $sentence);
            })*
        }
    };
}

catches! {
    a_call_accepted_before_it_is_recorded: AcceptsUnrecorded => "the call is unknown";
    a_lost_reply: LosesReply => "got no answer";
    a_superseded_report_that_decides: TakesSupersededReport => "the record refuses a write";
    a_second_outcome: KeepsFinishedInput => "unfinished inputs differ from the record";
    a_gap_in_the_outputs: SkipsSequence => "leaves a gap";
    a_requeue_that_is_not_recorded: RequeuesUnrecorded => "differs from its record";
    a_lost_input: ForgetsInputsOfTheDead => "is lost";
    an_exited_container_that_is_wanted: KeepsExitedContainer => "the containers differ";
    too_many_inputs_on_a_container: IgnoresSlots => "more than its slots";
    more_inputs_than_were_asked_for: IgnoresPollLimit => "more than it asked for";
    a_pool_beyond_its_maximum: IgnoresMaximum => "larger than its maximum";
    a_machine_beyond_its_resources: IgnoresRoom => "over its resources";
    a_machine_without_the_runtime: IgnoresRuntime => "does not have its runtime";
    too_many_starts_at_once: IgnoresStartLimit => "start at once";
    an_attempt_beyond_its_time: IgnoresTimeouts => "overran its time";
    restarts_without_pause: NeverBacksOff => "started again at once";
    a_starved_pool: ForgetsTheLine => "should stand in line";
    idle_containers_that_stay: NeverScalesDown => "no rest";
    a_forgotten_deadline: ForgetsDeadlines => "the deadline of";
    work_for_a_container_that_ends: DeliversToDraining => "got work while it ends";
    a_recovery_that_keeps_attempts: RecoversAttempts => "come back with other work";
    an_abandoned_call_that_stays_open: LeavesCallsOpen => "is open and was forgotten";
    a_container_that_hangs: IgnoresHangingContainers => "is past the deadline";
    a_silent_worker_that_is_waited_for: WaitsForSilentWorkers => "was silent for too long";
    a_worker_that_is_given_up_although_it_speaks: IgnoresSignsOfLife => "spoke, and that was not noted";
    a_start_on_a_worker_that_was_given_up: PlacesOnSilentWorkers => "on a worker that was given up";
    a_result_of_a_container_that_was_given_up: AnswersTheFenced => "which is fenced";
    a_container_that_is_started_twice: ForgetsSightings => "is started again";
    a_decision_before_the_record_is_read: StartsBeforeRecovery => "before the record was read";
    a_restart_that_forgets_containers: ForgetsSurvivors => "would not find the containers";
    a_restart_that_forgets_what_runs: ForgetsWhatSurvivorsRun => "other work";
    a_delivery_that_died_with_the_server: TrustsTheLastDelivery => "never got it";
    a_request_to_an_unknown_place: ServesUnseenWebContainers => "nobody knows where that is";
    a_container_of_an_older_definition_that_stays: KeepsOutdatedSurvivors => "would come back for good";
}
