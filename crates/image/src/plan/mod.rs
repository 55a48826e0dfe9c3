//! Turns a Dockerfile into steps. Pure: no file, network or clock is looked at, and the same request
//! gives the same plan.
//!
//! It works in two turns, because variables depend on the base image's environment: [`outline`] finds the
//! stages that the last one needs and the images they rest on; once those are resolved, `Outline::plan`
//! makes the steps. Every step has an identity: a digest of everything that decides what it produces,
//! except for the layers below it, which the engine adds when it knows them.

mod planner;
mod stages;
mod transfer;

use std::collections::BTreeMap;

use ionian_domain::image::ImageConfig;
use serde::Serialize;

use crate::context::{ContextFile, ContextItem, ContextTree};
use crate::dockerfile::{DockerfileError, Heredoc};
use crate::trust::HostTrust;

pub use stages::{Outline, StageBase, outline};

/// Part of every key. Raise it when the engine comes to produce something else from the same step.
pub(crate) const ENGINE_VERSION: &str = "ionian-step-1";

/// The `PATH` of images that set none, as every OCI builder has it.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a script from a heredoc is seen: `/dev` is no part of the image, so nothing is left behind.
pub(crate) const SCRIPT_TARGET: &str = "/dev/.ionian-heredoc";

/// What a plan depends on besides the Dockerfile and its base images.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlanInputs<'a> {
    pub(crate) build_args: &'a BTreeMap<String, String>,
    pub(crate) context: &'a ContextTree,
    /// Names of the variables that secrets provide; their values decide no key.
    pub(crate) secret_names: &'a [String],
    pub(crate) builder_version: &'a str,
    pub(crate) gpu: Option<&'a str>,
    pub(crate) trust: &'a HostTrust,
    /// Configurations of the images that stages rest on, by the name that `FROM` uses.
    pub(crate) images: &'a BTreeMap<String, ImageConfig>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildPlan {
    /// In the order of the Dockerfile; the last one is the result.
    pub stages: Vec<StagePlan>,
    /// How many steps all stages have together.
    pub total: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    pub base: StageBase,
    /// The `FROM` line, for the log.
    pub text: String,
    pub number: usize,
    pub steps: Vec<Step>,
    /// What the stage's image is configured to, once all steps are done.
    pub config: ImageConfig,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Counted from 1 over all stages.
    pub number: usize,
    /// As written, secrets and variables unexpanded.
    pub text: String,
    pub line: usize,
    /// `None` for instructions that change the configuration only: they make no layer.
    pub work: Option<Work>,
}

/// What makes a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Created first where they are missing: what earlier `WORKDIR`s asked for.
    pub directories: Vec<String>,
    pub action: Action,
    /// 64 hexadecimal digits over everything above.
    pub identity: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Action {
    Run(RunAction),
    Copy(CopyAction),
    /// Only the directories.
    Directories,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunAction {
    pub argv: Vec<String>,
    /// Without secrets and host settings, which the engine adds.
    pub env: Vec<(String, String)>,
    pub workdir: String,
    pub user: Option<String>,
    pub mounts: Vec<PlannedMount>,
    pub has_network: bool,
    pub gpu: Option<String>,
    /// Content of an executable file at `SCRIPT_TARGET`.
    pub script: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum PlannedMount {
    Bind {
        source: BindSource,
        target: String,
        read_only: bool,
    },
    Cache {
        id: String,
        target: String,
        mode: u32,
        uid: u32,
        gid: u32,
        exclusive: bool,
    },
    Secret {
        name: String,
        file: Option<SecretFile>,
        env: Option<String>,
        required: bool,
    },
    Tmpfs {
        target: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretFile {
    pub target: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum BindSource {
    Context(ContextItem),
    Layers { source: LayersSource, path: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyAction {
    pub source: CopySource,
    /// Absolute, without `.` and `..`.
    pub destination: String,
    /// Whether the destination is a directory even where nothing stands there yet.
    pub into_directory: bool,
    /// `user[:group]`, to be looked up in the image.
    pub chown: Option<String>,
    pub chmod: Option<u32>,
    /// Whether tar archives are unpacked (`ADD`).
    pub extract: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum CopySource {
    /// From the build context, and files whose content stands in the Dockerfile: (name, content).
    Context {
        items: Vec<ContextItem>,
        inline: Vec<(String, String)>,
    },
    /// From other layers: patterns without a leading slash.
    Layers {
        source: LayersSource,
        patterns: Vec<String>,
    },
}

/// Layers other than the ones below: their chain is part of the step's key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum LayersSource {
    /// Index into [`BuildPlan::stages`].
    Stage(usize),
    Image(String),
}

impl Work {
    /// The other layers that this step reads.
    pub fn sources(&self) -> Vec<&LayersSource> {
        match &self.action {
            Action::Copy(CopyAction {
                source: CopySource::Layers { source, .. },
                ..
            }) => vec![source],
            Action::Run(run) => run
                .mounts
                .iter()
                .filter_map(|mount| match mount {
                    PlannedMount::Bind {
                        source: BindSource::Layers { source, .. },
                        ..
                    } => Some(source),
                    PlannedMount::Bind {
                        source: BindSource::Context(_),
                        ..
                    }
                    | PlannedMount::Cache { .. }
                    | PlannedMount::Secret { .. }
                    | PlannedMount::Tmpfs { .. } => None,
                })
                .collect(),
            Action::Copy(_) | Action::Directories => Vec::new(),
        }
    }
}

/// What stands in a `FROM` or `--from` and must be brought from elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageUse {
    pub reference: String,
    /// Whether a stage rests on it. Otherwise only files are copied from it.
    pub is_base: bool,
}

/// Joins a path onto a working directory and removes `.`, `..` and doubled slashes.
pub(crate) fn join_path(workdir: &str, path: &str) -> String {
    let mut components: Vec<&str> = Vec::new();
    let base = if path.starts_with('/') { "" } else { workdir };
    for component in base.split('/').chain(path.split('/')) {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            name => components.push(name),
        }
    }
    format!("/{}", components.join("/"))
}

/// A heredoc's content with its variables replaced where its name was not quoted.
fn heredoc_content(heredoc: &Heredoc, escape: char, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    if !heredoc.expands {
        return Ok(heredoc.content.clone());
    }
    // Quotes mean nothing in a heredoc, and the lexer would remove them.
    let guarded: String = heredoc
        .content
        .chars()
        .flat_map(|c| {
            if c == '"' || c == '\'' {
                vec![escape, c]
            } else {
                vec![c]
            }
        })
        .collect();
    crate::dockerfile::words::expand(&guarded, escape, lookup).map_err(|error| error.to_string())
}

fn is_file(item: &ContextItem) -> Option<&ContextFile> {
    match item {
        ContextItem::File(file) => Some(file),
        ContextItem::Directory(_) => None,
    }
}

#[cfg(test)]
mod tests;
