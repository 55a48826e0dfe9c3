//! What containers ask of us: inputs, and a place for outputs.

use std::time::Duration;

use ionian_domain::call::{AttemptNumber, InputPayload, Invocation};
use ionian_domain::{CallId, ContainerId, ErrorKind, InputId, Outcome};
use ionian_scheduler::{AttemptReport, Delivery, Event};

use crate::Control;
use crate::containers::ContainerEntry;
use crate::data_channel::WebInput;
use crate::error::{Error, Result};
use crate::turn_loop::PollAnswer;

/// How long a poll is held. The runtime has no limit of its own and polls again at once; this bounds
/// how long a connection that died silently keeps a poll open.
const POLL_HOLD: Duration = Duration::from_secs(50);

pub struct ContainerCalls<'a>(pub(crate) &'a Control);

/// An input on its way to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveredInput {
    pub input_id: InputId,
    pub call_id: CallId,
    pub index: u32,
    pub attempt: AttemptNumber,
    pub invocation: Invocation,
    pub input: InputPayload,
}

/// The answer to a container's poll.
#[derive(Debug, Clone)]
pub enum Work {
    Inputs(Vec<DeliveredInput>),
    /// A web request over the data channel.
    Web(WebInput),
    KillSwitch,
    Nothing,
}

impl ContainerCalls<'_> {
    /// Waits for work. The first call says that the container is ready.
    pub async fn next(&self, entry: &ContainerEntry, max_inputs: u32) -> Result<Work> {
        let is_web = entry.function.spec.web.is_some() || !entry.function.spec.web_methods.is_empty();
        let mut ticket = self.0.turn().poll(entry.id, max_inputs).await?;
        let web = async {
            let taken = if is_web {
                self.0.data_channels().next_input(entry.id, POLL_HOLD).await
            } else {
                None
            };
            match taken {
                Some(input) => input,
                None => std::future::pending().await,
            }
        };
        let answer = tokio::select! {
            biased;
            answer = ticket.answer() => answer,
            input = web => {
                // The poll is used up by this request; a kill switch that crossed it comes with the next one.
                drop(ticket);
                return Ok(Work::Web(input));
            }
            () = tokio::time::sleep(POLL_HOLD) => ticket.withdraw().await,
        };
        match answer {
            PollAnswer::Inputs(deliveries) => Ok(Work::Inputs(self.load(entry, deliveries).await?)),
            PollAnswer::KillSwitch => Ok(Work::KillSwitch),
            PollAnswer::Empty => Ok(Work::Nothing),
        }
    }

    /// Adds the arguments. A poll whose connection breaks meanwhile, and a failing read, give the inputs back.
    async fn load(&self, entry: &ContainerEntry, deliveries: Vec<Delivery>) -> Result<Vec<DeliveredInput>> {
        let guard = self.0.turn().guard(entry.id, deliveries);
        let ids: Vec<InputId> = guard.inputs().iter().map(|delivery| delivery.input_id).collect();
        let mut payloads = self.0.payloads().take(&ids);
        let missing: Vec<InputId> = ids.into_iter().filter(|id| !payloads.contains_key(id)).collect();
        if !missing.is_empty() {
            payloads.extend(self.0.store().calls().input_payloads(&missing).await?);
        }
        let mut inputs = Vec::with_capacity(guard.inputs().len());
        for delivery in guard.inputs() {
            let input = payloads.remove(&delivery.input_id).ok_or_else(|| {
                Error::internal(
                    format!("the arguments of input {} are missing", delivery.input_id),
                    "no payload in the database",
                )
            })?;
            inputs.push(DeliveredInput {
                input_id: delivery.input_id,
                call_id: delivery.call_id,
                index: delivery.index,
                attempt: delivery.attempt,
                invocation: delivery.invocation,
                input,
            });
        }
        for delivery in guard.handed_over() {
            entry.hold(delivery.input_id, delivery.call_id);
        }
        Ok(inputs)
    }

    /// Whether the container may answer for this input: it was handed out to a container of the same function, or
    /// is not known (any more), and then nothing comes of the answer.
    pub async fn may_answer(&self, entry: &ContainerEntry, input_id: InputId) -> Result<bool> {
        if entry.holds(input_id) {
            return Ok(true);
        }
        let Some(call_id) = self.0.store().calls().find_call_of_input(input_id).await? else {
            return Ok(true);
        };
        let call = self.0.store().calls().call_summary(call_id).await?;
        Ok(call.is_none_or(|summary| summary.call.function_id == entry.function_id))
    }

    /// Takes outputs, and answers when they are recorded.
    pub async fn put_outputs(&self, entry: &ContainerEntry, reports: Vec<AttemptReport>) -> Result<()> {
        let mut recorded = Vec::with_capacity(reports.len());
        for report in reports {
            if !self
                .0
                .data_channels()
                .finish(entry.id, report.input_id, report.outcome.clone())
            {
                recorded.push(report);
            }
        }
        if recorded.is_empty() {
            return Ok(());
        }
        let container_id = entry.id;
        let ended: Vec<InputId> = recorded.iter().map(|report| report.input_id).collect();
        self.0
            .turn()
            .ask(|reply| Event::OutputsReported {
                container_id,
                outputs: recorded,
                reply,
            })
            .await?;
        for input_id in ended {
            entry.let_go(input_id);
        }
        Ok(())
    }

    /// The container could not be set up, or failed outside of an input.
    pub async fn failed(&self, entry: &ContainerEntry, outcome: Outcome) -> Result<()> {
        let container_id = entry.id;
        self.0
            .turn()
            .ask(|reply| Event::ContainerFailed {
                container_id,
                outcome,
                reply,
            })
            .await
    }

    pub async fn server_ready(&self, entry: &ContainerEntry) -> Result<()> {
        self.0.turn().tell(Event::ServerReady { container_id: entry.id }).await
    }

    /// Stopping a container that has ended changes nothing: whoever stops a list of them meets some that
    /// have gone meanwhile.
    pub async fn stop(&self, container_id: ContainerId, graceful: bool) -> Result<()> {
        let stopped = self
            .0
            .turn()
            .ask(|reply| Event::ContainerStopRequested {
                container_id,
                graceful,
                reply,
            })
            .await;
        match stopped {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let known = self.0.store().containers().find(container_id).await?;
                known.map(|_ended| ()).ok_or_else(|| {
                    Error::not_found(format!(
                        "container {container_id} does not exist; `modal container list` shows the running ones"
                    ))
                })
            }
            other => other,
        }
    }
}
