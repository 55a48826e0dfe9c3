//! Base images: what `FROM` and `COPY --from` name.
//!
//! [`BaseImages`] asks the sources in the order that its configuration names and says in the build log
//! which one was used, and what the earlier ones answered. A source that cannot be reached, or that has
//! no such image, passes on to the next. Two images can be made where no registry can be reached:
//! Python's official ones out of a Debian mirror ([`debian`]), and uv's out of the package index ([`uv`]).
//! They stand in for an unreachable registry only: where a registry answers that it has no such image,
//! that is the answer.

mod archive;
pub mod debian;
pub(crate) mod fuzzing;
mod layout;
mod oci;
pub mod package_index;
mod reference;
mod registry;
pub mod uv;

use std::fmt;
use std::path::PathBuf;

use ionian_domain::image::BuiltImage;
use oci_client::errors::OciDistributionError;

pub use archive::UnpackError;
pub(crate) use archive::{MAX_HEADER_RECORD_BYTES, UNPACK_LIMITS, UnpackLimits};
pub use debian::DebianConfig;
pub use package_index::{IndexFile, PackageIndex, PackageIndexConfig, PackageIndexError};
pub use reference::BaseReference;
pub use registry::{RegistryConfig, RegistryCredentials};

use crate::layers::{LayerError, LayerStore, layer_key};
use crate::step::{BuildLog, StepRunner};

/// Where base images may come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseSource {
    /// The registry that the image's name says, and its mirrors.
    Registry,
    /// OCI layouts and archives in a directory of this machine.
    Layouts,
    /// Made here: Python and Debian images from a Debian mirror, the uv image from the package index.
    Bootstrap,
}

impl fmt::Display for BaseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registry => "registry",
            Self::Layouts => "layouts",
            Self::Bootstrap => "bootstrap",
        })
    }
}

/// Everything that base images depend on.
#[derive(Debug, Clone)]
pub struct BaseConfig {
    /// Asked in this order.
    pub sources: Vec<BaseSource>,
    pub registry: RegistryConfig,
    /// The module `layout` says which names are looked up in it.
    pub layouts_dir: Option<PathBuf>,
    pub debian: DebianConfig,
    pub package_index: PackageIndexConfig,
    /// For downloads: nameless files of the size of layers. Must exist.
    pub scratch_dir: PathBuf,
}

impl BaseConfig {
    pub fn new(scratch_dir: PathBuf) -> Self {
        Self {
            sources: vec![BaseSource::Registry, BaseSource::Layouts, BaseSource::Bootstrap],
            registry: RegistryConfig::default(),
            layouts_dir: None,
            debian: DebianConfig::default(),
            package_index: PackageIndexConfig::default(),
            scratch_dir,
        }
    }
}

/// A base image that a build needs.
#[derive(Debug, Clone)]
pub struct BaseRequest {
    pub reference: String,
    pub auth: Option<RegistryCredentials>,
    /// Ask again and make anew, whatever is remembered.
    pub force: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    #[error("'{reference}' is not an image name: {why}")]
    InvalidReference { reference: String, why: String },
    #[error("{reference} is not an image that can be used: {why}")]
    InvalidImage { reference: String, why: String },
    #[error("no source has the image {reference}: {tried}. {help}")]
    NotFound {
        reference: String,
        tried: String,
        help: String,
    },
    #[error("failed to get {reference} from registry {host}")]
    Registry {
        reference: String,
        host: String,
        source: OciDistributionError,
    },
    #[error("failed to download layer {digest}")]
    Download {
        digest: String,
        source: Box<OciDistributionError>,
    },
    #[error("failed to unpack {reference}")]
    Unpack { reference: String, source: UnpackError },
    #[error("failed to read the OCI layout {path}")]
    Layout { path: PathBuf, source: std::io::Error },
    #[error("failed to make {reference} from the Debian mirror {mirror}: {why}")]
    Debian {
        reference: String,
        mirror: String,
        why: String,
    },
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("failed to get uv from the package index")]
    PackageIndex(#[from] PackageIndexError),
    #[error("failed to keep a base image in the layer store")]
    Layers(#[from] LayerError),
    #[error("a task that prepares base images ended early")]
    TaskLost,
}

/// What a source says when asked for an image.
enum Answer<T> {
    Found(T),
    /// The source was not there to answer; why.
    Unreachable(String),
    /// The source answered, and has no such image; why.
    Absent(String),
}

/// Brings base images; one per process, since it remembers what cannot be reached.
#[derive(Debug)]
pub struct BaseImages {
    config: BaseConfig,
    registry: registry::RegistrySource,
    package_index: PackageIndex,
}

impl BaseImages {
    pub fn new(config: BaseConfig) -> Result<Self, BaseError> {
        let scratch_dir = config.scratch_dir.clone();
        std::fs::create_dir_all(&scratch_dir).map_err(|source| BaseError::Io {
            action: "create the directory",
            path: scratch_dir.clone(),
            source,
        })?;
        Ok(Self {
            registry: registry::RegistrySource::new(config.registry.clone(), scratch_dir),
            package_index: PackageIndex::new(&config.package_index)?,
            config,
        })
    }

    /// Makes the layers of a base image exist and says what they are.
    ///
    /// The runner is for sources that must run something on what they make; none of the present ones
    /// does, because `mmdebstrap` brings its own ways.
    pub async fn resolve(
        &self,
        request: BaseRequest,
        layers: &LayerStore,
        _runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<BuiltImage, BaseError> {
        self.find(request, layers, log).await
    }

    /// The image that `COPY --from=<image>` names: files are copied out of its merged layers.
    pub async fn copy_source(
        &self,
        request: BaseRequest,
        layers: &LayerStore,
        _runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<BuiltImage, BaseError> {
        self.find(request, layers, log).await
    }

    /// What a build step upon this image is keyed by. It changes when another configuration could give
    /// another image for the same name; it does not change when a registry moves a tag, so that builds
    /// stay where they are until they are forced.
    pub fn cache_identity(&self, reference: &str) -> Result<String, BaseError> {
        let reference = BaseReference::parse(reference)?;
        let sources: Vec<String> = self.config.sources.iter().map(ToString::to_string).collect();
        let layouts = self
            .config
            .layouts_dir
            .as_ref()
            .map(|dir| dir.display().to_string())
            .unwrap_or_default();
        let debian = debian::identity(&self.config.debian);
        let parts = [
            "base-image-1",
            &reference.to_string(),
            &sources.join(","),
            &layouts,
            &debian,
        ];
        Ok(layer_key(&parts))
    }

    async fn find(&self, request: BaseRequest, layers: &LayerStore, log: &BuildLog) -> Result<BuiltImage, BaseError> {
        let reference = BaseReference::parse(&request.reference)?;
        let mut tried = Vec::new();
        let mut registry_said_no = false;
        for source in &self.config.sources {
            let answer = match source {
                BaseSource::Registry => {
                    let answer = self
                        .registry
                        .find(&reference, request.auth.as_ref(), request.force)
                        .await?;
                    registry_said_no |= matches!(answer, Answer::Absent(_));
                    self.install(&reference, answer, layers, log).await?
                }
                BaseSource::Layouts => match &self.config.layouts_dir {
                    None => Answer::Absent("no directory of OCI layouts is configured".to_owned()),
                    Some(dir) => {
                        let answer = layout::find(dir, &self.config.scratch_dir, &reference).await?;
                        self.install(&reference, answer, layers, log).await?
                    }
                },
                BaseSource::Bootstrap if registry_said_no => {
                    Answer::Absent("nothing is made in place of an image that its registry does not have".to_owned())
                }
                BaseSource::Bootstrap if uv::is_uv(&reference) => {
                    uv::make(&self.package_index, &reference, layers, log, &self.config.scratch_dir).await?
                }
                BaseSource::Bootstrap => {
                    debian::make(&self.config.debian, &reference, request.force, layers, log).await?
                }
            };
            match answer {
                Answer::Found(image) => return Ok(image),
                Answer::Unreachable(why) | Answer::Absent(why) => {
                    log.line(format!("base image {reference}: {why}")).await;
                    tried.push(why);
                }
            }
        }
        if tried.is_empty() {
            tried.push("no source of base images is configured".to_owned());
        }
        let dir = self
            .config
            .layouts_dir
            .as_ref()
            .map_or("the directory of OCI layouts".into(), |dir| dir.to_string_lossy());
        let (name, shown) = (reference.familiar_name().replace('/', "_"), reference.to_string());
        let tag = reference.tag().unwrap_or("latest");
        Err(BaseError::NotFound {
            tried: tried.join("; "),
            help: format!(
                "To provide it, configure a registry or a mirror that has it, or put an OCI layout into {dir}, such as \
                 by: skopeo copy docker://{shown} oci:{dir}/{name}:{tag}"
            ),
            reference: shown,
        })
    }

    async fn install(
        &self,
        reference: &BaseReference,
        answer: Answer<oci::FoundImage>,
        layers: &LayerStore,
        log: &BuildLog,
    ) -> Result<Answer<BuiltImage>, BaseError> {
        Ok(match answer {
            Answer::Found(found) => Answer::Found(oci::install(&reference.to_string(), found, layers, log).await?),
            Answer::Unreachable(why) => Answer::Unreachable(why),
            Answer::Absent(why) => Answer::Absent(why),
        })
    }
}

/// An error and what caused it, on one line: HTTP clients keep the interesting part in the sources.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
