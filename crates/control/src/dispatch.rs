//! Turns the scheduler's desired entries into what a worker needs (D7), and the worker's reports into
//! events.
//!
//! Building a container's specification reads the store (image, files, secrets), so it happens here
//! and not in the turn loop. A container whose specification cannot be built is reported as one that
//! failed to start.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ionian_domain::app::App;
use ionian_domain::container::{ContainerExit, ContainerSpec, WebHookMode};
use ionian_domain::environment::Environment;
use ionian_domain::function::Function;
use ionian_domain::image::{BuiltImage, ImageState};
use ionian_domain::log::{LogEntry, LogStream};
use ionian_domain::mount::MountFile;
use ionian_domain::web::WebKind;
use ionian_domain::worker::{DesiredContainer, DesiredSet, DesiredState, Generation, WorkerReport};
use ionian_domain::{ContainerId, DefinitionId, ErrorKind, FunctionId, ImageId, SecretId, Timestamp, WorkerId};
use ionian_scheduler::{DesiredEntry, Event};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::Control;
use crate::containers::ContainerEntry;
use crate::error::{Error, Result};

/// What the official runtime is told at its start; encoded by `api`, which knows the wire.
pub struct ArgumentsRequest<'a> {
    pub container_id: ContainerId,
    pub app: &'a App,
    pub environment: &'a Environment,
    pub function: &'a Function,
    /// All functions of the app, so that code in the container can call them.
    pub functions: &'a [Function],
    /// The hook needs the runtime's event loop to spin, which it does for concurrent functions only.
    pub web_hook: WebHookMode,
}

/// Encodes the runtime's arguments. Given by `server`.
pub type ArgumentsFn = Arc<dyn Fn(&Control, &ArgumentsRequest<'_>) -> bytes::Bytes + Send + Sync>;

/// Keeps a worker's desired set in step with the scheduler's entries for it. What the scheduler says first comes
/// after it has recovered; until then the set has generation 0, by which a worker does nothing.
pub(crate) async fn run(
    control: Control,
    worker_id: WorkerId,
    mut entries: watch::Receiver<Vec<DesiredEntry>>,
    desired: watch::Sender<DesiredSet>,
    cancel: CancellationToken,
) {
    let mut specs: HashMap<ContainerId, Arc<ContainerSpec>> = HashMap::new();
    // Reported once; the scheduler takes them out of the entries.
    let mut unprepared: HashSet<ContainerId> = HashSet::new();
    let mut generation = Generation::default();
    loop {
        let changed = tokio::select! {
            () = cancel.cancelled() => return,
            changed = entries.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        let mut wanted = entries.borrow_and_update().clone();
        wanted.retain(|entry| entry.worker_id == worker_id);
        specs.retain(|id, _| {
            let is_wanted = wanted.iter().any(|entry| entry.container_id == *id);
            if !is_wanted {
                // It may have been given up while its specification was being built, after which its
                // credential must open nothing.
                control.containers().forget(*id);
            }
            is_wanted
        });
        unprepared.retain(|id| wanted.iter().any(|entry| entry.container_id == *id));
        let mut containers = Vec::with_capacity(wanted.len());
        let mut used_secrets: BTreeSet<SecretId> = BTreeSet::new();
        for entry in wanted {
            if unprepared.contains(&entry.container_id) {
                continue;
            }
            let spec = match specs.get(&entry.container_id) {
                Some(spec) => Ok(Arc::clone(spec)),
                None => match (entry.state, entry.must_exist) {
                    // One that outlived the server is stopped as gently as any other.
                    (DesiredState::Running, _) | (DesiredState::Stopped { .. }, true) => {
                        match build_spec(&control, &entry).await {
                            Ok(prepared) => {
                                used_secrets.extend(prepared.secrets);
                                specs.insert(entry.container_id, Arc::clone(&prepared.spec));
                                Ok(prepared.spec)
                            }
                            Err(error) => {
                                report_unprepared(&control, &entry, &error).await;
                                Err(ContainerExit::StartFailed {
                                    message: error.to_string(),
                                })
                            }
                        }
                    }
                    // Given up before any worker heard of it.
                    (DesiredState::Stopped { .. }, false) => Err(ContainerExit::Exited { code: 0 }),
                },
            };
            match spec {
                Ok(spec) => containers.push(DesiredContainer {
                    id: entry.container_id,
                    spec,
                    state: entry.state,
                    must_exist: entry.must_exist,
                }),
                Err(exit) => {
                    unprepared.insert(entry.container_id);
                    let event = Event::WorkerExited {
                        container_id: entry.container_id,
                        exit,
                    };
                    if control.turn().tell(event).await.is_err() {
                        return;
                    }
                }
            }
        }
        generation.0 += 1;
        desired.send_replace(DesiredSet { generation, containers });
        // After the order is out: when a secret was used last is not worth a wait.
        let used_secrets: Vec<SecretId> = used_secrets.into_iter().collect();
        if let Err(error) = control.secrets().touch(&used_secrets).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the use of secrets could not be recorded"
            );
        }
    }
}

/// A container that can be started, and the secrets that it uses.
struct Prepared {
    spec: Arc<ContainerSpec>,
    secrets: Vec<SecretId>,
}

/// Says why a container cannot be started: to the user, and to the operator where it is our fault.
async fn report_unprepared(control: &Control, entry: &DesiredEntry, error: &Error) {
    if error.kind() == ErrorKind::Internal {
        tracing::error!(
            container = %entry.container_id,
            error = error as &dyn std::error::Error,
            "a container could not be prepared"
        );
    } else {
        tracing::info!(container = %entry.container_id, reason = error.message(), "a container could not be prepared");
    }
    // A function that cannot be read has no app whose log could be written to.
    if let Ok(function) = control.functions().get(entry.function_id).await {
        let line = LogEntry {
            at: Timestamp::now(),
            app_id: function.app_id,
            function_id: function.id,
            container_id: entry.container_id,
            stream: LogStream::Info,
            text: format!("the container could not start: {}\n", error.message()),
        };
        control.logs().append(vec![line]).await;
    }
}

/// Passes the worker's observations on.
pub(crate) async fn observe(control: Control, mut reports: mpsc::Receiver<WorkerReport>) {
    while let Some(report) = reports.recv().await {
        let event = match report {
            WorkerReport::Started(started) => {
                control.containers().started(started.container_id, started.address);
                let steps: Vec<String> = started
                    .timings
                    .steps
                    .iter()
                    .map(|(step, took)| format!("{step}={:.1}ms", took.as_secs_f64() * 1e3))
                    .collect();
                tracing::debug!(container = %started.container_id, steps = steps.join(" "), "container started");
                Event::WorkerStarted {
                    container_id: started.container_id,
                }
            }
            WorkerReport::Exited { container_id, exit } => {
                let failed = exit != ContainerExit::Exited { code: 0 };
                if failed {
                    tracing::info!(container = %container_id, %exit, "container ended");
                }
                if failed && let Some(entry) = control.containers().find(container_id) {
                    control.logs().say(&entry, &format!("{exit}\n")).await;
                }
                Event::WorkerExited { container_id, exit }
            }
        };
        if control.turn().tell(event).await.is_err() {
            return;
        }
    }
}

impl Control {
    /// A function at a definition: it may have a newer draft, and a container runs the one that was decided on.
    pub(crate) async fn function_at(&self, function_id: FunctionId, definition_id: DefinitionId) -> Result<Function> {
        let (_, spec) = self
            .store()
            .functions()
            .find_definition(definition_id)
            .await?
            .ok_or_else(|| Error::not_found(format!("definition {definition_id} does not exist")))?;
        Ok(Function {
            definition_id,
            spec,
            ..self.functions().get(function_id).await?
        })
    }
}

async fn build_spec(control: &Control, entry: &DesiredEntry) -> Result<Prepared> {
    let function = control.function_at(entry.function_id, entry.definition_id).await?;
    let app = control.apps().get(function.app_id).await?;
    let environment = control.environments().get_by_id(app.environment_id).await?;
    let spec = &function.spec;
    let image_id = spec
        .image_id
        .ok_or_else(|| Error::precondition(format!("function '{}' has no image", spec.name)))?;
    let image = match control.images().get(image_id).await?.state {
        ImageState::Ready { image } => image,
        ImageState::Building | ImageState::Failed { .. } => {
            return Err(Error::precondition(format!(
                "the image {image_id} of function '{}' is not built",
                spec.name
            )));
        }
    };
    if entry.must_exist {
        return Ok(adopted_spec(control, &function, image_id, image));
    }
    if !spec.volume_mounts.is_empty() {
        return Err(Error::new(
            ErrorKind::Unimplemented,
            format!(
                "function '{}' mounts volumes, which are not available on this server yet",
                spec.name
            ),
        ));
    }
    if let Some(gpu) = &spec.resources.gpu {
        return Err(Error::precondition(format!(
            "function '{}' asks for a GPU ({} {}), and this worker has none",
            spec.name, gpu.count, gpu.kind
        )));
    }
    let mut files: Vec<MountFile> = Vec::new();
    for mount_id in &spec.mount_ids {
        files.extend(control.mounts().get(*mount_id).await?.files);
    }
    let secret_env = control.secrets().open(&spec.secret_ids).await?;
    let functions = control.published_functions(&app).await?;
    let hooked = spec
        .web
        .as_ref()
        .into_iter()
        .chain(spec.web_methods.iter().map(|(_, web)| web))
        .any(|web| match web.kind {
            WebKind::AsgiApp | WebKind::FastapiEndpoint | WebKind::WsgiApp => true,
            WebKind::WebServer => false,
        });
    let web_hook = if hooked && control.config().web_hook {
        WebHookMode::On
    } else {
        WebHookMode::Off
    };
    let arguments = control.encode_arguments(&ArgumentsRequest {
        container_id: entry.container_id,
        app: &app,
        environment: &environment,
        function: &function,
        functions: &functions,
        web_hook,
    });
    let credential = control.containers().issue_credential(entry.container_id);
    let platform_env = BTreeMap::from([
        (
            "MODAL_SERVER_URL".to_owned(),
            control.config().container_server_url.clone(),
        ),
        ("MODAL_IS_REMOTE".to_owned(), "1".to_owned()),
        ("MODAL_TASK_ID".to_owned(), entry.container_id.to_string()),
        ("MODAL_IMAGE_ID".to_owned(), image_id.to_string()),
        ("MODAL_ENVIRONMENT".to_owned(), environment.name.clone()),
        (
            "MODAL_CLOUD_PROVIDER".to_owned(),
            "CLOUD_PROVIDER_UNSPECIFIED".to_owned(),
        ),
        ("MODAL_REGION".to_owned(), "local".to_owned()),
        (
            "MODAL_OVERRIDE_HEADERS".to_owned(),
            format!("{CREDENTIAL_HEADER}:{credential}"),
        ),
    ]);
    let app_name = app.name.clone().unwrap_or_else(|| app.description.clone());
    let container = ContainerSpec {
        app_id: app.id,
        function_id: function.id,
        function_name: spec.name.clone(),
        runtime: control.config().runtime_of(spec),
        image_id,
        image: Arc::new(image),
        files,
        volumes: spec.volume_mounts.clone(),
        resources: spec.resources.clone(),
        secret_env,
        platform_env,
        arguments,
        client_version: spec.client_version.clone(),
        mount_client_dependencies: spec.mount_client_dependencies,
        web_hook,
        egress: spec.egress.clone(),
    };
    let secrets = spec.secret_ids.clone();
    control.containers().insert(ContainerEntry::new(
        entry.container_id,
        app_name,
        environment.name,
        Arc::new(function),
        Timestamp::now(),
    ));
    Ok(Prepared {
        spec: Arc::new(container),
        secrets,
    })
}

/// What a worker needs to take back a container that runs already. What a start takes is left out: it may be
/// gone by now (a secret, a mount), and a worker that does not have the container starts nothing.
fn adopted_spec(control: &Control, function: &Function, image_id: ImageId, image: BuiltImage) -> Prepared {
    let spec = &function.spec;
    let container = ContainerSpec {
        app_id: function.app_id,
        function_id: function.id,
        function_name: spec.name.clone(),
        runtime: control.config().runtime_of(spec),
        image_id,
        image: Arc::new(image),
        files: Vec::new(),
        volumes: spec.volume_mounts.clone(),
        resources: spec.resources.clone(),
        secret_env: Vec::new(),
        platform_env: BTreeMap::new(),
        arguments: bytes::Bytes::new(),
        client_version: spec.client_version.clone(),
        mount_client_dependencies: spec.mount_client_dependencies,
        web_hook: WebHookMode::Off,
        egress: spec.egress.clone(),
    };
    Prepared {
        spec: Arc::new(container),
        secrets: Vec::new(),
    }
}

/// The request header that carries a container's credential.
pub const CREDENTIAL_HEADER: &str = "x-ionian-container";
