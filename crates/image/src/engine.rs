//! Executes a plan: finds the layer of every step, or makes it.
//!
//! The key of a step is the key of the layer below, the step's identity, and the keys of other layers it
//! reads. Whoever comes first makes the layer; others wait and find it. Nothing counts until it is
//! committed, so a build that dies is repeated from the first step that it did not finish.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ionian_domain::image::{BuiltImage, ImageConfig};
use ionian_domain::time::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::base::{BaseError, BaseRequest};
use crate::build::{BuildError, BuildRequest, BuilderConfig, StepNumber};
use crate::copy::{self, CopyError};
use crate::dockerfile::shorten;
use crate::inspect;
use crate::layers::{Begin, LayerDraft, LayerNote, layer_key};
use crate::plan::{
    Action, BuildPlan, CopyAction, CopySource, ENGINE_VERSION, ImageUse, LayersSource, StageBase, Step, Work,
};
use crate::rooted::{Attributes, Rooted};
use crate::run;
use crate::step::{BuildLog, MountedRoot, StepError};

/// After this long a caller is told that it waits for another build.
const WAIT_NOTICE: Duration = Duration::from_secs(1);

/// overlayfs stacks at most 500 layers, and a container adds some of its own.
const MAX_STACK: usize = 450;

/// Brings a base image, or one that files are copied from.
pub(crate) async fn resolve(
    builder: &BuilderConfig,
    request: &BuildRequest,
    image: &ImageUse,
    log: &BuildLog,
) -> Result<BuiltImage, BaseError> {
    let wanted = BaseRequest {
        reference: image.reference.clone(),
        auth: request.registry_auth.clone(),
        force: request.force,
    };
    let runner = builder.runner.as_ref();
    if image.is_base {
        builder.base_images.resolve(wanted, &builder.layers, runner, log).await
    } else {
        builder
            .base_images
            .copy_source(wanted, &builder.layers, runner, log)
            .await
    }
}

/// Makes the image that a plan describes.
pub(crate) async fn execute(
    builder: &BuilderConfig,
    request: &BuildRequest,
    plan: &BuildPlan,
    images: &BTreeMap<String, BuiltImage>,
    log: &BuildLog,
    cancel: &CancellationToken,
) -> Result<BuiltImage, BuildError> {
    let nonce = request.force.then(nonce);
    let mut engine = Engine {
        builder,
        request,
        plan,
        images,
        log,
        cancel,
        nonce,
        stages: Vec::new(),
    };
    for (index, stage) in plan.stages.iter().enumerate() {
        let number = StepNumber {
            number: stage.number,
            total: plan.total,
        };
        log.line(format!("Step {number}: {}", shorten(&stage.text))).await;
        let mut chain = match &stage.base {
            StageBase::Scratch => Chain::new(Vec::new()),
            StageBase::Stage(other) => engine.stages[*other].clone(),
            StageBase::Image(name) => Chain::new(engine.image(name)?.layers.clone()),
        };
        for step in &plan.stages[index].steps {
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            engine.step(step, &mut chain).await?;
        }
        engine.stages.push(chain);
    }
    let (Some(chain), Some(stage)) = (engine.stages.pop(), plan.stages.last()) else {
        return Err(BuildError::TaskLost);
    };
    let config: ImageConfig = stage.config.clone();
    let metadata = inspect::inspect(builder, &chain.layers, &config, log, cancel).await?;
    Ok(BuiltImage {
        layers: chain.layers,
        config,
        metadata,
    })
}

/// What a stage has come to so far.
#[derive(Debug, Clone)]
struct Chain {
    /// Base first; layers that add nothing are left out.
    layers: Vec<String>,
    /// Stands for all steps, those that added nothing among them.
    key: String,
}

impl Chain {
    fn new(layers: Vec<String>) -> Self {
        let key = layer_key(&layers);
        Self { layers, key }
    }
}

struct Engine<'a> {
    builder: &'a BuilderConfig,
    request: &'a BuildRequest,
    plan: &'a BuildPlan,
    images: &'a BTreeMap<String, BuiltImage>,
    log: &'a BuildLog,
    cancel: &'a CancellationToken,
    /// Makes the keys of a forced build new.
    nonce: Option<String>,
    stages: Vec<Chain>,
}

/// Where the work of one step happens.
pub(crate) struct Site<'a> {
    pub(crate) builder: &'a BuilderConfig,
    pub(crate) request: &'a BuildRequest,
    pub(crate) log: &'a BuildLog,
    pub(crate) cancel: &'a CancellationToken,
    pub(crate) number: StepNumber,
    pub(crate) step: &'a Step,
    pub(crate) lower_dirs: Vec<PathBuf>,
    pub(crate) draft: &'a LayerDraft,
    /// Directories of the other layers that the step reads.
    pub(crate) sources: BTreeMap<LayersSource, Vec<PathBuf>>,
}

impl Engine<'_> {
    fn image(&self, name: &str) -> Result<&BuiltImage, BuildError> {
        // Every image of the plan was resolved before it was made.
        self.images.get(name).ok_or_else(|| BuildError::Io {
            action: format!("find the base image '{name}'"),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    fn source(&self, source: &LayersSource) -> Result<Chain, BuildError> {
        match source {
            LayersSource::Stage(index) => Ok(self.stages[*index].clone()),
            LayersSource::Image(name) => Ok(Chain::new(self.image(name)?.layers.clone())),
        }
    }

    async fn step(&self, step: &Step, chain: &mut Chain) -> Result<(), BuildError> {
        let number = StepNumber {
            number: step.number,
            total: self.plan.total,
        };
        let title = format!("Step {number}: {}", shorten(&step.text));
        let Some(work) = &step.work else {
            self.log.line(title).await;
            return Ok(());
        };
        let mut parts = vec![ENGINE_VERSION.to_owned(), chain.key.clone(), work.identity.clone()];
        let mut sources = BTreeMap::new();
        for source in work.sources() {
            let other = self.source(source)?;
            parts.push(other.key.clone());
            sources.insert(source.clone(), self.dirs(&other.layers));
        }
        let planned = layer_key(&parts);
        // A forced build made another layer for this step: it is the one that counts since.
        let redirect = layer_key(&["redirect", planned.as_str()]);
        let key = match &self.nonce {
            Some(nonce) => layer_key(&[planned.as_str(), nonce.as_str()]),
            None => self.redirected(&redirect)?.unwrap_or(planned),
        };
        let begun = Instant::now();
        if self.builder.layers.contains(&key) {
            self.log.line(format!("{title} [cached]")).await;
        } else {
            self.log.line(title).await;
            match self.begin(&key).await? {
                Begin::Exists => self.log.line(format!("Step {number}: made by another build")).await,
                Begin::Build(draft) => {
                    let lower_dirs = self.dirs(&chain.layers);
                    adopt_root(draft.fs(), lower_dirs.last())?;
                    let site = Site {
                        builder: self.builder,
                        request: self.request,
                        log: self.log,
                        cancel: self.cancel,
                        number,
                        step,
                        lower_dirs,
                        draft: &draft,
                        sources,
                    };
                    site.work(work).await?;
                    let note = LayerNote {
                        made_by: step.text.clone(),
                        parent: chain.layers.last().cloned(),
                    };
                    draft.commit(note).await?;
                    self.log
                        .line(format!("Step {number}: done in {:.1} s", begun.elapsed().as_secs_f64()))
                        .await;
                }
            }
        }
        if self.nonce.is_some() {
            self.builder.layers.put_note(&redirect, key.as_bytes())?;
        }
        if self.adds_something(&key, chain)? {
            chain.layers.push(key.clone());
        }
        if chain.layers.len() > MAX_STACK {
            let problem =
                format!("the image has more than {MAX_STACK} layers: join commands, or copy its files to a new image");
            return Err(BuildError::Refused {
                step: number,
                instruction: shorten(&step.text),
                problem,
            });
        }
        chain.key = key;
        Ok(())
    }

    fn redirected(&self, redirect: &str) -> Result<Option<String>, BuildError> {
        let note = self.builder.layers.find_note(redirect)?;
        let key = note.and_then(|key| String::from_utf8(key).ok());
        Ok(key.filter(|key| self.builder.layers.contains(key)))
    }

    async fn begin(&self, key: &str) -> Result<Begin, BuildError> {
        let begin = self.builder.layers.begin(key);
        tokio::pin!(begin);
        let mut told = false;
        loop {
            tokio::select! {
                begun = &mut begin => return Ok(begun?),
                () = self.cancel.cancelled() => return Err(BuildError::Cancelled),
                () = tokio::time::sleep(WAIT_NOTICE), if !told => {
                    told = true;
                    self.log.line("Another build is at this step: waiting for it.").await;
                }
            }
        }
    }

    fn dirs(&self, layers: &[String]) -> Vec<PathBuf> {
        layers.iter().map(|key| self.builder.layers.fs_path(key)).collect()
    }

    /// A layer without entries is left out of the stack, unless it changes the root directory itself.
    fn adds_something(&self, key: &str, chain: &Chain) -> Result<bool, BuildError> {
        if self.builder.layers.describe(key)?.entries > 0 {
            return Ok(true);
        }
        let Some(below) = chain.layers.last() else {
            return Ok(true);
        };
        let root = |key: &str| -> Result<(u32, u32, u32), BuildError> {
            let path = self.builder.layers.fs_path(key);
            let metadata =
                std::fs::metadata(&path).map_err(|source| io_error(&format!("inspect {}", path.display()), source))?;
            Ok((metadata.mode(), metadata.uid(), metadata.gid()))
        };
        Ok(root(key)? != root(below)?)
    }
}

impl Site<'_> {
    async fn work(&self, work: &Work) -> Result<(), BuildError> {
        match &work.action {
            Action::Directories => self.make_directories(&work.directories).await,
            Action::Run(action) => {
                self.make_directories(&work.directories).await?;
                run::run(self, action).await
            }
            Action::Copy(action) => {
                self.make_directories(&work.directories).await?;
                self.copy(action).await
            }
        }
    }

    async fn make_directories(&self, directories: &[String]) -> Result<(), BuildError> {
        if directories.is_empty() {
            return Ok(());
        }
        let view = self.mount_draft().await?;
        let (root, directories) = (view.path().to_owned(), directories.to_vec());
        self.blocking(move || {
            let root = Rooted::open(&root).map_err(|source| CopyError::Io {
                what: "a directory".to_owned(),
                source,
            })?;
            for path in directories {
                root.ensure_dir(Path::new(&path), &Attributes::new(0o755, 0, 0))
                    .map_err(|source| {
                        if source.raw_os_error().is_none() {
                            CopyError::Refused(source.to_string())
                        } else {
                            CopyError::Io {
                                what: format!("to '{path}'"),
                                source,
                            }
                        }
                    })?;
            }
            Ok(())
        })
        .await
    }

    async fn copy(&self, action: &CopyAction) -> Result<(), BuildError> {
        let source_view = match &action.source {
            CopySource::Context { .. } => None,
            CopySource::Layers { source, .. } => Some(self.mount_source(source).await?),
        };
        let view = self.mount_draft().await?;
        let (action, target) = (action.clone(), view.path().to_owned());
        let source_path = source_view.as_ref().map(|view| view.path().to_owned());
        let files = self.builder.files.clone();
        let skipped = self
            .blocking(move || copy::copy(&action, &target, source_path.as_deref(), &files))
            .await?;
        for line in skipped {
            self.log.line(line).await;
        }
        Ok(())
    }

    async fn mount_draft(&self) -> Result<Box<dyn MountedRoot>, BuildError> {
        let upper = Some((self.draft.fs(), self.draft.work()));
        self.builder
            .runner
            .mount(&self.lower_dirs, upper)
            .await
            .map_err(|source| self.step_error(source))
    }

    pub(crate) async fn mount_source(&self, source: &LayersSource) -> Result<Box<dyn MountedRoot>, BuildError> {
        let dirs = self.sources.get(source).map_or(&[][..], Vec::as_slice);
        if dirs.is_empty() {
            return Err(self.refused("it copies from an image without any files".to_owned()));
        }
        self.builder
            .runner
            .mount(dirs, None)
            .await
            .map_err(|source| self.step_error(source))
    }

    /// Copying gigabytes does not belong on the threads that serve requests.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, CopyError> + Send + 'static,
    ) -> Result<T, BuildError> {
        let result = tokio::task::spawn_blocking(work)
            .await
            .map_err(|_| BuildError::TaskLost)?;
        result.map_err(|error| match error {
            CopyError::Refused(problem) => self.refused(problem),
            CopyError::Io { what, source } => io_error(
                &format!("copy {what} in step {}: {}", self.number, shorten(&self.step.text)),
                source,
            ),
            CopyError::Content { sha256_hex, source } => {
                io_error(&format!("read content {sha256_hex} of the build context"), source)
            }
        })
    }

    pub(crate) fn refused(&self, problem: String) -> BuildError {
        BuildError::Refused {
            step: self.number,
            instruction: shorten(&self.step.text),
            problem,
        }
    }

    pub(crate) fn step_error(&self, source: StepError) -> BuildError {
        match source {
            StepError::Cancelled => BuildError::Cancelled,
            source @ StepError::Runtime { .. } => BuildError::Step {
                step: self.number,
                instruction: shorten(&self.step.text),
                source,
            },
        }
    }
}

/// The root directory of a layer is the root directory of the view: it looks like the one below.
fn adopt_root(fs: &Path, below: Option<&PathBuf>) -> Result<(), BuildError> {
    let Some(below) = below else { return Ok(()) };
    let action = || format!("take over the root directory of {}", below.display());
    let metadata = std::fs::metadata(below).map_err(|source| io_error(&action(), source))?;
    chown(fs, Some(metadata.uid()), Some(metadata.gid())).map_err(|source| io_error(&action(), source))?;
    std::fs::set_permissions(fs, std::fs::Permissions::from_mode(metadata.mode() & 0o7777))
        .map_err(|source| io_error(&action(), source))
}

pub(crate) fn io_error(action: &str, source: io::Error) -> BuildError {
    BuildError::Io {
        action: action.to_owned(),
        source,
    }
}

/// Different in every call, over processes too.
fn nonce() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    format!("{}.{}.{call}", Timestamp::now().micros(), std::process::id())
}
