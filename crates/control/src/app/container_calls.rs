//! What containers ask of us: inputs, and a place for outputs.

use std::time::Duration;

use ionian_domain::call::{AttemptNumber, InputPayload, Invocation};
use ionian_domain::{CallId, ContainerId, InputId, Outcome};
use ionian_scheduler::{AttemptReport, Delivery, Event};

use crate::containers::ContainerEntry;
use crate::data_channel::WebInput;
use crate::error::{Error, Result};
use crate::turn_loop::PollAnswer;
use crate::Control;

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
        let mut ticket = self.0.turn().poll(entry.id, max_inputs).await?;
        let is_web = entry.function.spec.web.is_some() || !entry.function.spec.web_methods.is_empty();
        let channels = self.0.data_channels();
        let web = async {
            if is_web {
                // `None` at once means that the container takes no requests this way.
                match channels.next_input(entry.id, POLL_HOLD).await {
                    Some(input) => input,
                    None => std::future::pending().await,
                }
            } else {
                std::future::pending().await
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
            PollAnswer::Inputs(deliveries) => Ok(Work::Inputs(self.load(deliveries).await?)),
            PollAnswer::KillSwitch => Ok(Work::KillSwitch),
            PollAnswer::Empty => Ok(Work::Nothing),
        }
    }

    async fn load(&self, deliveries: Vec<Delivery>) -> Result<Vec<DeliveredInput>> {
        let ids: Vec<InputId> = deliveries.iter().map(|delivery| delivery.input_id).collect();
        let mut payloads = self.0.payloads().take(&ids);
        let missing: Vec<InputId> = ids.into_iter().filter(|id| !payloads.contains_key(id)).collect();
        if !missing.is_empty() {
            payloads.extend(self.0.store().calls().input_payloads(&missing).await?);
        }
        deliveries
            .into_iter()
            .map(|delivery| {
                let input = payloads.remove(&delivery.input_id).ok_or_else(|| {
                    Error::internal(
                        format!("the arguments of input {} are missing", delivery.input_id),
                        "no payload in the database",
                    )
                })?;
                Ok(DeliveredInput {
                    input_id: delivery.input_id,
                    call_id: delivery.call_id,
                    index: delivery.index,
                    attempt: delivery.attempt,
                    invocation: delivery.invocation,
                    input,
                })
            })
            .collect()
    }

    /// Takes outputs, and answers when they are recorded.
    pub async fn put_outputs(&self, entry: &ContainerEntry, reports: Vec<AttemptReport>) -> Result<()> {
        let mut recorded = Vec::with_capacity(reports.len());
        for report in reports {
            let finished = self.0.data_channels().finish(entry.id, report.input_id, report.outcome.clone());
            if !finished {
                recorded.push(report);
            }
        }
        if recorded.is_empty() {
            return Ok(());
        }
        let container_id = entry.id;
        self.0.turn().ask(|reply| Event::OutputsReported { container_id, outputs: recorded, reply }).await
    }

    /// The container could not be set up, or failed outside of an input.
    pub async fn failed(&self, entry: &ContainerEntry, outcome: Outcome) -> Result<()> {
        let container_id = entry.id;
        self.0.turn().ask(|reply| Event::ContainerFailed { container_id, outcome, reply }).await
    }

    pub async fn server_ready(&self, entry: &ContainerEntry) -> Result<()> {
        self.0.turn().tell(Event::ServerReady { container_id: entry.id }).await
    }

    pub async fn stop(&self, container_id: ContainerId, graceful: bool) -> Result<()> {
        self.0.turn().ask(|reply| Event::ContainerStopRequested { container_id, graceful, reply }).await
    }
}
