//! A world around the scheduler: a server that crashes, workers that crash, freeze and are cut off,
//! containers that live on or not, an ingress, clients and administrators, all of whom are slow, repeat
//! themselves and vanish. Everything follows from a seed.
//!
//! Time is virtual. What happens is a queue of actions; those of the same moment reach the scheduler in
//! one turn. After each turn the writes go to the record, the invariants are checked, and only then do
//! answers and orders leave. A crash drops a turn before its commit, or everything it decided after it.

mod administration;
mod clients;
mod containers;
mod ingress;
mod random;
mod server;
mod workers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ionian_domain::call::AttemptNumber;
use ionian_domain::record::Recovered;
use ionian_domain::{CallId, ContainerId, FunctionId, InputId, Timestamp};

use self::clients::{Ask, ClientCall, ClientStep};
use self::containers::{ContainerModel, ContainerStep};
use self::ingress::{Ingress, IngressStep};
use self::random::Random;
use self::workers::{WorkerModel, WorkerStep};
use super::ids::numbered;
use super::record::Record;
use crate::breaks::Break;
use crate::event::{Event, PollId, PoolSettings, ReplyId};
use crate::state::Phase;
use crate::{Config, Scheduler, journal};

/// Events that each seed takes at least while things go wrong.
const EVENTS: usize = 230;
/// No more clients come while so much waits: a long outage would make a seed of nothing but waiting.
const PATIENT_CLIENTS: usize = 30;
/// Lines of the story that a failure shows.
const REMEMBERED: usize = 60;
/// How long everything may take to come to rest once nothing goes wrong any more.
const TIME_TO_REST: Duration = Duration::from_hours(2);
/// More steps than any seed needs for it: a world that goes in circles fails instead of hanging.
const STEPS_TO_REST: usize = 60_000;

pub(super) struct Function {
    pub id: FunctionId,
    pub settings: PoolSettings,
    pub is_active: bool,
    /// Its containers cannot be set up.
    pub is_broken: bool,
    pub never_polls: bool,
    /// Failed starts in a row, as the world counts them, and the last one.
    failures: (u32, Timestamp),
}

/// What happens at its time, unless the server that it concerns died before.
enum Action {
    Event(Event),
    Container(ContainerId, ContainerStep),
    Worker(usize, WorkerStep),
    Trouble,
    Ingress(FunctionId, IngressStep),
    Client(usize, ClientStep),
    NewClient,
    Administrator,
    /// The web endpoints of a container were noted.
    WebNoted(ContainerId),
    Crash,
    Restart,
    ReadRecord,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Down,
    /// It has not yet read its record.
    Recovering,
    Up,
}

pub(super) struct World {
    random: Random,
    now: Timestamp,
    scheduler: Scheduler,
    record: Record,
    actions: BTreeMap<(Timestamp, u64), (u64, Action)>,
    wake_at: Option<Timestamp>,
    /// Counts lives of the server. What was on its way to or from an earlier one never arrives.
    life: u64,
    server: Server,
    next_number: u64,
    functions: Vec<Function>,
    containers: BTreeMap<ContainerId, ContainerModel>,
    workers: Vec<WorkerModel>,
    generation: u64,
    /// Attempts that reached a container, and containers that ever got one.
    received: BTreeSet<(InputId, AttemptNumber)>,
    has_worked: BTreeSet<ContainerId>,
    /// Containers of which a server was told where they are, by the server's life.
    located: BTreeSet<(u64, ContainerId)>,
    /// What was said to the server before it had read its record.
    early: Vec<Event>,
    acknowledged: BTreeSet<ContainerId>,
    polls: BTreeMap<PollId, ContainerId>,
    calls: Vec<ClientCall>,
    asks: BTreeMap<ReplyId, Ask>,
    accepted: BTreeSet<InputId>,
    ingress: BTreeMap<FunctionId, Ingress>,
    batch: Vec<Event>,
    goes_wrong: bool,
    broken: Option<Break>,
    config: Config,
    /// What the server would write into its journal, where it is asked for.
    journal: Option<Vec<u8>>,
    /// Telling costs more than living.
    tells: bool,
    story: VecDeque<String>,
    pub events: usize,
    pub turns: usize,
    pub crashes: usize,
    pub troubles: usize,
}

/// Runs one seed to its end. An error is what was violated, and how it came to it.
pub(super) fn run(seed: u64, broken: Option<Break>) -> Result<World, String> {
    let mut world = World::new(seed, broken);
    world.live()?;
    Ok(world)
}

/// The journal of a seed, while things go wrong.
pub(super) fn journal(seed: u64) -> Result<String, String> {
    let mut world = World::new(seed, None);
    world.journal = Some(journal::opening(&world.config));
    while world.events < EVENTS {
        world.step()?;
    }
    let lines = world.journal.unwrap_or_default();
    String::from_utf8(lines).map_err(|error| error.to_string())
}

/// The last lines of a seed's story: how it came to what went wrong.
pub(super) fn story(seed: u64, broken: Option<Break>) -> String {
    let mut world = World::new(seed, broken);
    world.tells = true;
    // Unwinding or not, the lines up to there are what is wanted.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.live()));
    let story: Vec<String> = world.story.into_iter().collect();
    format!("{}\n{ended:?}", story.join("\n"))
}

impl World {
    fn new(seed: u64, broken: Option<Break>) -> Self {
        let random = Random::new(seed);
        let config = Config {
            max_queued_inputs: 30,
            drain_grace: Duration::from_secs(5),
            stop_grace: Duration::from_secs(3),
            cancel_grace: Duration::from_secs(2),
            worker_silence: workers::SILENCE,
        };
        let mut scheduler = Scheduler::new(config.clone());
        scheduler.state.broken = broken;
        let mut world = Self {
            random,
            now: Timestamp(1_000_000),
            scheduler,
            record: Record::default(),
            actions: BTreeMap::new(),
            wake_at: None,
            life: 0,
            server: Server::Up,
            next_number: 0,
            functions: Vec::new(),
            containers: BTreeMap::new(),
            workers: Vec::new(),
            generation: 0,
            received: BTreeSet::new(),
            has_worked: BTreeSet::new(),
            located: BTreeSet::new(),
            early: Vec::new(),
            acknowledged: BTreeSet::new(),
            polls: BTreeMap::new(),
            calls: Vec::new(),
            asks: BTreeMap::new(),
            accepted: BTreeSet::new(),
            ingress: BTreeMap::new(),
            batch: Vec::new(),
            goes_wrong: true,
            broken,
            config,
            journal: None,
            tells: false,
            story: VecDeque::new(),
            events: 0,
            turns: 0,
            crashes: 0,
            troubles: 0,
        };
        let recovered = Event::Recovered(Recovered::default());
        world.after_ms(0, Action::Event(recovered));
        world.declare_workers();
        let count = 2 + world.random.below(4);
        for _ in 0..count {
            world.declare();
        }
        for function in 0..world.functions.len() {
            let event = world.activation(function);
            world.after_ms(0, Action::Event(event));
        }
        for _ in 0..4 {
            let delay = u64::from(world.random.below(2_000));
            world.after_ms(delay, Action::NewClient);
        }
        world.after_ms(3_000, Action::Administrator);
        world.after_ms(4_000, Action::Trouble);
        world
    }

    /// Things go wrong, and then they do not: everything must come to rest.
    fn live(&mut self) -> Result<(), String> {
        while self.events < EVENTS {
            self.step()?;
        }
        self.goes_wrong = false;
        self.config.worker_silence = workers::CALM_SILENCE;
        self.scheduler.state.config.worker_silence = workers::CALM_SILENCE;
        for function in 0..self.functions.len() {
            self.functions[function].is_active = true;
            self.functions[function].is_broken = false;
            self.functions[function].failures.0 = 0;
            self.functions[function].settings.definition_id = numbered(self.next_number + function as u64);
            if self.server == Server::Up {
                let event = self.activation(function);
                self.after_ms(0, Action::Event(event));
            }
        }
        self.next_number += self.functions.len() as u64;
        let end = self.now + TIME_TO_REST;
        for _ in 0..STEPS_TO_REST {
            let unrest = self.unrest();
            let is_closed = self.record.open.is_empty();
            match unrest {
                None if is_closed => return Ok(()),
                Some(unrest) if self.now > end => return Err(format!("no rest: {unrest}")),
                None if self.now > end => return Err("no rest: a call that its client left is still open".to_owned()),
                None | Some(_) => self.step()?,
            }
        }
        Err(format!("no rest after {STEPS_TO_REST} steps: {:?}", self.unrest()))
    }

    /// What still moves, or waits for something.
    fn unrest(&self) -> Option<String> {
        if self.server != Server::Up {
            return Some("the server is down".to_owned());
        }
        if let Some(worker) = self
            .workers
            .iter()
            .find(|worker| worker.condition != workers::Condition::Up)
        {
            return Some(format!("{} is away", worker.id));
        }
        if let Some(input) = self.record.pending.keys().next() {
            return Some(format!("{input} is not finished"));
        }
        if let Some((reply, _)) = self.asks.first_key_value() {
            return Some(format!("{reply:?} has no answer"));
        }
        if let Some((function, _)) = self.ingress.iter().find(|(_, ingress)| !ingress.is_at_rest()) {
            return Some(format!("requests wait for {function}"));
        }
        let state = &self.scheduler.state;
        for (id, pool) in &state.pools {
            let minimum = pool.settings.autoscaler.min_containers as usize;
            let is_ready = pool
                .containers
                .iter()
                .all(|id| state.containers[id].phase == Phase::Ready);
            if pool.containers.len() != minimum || !is_ready {
                return Some(format!(
                    "{id} has {} containers, and its minimum is {minimum}",
                    pool.containers.len()
                ));
            }
        }
        if let Some(input) = self
            .accepted
            .iter()
            .find(|input| !self.record.outcomes.contains_key(*input))
        {
            return Some(format!("{input} has no outcome"));
        }
        None
    }

    fn step(&mut self) -> Result<(), String> {
        let next = self.actions.first_key_value().map(|((at, _), _)| *at);
        let wake = self.wake_at.filter(|_| self.server != Server::Down);
        let Some(at) = [next, wake].into_iter().flatten().min() else {
            return Err(format!(
                "nothing will ever happen again: {:?}, open calls {:?}",
                self.unrest(),
                self.record.open
            ));
        };
        self.now = at.max(self.now);
        // What happens within some milliseconds can share a turn.
        let window = self.now + Duration::from_millis(u64::from(self.random.below(4)));
        let mut is_wake = wake.is_some_and(|wake| wake <= self.now);
        while let Some((&(at, _), _)) = self.actions.first_key_value()
            && at <= window
            && !is_wake
        {
            let (_, (life, action)) = self.actions.pop_first().expect("the first action was just seen");
            self.now = at.max(self.now);
            // What was on its way to or from a server that died never arrives.
            let is_of_the_server = matches!(
                action,
                Action::Event(_) | Action::Ingress(..) | Action::WebNoted(_) | Action::Crash | Action::ReadRecord
            );
            if life == self.life || !is_of_the_server {
                self.act(action)?;
            }
            is_wake = self.wake_at.is_some_and(|wake| wake <= self.now);
        }
        if self.server != Server::Down && (is_wake || !self.batch.is_empty()) {
            self.turn()?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::Event(event) => {
                self.note(|| format!("{event:?}"));
                if self.server == Server::Down {
                    return Err(format!("somebody speaks to a dead server: {event:?}"));
                }
                if let Event::ContainerFailed { container_id, .. } = &event {
                    self.count_failure(*container_id);
                }
                if let Event::WorkerStarted { container_id } = &event {
                    self.located.insert((self.life, *container_id));
                }
                if let Event::PollStarted { container_id, .. } = &event
                    && let Some(container) = self.containers.get_mut(container_id)
                {
                    container.polled_in = Some(self.life);
                }
                self.events += 1;
                self.batch.push(event);
                Ok(())
            }
            Action::Container(id, step) => {
                self.container_step(id, step);
                Ok(())
            }
            Action::Worker(index, step) => self.worker_step(index, step),
            Action::Trouble => {
                if self.goes_wrong {
                    self.make_trouble();
                    let delay = 500 + u64::from(self.random.below(12_000));
                    self.after_ms(delay, Action::Trouble);
                }
                Ok(())
            }
            Action::WebNoted(id) => {
                self.record.web_ready(id, self.now);
                Ok(())
            }
            Action::Crash => {
                self.crash("when it was told to end");
                Ok(())
            }
            Action::Ingress(function, step) => {
                self.ingress_step(function, step);
                Ok(())
            }
            Action::Client(call, step) => {
                self.client_step(call, step);
                Ok(())
            }
            Action::NewClient => {
                if self.goes_wrong {
                    if self.asks.len() + self.record.pending.len() < PATIENT_CLIENTS {
                        self.new_client();
                    }
                    let delay = 20 + u64::from(self.random.below(1_500));
                    self.after_ms(delay, Action::NewClient);
                }
                Ok(())
            }
            Action::Administrator => {
                if self.goes_wrong {
                    self.administrate();
                    let delay = 1_000 + u64::from(self.random.below(20_000));
                    self.after_ms(delay, Action::Administrator);
                }
                Ok(())
            }
            Action::Restart => self.restart(),
            Action::ReadRecord => {
                self.read_record();
                Ok(())
            }
        }
    }

    fn after_ms(&mut self, delay: u64, action: Action) {
        self.next_number += 1;
        let at = self.now + Duration::from_millis(delay);
        self.actions.insert((at, self.next_number), (self.life, action));
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if !self.tells {
            return;
        }
        if self.story.len() == REMEMBERED {
            self.story.pop_front();
        }
        let line = format!("{:.3} {}", self.now.as_unix_seconds(), line());
        self.story.push_back(line);
    }

    /// Something goes wrong in so many of a hundred cases, while things go wrong.
    fn mishap(&mut self, percent: u32) -> bool {
        self.goes_wrong && self.random.percent(percent)
    }

    fn function_of(&mut self, id: FunctionId) -> &mut Function {
        self.functions
            .iter_mut()
            .find(|function| function.id == id)
            .expect("a container's function was declared")
    }

    fn ask(&mut self, ask: Ask) -> ReplyId {
        let reply = ReplyId(self.number());
        self.asks.insert(reply, ask);
        reply
    }

    fn call_row_is_recorded(&self, call: &CallId) -> bool {
        self.record.calls.contains_key(call)
    }
}
