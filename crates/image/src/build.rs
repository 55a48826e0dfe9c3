//! The door of this crate: asks whether an image is built, and builds it.
//!
//! One [`ImageBuilder`] serves a whole worker. Callers may ask for the same image at the same time:
//! every step is executed once, and the others wait for it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::image::{BuiltImage, ImageSpec};
use tokio_util::sync::CancellationToken;

use crate::base::{BaseError, BaseImages, RegistryCredentials};
use crate::context::ContextTree;
use crate::dockerfile::{DockerfileError, shorten};
use crate::engine;
use crate::layers::{LayerError, LayerStore, layer_key};
use crate::plan::{self, ENGINE_VERSION, ImageUse, Outline, PlanInputs};
use crate::step::{BuildLog, StepError, StepExit, StepRunner};
use crate::trust::HostTrust;

pub use crate::context::ContextEntry;

/// A `RUN` that takes longer is killed. Compiling a large package takes an hour; a hung download must
/// not hold a builder for days.
pub const DEFAULT_STEP_TIMEOUT: Duration = Duration::from_hours(2);

/// Where on this machine the content with a digest (64 hexadecimal digits) lies.
pub type ContextFiles = Arc<dyn Fn(&str) -> io::Result<PathBuf> + Send + Sync>;

/// What a builder works with.
#[derive(Clone)]
pub struct BuilderConfig {
    pub layers: LayerStore,
    pub base_images: Arc<BaseImages>,
    pub runner: Arc<dyn StepRunner>,
    pub files: ContextFiles,
    pub trust: HostTrust,
    pub step_timeout: Duration,
    /// For `RUN --mount=type=cache`: kept between builds, never part of a layer.
    pub cache_dir: PathBuf,
    /// For what a step needs while it runs. Emptied of it afterwards.
    pub scratch_dir: PathBuf,
    /// On a file system in memory, since secrets are written there while a step runs: `/dev/shm`.
    pub volatile_dir: PathBuf,
}

/// One image to build.
#[derive(Clone)]
pub struct BuildRequest {
    pub spec: ImageSpec,
    /// The images that `FROM` names by a word of the client's (`base`).
    pub bases: BTreeMap<String, BuiltImage>,
    /// The files of the context mount. Those of `spec.context_files` are added to them.
    pub context: Vec<ContextEntry>,
    /// Variables for `RUN` steps. They reach no layer, key, record or log.
    pub secrets: Vec<(String, String)>,
    pub registry_auth: Option<RegistryCredentials>,
    /// Executes every step again, whatever is cached.
    pub force: bool,
}

impl fmt::Debug for BuildRequest {
    /// Leaves secrets and credentials out, so that no log line can hold them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secret_names: Vec<&str> = self.secrets.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("BuildRequest")
            .field("spec", &self.spec)
            .field("bases", &self.bases.keys())
            .field("context", &self.context.len())
            .field("secrets", &secret_names)
            .field("force", &self.force)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    // The user's fault.
    #[error(transparent)]
    Dockerfile(#[from] DockerfileError),
    #[error("{0}")]
    Context(String),
    #[error("step {step} failed: {instruction}: {}{}", describe_exit(*.exit, *.timeout), indent(.tail))]
    StepFailed {
        step: StepNumber,
        instruction: String,
        exit: StepExit,
        timeout: Duration,
        /// The last lines that the command wrote, secrets masked.
        tail: String,
    },
    #[error("step {step} failed: {instruction}: {problem}")]
    Refused {
        step: StepNumber,
        instruction: String,
        problem: String,
    },
    // Depends on the base image and its source.
    #[error("{}", with_causes(.0))]
    Base(#[from] BaseError),
    // Nobody's fault.
    #[error("the build was cancelled")]
    Cancelled,
    // The platform's fault.
    #[error("failed to execute step {step}: {instruction}")]
    Step {
        step: StepNumber,
        instruction: String,
        source: StepError,
    },
    #[error("failed to {action}")]
    Io { action: String, source: io::Error },
    #[error("failed to use the layer store")]
    Layers(#[from] LayerError),
    #[error("failed to inspect the image")]
    Inspect { source: StepError },
    #[error("a task of the build ended early")]
    TaskLost,
}

/// Such as `3/7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepNumber {
    pub number: usize,
    pub total: usize,
}

impl fmt::Display for StepNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.total)
    }
}

impl BuildError {
    /// Whether whoever wrote the image definition can mend it, rather than whoever runs the platform.
    pub fn is_user_fault(&self) -> bool {
        match self {
            Self::Dockerfile(_) | Self::Context(_) | Self::StepFailed { .. } | Self::Refused { .. } => true,
            Self::Base(error) => match error {
                BaseError::InvalidReference { .. }
                | BaseError::InvalidImage { .. }
                | BaseError::NotFound { .. }
                | BaseError::Registry { .. }
                | BaseError::Unpack { .. } => true,
                BaseError::Download { .. }
                | BaseError::Layout { .. }
                | BaseError::Debian { .. }
                | BaseError::Io { .. }
                | BaseError::PackageIndex(_)
                | BaseError::Layers(_)
                | BaseError::TaskLost => false,
            },
            Self::Cancelled
            | Self::Step { .. }
            | Self::Io { .. }
            | Self::Layers(_)
            | Self::Inspect { .. }
            | Self::TaskLost => false,
        }
    }
}

/// Builds images. A cheap clone shares everything.
#[derive(Clone)]
pub struct ImageBuilder {
    config: Arc<BuilderConfig>,
}

impl ImageBuilder {
    pub fn new(config: BuilderConfig) -> Self {
        Self {
            config: Arc::new(config),
        }
    }

    pub fn layers(&self) -> &LayerStore {
        &self.config.layers
    }

    pub fn trust(&self) -> &HostTrust {
        &self.config.trust
    }

    /// Stands for everything that decides what the request builds: equal keys, equal images.
    ///
    /// Values of secrets, ids of mounts and the order of the context do not change it, and neither does
    /// a tag that its registry has moved: a build is repeated when it is forced.
    pub fn plan_key(&self, request: &BuildRequest) -> String {
        let mut context: Vec<_> = all_context(request)
            .into_iter()
            .map(|entry| {
                (
                    entry.path.trim_start_matches('/').to_owned(),
                    entry.sha256_hex,
                    entry.mode,
                )
            })
            .collect();
        context.sort();
        let external: BTreeMap<String, String> = match Self::outline(request) {
            // What is wrong with it will be said by the build.
            Err(_) => BTreeMap::new(),
            Ok(outline) => external_images(&outline, request)
                .map(|image| {
                    let identity = self
                        .config
                        .base_images
                        .cache_identity(&image.reference)
                        .unwrap_or_default();
                    (image.reference, identity)
                })
                .collect(),
        };
        let described = serde_json::json!({
            "commands": request.spec.dockerfile_commands,
            "bases": request.bases,
            "external": external,
            "context": context,
            "secrets": secret_names(request),
            "build_args": request.spec.build_args,
            "builder": request.spec.builder_version,
            "gpu": request.spec.gpu,
            "settings": self.config.trust.result_settings(),
        });
        layer_key(&[ENGINE_VERSION, "image", &described.to_string()])
    }

    /// The image, where it is built already. Does no work: one small file is read, and layers are
    /// looked for.
    pub async fn find_cached(&self, request: &BuildRequest) -> Option<BuiltImage> {
        if request.force {
            return None;
        }
        let (key, layers) = (self.plan_key(request), self.config.layers.clone());
        let found = tokio::task::spawn_blocking(move || -> Result<Option<BuiltImage>, LayerError> {
            let Some(note) = layers.find_note(&key)? else {
                return Ok(None);
            };
            // A note of an older form is made anew, as is an image that has lost a layer.
            let image: Option<BuiltImage> = serde_json::from_slice(&note).ok();
            Ok(image.filter(|image| image.layers.iter().all(|key| layers.contains(key))))
        });
        match found.await {
            Ok(Ok(image)) => image,
            Ok(Err(error)) => {
                tracing::warn!(%error, "failed to look for a built image; it is built again");
                None
            }
            Err(error) => {
                tracing::warn!(%error, "looking for a built image ended early; it is built again");
                None
            }
        }
    }

    /// Builds the image, step by step, where steps are not built already.
    ///
    /// To stop it, cancel the token and wait for the return: then no container is left. Dropping the
    /// future leaves that to the runner.
    pub async fn build(
        &self,
        request: BuildRequest,
        log: BuildLog,
        cancel: CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        let key = self.plan_key(&request);
        if let Some(image) = self.find_cached(&request).await {
            log.line("The image is built already.").await;
            return Ok(image);
        }
        let outline = Self::outline(&request)?;
        let context = ContextTree::new(&all_context(&request)).map_err(BuildError::Context)?;
        let mut images = request.bases.clone();
        for image in external_images(&outline, &request) {
            let resolved = tokio::select! {
                resolved = engine::resolve(&self.config, &request, &image, &log) => resolved?,
                () = cancel.cancelled() => return Err(BuildError::Cancelled),
            };
            images.insert(image.reference, resolved);
        }
        let configs = images
            .iter()
            .map(|(name, image)| (name.clone(), image.config.clone()))
            .collect();
        let plan = outline.plan(&PlanInputs {
            build_args: &request.spec.build_args,
            context: &context,
            secret_names: &secret_names(&request),
            builder_version: &request.spec.builder_version,
            gpu: request.spec.gpu.as_deref(),
            trust: &self.config.trust,
            images: &configs,
        })?;
        let built = engine::execute(&self.config, &request, &plan, &images, &log, &cancel).await?;
        let note = serde_json::to_vec(&built).map_err(|error| BuildError::Io {
            action: "describe the image".to_owned(),
            source: io::Error::other(error),
        })?;
        self.config.layers.put_note(&key, &note)?;
        Ok(built)
    }

    fn outline(request: &BuildRequest) -> Result<Outline, DockerfileError> {
        plan::outline(&request.spec.dockerfile_commands.join("\n"), &request.spec.build_args)
    }
}

fn external_images(outline: &Outline, request: &BuildRequest) -> impl Iterator<Item = ImageUse> {
    let mut images = outline.images();
    images.retain(|image| !request.bases.contains_key(&image.reference));
    // The same image as a base and as a source of files is resolved once.
    images.dedup_by(|a, b| a.reference == b.reference);
    images.into_iter()
}

fn all_context(request: &BuildRequest) -> Vec<ContextEntry> {
    let files = request.spec.context_files.iter().map(|file| ContextEntry {
        path: file.name.clone(),
        sha256_hex: file.sha256_hex.clone(),
        mode: None,
    });
    request.context.iter().cloned().chain(files).collect()
}

fn secret_names(request: &BuildRequest) -> Vec<String> {
    let mut names: Vec<String> = request.secrets.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    names.dedup();
    names
}

fn describe_exit(exit: StepExit, timeout: Duration) -> String {
    match exit {
        StepExit::Exited(code) => format!("the command exited with status {code}"),
        StepExit::Signaled(signal) => format!("the command was killed by signal {signal}"),
        StepExit::OutOfMemory => "the command was killed because it used more memory than a build may".to_owned(),
        StepExit::TimedOut => format!("the command took longer than {} s and was killed", timeout.as_secs()),
    }
}

fn indent(tail: &str) -> String {
    if tail.is_empty() {
        return String::new();
    }
    let lines: Vec<String> = tail.lines().map(|line| format!("\n    {line}")).collect();
    format!(". Its last output was:{}", lines.concat())
}

/// Base images fail for reasons that the user must see to act upon, such as a registry's answer.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&shorten(&error.to_string()));
        cause = error.source();
    }
    text
}
