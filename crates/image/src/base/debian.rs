//! Base images made from a Debian mirror by `mmdebstrap`, for sites that reach no registry.
//!
//! `python:3.X…` becomes the Debian release that ships that Python, arranged like the official image:
//! `python` and `pip` in `/usr/local/bin`, no externally-managed marker, pip installed by pip (so that it
//! can upgrade itself), packages where `import` finds them. `debian:…` becomes the plain release. What
//! differs from the image that was asked for is said in the build log. Which tags can be served is
//! decided by [`recipe_for`], a pure function; the rest carries it out.
//!
//! Nothing of the host's configuration gets into the image but the mirror's address, its key and the
//! configured apt options, which `apt-get` in a build needs just the same.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata};

use super::oci::host_architecture;
use super::reference::BaseReference;
use super::{Answer, BaseError};
use crate::layers::{Begin, LayerNote, LayerStore, layer_key};
use crate::step::BuildLog;
pub use recipe::{Flavor, RELEASES, Recipe, Release, recipe_for};

mod mirror;
mod mmdebstrap;
mod recipe;
mod rootfs;

/// Part of the key of what is made here. Raise it when the recipe changes.
const RECIPE_VERSION: &str = "debian-3";

#[derive(Debug, Clone)]
pub struct DebianConfig {
    /// Such as `http://deb.debian.org/debian`. `None`: what a Debian host uses itself, else the public one.
    pub mirror: Option<String>,
    /// Such as `http://deb.debian.org/debian-security`; likewise. An empty text: no security updates,
    /// for mirrors that carry none.
    pub security_mirror: Option<String>,
    /// The key ring that the mirror's signatures are checked with. `None`: the host's apt keys.
    pub keyring: Option<PathBuf>,
    /// Lines of apt configuration, such as `Acquire::http::Proxy "http://proxy:3128";`.
    pub apt_options: Vec<String>,
    pub mmdebstrap: PathBuf,
    /// A release takes 20 s from a near mirror.
    pub timeout: Duration,
}

impl Default for DebianConfig {
    fn default() -> Self {
        Self {
            mirror: None,
            security_mirror: None,
            keyring: None,
            apt_options: Vec::new(),
            mmdebstrap: PathBuf::from("mmdebstrap"),
            timeout: Duration::from_mins(15),
        }
    }
}

/// What of the configuration decides what an image made here contains.
pub(super) fn identity(config: &DebianConfig) -> String {
    let mirrors: Vec<String> = RELEASES
        .iter()
        .map(|release| mirror::Mirrors::find(config, release).identity())
        .collect();
    layer_key(&[RECIPE_VERSION, &mirrors.join("\n"), &config.apt_options.join("\n")])
}

/// Makes the image, or finds it made before.
pub(super) async fn make(
    config: &DebianConfig,
    reference: &BaseReference,
    force: bool,
    layers: &LayerStore,
    log: &BuildLog,
) -> Result<Answer<BuiltImage>, BaseError> {
    let recipe = match recipe_for(reference) {
        Ok(recipe) => recipe,
        Err(why) => return Ok(Answer::Absent(why)),
    };
    let mirrors = mirror::Mirrors::find(config, &recipe.release);
    let flavor = match recipe.flavor {
        Flavor::Python => "python",
        Flavor::Plain => "plain",
    };
    let codename = recipe.release.codename;
    let options = config.apt_options.join("\n");
    let identity = [
        RECIPE_VERSION,
        codename,
        flavor,
        host_architecture(),
        &mirrors.identity(),
        &options,
    ];
    // Forcing makes another layer and points the name at it; images on the old one keep theirs.
    let pointer = layer_key(&[&identity[..], &["refresh"]].concat());
    let refresh = if force {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        now.to_string()
    } else {
        let kept = layers.find_note(&pointer)?.unwrap_or_default();
        String::from_utf8_lossy(&kept).into_owned()
    };
    let key = layer_key(&[&identity[..], &[refresh.as_str()]].concat());

    match layers.begin(&key).await? {
        Begin::Exists => {
            log.line(format!(
                "base image {reference}: made from {} ({codename}) before",
                mirrors.archive
            ))
            .await;
        }
        Begin::Build(draft) => {
            log.line(format!(
                "base image {reference}: making it from {} ({codename})",
                mirrors.archive
            ))
            .await;
            let started = Instant::now();
            mmdebstrap::run(config, &recipe, &mirrors, reference, draft.fs(), log).await?;
            let (root, recipe_copy, mirrors_copy) = (draft.fs().to_owned(), recipe.clone(), mirrors.clone());
            tokio::task::spawn_blocking(move || rootfs::arrange(&root, &recipe_copy, &mirrors_copy))
                .await
                .map_err(|_| BaseError::TaskLost)??;
            let made_by = format!("{reference} from {} ({codename})", mirrors.archive);
            draft.commit(LayerNote { made_by, parent: None }).await?;
            log.line(format!(
                "base image {reference}: made in {:.1} s",
                started.elapsed().as_secs_f64()
            ))
            .await;
        }
    }
    if force {
        layers.put_note(&pointer, refresh.as_bytes())?;
    }

    let root = layers.fs_path(&key);
    let python = match recipe.flavor {
        Flavor::Python => Some(rootfs::python_version(&root, recipe.release.python)?),
        Flavor::Plain => None,
    };
    say_differences(&recipe, python.as_deref(), reference, log).await;
    Ok(Answer::Found(BuiltImage {
        layers: vec![key],
        config: image_config(python),
        metadata: ImageMetadata::default(),
    }))
}

async fn say_differences(recipe: &Recipe, python: Option<&str>, reference: &BaseReference, log: &BuildLog) {
    if let Some(has) = python {
        match recipe.asked_python.as_deref().filter(|asked| *asked != has) {
            Some(asked) => {
                let codename = recipe.release.codename;
                log.line(format!(
                    "  note: it has Python {has}, which Debian {codename} ships, not {asked}"
                ))
                .await;
            }
            None => log.line(format!("  {reference} has Python {has}")).await,
        }
    }
    for difference in &recipe.differences {
        log.line(format!("  note: {difference}")).await;
    }
}

/// As the official images have it.
fn image_config(python: Option<String>) -> ImageConfig {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    match python {
        None => ImageConfig {
            env: vec![pair("PATH", path)],
            cmd: vec!["bash".to_owned()],
            ..ImageConfig::default()
        },
        Some(version) => ImageConfig {
            env: vec![
                pair("PATH", &format!("/usr/local/bin:{path}")),
                pair("LANG", "C.UTF-8"),
                pair("PYTHON_VERSION", &version),
            ],
            cmd: vec!["python3".to_owned()],
            ..ImageConfig::default()
        },
    }
}
