//! Looks at a finished image: which Python it has, which C library, which distributions.
//!
//! What it finds is kept beside the layers, so that a stack of layers is inspected once.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ionian_domain::image::{ImageConfig, ImageMetadata};
use rustix::fs::FileType;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::build::{BuildError, BuilderConfig};
use crate::layers::{Begin, layer_key};
use crate::plan::{DEFAULT_PATH, ENGINE_VERSION};
use crate::rooted::Rooted;
use crate::step::{BuildLog, LogStream, StepError, StepExecution, StepExit};

/// An interpreter that does not answer within this time is not usable.
const INTERPRETER_TIMEOUT: Duration = Duration::from_mins(1);

/// What an interpreter may say about itself.
const MAX_ANSWER_BYTES: usize = 256 * 1024;

/// The C library is about 2 MB; larger files are something else.
const MAX_LIBC_BYTES: u64 = 32 * 1024 * 1024;

/// Stands before the answer, because start-up files of the image may print too.
const MARKER: &str = "ionian-inspection:";

/// Isolated (`-I`), so that variables and the working directory of the image do not matter.
const QUESTION: &str = "import json,sys\nlibc=None\ntry:\n import os\n libc=os.confstr('CS_GNU_LIBC_VERSION')\nexcept Exception:\n pass\n\
                        print('ionian-inspection:'+json.dumps({'version':sys.version,'libc':libc,'path':sys.path}),flush=True)";

#[derive(Debug, Deserialize)]
struct Answer {
    version: String,
    libc: Option<String>,
    path: Vec<String>,
}

/// What is seen without running anything.
struct Surface {
    interpreter: Option<String>,
    libc: Option<String>,
}

pub(crate) async fn inspect(
    builder: &BuilderConfig,
    layers: &[String],
    config: &ImageConfig,
    log: &BuildLog,
    cancel: &CancellationToken,
) -> Result<ImageMetadata, BuildError> {
    if layers.is_empty() {
        return Ok(ImageMetadata::default());
    }
    let path = variable(config, "PATH").unwrap_or(DEFAULT_PATH).to_owned();
    let mut parts = vec![ENGINE_VERSION, "inspection", path.as_str()];
    parts.extend(layers.iter().map(String::as_str));
    let key = layer_key(&parts);
    if let Some(known) = known(builder, &key)? {
        return Ok(known);
    }
    // The draft is where the interpreter runs; it is never committed, so it is only ever discarded.
    let Begin::Build(draft) = builder.layers.begin(&key).await? else {
        return Err(BuildError::TaskLost);
    };
    if let Some(known) = known(builder, &key)? {
        return Ok(known);
    }
    let lower_dirs: Vec<PathBuf> = layers.iter().map(|key| builder.layers.fs_path(key)).collect();
    let failed = |source| BuildError::Inspect { source };
    let surface = {
        let view = builder.runner.mount(&lower_dirs, None).await.map_err(failed)?;
        let root = view.path().to_owned();
        blocking(move || surface(&root, &path)).await?
    };
    let mut metadata = ImageMetadata {
        libc_version_info: surface.libc,
        ..ImageMetadata::default()
    };
    let mut is_final = true;
    let answer = match surface.interpreter {
        None => None,
        Some(interpreter) => {
            let step = StepExecution {
                lower_dirs: lower_dirs.clone(),
                upper_dir: draft.fs().to_owned(),
                work_dir: draft.work().to_owned(),
                argv: vec![interpreter, "-I".to_owned(), "-c".to_owned(), QUESTION.to_owned()],
                env: environment(config),
                workdir: "/".to_owned(),
                user: None,
                binds: Vec::new(),
                has_network: false,
                gpu: None,
                timeout: INTERPRETER_TIMEOUT,
                cancel: cancel.child_token(),
            };
            let (exit, output) = run_quietly(builder, step).await.map_err(|error| match error {
                StepError::Cancelled => BuildError::Cancelled,
                source @ StepError::Runtime { .. } => BuildError::Inspect { source },
            })?;
            let answer = parse(&output);
            if answer.is_none() {
                log.line(format!(
                    "The image's Python does not answer ({exit:?}): functions cannot run on this image."
                ))
                .await;
                // A busy machine is no property of the image.
                is_final = matches!(exit, StepExit::Exited(_));
            }
            answer
        }
    };
    if let Some(answer) = answer {
        metadata.python_version_info = Some(format!("Python {}", answer.version.replace('\n', " ")));
        metadata.libc_version_info = answer
            .libc
            .filter(|libc| !libc.is_empty())
            .or(metadata.libc_version_info);
        let view = builder.runner.mount(&lower_dirs, None).await.map_err(failed)?;
        let root = view.path().to_owned();
        metadata.python_packages = blocking(move || distributions(&root, &answer.path)).await?;
    }
    let text = serde_json::to_vec(&metadata).map_err(|error| io_error(io::Error::other(error)))?;
    if is_final {
        builder.layers.put_note(&key, &text)?;
    }
    Ok(metadata)
}

fn known(builder: &BuilderConfig, key: &str) -> Result<Option<ImageMetadata>, BuildError> {
    // A note of an older form is made anew.
    Ok(builder
        .layers
        .find_note(key)?
        .and_then(|text| serde_json::from_slice(&text).ok()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| BuildError::TaskLost)?
        .map_err(io_error)
}

fn io_error(source: io::Error) -> BuildError {
    BuildError::Io {
        action: "inspect the image".to_owned(),
        source,
    }
}

/// Runs a step whose standard output is for us and not for the log.
async fn run_quietly(builder: &BuilderConfig, step: StepExecution) -> Result<(StepExit, Vec<u8>), StepError> {
    let (log, mut chunks) = BuildLog::channel();
    let run = async move { builder.runner.run(step, &log).await };
    let collect = async {
        let mut output = Vec::new();
        while let Some(chunk) = chunks.recv().await {
            let room = MAX_ANSWER_BYTES.saturating_sub(output.len());
            if chunk.stream == LogStream::Stdout {
                output.extend_from_slice(&chunk.bytes[..chunk.bytes.len().min(room)]);
            }
        }
        output
    };
    let (exit, output) = tokio::join!(run, collect);
    Ok((exit?, output))
}

fn parse(output: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().rev().find_map(|line| line.split_once(MARKER))?.1;
    serde_json::from_str(line).ok()
}

fn environment(config: &ImageConfig) -> Vec<(String, String)> {
    let mut env = config.env.clone();
    if env.iter().all(|(name, _)| name != "PATH") {
        env.push(("PATH".to_owned(), DEFAULT_PATH.to_owned()));
    }
    env
}

fn variable<'a>(config: &'a ImageConfig, name: &str) -> Option<&'a str> {
    config
        .env
        .iter()
        .rev()
        .find(|(other, _)| other == name)
        .map(|(_, value)| value.as_str())
}

fn surface(root: &Path, path: &str) -> io::Result<Surface> {
    let root = Rooted::open(root)?;
    let mut interpreter = None;
    // As the client runs it: `python` before `python3`, each along the whole PATH.
    'names: for name in ["python", "python3"] {
        for dir in path.split(':').filter(|dir| dir.starts_with('/')) {
            let candidate = Path::new(dir).join(name);
            let is_program = root.find(&candidate).unwrap_or_default().is_some_and(|stat| {
                FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_mode & 0o111 != 0
            });
            if is_program {
                interpreter = Some(candidate.display().to_string());
                break 'names;
            }
        }
    }
    Ok(Surface {
        interpreter,
        libc: libc_of(&root)?,
    })
}

fn libc_of(root: &Rooted) -> io::Result<Option<String>> {
    let machine = std::env::consts::ARCH;
    if root.find(Path::new(&format!("lib/ld-musl-{machine}.so.1")))?.is_some() {
        return Ok(Some("musl".to_owned()));
    }
    for dir in [
        format!("lib/{machine}-linux-gnu"),
        "lib64".to_owned(),
        "usr/lib64".to_owned(),
        "usr/lib".to_owned(),
    ] {
        if let Some(content) = root.read(&Path::new(&dir).join("libc.so.6"), MAX_LIBC_BYTES)?
            && let Some(version) = glibc_version(&content)
        {
            return Ok(Some(format!("glibc {version}")));
        }
    }
    Ok(None)
}

/// The library holds the banner that it prints when it is run as a program.
fn glibc_version(library: &[u8]) -> Option<String> {
    let banner = b"stable release version ";
    let at = library.windows(banner.len()).position(|window| window == banner)? + banner.len();
    let version: String = library[at..]
        .iter()
        .map(|byte| char::from(*byte))
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .take(16)
        .collect();
    let version = version.trim_end_matches('.').to_owned();
    (!version.is_empty()).then_some(version)
}

/// Installed distributions, by the names of their metadata. The first directory of the path wins.
fn distributions(root: &Path, path: &[String]) -> io::Result<BTreeMap<String, String>> {
    let root = Rooted::open(root)?;
    let mut found = BTreeMap::new();
    for dir in path.iter().filter(|dir| dir.starts_with('/')) {
        // A path entry may be a zip file or lead out of the tree: then it holds nothing for us.
        for name in root.list(Path::new(dir)).unwrap_or_default() {
            if let Some((name, version)) = distribution(&name) {
                found.entry(name).or_insert(version);
            }
        }
    }
    Ok(found)
}

fn distribution(name: &OsStr) -> Option<(String, String)> {
    let name = name.to_str()?;
    let stem = name
        .strip_suffix(".dist-info")
        .or_else(|| name.strip_suffix(".egg-info"))?;
    let (name, version) = stem.split_once('-')?;
    // Eggs append the version of Python.
    let version = version.split("-py").next()?;
    (!name.is_empty() && !version.is_empty())
        .then(|| (name.to_ascii_lowercase().replace(['_', '.'], "-"), version.to_owned()))
}

/// For the fuzzers.
pub(crate) fn fuzz(output: &[u8]) {
    let _answer = parse(output);
    let _version = glibc_version(output);
    let _distribution = distribution(std::os::unix::ffi::OsStrExt::from_bytes(output));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_known_by_their_metadata() {
        let known = |name: &str| distribution(OsStr::new(name));
        let pair = |name: &str, version: &str| Some((name.to_owned(), version.to_owned()));
        assert_eq!(
            known("typing_extensions-4.12.2.dist-info"),
            pair("typing-extensions", "4.12.2")
        );
        assert_eq!(known("PyYAML-6.0.dist-info"), pair("pyyaml", "6.0"));
        assert_eq!(known("python_apt-2.6.0-py3.11.egg-info"), pair("python-apt", "2.6.0"));
        assert_eq!(known("distutils-precedence.pth"), None);
        assert_eq!(known("nothing.dist-info"), None);
    }

    #[test]
    fn the_answer_is_found_among_other_output() {
        let output = b"hello from sitecustomize\nionian-inspection:{\"version\":\"3.11.2 (main)\\n[GCC]\",\"libc\":\"glibc 2.36\",\"path\":[\"\"]}\n";
        assert_eq!(parse(output).unwrap().libc.as_deref(), Some("glibc 2.36"));
        assert!(parse(b"garbage").is_none());
    }

    #[test]
    fn glibc_says_its_version() {
        assert_eq!(
            glibc_version(b"\0GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\nCopyright").as_deref(),
            Some("2.36")
        );
        assert_eq!(glibc_version(b"nothing"), None);
    }
}
