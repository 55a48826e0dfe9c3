//! The worker with its parts, and the platform's answer to a request.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use http::header::CONTENT_TYPE;
use http::{Request, Response};
use hyper::body::Incoming;
use ionian_api::Api;
use ionian_blobs::{ContentHash, ContentStore};
use ionian_control::Control;
use ionian_image::base::{BaseConfig, BaseImages};
use ionian_image::build::DEFAULT_STEP_TIMEOUT;
use ionian_image::client_bundle::{ClientBundles, ClientBundlesConfig};
use ionian_image::{BuilderConfig, ContextFiles, ImageBuilder, LayerStore};
use ionian_worker::{
    Builder, ContainerSteps, FetchContent, LogSink, StepLimits, Worker, WorkerLimits, WorkerParts, find_containers,
};
use tower::ServiceExt;

use crate::config::Config;
use crate::serve::runtimes::Runtimes;

/// Secrets of build steps are written to memory only.
const VOLATILE_DIR: &str = "/dev/shm";

/// A worker that has everything but the place where its logs go.
pub(crate) struct WorkerSetup {
    pub builder: Builder,
    worker: Box<dyn FnOnce(LogSink) -> anyhow::Result<Worker> + Send>,
}

impl WorkerSetup {
    /// A worker whose logs go to control in this process.
    pub(super) fn embedded(self, control: &Control) -> anyhow::Result<Worker> {
        let control = control.clone();
        self.worker(Arc::new(move |entries| {
            let control = control.clone();
            Box::pin(async move { control.logs().append(entries).await })
        }))
    }

    pub(crate) fn worker(self, logs: LogSink) -> anyhow::Result<Worker> {
        (self.worker)(logs)
    }
}

/// Where a worker finds files by digest, and how it gets those that are not there.
pub(crate) struct Content {
    pub files: ContextFiles,
    pub fetch: FetchContent,
}

impl Content {
    /// The server's own store, on this host.
    pub(super) fn local(content: ContentStore) -> Self {
        Self {
            files: content_files(content),
            fetch: Arc::new(|_| Box::pin(async { Ok(()) })),
        }
    }
}

pub(crate) async fn worker(
    config: &Config,
    runtimes: &Runtimes,
    layers: LayerStore,
    content: Content,
) -> anyhow::Result<WorkerSetup> {
    let Content { files, fetch } = content;
    let state_dir = config.data_dir.join("worker");
    let images_dir = config.images_dir();
    let scratch_dir = images_dir.join("scratch");
    let cache_dir = images_dir.join("cache");
    for dir in [&state_dir, &scratch_dir, &cache_dir] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let trust = super::trust(config)?;
    let mut base = BaseConfig::new(scratch_dir.clone());
    base.sources.clone_from(&config.image_sources);
    base.registry.insecure.clone_from(&config.insecure_registries);
    base.layouts_dir.clone_from(&config.layouts_dir);
    base.debian.mirror.clone_from(&config.debian_mirror);
    let base_images = Arc::new(BaseImages::new(base).context("cannot prepare the sources of base images")?);
    let steps: Arc<dyn ionian_image::StepRunner> = Arc::new(
        ContainerSteps::open(
            Arc::clone(&runtimes.builds),
            &state_dir.join("steps"),
            StepLimits::for_host(),
        )
        .context("cannot prepare image builds")?,
    );
    let binds = trust.binds();
    let mut pip_env = trust.trust_env(&[]);
    pip_env.extend(trust.env.iter().cloned());
    let images = ImageBuilder::new(BuilderConfig {
        layers,
        base_images,
        runner: Arc::clone(&steps),
        files: Arc::clone(&files),
        trust,
        step_timeout: DEFAULT_STEP_TIMEOUT,
        cache_dir,
        scratch_dir,
        volatile_dir: Path::new(VOLATILE_DIR).to_owned(),
    });
    let bundles = Arc::new(ClientBundles::new(ClientBundlesConfig {
        pip_env,
        binds,
        ..ClientBundlesConfig::default()
    }));
    let process_python = config.process_python.clone();
    let (open_images, open_steps, open_bundles) = (images.clone(), Arc::clone(&steps), Arc::clone(&bundles));
    let builder = ionian_worker::Builder::new(images, bundles, steps);
    let runtimes = runtimes.offered.clone();
    let found = find_containers(&runtimes).await;
    let worker = Box::new(move |logs: LogSink| {
        Worker::open(WorkerParts {
            runtimes,
            images: open_images,
            steps: open_steps,
            bundles: open_bundles,
            content: files,
            fetch,
            state_dir: state_dir.join("containers"),
            logs,
            limits: WorkerLimits::for_host(),
            found,
            process_python,
        })
        .context("cannot open the worker")
    });
    Ok(WorkerSetup { builder, worker })
}

fn content_files(content: ContentStore) -> ContextFiles {
    Arc::new(move |sha256_hex| {
        let invalid = |reason: String| std::io::Error::new(std::io::ErrorKind::NotFound, reason);
        let hash: ContentHash = sha256_hex.parse().map_err(|error| invalid(format!("{error}")))?;
        content
            .local_path(hash)
            .ok_or_else(|| invalid(format!("the content {sha256_hex} is not on this host")))
    })
}

/// gRPC by content type, everything else by path.
pub(super) async fn answer(api: &Api, router: axum::Router, request: Request<Incoming>) -> Response<axum::body::Body> {
    let is_grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        return api.call(request).await.map(axum::body::Body::new);
    }
    match router.oneshot(request.map(axum::body::Body::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
