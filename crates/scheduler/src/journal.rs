//! The journal: what the scheduler was told and what it decided, one line of JSON for each turn, so that
//! what happened on a real server can be run again through the same code.
//!
//! The scheduler is a function of its events, the time and the ids that it draws; nothing else is needed.
//! What users sent and what their code returned or raised is left out, since no decision depends on it:
//! a journal can be handed to a stranger. It is written for diagnosis, not for recovery, and nobody reads
//! it but [`replay`].
//!
//! This module only makes lines and reads them; `control` writes them, after the turn's commit:
//!
//! ```
//! # use ionian_domain::{ContainerId, Timestamp};
//! # use ionian_domain::record::Recovered;
//! # use ionian_scheduler::{journal, Config, Event, Scheduler};
//! # let (config, now) = (Config::default(), Timestamp(0));
//! # let events = vec![Event::Recovered(Recovered::default())];
//! let mut file: Vec<u8> = journal::opening(&config);
//! let mut scheduler = Scheduler::new(config);
//! let mut entry = journal::Entry::begin(now, &events);
//! let turn = scheduler.handle(now, events, &mut || entry.drew(ContainerId::generate()));
//! file.extend(entry.end(&turn));
//! # let text = String::from_utf8(file).unwrap();
//! assert_eq!(journal::replay(text.lines()).unwrap().turns, 1);
//! ```

use std::collections::VecDeque;

use ionian_domain::call::Payload;
use ionian_domain::record::{NewInput, Write};
use ionian_domain::{ContainerId, Outcome, Timestamp};
use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::turn::{Command, Reply, Turn};
use crate::{Config, Scheduler};

/// Counts changes of the format that make older journals unreadable.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// A server started: what follows is its life.
    Opened {
        version: u32,
        config: Config,
    },
    Turn(Box<Recorded>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Recorded {
    now: Timestamp,
    events: Vec<Event>,
    /// Ids for new containers, in the order in which they were drawn.
    drawn: Vec<ContainerId>,
    decided: Decided,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Decided {
    writes: Vec<Write>,
    replies: Vec<Reply>,
    commands: Vec<Command>,
    desired_changed: bool,
    wake_at: Option<Timestamp>,
}

/// The line with which a life of the server begins.
pub fn opening(config: &Config) -> Vec<u8> {
    line(&Line::Opened {
        version: VERSION,
        config: config.clone(),
    })
}

/// One turn on its way into the journal.
#[derive(Debug)]
pub struct Entry {
    recorded: Recorded,
}

impl Entry {
    /// Notes what the scheduler is about to be told.
    pub fn begin(now: Timestamp, events: &[Event]) -> Self {
        let events = events.iter().map(without_contents).collect();
        Self {
            recorded: Recorded {
                now,
                events,
                drawn: Vec::new(),
                decided: Decided::default(),
            },
        }
    }

    /// Notes an id that was drawn for a new container, and gives it back.
    pub fn drew(&mut self, container_id: ContainerId) -> ContainerId {
        self.recorded.drawn.push(container_id);
        container_id
    }

    /// The line to write, with what was decided.
    pub fn end(mut self, turn: &Turn) -> Vec<u8> {
        self.recorded.decided = Decided::of(turn);
        line(&Line::Turn(Box::new(self.recorded)))
    }
}

fn line(line: &Line) -> Vec<u8> {
    let mut text = serde_json::to_vec(line).expect("ids, numbers and texts are JSON");
    text.push(b'\n');
    text
}

/// What a replay went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplayReport {
    /// Lives of the server.
    pub lives: usize,
    pub turns: usize,
    pub events: usize,
    pub writes: usize,
    /// The last line was cut off: the process died while it was written.
    pub is_torn: bool,
}

/// Why a journal could not be replayed to its end.
#[derive(Debug, thiserror::Error)]
pub enum Divergence {
    #[error("line {line} of the journal cannot be read")]
    Unreadable { line: usize, source: serde_json::Error },
    #[error(
        "line {line} of the journal is of format {found}, and this program reads {VERSION}; replay it with the version that wrote it"
    )]
    OtherFormat { line: usize, found: u32 },
    #[error("line {line} of the journal is a turn before any server was started")]
    NotOpened { line: usize },
    #[error("line {line} of the journal is decided differently now\nthen: {then}\nnow:  {now}")]
    Differs { line: usize, then: String, now: String },
}

/// Runs a journal through the scheduler and compares what it decides with what was decided.
pub fn replay<Text: AsRef<str>>(lines: impl IntoIterator<Item = Text>) -> Result<ReplayReport, Divergence> {
    let mut report = ReplayReport::default();
    let mut scheduler: Option<Scheduler> = None;
    let mut lines = lines.into_iter().enumerate().peekable();
    while let Some((index, text)) = lines.next() {
        let number = index + 1;
        let parsed: Line = match serde_json::from_str(text.as_ref()) {
            Ok(parsed) => parsed,
            Err(source) if source.is_eof() && lines.peek().is_none() => {
                report.is_torn = true;
                return Ok(report);
            }
            Err(source) => return Err(Divergence::Unreadable { line: number, source }),
        };
        match parsed {
            Line::Opened { version, .. } if version != VERSION => {
                return Err(Divergence::OtherFormat {
                    line: number,
                    found: version,
                });
            }
            Line::Opened { config, .. } => {
                report.lives += 1;
                scheduler = Some(Scheduler::new(config));
            }
            Line::Turn(recorded) => {
                let scheduler = scheduler.as_mut().ok_or(Divergence::NotOpened { line: number })?;
                report.turns += 1;
                report.events += recorded.events.len();
                report.writes += recorded.decided.writes.len();
                again(scheduler, *recorded).map_err(|(then, now)| Divergence::Differs {
                    line: number,
                    then,
                    now,
                })?;
            }
        }
    }
    Ok(report)
}

/// Runs one turn again. What differs is told as it was then and as it is now.
fn again(scheduler: &mut Scheduler, recorded: Recorded) -> Result<(), (String, String)> {
    let mut left: VecDeque<ContainerId> = recorded.drawn.iter().copied().collect();
    let mut drawn = 0;
    let turn = scheduler.handle(recorded.now, recorded.events, &mut || {
        drawn += 1;
        // One that was not drawn then differs anyway; it only has to be new.
        left.pop_front()
            .unwrap_or_else(|| ContainerId::from_digest(&[drawn as u8; 32]))
    });
    let decided = Decided::of(&turn);
    if drawn == recorded.drawn.len() && decided == recorded.decided {
        return Ok(());
    }
    Err((
        format!("{:?}", recorded.decided),
        format!("{decided:?} with {drawn} new containers"),
    ))
}

impl Decided {
    fn of(turn: &Turn) -> Self {
        Self {
            writes: turn.writes.iter().map(write_without_contents).collect(),
            replies: turn.replies.clone(),
            commands: turn.commands.iter().map(command_without_contents).collect(),
            desired_changed: turn.desired_changed,
            wake_at: turn.wake_at,
        }
    }
}

fn inputs_without_contents(inputs: &[NewInput]) -> Vec<NewInput> {
    let mut inputs = inputs.to_vec();
    for input in &mut inputs {
        input.payload.payload = Payload::EMPTY;
    }
    inputs
}

/// What a user's code returned or raised is reduced to whether it succeeded.
fn outcome_without_contents(outcome: &Outcome) -> Outcome {
    Outcome::decided(outcome.status, "")
}

fn without_contents(event: &Event) -> Event {
    match event {
        Event::CallStarted { call, inputs, reply } => Event::CallStarted {
            call: call.clone(),
            inputs: inputs_without_contents(inputs),
            reply: *reply,
        },
        Event::InputsPut { call_id, inputs, reply } => Event::InputsPut {
            call_id: *call_id,
            inputs: inputs_without_contents(inputs),
            reply: *reply,
        },
        Event::OutputsReported {
            container_id,
            outputs,
            reply,
        } => {
            let mut outputs = outputs.clone();
            for report in &mut outputs {
                report.outcome = outcome_without_contents(&report.outcome);
            }
            Event::OutputsReported {
                container_id: *container_id,
                outputs,
                reply: *reply,
            }
        }
        Event::ContainerFailed {
            container_id,
            outcome,
            reply,
        } => Event::ContainerFailed {
            container_id: *container_id,
            outcome: outcome_without_contents(outcome),
            reply: *reply,
        },
        // Outcomes in these are sentences of the platform.
        Event::FunctionDeactivated { .. }
        | Event::CallCancelled { .. }
        | Event::Recovered(_)
        | Event::FunctionActivated { .. }
        | Event::CallInputsFinished { .. }
        | Event::CallConsumed { .. }
        | Event::PollStarted { .. }
        | Event::PollDropped { .. }
        | Event::DeliveryLost { .. }
        | Event::ServerReady { .. }
        | Event::ContainerStopRequested { .. }
        | Event::WorkerConnected { .. }
        | Event::WorkerHeard { .. }
        | Event::WorkerStarted { .. }
        | Event::WorkerExited { .. }
        | Event::WebDemand { .. }
        | Event::AutoscalerUpdated { .. }
        | Event::Tick
        | Event::ShuttingDown => event.clone(),
    }
}

fn write_without_contents(write: &Write) -> Write {
    let mut write = write.clone();
    match &mut write {
        Write::InputsCreated { inputs, .. } => *inputs = inputs_without_contents(inputs),
        Write::InputFinished { outcome, .. } => *outcome = outcome_without_contents(outcome),
        Write::CallCreated { .. }
        | Write::InputStarted { .. }
        | Write::InputRequeued { .. }
        | Write::CallInputsFinished { .. }
        | Write::CallConsumed { .. }
        | Write::ContainerCreated { .. }
        | Write::ContainerEnded { .. } => {}
    }
    write
}

fn command_without_contents(command: &Command) -> Command {
    let mut command = command.clone();
    match &mut command {
        // What an import raised.
        Command::WebStartFailed { message, .. } => message.clear(),
        Command::OutputsReady { .. }
        | Command::CancelInputs { .. }
        | Command::WebReady { .. }
        | Command::WebDraining { .. }
        | Command::WebGone { .. }
        | Command::Forget { .. }
        | Command::BackedOff { .. }
        | Command::RuntimeMissing { .. } => {}
    }
    command
}
