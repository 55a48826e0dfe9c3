//! Functions: created as drafts, looked up, bound to parameters.

use std::time::Duration;

use bytes::Bytes;
use ionian_domain::app::App;
use ionian_domain::container::RuntimeKind;
use ionian_domain::environment::Environment;
use ionian_domain::function::{Autoscaler, Binding, ContainerUse, Function, FunctionSpec};
use ionian_domain::network::Egress;
use ionian_domain::web::{WebKind, WebSpec};
use ionian_domain::{AppId, ClassId, DefinitionId, FunctionId, Timestamp};
use ionian_scheduler::{Event, PoolSettings, PoolStats, Scheduler};
use sha2::{Digest, Sha256};

use super::routes;
use crate::Control;
use crate::error::{Error, Result};

/// What a function gets that asks for nothing; the hosted product has the same defaults.
const DEFAULT_CPU_MILLIS: u32 = 125;
const DEFAULT_MEMORY_MIB: u32 = 128;

pub struct Functions<'a>(pub(crate) &'a Control);

/// What a client asks of a web endpoint, before it has a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebWish {
    pub kind: WebKind,
    /// `label=`; empty for the default.
    pub label: String,
    pub ephemeral_suffix: String,
    pub requires_proxy_auth: bool,
    pub port: Option<u16>,
    pub startup_timeout: Duration,
}

impl Functions<'_> {
    /// The endpoint that a wish becomes in this app.
    pub fn grant(
        &self,
        app: &App,
        environment: &Environment,
        tag: &str,
        method: Option<&str>,
        wish: &WebWish,
    ) -> WebSpec {
        let app_name = app.name.as_deref().unwrap_or(&app.description);
        let wanted = routes::slug(&wish.label);
        let label = if wanted.is_empty() {
            routes::default_label(app_name, tag, method)
        } else {
            wanted
        };
        let label = format!("{label}{}", routes::dev_suffix(app.state, &wish.ephemeral_suffix));
        let (_, label_truncated) = routes::host_label(&self.0.config().workspace, &environment.web_suffix, &label);
        WebSpec {
            kind: wish.kind,
            label,
            label_truncated,
            requires_proxy_auth: wish.requires_proxy_auth,
            port: wish.port,
            startup_timeout: wish.startup_timeout,
        }
    }

    /// The id that a function of this app has, or gets.
    pub async fn reserve(&self, app: &App, existing: Option<FunctionId>, tag: &str) -> Result<FunctionId> {
        match existing {
            Some(id) => {
                if let Some(function) = self.0.store().functions().find(id).await?
                    && function.app_id != app.id
                {
                    return Err(Error::precondition(format!(
                        "function {id} belongs to another app; deploy again"
                    )));
                }
                Ok(id)
            }
            None => Ok(app
                .layout
                .functions
                .get(tag)
                .copied()
                .unwrap_or_else(FunctionId::generate)),
        }
    }

    /// Records a function's definition as a draft. An unchanged definition keeps its id, so that a
    /// publish of it restarts nothing.
    pub async fn create(&self, app: &App, id: FunctionId, spec: FunctionSpec) -> Result<Function> {
        if spec.name.is_empty() {
            return Err(Error::invalid("the function has no name"));
        }
        self.check_isolation(&spec).await?;
        let existing = self.0.store().functions().find(id).await?;
        let unchanged = existing
            .as_ref()
            .filter(|function| function.spec == spec && function.app_id == app.id);
        if let Some(function) = unchanged {
            return Ok(function.clone());
        }
        let function = Function {
            id,
            app_id: app.id,
            definition_id: DefinitionId::generate(),
            spec,
            binding: None,
            created_at: existing.map_or_else(Timestamp::now, |function| function.created_at),
        };
        self.0.store().functions().upsert(&function).await?;
        self.0.call_targets().forget(function.id);
        Ok(function)
    }

    /// Whether containers of this function can be kept apart as it asks, and as the operator does.
    async fn check_isolation(&self, spec: &FunctionSpec) -> Result<()> {
        let config = self.0.config();
        let runtime = config.runtime_of(spec);
        // Without a worker nothing is known; the function waits for one.
        let there = self.0.turn().inspect(Scheduler::runtimes).await?;
        if let Some(wanted) = spec.runtime {
            if wanted != runtime {
                return Err(Error::invalid(format!(
                    "{}: the runtime {wanted} isolates less than {}, which the operator of this server has chosen for \
                     all functions; leave it out, or have the operator set `runtime.allow_weaker`",
                    spec.name, config.runtime
                )));
            }
            if let Some(there) = there.filter(|there| !there.contains(wanted)) {
                return Err(Error::invalid(format!(
                    "{}: no worker of this server has the runtime {wanted}; there is {there}{}",
                    spec.name,
                    how_to_get(wanted)
                )));
            }
        }
        match (runtime, &spec.egress) {
            (RuntimeKind::Process, Egress::Blocked | Egress::Allow(_)) => Err(Error::invalid(format!(
                "{}: the process runtime of this server cannot limit what a function reaches on the network",
                spec.name
            ))),
            (RuntimeKind::Process, Egress::Open) | (RuntimeKind::Runc | RuntimeKind::Gvisor, _) => Ok(()),
        }
    }

    pub async fn get(&self, id: FunctionId) -> Result<Function> {
        let found = self.0.store().functions().find(id).await?;
        found.ok_or_else(|| {
            Error::not_found(format!(
                "function {id} does not exist; look it up by its app and name, or deploy it"
            ))
        })
    }

    /// A function of a deployed app, at its published definition.
    pub async fn get_by_name(&self, environment: &str, app_name: &str, tag: &str) -> Result<(App, Function)> {
        let app = self.0.apps().get_by_name(environment, app_name).await?;
        let id = app.layout.functions.get(tag).copied();
        let function = match id {
            Some(id) => self.0.store().functions().find_published(id).await?,
            None => None,
        };
        let function = function.ok_or_else(|| {
            let known: Vec<&str> = app.layout.functions.keys().map(String::as_str).collect();
            let hint = if known.is_empty() {
                "it has no functions".to_owned()
            } else {
                format!("it has: {}", known.join(", "))
            };
            Error::not_found(format!("Function '{tag}' not found in app '{app_name}'; {hint}"))
        })?;
        Ok((app, function))
    }

    /// The function at the definition that runs: the published one, or a draft that never was.
    pub async fn get_running(&self, id: FunctionId) -> Result<Function> {
        match self.0.store().functions().find_published(id).await? {
            Some(function) => Ok(function),
            None => self.get(id).await,
        }
    }

    /// A class object of an app. It has no content of its own; its service function has.
    pub async fn create_class(&self, app: &App, existing: Option<ClassId>, name: &str) -> Result<ClassId> {
        let id = existing
            .or_else(|| app.layout.classes.get(name).copied())
            .unwrap_or_else(ClassId::generate);
        let class = ionian_store::classes::Class {
            id,
            app_id: app.id,
            name: name.to_owned(),
        };
        self.0.store().classes().upsert(&class).await?;
        Ok(id)
    }

    pub async fn get_class(&self, environment: &str, app_name: &str, name: &str) -> Result<(App, ClassId)> {
        let app = self.0.apps().get_by_name(environment, app_name).await?;
        match app.layout.classes.get(name).copied() {
            Some(id) => Ok((app, id)),
            None => {
                let known: Vec<&str> = app.layout.classes.keys().map(String::as_str).collect();
                let hint = if known.is_empty() {
                    "it has no classes".to_owned()
                } else {
                    format!("it has: {}", known.join(", "))
                };
                Err(Error::not_found(format!(
                    "Class '{name}' not found in app '{app_name}'; {hint}"
                )))
            }
        }
    }

    /// A variant of a function: a class with parameters, or with other options. Equal bindings are one
    /// variant, with one pool of containers.
    pub async fn bind(&self, base: &Function, spec: FunctionSpec, params: Bytes, options: &[u8]) -> Result<Function> {
        // A variant of a variant would not follow its base when that is published anew.
        if let Some(binding) = &base.binding {
            return Err(Error::invalid(format!(
                "function {} is a variant already; bind parameters and options to its base {} instead",
                base.id, binding.base
            )));
        }
        let id = variant_id(base.id, &params, options);
        let existing = self.0.store().functions().find(id).await?;
        let unchanged = existing.as_ref().is_some_and(|function| function.spec == spec);
        let function = Function {
            id,
            app_id: base.app_id,
            definition_id: match &existing {
                Some(function) if unchanged => function.definition_id,
                Some(_) | None => DefinitionId::generate(),
            },
            spec,
            binding: Some(Binding {
                base: base.id,
                serialized_params: params,
            }),
            created_at: existing.map_or_else(Timestamp::now, |function| function.created_at),
        };
        if !unchanged {
            self.0.store().functions().upsert(&function).await?;
            self.0.call_targets().forget(function.id);
        }
        // An app that is being stopped must not get a pool after that.
        let _turn = self.0.apps_turn().lock().await;
        let app = self.0.apps().get(base.app_id).await?;
        if app.state.accepts_work() {
            self.0.turn().tell(self.0.activation(&function)).await?;
        }
        Ok(function)
    }

    /// Gives variants that differ from their base in parameters only the definition that was just
    /// published for it. Variants with options of their own follow when a client binds them again.
    pub(crate) async fn follow_base(&self, app: &App) -> Result<()> {
        let published = self.0.published_functions(app).await?;
        for variant in self.0.store().functions().list_by_app(app.id).await? {
            let Some(binding) = &variant.binding else { continue };
            let Some(base) = published.iter().find(|function| function.id == binding.base) else {
                continue;
            };
            let has_options = variant.id != variant_id(base.id, &binding.serialized_params, &[]);
            if has_options || variant.spec == base.spec {
                continue;
            }
            let followed = Function {
                definition_id: DefinitionId::generate(),
                spec: base.spec.clone(),
                ..variant.clone()
            };
            self.0.store().functions().upsert(&followed).await?;
            self.0.call_targets().forget(followed.id);
        }
        Ok(())
    }

    pub async fn stats(&self, id: FunctionId) -> Result<PoolStats> {
        self.0.turn().inspect(move |scheduler| scheduler.pool_stats(id)).await
    }

    /// The settings that a function runs with: its own, or what they were changed to since it was published.
    pub fn autoscaler(&self, function: &Function) -> Autoscaler {
        let overrides = self.0.autoscaler_overrides().lock();
        overrides
            .get(&function.id)
            .cloned()
            .unwrap_or_else(|| function.spec.autoscaler.clone())
    }

    /// Changes the settings until the function is published anew, or the server restarts.
    pub async fn update_autoscaler(&self, function: &Function, autoscaler: Autoscaler) -> Result<()> {
        let (function_id, wanted) = (function.id, autoscaler.clone());
        self.0
            .turn()
            .ask(|reply| Event::AutoscalerUpdated {
                function_id,
                autoscaler,
                reply,
            })
            .await?;
        self.0.autoscaler_overrides().lock().insert(function_id, wanted);
        Ok(())
    }

    /// A function with its bound variants.
    pub async fn with_variants(&self, id: FunctionId) -> Result<Vec<FunctionId>> {
        let function = self.get(id).await?;
        let all = self.0.store().functions().list_by_app(function.app_id).await?;
        let is_variant = |other: &Function| other.binding.as_ref().is_some_and(|binding| binding.base == id);
        let variants = all.iter().filter(|other| is_variant(other)).map(|variant| variant.id);
        Ok(std::iter::once(id).chain(variants).collect())
    }

    pub async fn list_by_app(&self, app_id: AppId) -> Result<Vec<Function>> {
        Ok(self.0.store().functions().list_by_app(app_id).await?)
    }
}

fn how_to_get(runtime: RuntimeKind) -> &'static str {
    match runtime {
        RuntimeKind::Gvisor => {
            "; install runsc on a worker and start it again (`ionian doctor` tells whether it is found)"
        }
        RuntimeKind::Runc | RuntimeKind::Process => "",
    }
}

/// Equal bindings are one variant.
fn variant_id(base: FunctionId, params: &[u8], options: &[u8]) -> FunctionId {
    let mut hasher = Sha256::new();
    hasher.update(base.to_string().as_bytes());
    hasher.update((params.len() as u64).to_be_bytes());
    hasher.update(params);
    hasher.update(options);
    FunctionId::from_digest(&hasher.finalize().into())
}

impl Control {
    /// Announces an app's functions, bound variants included, to the scheduler.
    pub(crate) async fn activate(&self, app: &App) -> Result<()> {
        let published = self.published_functions(app).await?;
        for function in &published {
            self.autoscaler_overrides().lock().remove(&function.id);
            self.turn().tell(self.activation(function)).await?;
        }
        for bound in self.store().functions().list_by_app(app.id).await? {
            let Some(binding) = &bound.binding else { continue };
            if published.iter().any(|function| function.id == binding.base) {
                self.autoscaler_overrides().lock().remove(&bound.id);
                self.turn().tell(self.activation(&bound)).await?;
            }
        }
        Ok(())
    }

    pub(crate) fn activation(&self, function: &Function) -> Event {
        let spec = &function.spec;
        let slots = spec.concurrency.max_inputs.max(1);
        let target = spec.concurrency.target_inputs;
        Event::FunctionActivated {
            function_id: function.id,
            settings: PoolSettings {
                app_id: function.app_id,
                definition_id: function.definition_id,
                is_web: spec.is_web() || !spec.web_methods.is_empty(),
                autoscaler: spec.autoscaler.clone(),
                slots,
                target_slots: if target == 0 { slots } else { target.min(slots) },
                batching: spec.batching,
                retry: spec.retry,
                timeout: spec.timeout,
                startup_timeout: spec.startup_timeout,
                single_use: spec.container_use == ContainerUse::Single,
                cpu_millis: spec.resources.cpu_millis.unwrap_or(DEFAULT_CPU_MILLIS),
                memory_mib: spec.resources.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
                runtime: self.config().runtime_of(spec),
            },
        }
    }
}
