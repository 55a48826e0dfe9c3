//! Apps: created by a client's session, published, stopped.

use std::collections::BTreeMap;

use ionian_domain::app::{App, AppLayout, AppState, AppVersion};
use ionian_domain::container::StopReason;
use ionian_domain::function::Function;
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{AppId, ClassId, DefinitionId, ErrorKind, FunctionId, Outcome, Timestamp};
use ionian_scheduler::Event;
use ionian_store::apps::PublishRecord;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::{Caller, Control};

/// The client has the same limit.
const MAX_NAME_LENGTH: usize = 64;
/// A description is shown in lists; it is the name of a file or what a user passed as `--name`.
const MAX_DESCRIPTION_LENGTH: usize = 1_000;
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

/// What came of a publish.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    pub app: App,
    /// Containers that were ordered before this may run an older version.
    pub at: Timestamp,
}

/// Why a client's session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disconnect {
    /// The session's code has ended, well or not: an ephemeral app ends with it, a detached one when its
    /// last input has finished.
    Ended,
    /// The user interrupted the session: an ephemeral app ends, a detached one goes on.
    Interrupted,
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
            Error::not_found(format!(
                "App '{name}' not found; deploy it with `modal deploy`, or check the environment"
            ))
        })
    }

    /// `dedupe` names the request: a repeated one gets the app that the first one made.
    pub async fn create(
        &self,
        environment: &str,
        description: &str,
        state: AppState,
        tags: BTreeMap<String, String>,
        dedupe: Option<&str>,
    ) -> Result<App> {
        check_description(description)?;
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
        // Heard of before it can be seen: the sweep must not take it for abandoned.
        self.0.heartbeats().touch(app.id);
        match self.0.store().apps().insert(&app).await {
            Ok(()) => Ok(app),
            // The first try of this request is still under way.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => self.get(id).await,
            Err(error) => Err(error.into()),
        }
    }

    /// `App.lookup`.
    pub async fn get_or_create(&self, environment: &str, name: &str, create: bool) -> Result<App> {
        if !create {
            return self.get_by_name(environment, name).await;
        }
        check_name(name)?;
        let _turn = self.0.apps_turn().lock().await;
        if let Some(app) = self.find_by_name(environment, name).await? {
            return Ok(app);
        }
        let app = self
            .create(environment, name, AppState::Deployed, BTreeMap::new(), None)
            .await?;
        let publish = Publish {
            name: Some(name.to_owned()),
            state: Some(AppState::Deployed),
            ..Publish::default()
        };
        Ok(self.publish(app, publish, "", "").await?.app)
    }

    pub async fn list(&self, environment: &str) -> Result<Vec<App>> {
        let environment = self.0.environments().get(environment).await?;
        Ok(self.0.store().apps().list(environment.id, MAX_LISTED).await?)
    }

    pub async fn versions(&self, id: AppId) -> Result<Vec<AppVersion>> {
        Ok(self
            .0
            .store()
            .apps()
            .versions(id)
            .await?
            .into_iter()
            .map(|published| published.version)
            .collect())
    }

    /// The client of a session is alive. It learns from the end of the app's logs that the app was stopped.
    pub async fn heartbeat(&self, id: AppId) -> Result<()> {
        if self.get(id).await?.state.accepts_work() {
            self.0.heartbeats().touch(id);
        }
        Ok(())
    }

    /// `is_retry` says that the first try may have published it.
    pub async fn publish_as(&self, caller: &Caller, id: AppId, publish: Publish, is_retry: bool) -> Result<Published> {
        // One publish or stop at a time, so that what is announced to the scheduler is what was recorded last.
        let _turn = self.0.apps_turn().lock().await;
        let app = self.get(id).await?;
        if is_retry && self.is_published(&app, &publish).await? {
            let newest = self.versions(id).await?.into_iter().next();
            let at = newest.map_or_else(Timestamp::now, |version| version.deployed_at);
            return Ok(Published { app, at });
        }
        self.publish(app, publish, &caller.name(), caller.client_version())
            .await
    }

    /// One transaction points the app at the new set of functions; from then on new inputs and requests
    /// go to it, and old containers drain.
    async fn publish(&self, app: App, publish: Publish, by: &str, client_version: &str) -> Result<Published> {
        if !app.state.accepts_work() {
            return Err(Error::precondition(format!(
                "app {} was stopped; deploy it again",
                app.id
            )));
        }
        if let Some(name) = &publish.name {
            check_name(name)?;
            let holder = self.0.store().apps().find_by_name(app.environment_id, name).await?;
            if let Some(holder) = holder.filter(|holder| holder.id != app.id) {
                return Err(Error::precondition(format!(
                    "an app named '{name}' ({}) was deployed while this deployment was under way; deploy again to \
                     update it",
                    holder.id
                )));
            }
        }
        let mut definitions = BTreeMap::new();
        for (tag, function_id) in &publish.functions {
            let function = self
                .0
                .store()
                .functions()
                .find(*function_id)
                .await?
                .filter(|f| f.app_id == app.id);
            let Some(function) = function else {
                return Err(Error::precondition(format!(
                    "function '{tag}' ({function_id}) was not created in app {}; deploy again",
                    app.id
                )));
            };
            let definition = publish
                .definitions
                .get(function_id)
                .copied()
                .unwrap_or(function.definition_id);
            definitions.insert(*function_id, definition);
        }
        let now = Timestamp::now();
        let version = app.version + 1;
        let layout = AppLayout {
            functions: publish.functions,
            classes: publish.classes,
        };
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
        for function_id in layout.functions.values() {
            self.0.call_targets().forget(*function_id);
        }
        let published = self.get(app.id).await?;
        for function_id in self.removed_functions(&app, &layout).await? {
            self.deactivate(
                function_id,
                StopReason::Superseded,
                "the function is no longer part of its app",
            )
            .await?;
        }
        self.0.functions().follow_base(&published).await?;
        self.0.activate(&published).await?;
        self.0.republish_routes().await?;
        tracing::info!(app = %published.id, name = published.name, version, "app published");
        Ok(Published {
            app: published,
            at: now,
        })
    }

    async fn is_published(&self, app: &App, publish: &Publish) -> Result<bool> {
        let is_same = app.version > 0
            && app.layout.functions == publish.functions
            && app.layout.classes == publish.classes
            && publish.name.as_ref().is_none_or(|name| app.name.as_ref() == Some(name))
            && publish.state.is_none_or(|state| state == app.state);
        if !is_same {
            return Ok(false);
        }
        for (function_id, definition_id) in &publish.definitions {
            let published = self.0.store().functions().find_published(*function_id).await?;
            if published.is_none_or(|function| function.definition_id != *definition_id) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Functions that a publish leaves out, with their bound variants.
    async fn removed_functions(&self, before: &App, layout: &AppLayout) -> Result<Vec<FunctionId>> {
        let is_kept = |id: &FunctionId| layout.functions.values().any(|kept| kept == id);
        let removed: Vec<FunctionId> = before
            .layout
            .functions
            .values()
            .filter(|id| !is_kept(id))
            .copied()
            .collect();
        if removed.is_empty() {
            return Ok(removed);
        }
        let all = self.0.store().functions().list_by_app(before.id).await?;
        let is_removed = |function: &Function| {
            removed.contains(&function.id)
                || function
                    .binding
                    .as_ref()
                    .is_some_and(|binding| removed.contains(&binding.base))
        };
        Ok(all
            .iter()
            .filter(|function| is_removed(function))
            .map(|function| function.id)
            .collect())
    }

    /// Stops an app: it takes no new work, what waits ends, and its containers are ended.
    pub async fn stop(&self, id: AppId) -> Result<()> {
        let _turn = self.0.apps_turn().lock().await;
        let app = self.get(id).await?;
        if app.state == AppState::Stopped {
            return Ok(());
        }
        self.0
            .store()
            .apps()
            .set_state(id, AppState::Stopped, Timestamp::now())
            .await?;
        self.0.heartbeats().forget(id);
        let functions = self.0.store().functions().list_by_app(id).await?;
        for function in functions {
            self.deactivate(function.id, StopReason::AppStopped, "the app was stopped")
                .await?;
        }
        self.0.republish_routes().await?;
        self.0.logs().wake(id);
        tracing::info!(app = %id, name = app.name, "app stopped");
        Ok(())
    }

    async fn deactivate(&self, function_id: FunctionId, reason: StopReason, sentence: &str) -> Result<()> {
        let outcome = Outcome::decided(OutcomeStatus::Terminated, sentence);
        self.0
            .turn()
            .tell(Event::FunctionDeactivated {
                function_id,
                reason,
                outcome,
            })
            .await
    }

    pub async fn disconnect(&self, id: AppId, disconnect: Disconnect) -> Result<()> {
        let app = self.get(id).await?;
        match (app.state, disconnect) {
            (
                AppState::Ephemeral | AppState::Initializing,
                Disconnect::Ended | Disconnect::Interrupted | Disconnect::FailedDeploy,
            ) => self.stop(id).await,
            (AppState::Detached, Disconnect::Ended | Disconnect::FailedDeploy) if !self.is_busy(id).await? => {
                self.stop(id).await
            }
            (AppState::Detached, Disconnect::Ended | Disconnect::FailedDeploy) => {
                self.0.heartbeats().end_session(id);
                Ok(())
            }
            (AppState::Detached, Disconnect::Interrupted)
            | (
                AppState::Deployed | AppState::Stopping | AppState::Stopped,
                Disconnect::Ended | Disconnect::Interrupted | Disconnect::FailedDeploy,
            ) => Ok(()),
        }
    }

    /// Whether inputs of the app wait or run.
    async fn is_busy(&self, id: AppId) -> Result<bool> {
        let functions = self.0.store().functions().list_by_app(id).await?;
        let ids: Vec<FunctionId> = functions.into_iter().map(|function| function.id).collect();
        self.0
            .turn()
            .inspect(move |scheduler| {
                ids.into_iter()
                    .map(|id| scheduler.pool_stats(id))
                    .any(|stats| stats.backlog + stats.running_inputs > 0)
            })
            .await
    }

    /// Stops ephemeral apps whose client is gone, and detached ones that have nothing left to do. Called
    /// by a sweep.
    pub(crate) async fn stop_abandoned(&self) -> Result<()> {
        for app in self.0.store().apps().list_all_live().await? {
            let is_over = match app.state {
                AppState::Ephemeral | AppState::Initializing => self
                    .0
                    .heartbeats()
                    .is_silent(app.id, self.0.config().client_heartbeat_timeout),
                AppState::Detached => self.0.heartbeats().has_ended(app.id) && !self.is_busy(app.id).await?,
                AppState::Deployed | AppState::Stopping | AppState::Stopped => false,
            };
            if is_over {
                tracing::info!(app = %app.id, "stopping an app whose session is over");
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

/// What the client takes as a name of a deployment.
fn check_name(name: &str) -> Result<()> {
    let is_valid = !name.is_empty()
        && name.len() <= MAX_NAME_LENGTH
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        // The client could not tell it from an id.
        && name.parse::<AppId>().is_err();
    if is_valid {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "'{}' is not a valid app name: use up to {MAX_NAME_LENGTH} letters, digits, '-', '_' and '.'",
        name.chars().take(80).collect::<String>().escape_debug()
    )))
}

fn check_description(description: &str) -> Result<()> {
    if description.chars().count() <= MAX_DESCRIPTION_LENGTH && !description.contains('\0') {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the app's description is not valid: use up to {MAX_DESCRIPTION_LENGTH} characters, and no NUL"
    )))
}

/// A digest for ids that must be equal when a request is repeated.
pub(crate) fn digest(kind: &str, key: &str) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(kind.as_bytes());
    hasher.update([0]);
    hasher.update(key.as_bytes());
    hasher.finalize().into()
}
