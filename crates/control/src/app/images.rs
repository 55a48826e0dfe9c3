//! Images: known by content, built once, their logs followed by everybody who waits.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ionian_domain::image::{BuiltImage, Image, ImageSpec, ImageState, RegistryAuth};
use ionian_domain::mount::MountFile;
use ionian_domain::{AppId, ImageId, Timestamp};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use super::builds::{BuildLine, BuildLogPage};
use crate::Control;
use crate::error::{Error, Result};

/// Lines between a build and its log; the build waits when followers' bookkeeping is behind.
const LOG_QUEUE: usize = 1024;
/// No build may take longer than this in all.
const BUILD_TIMEOUT: Duration = Duration::from_hours(3);
/// Builds that run or wait for the disk at once: a build is mostly one process, and each holds its context in memory.
const MAX_BUILDS: usize = 32;

pub struct Images<'a>(pub(crate) &'a Control);

/// Everything that a builder needs.
///
/// Not `Debug`: it carries the values of secrets.
#[derive(Clone)]
pub struct BuildJob {
    pub image_id: ImageId,
    pub spec: ImageSpec,
    pub bases: BTreeMap<String, BuiltImage>,
    /// The build context: files by path in its root.
    pub context: Vec<MountFile>,
    /// Variables for `RUN` steps. Never logged.
    pub secrets: Vec<(String, String)>,
    /// `REGISTRY_USERNAME` and `REGISTRY_PASSWORD`.
    pub registry_login: Option<(String, String)>,
    /// The client that asks: its in-container side is fetched with the build, not at the first start.
    pub client_version: String,
    pub force: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildFailure {
    /// Whether the definition is at fault (a failing step, an unknown command) or the platform.
    pub by_user: bool,
    pub message: String,
}

type BuildFuture = Pin<Box<dyn Future<Output = Result<BuiltImage, BuildFailure>> + Send>>;
/// Runs a build on a worker. Given by `server`.
pub type BuildFn = Arc<dyn Fn(BuildJob, mpsc::Sender<BuildLine>, CancellationToken) -> BuildFuture + Send + Sync>;
/// Whether all layers of a built image are still on the worker's disk.
pub type PresentFn = Arc<dyn Fn(&BuiltImage) -> bool + Send + Sync>;

impl Images<'_> {
    pub async fn get(&self, id: ImageId) -> Result<Image> {
        let found = self.0.store().images().find(id).await?;
        found.ok_or_else(|| Error::not_found(format!("image {id} does not exist; deploy the app that defines it")))
    }

    /// The image of this definition; starts its build where it is not built.
    pub async fn get_or_create(
        &self,
        spec: ImageSpec,
        app_id: Option<AppId>,
        client_version: &str,
        force: bool,
    ) -> Result<Image> {
        if spec.build_function_id.is_some() {
            return Err(Error::new(
                ionian_domain::ErrorKind::Unimplemented,
                "`Image.run_function` is not available on this server yet; use `run_commands` instead",
            ));
        }
        let canonical = serde_json::to_vec(&spec).expect("an image spec is JSON");
        let id = ImageId::from_digest(&Sha256::digest(&canonical).into());
        // One caller at a time decides about one image, so that two never start its build twice.
        let _turn = self.0.images_turn().lock().await;
        let existing = self.0.store().images().find(id).await?;
        if let Some(image) = existing {
            match &image.state {
                ImageState::Ready { image: built } if !force && (self.0.layers_present())(built) => return Ok(image),
                ImageState::Building if self.0.builds().is_live(id) => return Ok(image),
                ImageState::Ready { .. } | ImageState::Building | ImageState::Failed { .. } => {}
            }
        }
        if self.0.builds().live_count() >= MAX_BUILDS {
            return Err(Error::new(
                ionian_domain::ErrorKind::Exhausted,
                format!("{MAX_BUILDS} images are being built; try again when some of them are done"),
            ));
        }
        let job = self.job(id, &spec, client_version, force).await?;
        let image = Image {
            id,
            app_id,
            spec,
            state: ImageState::Building,
            created_at: Timestamp::now(),
        };
        self.0.store().images().upsert(&image).await?;
        self.start(job);
        Ok(image)
    }

    async fn job(&self, image_id: ImageId, spec: &ImageSpec, client_version: &str, force: bool) -> Result<BuildJob> {
        let mut bases = BTreeMap::new();
        for (tag, base_id) in &spec.base_images {
            match self.get(*base_id).await?.state {
                ImageState::Ready { image } => {
                    bases.insert(tag.clone(), image);
                }
                ImageState::Building | ImageState::Failed { .. } => {
                    return Err(Error::precondition(format!("the base image {base_id} is not built")));
                }
            }
        }
        let mut context: Vec<MountFile> = spec
            .context_files
            .iter()
            .map(|file| MountFile {
                path: file.name.clone(),
                sha256_hex: file.sha256_hex.clone(),
                mode: None,
            })
            .collect();
        if let Some(mount_id) = spec.context_mount_id {
            context.extend(self.0.mounts().get(mount_id).await?.files);
        }
        let registry_login = match &spec.registry_auth {
            RegistryAuth::Public => None,
            RegistryAuth::Static(secret_id) => {
                let values: HashMap<String, String> = self.0.secrets().open(&[*secret_id]).await?.into_iter().collect();
                match (values.get("REGISTRY_USERNAME"), values.get("REGISTRY_PASSWORD")) {
                    (Some(user), Some(password)) => Some((user.clone(), password.clone())),
                    _ => {
                        return Err(Error::invalid(
                            "the registry secret must have REGISTRY_USERNAME and REGISTRY_PASSWORD",
                        ));
                    }
                }
            }
            RegistryAuth::Aws(_) | RegistryAuth::Gcp(_) => {
                return Err(Error::new(
                    ionian_domain::ErrorKind::Unimplemented,
                    "registry logins through AWS or GCP are not available on this server; use a secret with \
                     REGISTRY_USERNAME and REGISTRY_PASSWORD",
                ));
            }
        };
        Ok(BuildJob {
            image_id,
            spec: spec.clone(),
            bases,
            context,
            secrets: self.0.secrets().open(&spec.secret_ids).await?,
            registry_login,
            client_version: client_version.to_owned(),
            force,
        })
    }

    fn start(&self, job: BuildJob) {
        let control = self.0.clone();
        let build = control.builds().begin(job.image_id);
        let image_id = job.image_id;
        // Kind: per request, bounded by BUILD_TIMEOUT. A panic in the build ends as a failure below.
        let run = async move {
            let (lines, mut incoming) = mpsc::channel(LOG_QUEUE);
            let cancel = control.cancel_token().child_token();
            let started = (control.build_fn())(job, lines, cancel.clone());
            let mut running = tokio::spawn(tokio::time::timeout(BUILD_TIMEOUT, started));
            let result = loop {
                tokio::select! {
                    biased;
                    Some(line) = incoming.recv() => build.append(line),
                    result = &mut running => break result,
                }
            };
            cancel.cancel();
            while let Ok(line) = incoming.try_recv() {
                build.append(line);
            }
            let state = match result {
                Ok(Ok(Ok(image))) => ImageState::Ready { image },
                Ok(Ok(Err(failure))) => {
                    if !failure.by_user {
                        tracing::error!(image = %image_id, error = failure.message, "an image build failed");
                    }
                    ImageState::Failed {
                        message: failure.message,
                    }
                }
                Ok(Err(_elapsed)) => ImageState::Failed {
                    message: format!("the build was stopped after {} hours", BUILD_TIMEOUT.as_secs() / 3600),
                },
                Err(panic) => {
                    tracing::error!(image = %image_id, error = %panic, "an image build crashed");
                    ImageState::Failed {
                        message: "the builder crashed; the server's log has details".to_owned(),
                    }
                }
            };
            if let Err(error) = control.store().images().set_state(image_id, &state).await {
                tracing::error!(image = %image_id, error = &error as &dyn std::error::Error, "a build's result could not be recorded");
            }
            control.builds().finish(image_id, &build).await;
        };
        tokio::spawn(run);
    }

    /// Lines from a position on; waits for news for up to `hold`. All lines come before the result.
    pub async fn build_log(&self, id: ImageId, from: u64, hold: Duration) -> Result<BuildLogPage> {
        if let Some(build) = self.0.builds().find(id) {
            let mut news = build.subscribe();
            let deadline = tokio::time::Instant::now() + hold;
            loop {
                news.mark_unchanged();
                let waited = tokio::time::Instant::now() >= deadline;
                let (lines, next, finished) = build.page(from);
                if lines.is_empty() && finished {
                    return self.finished_page(id, next).await;
                }
                if !lines.is_empty() || waited {
                    return Ok(BuildLogPage {
                        lines,
                        next,
                        result: None,
                    });
                }
                tokio::select! {
                    _ = news.changed() => {}
                    () = tokio::time::sleep_until(deadline) => {}
                }
            }
        }
        let (lines, next) = self.0.builds().read_finished(id, from).await;
        if lines.is_empty() {
            self.finished_page(id, next).await
        } else {
            Ok(BuildLogPage {
                lines,
                next,
                result: None,
            })
        }
    }

    async fn finished_page(&self, id: ImageId, next: u64) -> Result<BuildLogPage> {
        let image = self.get(id).await?;
        let result = match image.state {
            // Nobody builds it: the server stopped in the middle.
            ImageState::Building => ImageState::Failed {
                message: "the build was interrupted by a server restart; run it again".to_owned(),
            },
            ImageState::Ready { .. } | ImageState::Failed { .. } => image.state,
        };
        Ok(BuildLogPage {
            lines: Vec::new(),
            next,
            result: Some(result),
        })
    }
}
