//! Apps: created by a client's session, published, stopped.

use std::collections::BTreeMap;

use ionian_domain::app::{App, AppLayout, AppState, AppVersion};
use ionian_domain::container::StopReason;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{AppId, ClassId, DefinitionId, ErrorKind, FunctionId, Outcome, Timestamp};
use ionian_scheduler::Event;
use ionian_store::apps::PublishRecord;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::{Caller, Control};

/// The client has the same limit.
const MAX_NAME_LENGTH: usize = 64;
/// Apps in one list; every `modal run` leaves a stopped one.
const MAX_LISTED: u32 = 1_000;

pub struct Apps<'a>(pub(crate) &'a Control);

/// What a client publishes.
#[derive(Debug, Clone, Default)]
pub struct Publish {
    /// Set by a deploy.
    pub name: Option<String>,
    /// `None` keeps the state (hot reload).
    pub state: Option<AppState>,
    pub functions: BTreeMap<String, FunctionId>,
    pub classes: BTreeMap<String, ClassId>,
    /// The definitions that this publish is about; functions that are missing keep their newest.
    pub definitions: BTreeMap<FunctionId, DefinitionId>,
    pub deployment_tag: String,
}

/// Why a client's session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disconnect {
    /// The session is over: an ephemeral app ends with it.
    Session,
    /// A deploy failed: only an app that never was published ends.
    FailedDeploy,
}

impl Apps<'_> {
    pub async fn get(&self, id: AppId) -> Result<App> {
        let found = self.0.store().apps().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("app {id} does not exist")))
    }

    /// The live app of this name.
    pub async fn find_by_name(&self, environment: &str, name: &str) -> Result<Option<App>> {
        let environment = self.0.environments().get(environment).await?;
        Ok(self.0.store().apps().find_by_name(environment.id, name).await?)
    }

    /// The newest app of this name that was stopped, where none is live.
    pub async fn find_stopped_by_name(&self, environment: &str, name: &str) -> Result<Option<App>> {
        let environment = self.0.environments().get(environment).await?;
        Ok(self.0.store().apps().find_last_by_name(environment.id, name).await?)
    }

    pub async fn get_by_name(&self, environment: &str, name: &str) -> Result<App> {
        self.find_by_name(environment, name).await?.ok_or_else(|| {
            Error::not_found(format!("App '{name}' not found; deploy it with `modal deploy`, or check the environment"))
        })
    }

    /// `dedupe` names the attempt's request: a repeated request gets the app that the first one made.
    pub async fn create(
        &self,
        environment: &str,
        description: &str,
        state: AppState,
        tags: BTreeMap<String, String>,
        dedupe: Option<&str>,
    ) -> Result<App> {
        check_name(description)?;
        let environment = self.0.environments().get(environment).await?;
        let id = dedupe.map_or_else(AppId::generate, |key| AppId::from_digest(&digest("app", key)));
        if dedupe.is_some()
            && let Some(existing) = self.0.store().apps().find(id).await?
        {
            return Ok(existing);
        }
        let app = App {
            id,
            environment_id: environment.id,
            name: None,
            description: description.to_owned(),
            state,
            created_at: Timestamp::now(),
            deployed_at: None,
            stopped_at: None,
            version: 0,
            layout: AppLayout::default(),
            tags,
        };
        self.0.store().apps().insert(&app).await?;
        self.0.heartbeats().touch(app.id);
        Ok(app)
    }

    /// `App.lookup`.
    pub async fn get_or_create(&self, environment: &str, name: &str, create: bool) -> Result<App> {
        if let Some(app) = self.find_by_name(environment, name).await? {
            return Ok(app);
        }
        if !create {
            return self.get_by_name(environment, name).await;
        }
        let app = self.create(environment, name, AppState::Deployed, BTreeMap::new(), None).await?;
        self.publish(&app, Publish { name: Some(name.to_owned()), state: Some(AppState::Deployed), ..Publish::default() }, "", "")
            .await
    }

    pub async fn list(&self, environment: &str) -> Result<Vec<App>> {
        let environment = self.0.environments().get(environment).await?;
        Ok(self.0.store().apps().list(environment.id, MAX_LISTED).await?)
    }

    pub async fn versions(&self, id: AppId) -> Result<Vec<AppVersion>> {
        Ok(self.0.store().apps().versions(id).await?.into_iter().map(|published| published.version).collect())
    }

    /// The client of a session is alive.
    pub async fn heartbeat(&self, id: AppId) -> Result<()> {
        let app = self.get(id).await?;
        if app.state == AppState::Stopped {
            return Err(Error::precondition(format!("app {id} was stopped")));
        }
        self.0.heartbeats().touch(id);
        Ok(())
    }

    pub async fn publish_as(&self, caller: &Caller, id: AppId, publish: Publish) -> Result<App> {
        let app = self.get(id).await?;
        self.publish(&app, publish, &caller.name(), caller.client_version()).await
    }

    /// One transaction points the app at the new set of functions; from then on new inputs and requests
    /// go to it, and old containers drain.
    async fn publish(&self, app: &App, publish: Publish, by: &str, client_version: &str) -> Result<App> {
        if !app.state.accepts_work() {
            return Err(Error::precondition(format!("app {} was stopped; deploy it again", app.id)));
        }
        if let Some(name) = &publish.name {
            check_name(name)?;
        }
        let mut definitions = BTreeMap::new();
        for (tag, function_id) in &publish.functions {
            let function = self.0.store().functions().find(*function_id).await?.filter(|f| f.app_id == app.id);
            let Some(function) = function else {
                return Err(Error::precondition(format!("function '{tag}' ({function_id}) was not created in app {}", app.id)));
            };
            let definition = publish.definitions.get(function_id).copied().unwrap_or(function.definition_id);
            definitions.insert(*function_id, definition);
        }
        let now = Timestamp::now();
        let version = app.version + 1;
        let layout = AppLayout { functions: publish.functions, classes: publish.classes };
        let record = PublishRecord {
            state: publish.state,
            name: publish.name.clone(),
            definitions,
            version: AppVersion {
                app_id: app.id,
                version,
                layout: layout.clone(),
                deployed_at: now,
                deployed_by: by.to_owned(),
                client_version: client_version.to_owned(),
                tag: publish.deployment_tag,
            },
        };
        self.0.store().apps().publish(&record).await?;
        let published = self.get(app.id).await?;
        let removed: Vec<FunctionId> =
            app.layout.functions.values().filter(|id| !layout.functions.values().any(|kept| kept == *id)).copied().collect();
        for function_id in removed {
            self.deactivate(function_id, StopReason::Superseded, "the function is no longer part of its app").await?;
        }
        self.0.activate(&published).await?;
        self.0.republish_routes().await?;
        tracing::info!(app = %published.id, name = published.name, version, "app published");
        Ok(published)
    }

    /// Stops an app: it takes no new work, what waits ends, and its containers are ended.
    pub async fn stop(&self, id: AppId) -> Result<()> {
        let app = self.get(id).await?;
        if app.state == AppState::Stopped {
            return Ok(());
        }
        self.0.store().apps().set_state(id, AppState::Stopped, Timestamp::now()).await?;
        self.0.heartbeats().forget(id);
        let functions = self.0.store().functions().list_by_app(id).await?;
        for function in functions {
            self.deactivate(function.id, StopReason::AppStopped, "the app was stopped").await?;
        }
        self.0.republish_routes().await?;
        self.0.logs().mark_stopped(id);
        tracing::info!(app = %id, name = app.name, "app stopped");
        Ok(())
    }

    async fn deactivate(&self, function_id: FunctionId, reason: StopReason, sentence: &str) -> Result<()> {
        let outcome = Outcome::decided(OutcomeStatus::Terminated, sentence);
        self.0.turn().tell(Event::FunctionDeactivated { function_id, reason, outcome }).await
    }

    pub async fn disconnect(&self, id: AppId, disconnect: Disconnect) -> Result<()> {
        let app = self.get(id).await?;
        let ends = match (disconnect, app.state) {
            (Disconnect::Session | Disconnect::FailedDeploy, AppState::Ephemeral | AppState::Initializing) => true,
            (
                Disconnect::Session | Disconnect::FailedDeploy,
                AppState::Detached | AppState::Deployed | AppState::Stopping | AppState::Stopped,
            ) => false,
        };
        if ends { self.stop(id).await } else { Ok(()) }
    }

    /// Stops ephemeral apps whose client is gone. Called by a sweep.
    pub(crate) async fn stop_abandoned(&self) -> Result<()> {
        for app in self.0.store().apps().list_all_live().await? {
            let abandoned = match app.state {
                AppState::Ephemeral | AppState::Initializing => {
                    self.0.heartbeats().is_silent(app.id, self.0.config().client_heartbeat_timeout)
                }
                AppState::Detached | AppState::Deployed | AppState::Stopping | AppState::Stopped => false,
            };
            if abandoned {
                tracing::info!(app = %app.id, "stopping an app whose client is gone");
                self.stop(app.id).await?;
            }
        }
        Ok(())
    }

    pub async fn set_tags(&self, id: AppId, tags: BTreeMap<String, String>) -> Result<()> {
        self.get(id).await?;
        Ok(self.0.store().apps().set_tags(id, &tags).await?)
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.chars().count() > MAX_NAME_LENGTH * 4 || name.contains('\0') {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("'{}' is not a valid app name", name.chars().take(80).collect::<String>().escape_debug()),
        ));
    }
    Ok(())
}

/// A digest for ids that must be equal when a request is repeated.
pub(crate) fn digest(kind: &str, key: &str) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(kind.as_bytes());
    hasher.update([0]);
    hasher.update(key.as_bytes());
    hasher.finalize().into()
}
