//! What to do next for every container of this host: a state machine without clock, tasks or IO.
//!
//! It is given desired sets, sightings and the time, and answers with [`Action`]s that the caller carries out
//! in order. Everything level-triggered is here: generations, exits that are repeated until acknowledged, grace
//! times that only ever get shorter, and which of the containers of an earlier process are adopted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ionian_domain::ContainerId;
use ionian_domain::container::{ContainerExit, ContainerSpec, ContainerStarted};
use ionian_domain::worker::{DesiredSet, DesiredState, Generation, WorkerReport};
use tokio::time::Instant;

#[derive(Debug)]
pub(crate) enum Action {
    Start {
        id: ContainerId,
        spec: Arc<ContainerSpec>,
    },
    /// Takes over a container that an earlier process of this worker left running (or ended meanwhile).
    Adopt {
        id: ContainerId,
        spec: Arc<ContainerSpec>,
    },
    /// Kills and removes such a container: nobody wants it any more.
    Discard {
        id: ContainerId,
    },
    /// SIGINT to the first process; a container that is still being prepared is given up.
    Interrupt {
        id: ContainerId,
    },
    /// SIGKILL to every process.
    Kill {
        id: ContainerId,
    },
    Report(WorkerReport),
}

#[derive(Debug)]
pub(crate) struct Reconciler {
    newest: Option<Generation>,
    containers: BTreeMap<ContainerId, Entry>,
}

#[derive(Debug)]
struct Entry {
    phase: Phase,
    /// Whether the newest desired set names it. What it does not name ends without a report.
    wanted: bool,
}

#[derive(Debug)]
enum Phase {
    /// An earlier process of this worker left it. Whether it is wanted is not known yet.
    Found,
    Live(Ending),
    /// Kept, and repeated, until a desired set leaves the container out.
    Ended(ContainerExit),
}

/// How far the end of a live container has been brought about. It only advances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    NotAsked,
    Asked { kill_at: Instant },
    Killed,
}

impl Reconciler {
    /// `found` are the containers that an earlier process of this worker left. The first desired set decides
    /// which of them are adopted.
    pub(crate) fn new(found: impl IntoIterator<Item = ContainerId>) -> Self {
        let entry = || Entry {
            phase: Phase::Found,
            wanted: false,
        };
        Self {
            newest: None,
            containers: found.into_iter().map(|id| (id, entry())).collect(),
        }
    }

    pub(crate) fn observe_desired(&mut self, set: &DesiredSet, now: Instant) -> Vec<Action> {
        // Nothing has been said yet, which is not the same as: there should be nothing.
        if set.generation == Generation::default() {
            return Vec::new();
        }
        if self.newest.is_some_and(|newest| set.generation < newest) {
            return Vec::new();
        }
        self.newest = Some(set.generation);
        let mut actions = Vec::new();
        for desired in &set.containers {
            let id = desired.id;
            let Some(entry) = self.containers.get_mut(&id) else {
                let phase = match desired.state {
                    DesiredState::Running if !desired.must_exist => {
                        actions.push(Action::Start {
                            id,
                            spec: Arc::clone(&desired.spec),
                        });
                        Phase::Live(Ending::NotAsked)
                    }
                    // It ran once and is gone, or it was to be stopped before it was ever started here.
                    DesiredState::Running | DesiredState::Stopped { .. } => {
                        actions.push(exited(id, ContainerExit::Lost));
                        Phase::Ended(ContainerExit::Lost)
                    }
                };
                self.containers.insert(id, Entry { phase, wanted: true });
                continue;
            };
            entry.wanted = true;
            if matches!(entry.phase, Phase::Found) {
                entry.phase = Phase::Live(Ending::NotAsked);
                actions.push(Action::Adopt {
                    id,
                    spec: Arc::clone(&desired.spec),
                });
            }
            match (&mut entry.phase, desired.state) {
                (Phase::Ended(exit), _) => actions.push(exited(id, exit.clone())),
                // A container that was asked to end does end: nobody can take a SIGINT back.
                (Phase::Found, _) | (Phase::Live(_), DesiredState::Running) => {}
                (Phase::Live(ending), DesiredState::Stopped { grace, .. }) => {
                    let kill_at = now + grace;
                    match ending {
                        Ending::Killed => {}
                        Ending::NotAsked | Ending::Asked { .. } if grace.is_zero() => {
                            *ending = Ending::Killed;
                            actions.push(Action::Kill { id });
                        }
                        Ending::NotAsked => {
                            *ending = Ending::Asked { kill_at };
                            actions.push(Action::Interrupt { id });
                        }
                        // The same request is repeated by every set: only a shorter grace changes anything.
                        Ending::Asked { kill_at: earlier } => *earlier = kill_at.min(*earlier),
                    }
                }
            }
        }
        let named: BTreeSet<ContainerId> = set.containers.iter().map(|desired| desired.id).collect();
        self.containers.retain(|id, entry| {
            if named.contains(id) {
                return true;
            }
            entry.wanted = false;
            match &mut entry.phase {
                // Left out of the set: the exit is acknowledged.
                Phase::Ended(_) => false,
                Phase::Found => {
                    entry.phase = Phase::Live(Ending::Killed);
                    actions.push(Action::Discard { id: *id });
                    true
                }
                Phase::Live(ending) => {
                    if *ending != Ending::Killed {
                        *ending = Ending::Killed;
                        actions.push(Action::Kill { id: *id });
                    }
                    true
                }
            }
        });
        actions
    }

    /// The grace of some container may be over.
    pub(crate) fn handle_deadlines(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, entry) in &mut self.containers {
            if let Phase::Live(ending @ Ending::Asked { .. }) = &mut entry.phase
                && matches!(ending, Ending::Asked { kill_at } if *kill_at <= now)
            {
                *ending = Ending::Killed;
                actions.push(Action::Kill { id: *id });
            }
        }
        actions
    }

    /// When [`Self::handle_deadlines`] has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = self.containers.values().filter_map(|entry| match entry.phase {
            Phase::Live(Ending::Asked { kill_at }) => Some(kill_at),
            Phase::Live(Ending::NotAsked | Ending::Killed) | Phase::Found | Phase::Ended(_) => None,
        });
        deadlines.min()
    }

    pub(crate) fn observe_started(&mut self, started: ContainerStarted) -> Option<Action> {
        let entry = self.containers.get(&started.container_id)?;
        entry.wanted.then_some(Action::Report(WorkerReport::Started(started)))
    }

    pub(crate) fn observe_ended(&mut self, id: ContainerId, exit: ContainerExit) -> Option<Action> {
        let entry = self.containers.get_mut(&id)?;
        match entry.phase {
            // Its task crashed after it had told of the end: the first word counts.
            Phase::Ended(_) => None,
            Phase::Found | Phase::Live(_) if entry.wanted => {
                entry.phase = Phase::Ended(exit.clone());
                Some(exited(id, exit))
            }
            Phase::Found | Phase::Live(_) => {
                self.containers.remove(&id);
                None
            }
        }
    }
}

fn exited(container_id: ContainerId, exit: ContainerExit) -> Action {
    Action::Report(WorkerReport::Exited { container_id, exit })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ionian_domain::container::{StartTimings, StopReason};
    use ionian_domain::worker::DesiredContainer;

    use super::*;
    use crate::launch::tests::spec;

    /// A reconciler with readable containers `a`, `b`, … and seconds for time.
    struct World {
        reconciler: Reconciler,
        spec: Arc<ContainerSpec>,
        start: Instant,
    }

    fn id(name: char) -> ContainerId {
        format!("{}-{}", ContainerId::PREFIX, name.to_string().repeat(22))
            .parse()
            .unwrap()
    }

    fn name(id: ContainerId) -> char {
        id.suffix().chars().next().unwrap()
    }

    fn show(actions: impl IntoIterator<Item = Action>) -> String {
        let shown: Vec<String> = actions
            .into_iter()
            .map(|action| match action {
                Action::Start { id, .. } => format!("start {}", name(id)),
                Action::Adopt { id, .. } => format!("adopt {}", name(id)),
                Action::Discard { id } => format!("discard {}", name(id)),
                Action::Interrupt { id } => format!("interrupt {}", name(id)),
                Action::Kill { id } => format!("kill {}", name(id)),
                Action::Report(WorkerReport::Started(started)) => {
                    format!("report {} started", name(started.container_id))
                }
                Action::Report(WorkerReport::Exited { container_id, exit }) => {
                    format!("report {} {exit:?}", name(container_id))
                }
            })
            .collect();
        shown.join(", ")
    }

    impl World {
        fn new() -> Self {
            Self::that_found("")
        }

        /// Each character is a container that an earlier process left.
        fn that_found(names: &str) -> Self {
            Self {
                reconciler: Reconciler::new(names.chars().map(id)),
                spec: Arc::new(spec()),
                start: Instant::now(),
            }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// `wanted`: `"a b:30 c!"` is `a` running, `b` stopped with 30 s of grace, and `c`, which must exist.
        fn desire(&mut self, generation: u64, seconds: u64, wanted: &str) -> String {
            let containers = wanted
                .split_whitespace()
                .map(|word| {
                    let (word, must_exist) = match word.strip_suffix('!') {
                        Some(word) => (word, true),
                        None => (word, false),
                    };
                    let state = match word[1..].strip_prefix(':') {
                        None => DesiredState::Running,
                        Some(grace) => DesiredState::Stopped {
                            grace: Duration::from_secs(grace.parse().unwrap()),
                            reason: StopReason::ScaleDown,
                        },
                    };
                    DesiredContainer {
                        id: id(word.chars().next().unwrap()),
                        spec: Arc::clone(&self.spec),
                        state,
                        must_exist,
                    }
                })
                .collect();
            let set = DesiredSet {
                generation: Generation(generation),
                containers,
            };
            show(self.reconciler.observe_desired(&set, self.at(seconds)))
        }

        fn started(&mut self, name: char) -> String {
            let address = std::net::IpAddr::from([127, 0, 0, 1]);
            let started = ContainerStarted {
                container_id: id(name),
                address,
                timings: StartTimings::default(),
            };
            show(self.reconciler.observe_started(started))
        }

        fn ended(&mut self, name: char, code: i32) -> String {
            show(self.reconciler.observe_ended(id(name), ContainerExit::Exited { code }))
        }

        fn tick(&mut self, seconds: u64) -> String {
            let now = self.at(seconds);
            show(self.reconciler.handle_deadlines(now))
        }

        fn deadline(&self) -> Option<u64> {
            self.reconciler.next_deadline().map(|at| (at - self.start).as_secs())
        }
    }

    #[test]
    fn a_container_is_started_once() {
        let mut world = World::new();
        assert_eq!(world.desire(1, 0, "a b"), "start a, start b");
        assert_eq!(world.started('a'), "report a started");
        assert_eq!(world.desire(2, 1, "a b"), "");
        assert_eq!(world.desire(3, 2, "a b c"), "start c");
    }

    #[test]
    fn older_generations_are_ignored() {
        let mut world = World::new();
        assert_eq!(world.desire(5, 0, "a"), "start a");
        assert_eq!(world.desire(4, 1, "b"), "");
        assert_eq!(world.desire(5, 1, "a b"), "start b");
    }

    #[test]
    fn an_exit_is_repeated_until_the_container_is_left_out() {
        let mut world = World::new();
        world.desire(1, 0, "a");
        assert_eq!(world.ended('a', 3), "report a Exited { code: 3 }");
        assert_eq!(world.desire(2, 1, "a"), "report a Exited { code: 3 }");
        assert_eq!(world.desire(3, 2, "a:30"), "report a Exited { code: 3 }");
        assert_eq!(world.desire(4, 3, ""), "");
        assert_eq!(world.deadline(), None);
        // Only what was acknowledged is forgotten: a later set that names it finds nothing.
        assert_eq!(world.desire(5, 4, "a:0"), "report a Lost");
    }

    #[test]
    fn stopping_interrupts_and_then_kills() {
        let mut world = World::new();
        world.desire(1, 0, "a");
        assert_eq!(world.desire(2, 10, "a:30"), "interrupt a");
        assert_eq!(world.deadline(), Some(40));
        // Later sets repeat the same request, which must neither interrupt again nor put off the end.
        assert_eq!(world.desire(3, 25, "a:30"), "");
        assert_eq!(world.deadline(), Some(40));
        assert_eq!(world.tick(39), "");
        assert_eq!(world.tick(40), "kill a");
        assert_eq!(world.tick(41), "");
        assert_eq!(world.desire(4, 42, "a:0"), "");
        assert_eq!(world.ended('a', 0), "report a Exited { code: 0 }");
    }

    #[test]
    fn a_shorter_grace_shortens() {
        let mut world = World::new();
        world.desire(1, 0, "a b");
        assert_eq!(world.desire(2, 0, "a:30 b:30"), "interrupt a, interrupt b");
        assert_eq!(world.desire(3, 1, "a:5 b:0"), "kill b");
        assert_eq!(world.deadline(), Some(6));
        assert_eq!(world.tick(6), "kill a");
    }

    #[test]
    fn no_grace_kills_at_once_and_a_stop_is_not_taken_back() {
        let mut world = World::new();
        world.desire(1, 0, "a b");
        assert_eq!(world.desire(2, 0, "a:0 b:9"), "kill a, interrupt b");
        assert_eq!(world.desire(3, 1, "a b"), "");
        assert_eq!(world.tick(9), "kill b");
    }

    #[test]
    fn what_is_not_named_is_killed_and_ends_without_a_report() {
        let mut world = World::new();
        world.desire(1, 0, "a b");
        assert_eq!(world.desire(2, 1, "b"), "kill a");
        assert_eq!(world.desire(3, 2, "b"), "");
        assert_eq!(world.started('a'), "");
        assert_eq!(world.ended('a', 0), "");
        // Named again while it died: then somebody waits for its exit.
        assert_eq!(world.desire(4, 3, ""), "kill b");
        assert_eq!(world.desire(5, 4, "b"), "");
        assert_eq!(world.ended('b', 1), "report b Exited { code: 1 }");
    }

    #[test]
    fn stopping_what_was_never_here_is_answered() {
        let mut world = World::new();
        assert_eq!(world.desire(1, 0, "a:30"), "report a Lost");
        assert_eq!(world.desire(2, 0, "a:30"), "report a Lost");
        assert_eq!(world.desire(3, 0, ""), "");
    }

    #[test]
    fn the_first_end_counts() {
        let mut world = World::new();
        world.desire(1, 0, "a");
        assert_eq!(world.ended('a', 3), "report a Exited { code: 3 }");
        assert_eq!(world.ended('a', 4), "");
        assert_eq!(world.desire(2, 0, "a"), "report a Exited { code: 3 }");
    }

    #[test]
    fn what_an_earlier_process_left_is_adopted_or_discarded_by_the_first_set() {
        let mut world = World::that_found("abc");
        assert_eq!(world.desire(0, 0, ""), "");
        assert_eq!(world.desire(0, 1, "a"), "");
        assert_eq!(world.desire(7, 2, "a! b d"), "adopt a, adopt b, start d, discard c");
        assert_eq!(world.started('a'), "report a started");
        assert_eq!(world.desire(8, 3, "a! b! d"), "");
        // Nobody waits for the end of what is discarded.
        assert_eq!(world.ended('c', 0), "");
        assert_eq!(world.ended('b', 2), "report b Exited { code: 2 }");
        assert_eq!(world.desire(9, 4, "a! b!"), "report b Exited { code: 2 }, kill d");
    }

    #[test]
    fn what_must_exist_and_does_not_is_lost_until_acknowledged() {
        let mut world = World::that_found("a");
        assert_eq!(world.desire(1, 0, "a! b!"), "adopt a, report b Lost");
        assert_eq!(world.desire(2, 1, "a! b!"), "report b Lost");
        assert_eq!(world.desire(3, 2, "a! b:30"), "report b Lost");
        assert_eq!(world.desire(4, 3, "a!"), "");
        // Started by this very process: that it must exist by now changes nothing.
        assert_eq!(world.desire(5, 4, "a! c"), "start c");
        assert_eq!(world.desire(6, 5, "a! c!"), "");
    }

    #[test]
    fn what_is_to_stop_is_adopted_first() {
        let mut world = World::that_found("ab");
        assert_eq!(
            world.desire(1, 0, "a:30! b:0!"),
            "adopt a, interrupt a, adopt b, kill b"
        );
        assert_eq!(world.deadline(), Some(30));
        assert_eq!(world.ended('a', 0), "report a Exited { code: 0 }");
    }

    #[test]
    fn a_set_without_a_generation_ends_nothing() {
        let mut world = World::that_found("a");
        assert_eq!(world.desire(0, 0, ""), "");
        assert_eq!(world.tick(1000), "");
        assert_eq!(world.desire(1, 1001, ""), "discard a");
        // Named while it was discarded: then somebody waits for its end.
        assert_eq!(world.desire(2, 1002, "a!"), "");
        assert_eq!(world.ended('a', 9), "report a Exited { code: 9 }");
    }
}
