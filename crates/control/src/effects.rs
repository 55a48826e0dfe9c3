//! What happens after a commit: the scheduler's commands, carried out.

use std::collections::HashMap;
use std::sync::Arc;

use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::web::PoolEvent;
use ionian_domain::{CallId, Outcome};
use ionian_scheduler::{Command, ContainerView, DesiredEntry, Scheduler};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::containers::Containers;
use crate::data_channel::DataChannels;

/// Wakes readers of a call's outputs. Holds a call only while somebody reads it.
#[derive(Debug, Clone, Default)]
pub struct OutputsHub {
    calls: Arc<Mutex<HashMap<CallId, watch::Sender<u64>>>>,
}

/// A reader's place in the hub.
#[derive(Debug)]
pub struct OutputsNews {
    hub: OutputsHub,
    call_id: CallId,
    /// `None` only while it is dropped.
    news: Option<watch::Receiver<u64>>,
}

impl OutputsHub {
    /// Sees every output from now on. Subscribe first, read the store next, wait last.
    pub fn subscribe(&self, call_id: CallId) -> OutputsNews {
        let news = self
            .calls
            .lock()
            .entry(call_id)
            .or_insert_with(|| watch::channel(0).0)
            .subscribe();
        OutputsNews {
            hub: self.clone(),
            call_id,
            news: Some(news),
        }
    }

    fn announce(&self, call_id: CallId, last_sequence: u64) {
        if let Some(sender) = self.calls.lock().get(&call_id) {
            sender.send_replace(last_sequence);
        }
    }
}

impl OutputsNews {
    /// What comes after this is news.
    pub fn mark_seen(&mut self) {
        if let Some(news) = &mut self.news {
            news.mark_unchanged();
        }
    }

    pub async fn changed(&mut self) {
        if let Some(news) = &mut self.news {
            // The hub keeps the sender while this place exists.
            let _closed = news.changed().await;
        }
    }
}

impl Drop for OutputsNews {
    fn drop(&mut self) {
        let mut calls = self.hub.calls.lock();
        self.news = None;
        if calls
            .get(&self.call_id)
            .is_some_and(|sender| sender.receiver_count() == 0)
        {
            calls.remove(&self.call_id);
        }
    }
}

/// Which containers exist, for lists and for the end of an app's logs.
pub type ContainersSnapshot = Arc<Vec<ContainerView>>;

/// The outlets of the turn loop.
pub(crate) struct Effects {
    pub outputs: OutputsHub,
    pub containers: Containers,
    pub data_channels: DataChannels,
    pub pool_events: mpsc::Sender<PoolEvent>,
    pub desired: watch::Sender<Vec<DesiredEntry>>,
    pub snapshot: watch::Sender<ContainersSnapshot>,
    pub notices: mpsc::Sender<Notice>,
}

/// Something the platform says in an app's log.
#[derive(Debug)]
pub struct Notice {
    pub function_id: ionian_domain::FunctionId,
    pub text: String,
}

impl Effects {
    pub(crate) async fn release(&self, scheduler: &Scheduler, commands: Vec<Command>, desired_changed: bool) {
        if desired_changed {
            self.desired.send_replace(scheduler.desired());
        }
        let mut containers = scheduler.containers();
        for container in &mut containers {
            // Counts of running inputs change with every call; who waits for containers must not wake up for it.
            container.running_inputs = 0;
        }
        self.snapshot.send_if_modified(|current| {
            let changed = **current != containers;
            if changed {
                *current = Arc::new(containers);
            }
            changed
        });
        for command in commands {
            match command {
                Command::OutputsReady { call_id, last_sequence } => self.outputs.announce(call_id, last_sequence),
                Command::CancelInputs {
                    container_id,
                    input_ids,
                } => self.containers.cancel(container_id, input_ids),
                Command::WebReady {
                    function_id,
                    container_id,
                } => {
                    let (slots, targets) = self.containers.web_targets(container_id);
                    if targets
                        .iter()
                        .any(|(_, target)| *target == ionian_domain::web::WebTarget::DataChannel)
                    {
                        self.data_channels.attach(container_id);
                    }
                    self.tell(PoolEvent::Ready {
                        function_id,
                        container_id,
                        slots,
                        targets,
                    })
                    .await;
                }
                Command::WebDraining {
                    function_id,
                    container_id,
                } => {
                    self.tell(PoolEvent::Draining {
                        function_id,
                        container_id,
                    })
                    .await;
                }
                Command::WebGone {
                    function_id,
                    container_id,
                } => {
                    let outcome = Outcome::decided(OutcomeStatus::InternalFailure, "the container ended");
                    self.data_channels.detach(container_id, &outcome);
                    self.tell(PoolEvent::Gone {
                        function_id,
                        container_id,
                    })
                    .await;
                }
                Command::WebStartFailed {
                    function_id,
                    container_id,
                    message,
                } => {
                    self.tell(PoolEvent::StartFailed {
                        function_id,
                        container_id,
                        message,
                    })
                    .await;
                }
                Command::Forget { container_id } => self.containers.forget(container_id),
                Command::BackedOff {
                    function_id,
                    failures,
                    until,
                } => {
                    let seconds = until.since(ionian_domain::Timestamp::now()).as_secs();
                    let text = format!(
                        "{failures} containers in a row could not be set up; the next start waits {seconds} s\n"
                    );
                    // A full queue means that notices come faster than they are written; one more adds nothing.
                    let _full = self.notices.try_send(Notice { function_id, text });
                }
                Command::RuntimeMissing { function_id, runtime } => {
                    tracing::warn!(function = %function_id, %runtime, "no worker has the runtime of a function; it waits for one");
                    let text = format!(
                        "no worker of this server has the runtime {runtime}: the function waits until one has\n"
                    );
                    let _full = self.notices.try_send(Notice { function_id, text });
                }
            }
        }
    }

    async fn tell(&self, event: PoolEvent) {
        // The ingress is gone only while the process shuts down.
        let _closed = self.pool_events.send(event).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_hub_wakes_readers_and_forgets_calls_that_nobody_reads() {
        let hub = OutputsHub::default();
        let call_id = CallId::generate();
        let (mut one, two) = (hub.subscribe(call_id), hub.subscribe(call_id));
        drop(two);
        one.mark_seen();
        hub.announce(call_id, 1);
        one.changed().await;
        drop(one);
        hub.announce(call_id, 2);
        assert!(hub.calls.lock().is_empty());
    }
}
