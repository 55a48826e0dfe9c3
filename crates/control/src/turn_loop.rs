//! The one task that owns the scheduler: collect a batch of events, decide, commit, then act (D4).
//!
//! Everybody else holds a [`TurnHandle`]. No reply and no order leaves before the write it rests on
//! has committed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ionian_domain::record::Write;
use ionian_domain::{ContainerId, ErrorKind, Timestamp, WorkerId};
use ionian_scheduler::{Delivery, Event, PollId, Refusal, Reply, ReplyId, Scheduler, Turn};
use ionian_store::Store;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::effects::Effects;
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::trouble::Trouble;

/// Events that wait for a turn. Senders wait beyond it, which slows callers instead of growing memory.
const QUEUED_EVENTS: usize = 4096;
/// Events in one turn: enough to share a commit between many callers, few enough to keep a turn short.
const EVENTS_PER_TURN: usize = 512;
/// Pause before a failed commit is tried again. Callers wait; nothing is acknowledged meanwhile.
const COMMIT_RETRY: Duration = Duration::from_millis(500);
/// How often the scheduler hears of the worker in this process, which lives as long as the loop does. Said
/// with a turn that happens anyway, so that a process which was stopped for long (SIGSTOP, a suspended
/// machine) does not take its own worker for one that is gone.
const WORKER_HEARD_PERIOD: Duration = Duration::from_secs(5);

/// What a container's poll is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PollAnswer {
    Inputs(Vec<Delivery>),
    KillSwitch,
    Empty,
}

enum Message {
    Event(Event),
    Asked(Event, ReplyId, oneshot::Sender<Result<(), Refusal>>),
    Polled(Event, PollId, oneshot::Sender<PollAnswer>),
    Inspect(Box<dyn FnOnce(&Scheduler) + Send>),
}

/// Talks to the turn loop. Cheap to clone.
#[derive(Clone)]
pub struct TurnHandle {
    sender: mpsc::Sender<Message>,
    next: Arc<AtomicU64>,
    trouble: Trouble,
}

/// An outstanding poll. Dropping it tells the scheduler that nobody waits any more.
pub struct PollTicket {
    container_id: ContainerId,
    id: PollId,
    answer: oneshot::Receiver<PollAnswer>,
    sender: mpsc::Sender<Message>,
    answered: bool,
}

impl PollTicket {
    /// Waits for the answer. Cancel-safe: dropping the future keeps the poll open.
    pub async fn answer(&mut self) -> PollAnswer {
        let answer = (&mut self.answer).await.unwrap_or(PollAnswer::Empty);
        self.answered = true;
        answer
    }

    /// Withdraws the poll. An answer that was already on its way is still returned: it names inputs
    /// that are recorded as running here. Cancel-safe: dropping the future drops the ticket, which takes
    /// such inputs back.
    pub async fn withdraw(mut self) -> PollAnswer {
        let event = Event::PollDropped {
            container_id: self.container_id,
            poll: self.id,
        };
        // A round trip through the loop: after it, no answer can come any more.
        let (done, barrier) = oneshot::channel();
        if self.sender.send(Message::Event(event)).await.is_ok()
            && self
                .sender
                .send(Message::Inspect(Box::new(move |_| {
                    let _hung_up = done.send(());
                })))
                .await
                .is_ok()
        {
            let _shut_down = barrier.await;
        }
        self.answered = true;
        self.answer.try_recv().unwrap_or(PollAnswer::Empty)
    }
}

impl Drop for PollTicket {
    fn drop(&mut self) {
        if !self.answered {
            // Closed first: an answer that is released after this finds nobody and is taken back there.
            self.answer.close();
            let event = match self.answer.try_recv() {
                Ok(PollAnswer::Inputs(inputs)) => lost(self.container_id, &inputs),
                Ok(PollAnswer::KillSwitch | PollAnswer::Empty) | Err(_) => Event::PollDropped {
                    container_id: self.container_id,
                    poll: self.id,
                },
            };
            tell_later(&self.sender, event);
        }
    }
}

/// Tells the loop of something from where nobody can wait.
fn tell_later(sender: &mpsc::Sender<Message>, event: Event) {
    if let Err(mpsc::error::TrySendError::Full(message)) = sender.try_send(Message::Event(event)) {
        let sender = sender.clone();
        // Ends as soon as the loop has room; the loop always drains.
        tokio::spawn(async move { drop(sender.send(message).await) });
    }
}

/// Inputs that are recorded as running in a container, on the way there. Dropping it before they have
/// been handed over gives them to whoever polls next.
pub struct DeliveryGuard {
    container_id: ContainerId,
    inputs: Vec<Delivery>,
    sender: mpsc::Sender<Message>,
}

impl DeliveryGuard {
    pub fn inputs(&self) -> &[Delivery] {
        &self.inputs
    }

    /// The container has them.
    pub fn handed_over(mut self) -> Vec<Delivery> {
        std::mem::take(&mut self.inputs)
    }
}

impl Drop for DeliveryGuard {
    fn drop(&mut self) {
        if !self.inputs.is_empty() {
            tell_later(&self.sender, lost(self.container_id, &self.inputs));
        }
    }
}

impl TurnHandle {
    pub(crate) fn channel(trouble: Trouble) -> (Self, TurnReceiver) {
        let (sender, receiver) = mpsc::channel(QUEUED_EVENTS);
        (
            Self {
                sender,
                next: Arc::new(AtomicU64::new(1)),
                trouble,
            },
            TurnReceiver(receiver),
        )
    }

    fn draw(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Reports a fact to which there is no answer.
    pub async fn tell(&self, event: Event) -> Result<()> {
        self.sender
            .send(Message::Event(event))
            .await
            .map_err(|_| shutting_down())
    }

    /// Asks for something and waits until it is recorded, or until it is clear that this takes long.
    pub async fn ask(&self, event: impl FnOnce(ReplyId) -> Event) -> Result<()> {
        self.trouble.check()?;
        let reply = ReplyId(self.draw());
        let (sender, receiver) = oneshot::channel();
        let message = Message::Asked(event(reply), reply, sender);
        let answered = async {
            self.sender.send(message).await.map_err(|_| shutting_down())?;
            receiver.await.map_err(|_| shutting_down())?.map_err(Error::from)
        };
        tokio::select! {
            biased;
            answered = answered => answered,
            trouble = self.trouble.lasts() => Err(trouble),
        }
    }

    /// Opens a container's poll for inputs.
    pub async fn poll(&self, container_id: ContainerId, max_inputs: u32) -> Result<PollTicket> {
        let id = PollId(self.draw());
        let (sender, answer) = oneshot::channel();
        let event = Event::PollStarted {
            container_id,
            poll: id,
            max_inputs,
        };
        self.sender
            .send(Message::Polled(event, id, sender))
            .await
            .map_err(|_| shutting_down())?;
        Ok(PollTicket {
            container_id,
            id,
            answer,
            sender: self.sender.clone(),
            answered: false,
        })
    }

    /// Watches over inputs until they are handed over.
    pub fn guard(&self, container_id: ContainerId, inputs: Vec<Delivery>) -> DeliveryGuard {
        DeliveryGuard {
            container_id,
            inputs,
            sender: self.sender.clone(),
        }
    }

    /// Reads the scheduler's state between two turns.
    pub async fn inspect<T: Send + 'static>(&self, read: impl FnOnce(&Scheduler) -> T + Send + 'static) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        let message = Message::Inspect(Box::new(move |scheduler| {
            let _hung_up = sender.send(read(scheduler));
        }));
        self.sender.send(message).await.map_err(|_| shutting_down())?;
        receiver.await.map_err(|_| shutting_down())
    }
}

fn shutting_down() -> Error {
    Error::new(
        ionian_domain::ErrorKind::Unavailable,
        "the server is shutting down; try again in a moment",
    )
}

pub(crate) struct TurnReceiver(mpsc::Receiver<Message>);

fn lost(container_id: ContainerId, inputs: &[Delivery]) -> Event {
    Event::DeliveryLost {
        container_id,
        inputs: inputs.iter().map(|delivery| delivery.input_id).collect(),
    }
}

/// What the loop works with.
pub(crate) struct TurnLoop {
    pub scheduler: Scheduler,
    pub store: Store,
    pub effects: Effects,
    pub trouble: Trouble,
    pub journal: Journal,
    pub embedded_worker: Option<WorkerId>,
}

/// Runs turns until cancelled and drained.
pub(crate) async fn run(
    TurnLoop {
        mut scheduler,
        store,
        effects,
        trouble,
        mut journal,
        embedded_worker,
    }: TurnLoop,
    TurnReceiver(mut messages): TurnReceiver,
    cancel: CancellationToken,
) {
    let mut worker_heard = Instant::now();
    let mut replies: HashMap<ReplyId, oneshot::Sender<Result<(), Refusal>>> = HashMap::new();
    let mut polls: Polls = HashMap::new();
    // Deliveries of the last turn whose receivers were gone; the next turn takes them back.
    let mut undelivered: Vec<Event> = Vec::new();
    let mut wake_at: Option<Timestamp> = None;
    let mut batch = Vec::with_capacity(EVENTS_PER_TURN);
    loop {
        let timer = async {
            match wake_at {
                Some(at) => tokio::time::sleep(at.since(Timestamp::now())).await,
                None => std::future::pending().await,
            }
        };
        let received = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = std::future::ready(()), if !undelivered.is_empty() => usize::MAX,
            received = messages.recv_many(&mut batch, EVENTS_PER_TURN) => received,
            () = timer => usize::MAX,
        };
        if received == 0 {
            return;
        }
        let mut events = std::mem::take(&mut undelivered);
        if let Some(worker_id) = embedded_worker
            && worker_heard.elapsed() >= WORKER_HEARD_PERIOD
        {
            worker_heard = Instant::now();
            events.push(Event::WorkerHeard { worker_id });
        }
        let mut inspections = Vec::new();
        for message in batch.drain(..) {
            match message {
                Message::Event(event) => events.push(event),
                Message::Asked(event, reply, sender) => {
                    replies.insert(reply, sender);
                    events.push(event);
                }
                Message::Polled(event, poll, sender) => {
                    if let Event::PollStarted { container_id, .. } = event {
                        polls.insert(poll, (container_id, sender));
                    }
                    events.push(event);
                }
                Message::Inspect(read) => inspections.push(read),
            }
        }
        let dropped: Vec<PollId> = events
            .iter()
            .filter_map(|event| match event {
                Event::PollDropped { poll, .. } => Some(*poll),
                _ => None,
            })
            .collect();
        let now = Timestamp::now();
        let mut entry = journal.begin(now, &events);
        let turn = scheduler.handle(now, events, &mut || {
            let id = ContainerId::generate();
            entry.as_mut().map_or(id, |entry| entry.drew(id))
        });
        let line = entry.map(|entry| entry.end(&turn));
        let Turn {
            writes,
            replies: answers,
            commands,
            desired_changed,
            wake_at: next,
        } = turn;
        wake_at = next;
        if !commit(&store, writes, &trouble, &cancel).await {
            return;
        }
        if let Some(line) = line {
            journal.write(line);
        }
        for answer in answers {
            undelivered.extend(release(answer, &mut replies, &mut polls));
        }
        for poll in dropped {
            polls.remove(&poll);
        }
        effects.release(&scheduler, commands, desired_changed).await;
        for read in inspections {
            read(&scheduler);
        }
    }
}

/// Commits, however long the disk takes. Until then nothing of this turn leaves the process.
async fn commit(store: &Store, writes: Vec<Write>, trouble: &Trouble, cancel: &CancellationToken) -> bool {
    if writes.is_empty() {
        return true;
    }
    loop {
        match store.calls().commit(writes.clone(), &[]).await {
            Ok(()) => {
                if trouble.end() {
                    tracing::info!("the database takes writes again");
                }
                return true;
            }
            Err(error) if !is_passing(error.kind()) => {
                // The scheduler and the database disagree: going on would build on what is not recorded.
                // Recovery starts again from what is.
                panic!("a turn contradicts what is recorded: {error}: {:?}", error.source);
            }
            Err(error) => {
                if trouble.begin(error.kind() == ErrorKind::Exhausted) {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "a turn could not be recorded; nothing is acknowledged until it is, and it is tried again"
                    );
                }
                tokio::select! {
                    () = cancel.cancelled() => return false,
                    () = tokio::time::sleep(COMMIT_RETRY) => {}
                }
            }
        }
    }
}

/// Whether a failed commit may succeed later: a full or failing disk, a busy database.
fn is_passing(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::Internal | ErrorKind::Unavailable | ErrorKind::Deadline | ErrorKind::Exhausted => true,
        ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::InvalidArgument
        | ErrorKind::PreconditionFailed
        | ErrorKind::PermissionDenied
        | ErrorKind::Unauthenticated
        | ErrorKind::Unimplemented => false,
    }
}

type Polls = HashMap<PollId, (ContainerId, oneshot::Sender<PollAnswer>)>;

/// Sends an answer. Inputs whose receiver is gone come back as an event.
fn release(
    answer: Reply,
    replies: &mut HashMap<ReplyId, oneshot::Sender<Result<(), Refusal>>>,
    polls: &mut Polls,
) -> Option<Event> {
    let (poll, answer) = match answer {
        Reply::Accepted(reply) => {
            // A caller that hung up; what was recorded stays.
            let _hung_up = replies.remove(&reply)?.send(Ok(()));
            return None;
        }
        Reply::Refused { reply, refusal } => {
            let _hung_up = replies.remove(&reply)?.send(Err(refusal));
            return None;
        }
        Reply::Deliver { poll, inputs } => (poll, PollAnswer::Inputs(inputs)),
        Reply::KillSwitch { poll } => (poll, PollAnswer::KillSwitch),
        Reply::Empty { poll } => (poll, PollAnswer::Empty),
    };
    let (container_id, sender) = polls.remove(&poll)?;
    match sender.send(answer) {
        Err(PollAnswer::Inputs(inputs)) => Some(lost(container_id, &inputs)),
        Ok(()) | Err(PollAnswer::KillSwitch | PollAnswer::Empty) => None,
    }
}
