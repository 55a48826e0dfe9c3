//! The client package that containers run, at the version of whoever deployed.
//!
//! The official runtime is part of the client package. Containers find it at `/pkg`, its pinned
//! dependencies at `/__modal/deps` and the platform's web server at `/__ionian/deps`, all mounted from
//! outside: the user's image is not touched, and the user's own packages come first on the path. The
//! files are fetched from the package index by the image's own Python and pip, since only those know
//! which wheels fit, once per (client version, Python, libc, architecture), and are kept as a layer.
//! [`ClientBundles::ensure`] is all there is; calling it ahead of time prepares a site without network.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ionian_domain::image::BuiltImage;
use tokio_util::sync::CancellationToken;

use crate::layers::{Begin, LayerDraft, LayerError, LayerNote, LayerStore, layer_key};
use crate::step::{BuildLog, StepBind, StepError, StepExecution, StepExit, StepRunner};

/// Older clients speak a protocol that is not served.
pub const OLDEST_CLIENT: &str = "1.5.4";

/// What the web hook needs beside the client. Pinned: a bundle must be the same on every worker. These
/// have wheels for Python 3.10 to 3.14, for glibc and for musl.
const WEB_SERVER_REQUIREMENTS: &[&str] = &[
    "uvicorn==0.54.0",
    "httptools==0.9.0",
    "uvloop==0.23.0",
    "websockets==16.1.1",
    "h11==0.16.0",
    "click==8.5.1",
    // The client needs it too, and images of older builders do not have it.
    "cbor2==5.7.0",
    // uvicorn needs it before Python 3.11.
    "typing_extensions==4.16.0",
];

/// Part of the key of every bundle. Raise it when `build.py` changes what it makes.
const RECIPE_VERSION: &str = "client-bundle-1";

const BUILD_SCRIPT: &str = include_str!("client_bundle/build.py");
/// Finds out which Python an image has; the output is the first lines of the file it writes.
const PROBE_SCRIPT: &str = r#"
import os, platform, sys
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except (AttributeError, ValueError, OSError):
    libc = ""
if not libc:
    libc = " ".join(platform.libc_ver()).strip() or "musl"
with open(os.path.join(sys.argv[1], "probe.txt"), "w") as file:
    file.write("%s\n%d.%d\n%s\n" % (sys.implementation.cache_tag, sys.version_info[0], sys.version_info[1], libc))
"#;
/// Runs a script with the Python that the image calls `python`, which is what containers run.
const FIND_PYTHON: &str =
    "python=$(command -v python || command -v python3) || exit 78; exec \"$python\" -c \"$0\" \"$@\"";
const EXIT_NO_PYTHON: i32 = 78;
const EXIT_NO_PIP: i32 = 77;

/// Where the step sees its output directory.
const OUTPUT_TARGET: &str = "/__ionian_bundle";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Starting Python once.
const PROBE_TIMEOUT: Duration = Duration::from_mins(1);
/// Of the reason that `build.py` leaves, which goes into an error message.
const MAX_REASON_BYTES: usize = 4096;
/// Answers remembered per (image, client): more than the images in use on one machine.
const MAX_REMEMBERED: usize = 4096;

#[derive(Debug, Clone)]
pub struct ClientBundlesConfig {
    /// Added to the environment of pip: `PIP_INDEX_URL`, proxies and the like.
    pub pip_env: Vec<(String, String)>,
    /// What `pip_env` names: the host's CA bundle.
    pub binds: Vec<StepBind>,
    /// Whether the newest older release may stand in for a dependency that the client pins and the package
    /// index does not have. Indexes that hold new releases back need it; the log says when it happens.
    pub accepts_older_pins: bool,
    pub timeout: Duration,
}

impl Default for ClientBundlesConfig {
    fn default() -> Self {
        // 15 MB of wheels and ten seconds of compiling.
        Self {
            pip_env: Vec::new(),
            binds: Vec::new(),
            accepts_older_pins: true,
            timeout: Duration::from_mins(10),
        }
    }
}

/// Directories to mount read-only: at `/pkg`, `/__modal/deps` and `/__ionian/deps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientBundle {
    pub pkg_dir: PathBuf,
    pub deps_dir: PathBuf,
    pub extra_dir: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("'{version}' is not a version of the client")]
    InvalidVersion { version: String },
    #[error(
        "client {version} is too old: this server works with {OLDEST_CLIENT} and newer; upgrade with `pip install --upgrade modal`"
    )]
    TooOld { version: String },
    #[error("the image has no `python` or `python3` on its PATH; functions need one (see `add_python`)")]
    NoPython,
    #[error("the image has no pip to fetch the client with; install it in the image: {reason}")]
    NoPip { reason: String },
    #[error("failed to prepare client {version} for {python}: {reason}")]
    Failed {
        version: String,
        python: String,
        reason: String,
    },
    #[error("failed to find out which Python the image has: {reason}")]
    Probe { reason: String },
    #[error("failed to run a step in the image")]
    Step(#[from] StepError),
    #[error("failed to keep the client in the layer store")]
    Layers(#[from] LayerError),
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Provides bundles; one per process, since it remembers which bundle goes with which image.
#[derive(Debug)]
pub struct ClientBundles {
    config: ClientBundlesConfig,
    /// From image and client version to the key of the bundle, so that starting a container asks nothing.
    known: Mutex<HashMap<String, String>>,
}

/// What decides which wheels fit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PythonPlatform {
    /// `cpython-311`
    cache_tag: String,
    /// `3.11`
    minor: String,
    /// `glibc 2.36`: wheels may need a certain version.
    libc: String,
}

impl ClientBundles {
    pub fn new(config: ClientBundlesConfig) -> Self {
        Self {
            config,
            known: Mutex::default(),
        }
    }

    /// Makes the bundle for an image exist and says where it is.
    pub async fn ensure(
        &self,
        client_version: &str,
        image: &BuiltImage,
        layers: &LayerStore,
        runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<ClientBundle, BundleError> {
        let version = check_version(client_version)?;
        let image_key = layer_key(&[&image.layers[..], std::slice::from_ref(&version)].concat());
        let remembered = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&image_key)
            .cloned();
        if let Some(key) = remembered.filter(|key| layers.contains(key)) {
            return Ok(bundle_in(&layers.fs_path(&key)));
        }
        let platform = self.platform(image, layers, runner, log).await?;
        let key = bundle_key(&version, &platform);
        if let Begin::Build(draft) = layers.begin(&key).await? {
            let started = Instant::now();
            let shown = format!("Python {}, {}", platform.minor, platform.libc);
            log.line(format!("preparing client {version} for {shown}")).await;
            self.build(&version, &shown, image, &draft, layers, runner, log).await?;
            draft
                .commit(LayerNote {
                    made_by: format!("client {version} for {shown}"),
                    parent: None,
                })
                .await?;
            log.line(format!(
                "prepared client {version} in {:.1} s",
                started.elapsed().as_secs_f64()
            ))
            .await;
        }
        let bundle = bundle_in(&layers.fs_path(&key));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_REMEMBERED {
            known.clear();
        }
        known.insert(image_key, key);
        Ok(bundle)
    }

    /// Which Python the image has: asked once per image, by running it.
    async fn platform(
        &self,
        image: &BuiltImage,
        layers: &LayerStore,
        runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<PythonPlatform, BundleError> {
        let note_key = layer_key(&[&image.layers[..], &["python-platform-1".to_owned()]].concat());
        if let Some(text) = layers.find_note(&note_key)?
            && let Some(platform) = parse_probe(&String::from_utf8_lossy(&text))
        {
            return Ok(platform);
        }
        // A draft is a place to work in on the right file system; this one is never committed.
        let scratch_key = layer_key(&["python-platform-scratch", &note_key]);
        let Begin::Build(draft) = layers.begin(&scratch_key).await? else {
            return Err(BundleError::Probe {
                reason: "its scratch directory became a layer".to_owned(),
            });
        };
        let argv = vec![OUTPUT_TARGET.to_owned()];
        let exit = self
            .run(PROBE_SCRIPT, argv, image, &draft, PROBE_TIMEOUT, layers, runner, log)
            .await?;
        match exit {
            StepExit::Exited(0) => {}
            StepExit::Exited(EXIT_NO_PYTHON) => return Err(BundleError::NoPython),
            exit => return Err(BundleError::Probe { reason: describe(exit) }),
        }
        let path = draft.fs().join("probe.txt");
        let text = fs::read_to_string(&path).map_err(|source| BundleError::Io {
            action: "read",
            path,
            source,
        })?;
        let platform = parse_probe(&text).ok_or_else(|| BundleError::Probe {
            reason: format!("it answered {:?}", shorten(&text)),
        })?;
        layers.put_note(&note_key, text.as_bytes())?;
        Ok(platform)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "what a step needs; a struct would be named once"
    )]
    async fn build(
        &self,
        version: &str,
        python: &str,
        image: &BuiltImage,
        draft: &LayerDraft,
        layers: &LayerStore,
        runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<(), BundleError> {
        let pins = if self.config.accepts_older_pins {
            "accept-older-pins"
        } else {
            "exact-pins"
        };
        let mut argv = vec![OUTPUT_TARGET.to_owned(), version.to_owned(), pins.to_owned()];
        argv.extend(WEB_SERVER_REQUIREMENTS.iter().map(|pin| (*pin).to_owned()));
        let exit = self
            .run(
                BUILD_SCRIPT,
                argv,
                image,
                draft,
                self.config.timeout,
                layers,
                runner,
                log,
            )
            .await?;
        let left = draft.fs().join("failure.txt");
        let reason = || match fs::read_to_string(&left) {
            Ok(text) => shorten(&text),
            Err(_) => describe(exit),
        };
        match exit {
            StepExit::Exited(0) => {}
            StepExit::Exited(EXIT_NO_PYTHON) => return Err(BundleError::NoPython),
            StepExit::Exited(EXIT_NO_PIP) => return Err(BundleError::NoPip { reason: reason() }),
            StepExit::Exited(_) | StepExit::Signaled(_) | StepExit::OutOfMemory | StepExit::TimedOut => {
                let (version, python) = (version.to_owned(), python.to_owned());
                return Err(BundleError::Failed {
                    version,
                    python,
                    reason: reason(),
                });
            }
        }
        for name in ["pkg/modal/__init__.py", "pkg/sitecustomize.py", "deps", "extra/uvicorn"] {
            let path = draft.fs().join(name);
            fs::metadata(&path).map_err(|source| BundleError::Io {
                action: "find",
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// Runs a script in the image with `draft.fs()` as its output; what it changes elsewhere is dropped
    /// with the draft's work directory.
    #[expect(
        clippy::too_many_arguments,
        reason = "what a step needs; a struct would be named once"
    )]
    async fn run(
        &self,
        script: &str,
        arguments: Vec<String>,
        image: &BuiltImage,
        draft: &LayerDraft,
        timeout: Duration,
        layers: &LayerStore,
        runner: &dyn StepRunner,
        log: &BuildLog,
    ) -> Result<StepExit, BundleError> {
        let (upper_dir, work_dir) = (draft.work().join("upper"), draft.work().join("work"));
        for path in [&upper_dir, &work_dir] {
            fs::create_dir(path).map_err(|source| BundleError::Io {
                action: "create",
                path: path.clone(),
                source,
            })?;
        }
        let mut argv: Vec<String> = ["/bin/sh", "-c", FIND_PYTHON, script].map(str::to_owned).to_vec();
        argv.extend(arguments);
        let mut binds = self.config.binds.clone();
        binds.push(StepBind {
            source: draft.fs().to_owned(),
            target: OUTPUT_TARGET.to_owned(),
            read_only: false,
        });
        // Cancelled when the caller gives up, so that the step does not outlive its draft.
        let cancel = CancellationToken::new();
        let _cancel_on_drop = cancel.clone().drop_guard();
        let step = StepExecution {
            lower_dirs: image.layers.iter().map(|key| layers.fs_path(key)).collect(),
            upper_dir,
            work_dir,
            argv,
            env: step_env(image, &self.config.pip_env),
            workdir: "/".to_owned(),
            user: None,
            binds,
            gpu: None,
            has_network: true,
            timeout,
            cancel,
        };
        Ok(runner.run(step, log).await?)
    }
}

/// The image's variables, without those that would bend Python or pip, and then the site's.
fn step_env(image: &BuiltImage, pip_env: &[(String, String)]) -> Vec<(String, String)> {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let mut env = vec![
        pair("PATH", DEFAULT_PATH),
        pair("HOME", "/root"),
        pair("PYTHONDONTWRITEBYTECODE", "1"),
        pair("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
        pair("PIP_NO_INPUT", "1"),
        pair("PIP_ROOT_USER_ACTION", "ignore"),
        // A marker of the distribution protects the system's packages; nothing is installed there.
        pair("PIP_BREAK_SYSTEM_PACKAGES", "1"),
    ];
    let bends = |name: &str| name.starts_with("PIP_") || name.starts_with("PYTHON") || name == "HOME";
    let image_env = image.config.env.iter().filter(|(name, _)| !bends(name));
    for (name, value) in image_env.chain(pip_env) {
        env.retain(|(known, _)| known != name);
        env.push((name.clone(), value.clone()));
    }
    env
}

fn bundle_in(layer: &Path) -> ClientBundle {
    ClientBundle {
        pkg_dir: layer.join("pkg"),
        deps_dir: layer.join("deps"),
        extra_dir: layer.join("extra"),
    }
}

fn bundle_key(version: &str, platform: &PythonPlatform) -> String {
    let pins = WEB_SERVER_REQUIREMENTS.join(" ");
    let PythonPlatform { cache_tag, minor, libc } = platform;
    layer_key(&[
        RECIPE_VERSION,
        version,
        cache_tag,
        minor,
        libc,
        std::env::consts::ARCH,
        &pins,
    ])
}

fn parse_probe(text: &str) -> Option<PythonPlatform> {
    let mut lines = text.lines().map(str::trim);
    let mut next = || {
        lines
            .next()
            .filter(|line| !line.is_empty() && line.len() <= 64)
            .map(str::to_owned)
    };
    Some(PythonPlatform {
        cache_tag: next()?,
        minor: next()?,
        libc: next()?,
    })
}

/// Only what a release of the client can be called: it becomes part of a command line and of a URL.
fn check_version(text: &str) -> Result<String, BundleError> {
    let invalid = || BundleError::InvalidVersion {
        version: text.chars().take(64).collect(),
    };
    let mut numbers = Vec::new();
    let mut suffix = None;
    for part in text.split('.') {
        if suffix.is_some() || numbers.len() > 3 {
            return Err(invalid());
        }
        match part.parse::<u32>() {
            // `parse` takes a sign too, and no release is written `01`.
            Ok(number) if number.to_string() == part => numbers.push(number),
            Ok(_) => return Err(invalid()),
            Err(_) => suffix = Some(part),
        }
    }
    // `1.6.5.dev3`; and `1.6.5rc1`, whose last number carries the suffix.
    let is_digits = |text: &str| !text.is_empty() && text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some(suffix) = suffix {
        let dev = suffix.strip_prefix("dev").is_some_and(is_digits) && numbers.len() == 3;
        let candidate = suffix
            .split_once("rc")
            .filter(|(number, rc)| is_digits(number) && is_digits(rc));
        match candidate {
            Some((number, _)) if numbers.len() == 2 => numbers.push(number.parse().map_err(|_| invalid())?),
            Some(_) | None if dev => {}
            Some(_) | None => return Err(invalid()),
        }
    }
    if numbers.len() != 3 {
        return Err(invalid());
    }
    let oldest: Vec<u32> = OLDEST_CLIENT.split('.').filter_map(|part| part.parse().ok()).collect();
    if numbers < oldest {
        return Err(BundleError::TooOld {
            version: text.to_owned(),
        });
    }
    Ok(text.to_owned())
}

fn describe(exit: StepExit) -> String {
    match exit {
        StepExit::Exited(code) => format!("it exited with status {code}; the log has its output"),
        StepExit::Signaled(signal) => format!("it was ended by signal {signal}"),
        StepExit::OutOfMemory => "it ran out of memory".to_owned(),
        StepExit::TimedOut => "it took too long".to_owned(),
    }
}

fn shorten(text: &str) -> String {
    let text = text.trim();
    let start = text.len().saturating_sub(MAX_REASON_BYTES);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[start..].to_owned()
}

/// For the fuzzers.
pub(crate) fn fuzz(text: &str) {
    let _platform = parse_probe(text);
    if let Ok(version) = check_version(text) {
        assert!(version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_checked_strictly() {
        for version in ["1.5.4", "1.6.4", "1.10.0", "2.0.0", "1.6.5.dev12", "1.7.0rc1"] {
            assert_eq!(check_version(version).unwrap(), version);
        }
        for version in ["1.5.3", "0.64.0", "1.4.99.dev1", "1.5.3rc1"] {
            assert!(
                matches!(check_version(version), Err(BundleError::TooOld { .. })),
                "{version}"
            );
        }
        for version in [
            "",
            "1",
            "1.6",
            "1.6.4.1",
            "1.6.4 --index-url=http://evil",
            "1.6.4\n",
            "../1.6.4",
            "1.6.x",
            "v1.6.4",
            "+1.6.4",
            "01.6.4",
            "1.6.4+local",
            "1.6.4.dev",
            "1.6.4.dev1.dev2",
            "1.6.rc1",
            "1.6.4;rm",
            "1.6.99999999999",
            "1.6.4rc1.dev1",
        ] {
            assert!(
                matches!(check_version(version), Err(BundleError::InvalidVersion { .. })),
                "{version:?}"
            );
        }
    }

    #[test]
    fn a_bundle_belongs_to_one_client_one_python_and_one_libc() {
        let platform = |minor: &str, libc: &str| PythonPlatform {
            cache_tag: format!("cpython-{}", minor.replace('.', "")),
            minor: minor.to_owned(),
            libc: libc.to_owned(),
        };
        let key = |version: &str, minor: &str, libc: &str| bundle_key(version, &platform(minor, libc));
        let one = key("1.6.4", "3.11", "glibc 2.36");
        assert_eq!(one, key("1.6.4", "3.11", "glibc 2.36"));
        assert_ne!(one, key("1.5.4", "3.11", "glibc 2.36"));
        assert_ne!(one, key("1.6.4", "3.13", "glibc 2.36"));
        assert_ne!(one, key("1.6.4", "3.11", "glibc 2.41"));
    }

    #[test]
    fn the_images_variables_do_not_bend_pip() {
        let mut image = BuiltImage::default();
        for (name, value) in [
            ("PATH", "/opt/bin"),
            ("PIP_TARGET", "/x"),
            ("PYTHONPATH", "/y"),
            ("LANG", "C.UTF-8"),
        ] {
            image.config.env.push((name.to_owned(), value.to_owned()));
        }
        let env = step_env(
            &image,
            &[("PIP_INDEX_URL".to_owned(), "https://index.example/".to_owned())],
        );
        let value = |name: &str| {
            env.iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| value.as_str())
        };
        assert_eq!(value("PATH"), Some("/opt/bin"));
        assert_eq!(value("LANG"), Some("C.UTF-8"));
        assert_eq!(value("PIP_INDEX_URL"), Some("https://index.example/"));
        assert_eq!((value("PIP_TARGET"), value("PYTHONPATH")), (None, None));
    }

    #[test]
    fn a_probe_that_says_too_little_is_no_answer() {
        let platform = parse_probe("cpython-311\n3.11\nglibc 2.36\n").unwrap();
        assert_eq!(
            (platform.minor.as_str(), platform.libc.as_str()),
            ("3.11", "glibc 2.36")
        );
        assert_eq!(parse_probe("cpython-311\n3.11\n"), None);
        assert_eq!(parse_probe(&"x".repeat(100)), None);
    }

    #[test]
    fn long_reasons_keep_their_end() {
        let text = format!("{}é the end", "ä".repeat(4000));
        let short = shorten(&text);
        assert!(short.len() <= MAX_REASON_BYTES && short.ends_with("the end"));
    }
}
