//! Containers that outlived the server: what control knew of them, restored before anybody can ask.
//!
//! The scheduler takes them back into its state, the worker finds them on its host; here it is their
//! credentials, addresses and inputs. Nothing of it is guessed: what cannot be restored from the record is
//! given up, so that its inputs run again in another container.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use ionian_domain::call::AttemptNumber;
use ionian_domain::function::{Function, FunctionKind};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::record::{PendingContainer, Recovered};
use ionian_domain::web::AnnouncedEndpoint;
use ionian_domain::{ContainerId, DefinitionId, FunctionId, InputId, Outcome, Timestamp, WorkerId};
use ionian_scheduler::{AttemptReport, Event};
use tokio::sync::mpsc;

use crate::Control;
use crate::containers::ContainerEntry;
use crate::error::{Error, Result};

/// In the database's table of facts: who the worker in this process is.
const EMBEDDED_WORKER: &str = "embedded-worker";
/// In the same table: where the containers that run were told to reach us.
const CONTAINERS_URL: &str = "containers-url";

/// An announcement that is to be noted in the record.
pub(crate) type WebNote = (ContainerId, Vec<AnnouncedEndpoint>, Timestamp);

/// What containers of one definition have in common.
struct Origin {
    function: Arc<Function>,
    app_name: String,
    environment_name: String,
}

/// An attempt that cannot go on where it stopped.
pub(crate) struct Interrupted {
    container_id: ContainerId,
    input_id: InputId,
    attempt: AttemptNumber,
}

impl Control {
    /// The id of the worker in this process: drawn once, and the same after every restart.
    pub(crate) async fn embedded_worker(&self) -> Result<WorkerId> {
        let drawn = WorkerId::generate().to_string();
        let kept = self.store().meta().ensure(EMBEDDED_WORKER, drawn.as_bytes()).await?;
        String::from_utf8_lossy(&kept)
            .parse()
            .map_err(|error| Error::internal("the embedded worker's id in the database is damaged", error))
    }

    /// Whether containers were told another address than ours is now. Notes ours for the next start.
    async fn note_containers_url(&self) -> Result<bool> {
        let ours = self.config().container_server_url.as_bytes();
        let told = self.store().meta().find(CONTAINERS_URL).await?;
        if told.as_deref() == Some(ours) {
            return Ok(false);
        }
        self.store().meta().set(CONTAINERS_URL, ours).await?;
        Ok(told.is_some())
    }

    /// Puts recorded containers back into the registry, each with its endpoints and the inputs it holds.
    /// One that could not speak to us any more loses its origin, by which the scheduler gives it up.
    pub(crate) async fn restore_containers(&self, recovered: &mut Recovered) -> Result<Vec<Interrupted>> {
        let has_moved = self.note_containers_url().await?;
        if has_moved && !recovered.containers.is_empty() {
            tracing::warn!(
                containers = recovered.containers.len(),
                url = self.config().container_server_url,
                "the containers' listener has another address than before: containers that know the old one are given up"
            );
        }
        let mut announced = self.store().containers().live_web_endpoints().await?;
        let mut origins: HashMap<DefinitionId, Origin> = HashMap::new();
        for container in &mut recovered.containers {
            let Some((_, definition_id)) = container.origin else {
                continue;
            };
            if has_moved {
                container.origin = None;
                continue;
            }
            let origin = match origins.entry(definition_id) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(unknown) => match self.origin(container.function_id, definition_id).await {
                    Ok(origin) => unknown.insert(origin),
                    Err(error) => {
                        tracing::warn!(
                            container = %container.id,
                            error = &error as &dyn std::error::Error,
                            "a container cannot be taken back; it is given up"
                        );
                        container.origin = None;
                        continue;
                    }
                },
            };
            let endpoints = announced.remove(&container.id).unwrap_or_default();
            self.restore_entry(container, origin, endpoints);
        }
        Ok(self.restore_inputs(recovered))
    }

    async fn origin(&self, function_id: FunctionId, definition_id: DefinitionId) -> Result<Origin> {
        let function = self.function_at(function_id, definition_id).await?;
        let app = self.apps().get(function.app_id).await?;
        let environment = self.environments().get_by_id(app.environment_id).await?;
        Ok(Origin {
            function: Arc::new(function),
            app_name: app.name.unwrap_or(app.description),
            environment_name: environment.name,
        })
    }

    fn restore_entry(&self, container: &PendingContainer, origin: &Origin, endpoints: Vec<AnnouncedEndpoint>) {
        let entry = self.containers().insert(ContainerEntry::new(
            container.id,
            origin.app_name.clone(),
            origin.environment_name.clone(),
            Arc::clone(&origin.function),
            container.created_at,
        ));
        entry.announce(endpoints);
    }

    /// Gives restored containers the inputs that they run, so that they may speak for their calls. A generator
    /// is not among them: what it had yielded was in our memory, so it begins anew.
    fn restore_inputs(&self, recovered: &Recovered) -> Vec<Interrupted> {
        let mut interrupted = Vec::new();
        for input in &recovered.inputs {
            let Some((container_id, _)) = input.running else {
                continue;
            };
            let Some(entry) = self.containers().find(container_id) else {
                continue;
            };
            match entry.function.spec.kind {
                FunctionKind::Function => entry.hold(input.id, input.call_id),
                FunctionKind::Generator => interrupted.push(Interrupted {
                    container_id,
                    input_id: input.id,
                    attempt: input.attempt,
                }),
            }
        }
        interrupted
    }

    /// Has attempts begin anew, and their containers let go of them. Comes after the scheduler has recovered.
    pub(crate) async fn begin_anew(&self, interrupted: Vec<Interrupted>) -> Result<()> {
        for Interrupted {
            container_id,
            input_id,
            attempt,
        } in interrupted
        {
            let report = AttemptReport {
                input_id,
                attempt,
                outcome: Outcome::decided(OutcomeStatus::Terminated, "the server restarted"),
                started_at: None,
            };
            self.turn()
                .ask(|reply| Event::OutputsReported {
                    container_id,
                    outputs: vec![report],
                    reply,
                })
                .await?;
            self.containers().cancel(container_id, vec![input_id]);
        }
        Ok(())
    }

    /// A container's web hook serves these endpoints. Comes before the container is ready. The note in the
    /// record follows behind: without it, a restarted server waits for the container's next poll instead.
    pub fn announce(&self, entry: &ContainerEntry, endpoints: Vec<AnnouncedEndpoint>) {
        entry.announce(endpoints.clone());
        if let Err(error) = self.web_notes().try_send((entry.id, endpoints, Timestamp::now())) {
            tracing::warn!(container = %entry.id, %error, "a container's web endpoints could not be noted");
        }
    }
}

/// Writes announcements down, behind them.
pub(crate) async fn write_web_notes(control: Control, mut notes: mpsc::Receiver<WebNote>) {
    while let Some((container_id, endpoints, at)) = notes.recv().await {
        let containers = control.store().containers();
        if let Err(error) = containers.note_web_endpoints(container_id, &endpoints, at).await {
            tracing::warn!(
                container = %container_id,
                error = &error as &dyn std::error::Error,
                "a container's web endpoints could not be noted"
            );
        }
    }
}
