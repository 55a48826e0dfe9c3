//! Scenarios: a short story in lines, and what the scheduler decided after each.
//!
//! The desired set is shown where it changed; a container on another worker than `w` says where.
//!
//! A line is a turn; ` & ` joins what arrives in the same turn. Containers are named `A`, `B`, … in the
//! order of their start, the inputs of call `c` are `c.0`, `c.1`, …
//!
//! | Line | Meaning |
//! |---|---|
//! | `fn f slots=2 max=3 …` | activate a function; see [`Story::settings`] for the words |
//! | `off f` | its app stops |
//! | `scale f min=1 …` | change its autoscaler |
//! | `call c f 3` / `map c f 3` | a unary call or a map, with inputs |
//! | `put c 2` / `close c` / `consume c` / `cancel c [kill]` | what its client says |
//! | `poll A [4]` / `drop A [old]` / `lost A c.0` | a poll, its end, a delivery that found nobody |
//! | `done A c.0[#1]` / `fail A c.0[#1]` | reports; `#1` names the attempt |
//! | `serves A` / `broken A` | ready without polls; the function cannot be set up |
//! | `exit A 1` / `exit A kill 9` / `exit A oom\|lost\|unstarted` | the worker saw its end |
//! | `web f 3 A=1 …` | the ingress: three wait, `A` has one request |
//! | `stop A` / `drain A` | somebody asks for it |
//! | `+5s` | time passes; due turns are shown |
//! | `gone f` | its app was stopped, and the server dies before the scheduler hears of it |
//! | `restart` | the server is killed and recovers from what was recorded; the worker `w` connects |
//! | `restart alone` | the same, and no worker connects |
//! | `restart slowly` | the same, with a turn before the record is read |
//! | `worker w cpu=1000 memory=500 starts=1` | a worker connects; `w` is there from the beginning |
//! | `worker v gvisor` | the same; it has this runtime too |
//! | `heard w` / `started A` | a sign of life; the worker says that the container runs |
//! | `away 5m` | time passes, and the server is down |
//! | `announced A` | its web endpoints were noted |
//! | `unplaced A` | the record does not say where it runs, as it is of an older version |
//! | `desired` | shows the desired set, with a `!` at containers that must exist already |
//! | `views f` | shows the containers, the statistics of `f`, and the runtimes of the workers, as people see them |
//! | `silence 30s` | from now on, what is silent for so long is given up |
//! | `shutdown` | |

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use expect_test::Expect;
use ionian_domain::call::{AttemptNumber, CallKind};
use ionian_domain::container::{ContainerExit, RuntimeKind, StopReason};
use ionian_domain::function::{Autoscaler, Batching, RetryPolicy};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{NewInput, Recovered};
use ionian_domain::worker::{DesiredState, WorkerCapacity};
use ionian_domain::{Outcome, Timestamp};

use super::invariants::{self, Before};
use super::record::Record;
use super::wording::{attempt, call, id, input, input_id, name, ordered, written};
use crate::event::{AttemptReport, Event, PollId, PoolSettings, ReplyId, WebUse};
use crate::turn::{Reply, Turn};
use crate::{Config, Scheduler};

/// Tells the story and compares what was decided. `UPDATE_EXPECT=1` writes it down.
pub(super) fn check(story: &str, expected: &Expect) {
    let mut teller = Story::new();
    for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
        teller.line(line);
    }
    expected.assert_eq(&teller.text);
}

struct Story {
    scheduler: Scheduler,
    record: Record,
    now: Timestamp,
    wake_at: Option<Timestamp>,
    functions: BTreeMap<String, PoolSettings>,
    input_counts: BTreeMap<String, u32>,
    next_container: u8,
    next_number: u64,
    polls: BTreeMap<String, Vec<PollId>>,
    /// The desired set as it was last shown.
    told: String,
    text: String,
}

/// Short grace times.
fn config() -> Config {
    Config {
        max_queued_inputs: 10,
        drain_grace: Duration::from_secs(30),
        stop_grace: Duration::from_secs(10),
        cancel_grace: Duration::from_secs(5),
        // Scenarios that are not about silence need no signs of life.
        worker_silence: Duration::from_hours(100_000),
    }
}

impl Story {
    fn new() -> Self {
        let mut scheduler = Scheduler::new(config());
        let events = vec![Event::Recovered(Recovered::default()), worker_connected("w", &[])];
        scheduler.handle(Timestamp(0), events, &mut || unreachable!("nothing runs"));
        Self {
            scheduler,
            record: Record::default(),
            now: Timestamp(0),
            wake_at: None,
            functions: BTreeMap::new(),
            input_counts: BTreeMap::new(),
            next_container: 0,
            next_number: 0,
            polls: BTreeMap::new(),
            told: "nothing".to_owned(),
            text: String::new(),
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(time) = line.strip_prefix('+') {
            let target = self.now + duration(time);
            while let Some(at) = self.wake_at.filter(|at| *at <= target) {
                self.now = at;
                self.turn("…", vec![Event::Tick]);
            }
            self.now = target;
            return;
        }
        if let Some(function) = line.strip_prefix("gone ") {
            self.functions.remove(function);
            return;
        }
        if line == "desired" {
            let desired = self.desired(true);
            writeln!(self.text, "    desired: {desired}").unwrap();
            return;
        }
        if let Some(function) = line.strip_prefix("views ") {
            self.views(function);
            return;
        }
        if let Some(time) = line.strip_prefix("silence ") {
            self.scheduler.state.config.worker_silence = duration(time);
            return;
        }
        if let Some(time) = line.strip_prefix("away ") {
            // Nobody looks at the clock.
            self.now = self.now + duration(time);
            return;
        }
        if let Some(container) = line.strip_prefix("announced ") {
            self.record.web_ready(id(container), self.now);
            return;
        }
        if let Some(container) = line.strip_prefix("unplaced ") {
            self.record.forget_origin(id(container));
            return;
        }
        if line.starts_with("restart") {
            let config = self.scheduler.state.config.clone();
            self.told = "nothing".to_owned();
            self.scheduler = Scheduler::new(config);
            let mut events: Vec<Event> = self
                .functions
                .iter()
                .map(|(name, settings)| Event::FunctionActivated {
                    function_id: id(name),
                    settings: settings.clone(),
                })
                .collect();
            if line == "restart slowly" {
                self.turn("restart: functions", std::mem::take(&mut events));
            }
            events.push(Event::Recovered(self.record.recovered()));
            if line != "restart alone" {
                events.push(worker_connected("w", &[]));
            }
            self.turn(line, events);
            return;
        }
        let events = line.split(" & ").map(|part| self.event(part)).collect();
        self.turn(line, events);
    }

    fn views(&mut self, function: &str) {
        for view in self.scheduler.containers() {
            let (container, on, of) = (name(view.id), name(view.worker_id), name(view.function_id));
            let condition = match (view.ready, view.ending) {
                (true, _) => "ready",
                (false, false) => "starting",
                (false, true) => "ending",
            };
            let (inputs, since) = (view.running_inputs, view.created_at.as_unix_seconds());
            writeln!(
                self.text,
                "    {container} of {of} on {on} since {since}s: {condition}, runs {inputs}"
            )
            .unwrap();
        }
        let stats = self.scheduler.pool_stats(id(function));
        writeln!(self.text, "    {function}: {stats:?}").unwrap();
        writeln!(self.text, "    runtimes: {:?}", self.scheduler.runtimes()).unwrap();
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn event(&mut self, line: &str) -> Event {
        let words: Vec<&str> = line.split_whitespace().collect();
        let reply = ReplyId(self.number());
        match words.as_slice() {
            ["fn", name, settings @ ..] => {
                let settings = Self::settings(settings);
                self.functions.insert((*name).to_owned(), settings.clone());
                Event::FunctionActivated {
                    function_id: id(name),
                    settings,
                }
            }
            ["off", name] => {
                self.functions.remove(*name);
                Event::FunctionDeactivated {
                    function_id: id(name),
                    reason: StopReason::AppStopped,
                    outcome: Outcome::decided(OutcomeStatus::Terminated, "stopped"),
                }
            }
            ["scale", name, settings @ ..] => {
                let autoscaler = Self::settings(settings).autoscaler;
                Event::AutoscalerUpdated {
                    function_id: id(name),
                    autoscaler,
                    reply,
                }
            }
            ["call", name, function] => {
                let call = call(name, function, CallKind::Unary, self.now);
                Event::CallStarted {
                    call,
                    inputs: self.inputs(name, 1),
                    reply,
                }
            }
            ["map", name, function, count] => {
                let call = call(name, function, CallKind::Map, self.now);
                Event::CallStarted {
                    call,
                    inputs: self.inputs(name, count.parse().unwrap()),
                    reply,
                }
            }
            ["again", name, function] => {
                let call = call(name, function, CallKind::Unary, self.now);
                Event::CallStarted {
                    call,
                    inputs: vec![input(name, 0)],
                    reply,
                }
            }
            ["put", name, count] => {
                let inputs = self.inputs(name, count.parse().unwrap());
                Event::InputsPut {
                    call_id: id(name),
                    inputs,
                    reply,
                }
            }
            ["reput", name, index] => {
                let inputs = vec![input(name, index.parse().unwrap())];
                Event::InputsPut {
                    call_id: id(name),
                    inputs,
                    reply,
                }
            }
            ["close", name] => {
                let count = self.input_counts[*name];
                Event::CallInputsFinished {
                    call_id: id(name),
                    count,
                    reply,
                }
            }
            ["consume", name] => Event::CallConsumed { call_id: id(name) },
            ["cancel", name, kill @ ..] => Event::CallCancelled {
                call_id: id(name),
                outcome: Outcome::decided(OutcomeStatus::Terminated, "cancelled"),
                terminate_containers: kill == ["kill"],
                reply,
            },
            ["poll", container, max_inputs @ ..] => {
                let poll = PollId(self.number());
                self.polls.entry((*container).to_owned()).or_default().push(poll);
                let max_inputs = max_inputs.first().map_or(1, |number| number.parse().unwrap());
                Event::PollStarted {
                    container_id: id(container),
                    poll,
                    max_inputs,
                }
            }
            ["drop", container, older @ ..] => {
                let polls = &self.polls[*container];
                let poll = if older.is_empty() { polls.last() } else { polls.first() };
                Event::PollDropped {
                    container_id: id(container),
                    poll: *poll.unwrap(),
                }
            }
            ["lost", container, inputs @ ..] => {
                let inputs = inputs.iter().map(|name| input_id(name)).collect();
                Event::DeliveryLost {
                    container_id: id(container),
                    inputs,
                }
            }
            ["done", container, inputs @ ..] => self.report(container, inputs, OutcomeStatus::Success, reply),
            ["fail", container, inputs @ ..] => self.report(container, inputs, OutcomeStatus::Failure, reply),
            ["let-go", container, inputs @ ..] => self.report(container, inputs, OutcomeStatus::Terminated, reply),
            ["serves", container] => Event::ServerReady {
                container_id: id(container),
            },
            ["broken", container] => Event::ContainerFailed {
                container_id: id(container),
                outcome: Outcome::decided(OutcomeStatus::Failure, "ImportError: no module named x"),
                reply,
            },
            ["exit", container, how @ ..] => {
                let exit = match how {
                    ["lost"] => ContainerExit::Lost,
                    ["oom"] => ContainerExit::OutOfMemory,
                    ["unstarted"] => ContainerExit::StartFailed {
                        message: "no image".to_owned(),
                    },
                    ["kill", signal] => ContainerExit::Signaled {
                        signal: signal.parse().unwrap(),
                    },
                    [code] => ContainerExit::Exited {
                        code: code.parse().unwrap(),
                    },
                    _ => panic!("how did it exit: {line}"),
                };
                Event::WorkerExited {
                    container_id: id(container),
                    exit,
                }
            }
            ["web", name, queued, uses @ ..] => Event::WebDemand {
                function_id: id(name),
                queued: queued.parse().unwrap(),
                containers: uses
                    .iter()
                    .map(|used| {
                        let (container, in_flight) = used.split_once('=').unwrap();
                        let in_flight = in_flight.parse().unwrap();
                        WebUse {
                            container_id: id(container),
                            in_flight,
                            last_active: self.now,
                        }
                    })
                    .collect(),
            },
            ["stop", container] => Event::ContainerStopRequested {
                container_id: id(container),
                graceful: false,
                reply,
            },
            ["drain", container] => Event::ContainerStopRequested {
                container_id: id(container),
                graceful: true,
                reply,
            },
            ["shutdown"] => Event::ShuttingDown,
            ["worker", name, capacity @ ..] => worker_connected(name, capacity),
            ["heard", name] => Event::WorkerHeard { worker_id: id(name) },
            ["started", container] => Event::WorkerStarted {
                container_id: id(container),
            },
            _ => panic!("the story has no such line: {line}"),
        }
    }

    fn report(&self, container: &str, inputs: &[&str], status: OutcomeStatus, reply: ReplyId) -> Event {
        let outputs = inputs
            .iter()
            .map(|word| {
                let (name, attempt) = word.split_once('#').unwrap_or((word, "0"));
                AttemptReport {
                    input_id: input_id(name),
                    attempt: AttemptNumber(attempt.parse().unwrap()),
                    outcome: Outcome::decided(
                        status,
                        if status == OutcomeStatus::Failure {
                            "ValueError"
                        } else {
                            ""
                        },
                    ),
                    started_at: Some(self.now),
                }
            })
            .collect();
        Event::OutputsReported {
            container_id: id(container),
            outputs,
            reply,
        }
    }

    fn inputs(&mut self, call: &str, count: u32) -> Vec<NewInput> {
        let next = self.input_counts.entry(call.to_owned()).or_default();
        let first = *next;
        *next += count;
        (first..*next).map(|index| input(call, index)).collect()
    }

    fn settings(words: &[&str]) -> PoolSettings {
        let mut settings = PoolSettings {
            app_id: id("app"),
            definition_id: id("v1"),
            is_web: false,
            autoscaler: Autoscaler {
                min_containers: 0,
                max_containers: None,
                buffer_containers: 0,
                scaledown_window: Duration::from_mins(1),
            },
            slots: 1,
            target_slots: 1,
            batching: None,
            retry: RetryPolicy::NONE,
            timeout: Duration::from_mins(5),
            startup_timeout: Duration::from_mins(2),
            single_use: false,
            cpu_millis: 100,
            memory_mib: 100,
            runtime: RuntimeKind::Runc,
        };
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "web" => settings.is_web = true,
                "gvisor" => settings.runtime = RuntimeKind::Gvisor,
                "once" => settings.single_use = true,
                "v" => settings.definition_id = id(&format!("v{value}")),
                "min" => settings.autoscaler.min_containers = value.parse().unwrap(),
                "max" => settings.autoscaler.max_containers = Some(value.parse().unwrap()),
                "buffer" => settings.autoscaler.buffer_containers = value.parse().unwrap(),
                "window" => settings.autoscaler.scaledown_window = duration(value),
                "slots" => {
                    settings.slots = value.parse().unwrap();
                    settings.target_slots = settings.slots;
                }
                "target" => settings.target_slots = value.parse().unwrap(),
                "batch" => {
                    let (size, wait) = value.split_once('/').unwrap();
                    settings.batching = Some(Batching {
                        max_size: size.parse().unwrap(),
                        wait: duration(wait),
                    });
                }
                "retries" => {
                    let (tries, delay) = value.split_once('/').unwrap();
                    settings.retry = RetryPolicy {
                        max_retries: tries.parse().unwrap(),
                        backoff_coefficient: 2.0,
                        initial_delay: duration(delay),
                        max_delay: Duration::from_mins(1),
                    };
                }
                "timeout" => settings.timeout = duration(value),
                "startup" => settings.startup_timeout = duration(value),
                "cpu" => settings.cpu_millis = value.parse().unwrap(),
                "memory" => settings.memory_mib = value.parse().unwrap(),
                _ => panic!("a function has no such setting: {word}"),
            }
        }
        settings
    }

    fn turn(&mut self, line: &str, events: Vec<Event>) {
        let mut before = Before::note(&self.scheduler.state, &events);
        before.is_recovering = line == "restart: functions";
        let next = &mut self.next_container;
        let turn = self.scheduler.handle(self.now, events, &mut || {
            *next += 1;
            id(&char::from(b'A' + *next - 1).to_string())
        });
        self.wake_at = turn.wake_at;
        self.tell(line, &turn);
        if let Err(sentence) = self.record.commit(&turn.writes) {
            panic!("the record refuses {line}: {sentence}\n{}", self.text);
        }
        if let Err(sentence) = invariants::check(&self.scheduler.state, &self.record, self.now, &before, &turn) {
            panic!("after {line}: {sentence}\n{}", self.text);
        }
    }

    fn tell(&mut self, line: &str, turn: &Turn) {
        let seconds = self.now.as_unix_seconds();
        writeln!(self.text, "{seconds}s {line}").unwrap();
        let writes: Vec<String> = turn.writes.iter().map(written).collect();
        let answers: Vec<String> = turn.replies.iter().map(|reply| self.answered(reply)).collect();
        let orders: Vec<String> = turn.commands.iter().filter_map(ordered).collect();
        for (kind, what) in [("record", writes), ("answer", answers), ("order", orders)] {
            if !what.is_empty() {
                writeln!(self.text, "    {kind}: {}", what.join(", ")).unwrap();
            }
        }
        if turn.desired_changed {
            let desired = self.desired(false);
            // An exit is acknowledged by the set without its container, however often it is told.
            if self.told != desired || line.contains("exit ") {
                writeln!(self.text, "    desired: {desired}").unwrap();
                self.told = desired;
            }
        }
    }

    /// The desired set; with a mark on what must exist already, where that is asked for.
    fn desired(&self, with_marks: bool) -> String {
        let desired: Vec<String> = self
            .scheduler
            .desired()
            .iter()
            .map(|entry| {
                let mut container = name(entry.container_id);
                if entry.must_exist && with_marks {
                    container.push('!');
                }
                let worker = name(entry.worker_id);
                if worker != "w" {
                    container = format!("{container} on {worker}");
                }
                match entry.state {
                    DesiredState::Running => container,
                    DesiredState::Stopped { grace, reason } => {
                        format!("{container} stopped in {}s ({reason:?})", grace.as_secs_f64())
                    }
                }
            })
            .collect();
        if desired.is_empty() {
            "nothing".to_owned()
        } else {
            desired.join(", ")
        }
    }

    fn answered(&self, reply: &Reply) -> String {
        let of = |poll: &PollId| {
            let newest = self.polls.iter().find(|(_, polls)| polls.last() == Some(poll));
            newest.map_or_else(|| "an older poll".to_owned(), |(container, _)| container.clone())
        };
        match reply {
            Reply::Accepted(_) => "yes".to_owned(),
            Reply::Refused { refusal, .. } => format!("no: {refusal:?}"),
            Reply::Deliver { poll, inputs } => {
                let inputs: Vec<String> = inputs
                    .iter()
                    .map(|delivery| attempt(delivery.input_id, delivery.attempt))
                    .collect();
                format!("{} gets {}", of(poll), inputs.join(" "))
            }
            Reply::KillSwitch { poll } => format!("{} ends itself", of(poll)),
            Reply::Empty { poll } => format!("{} asks again", of(poll)),
        }
    }
}

/// Two cores and two starts at a time, if nothing else is said.
fn worker_connected(name: &str, words: &[&str]) -> Event {
    let mut capacity = WorkerCapacity {
        cpu_millis: 2_000,
        memory_mib: 2_000,
        max_starting: 2,
        runtimes: [RuntimeKind::Runc].into(),
    };
    for word in words {
        if *word == "gvisor" {
            capacity.runtimes = [RuntimeKind::Runc, RuntimeKind::Gvisor].into();
            continue;
        }
        let (key, value) = word.split_once('=').unwrap();
        let value = value.parse().unwrap();
        match key {
            "cpu" => capacity.cpu_millis = value,
            "memory" => capacity.memory_mib = value,
            "starts" => capacity.max_starting = value,
            _ => panic!("a worker has no such setting: {word}"),
        }
    }
    Event::WorkerConnected {
        worker_id: id(name),
        capacity,
    }
}

fn duration(text: &str) -> Duration {
    let (number, unit) = text.split_at(text.find(char::is_alphabetic).unwrap());
    let number: f64 = number.parse().unwrap();
    Duration::from_secs_f64(match unit {
        "ms" => number / 1_000.0,
        "s" => number,
        "m" => number * 60.0,
        _ => panic!("no such unit of time: {text}"),
    })
}
