//! Stages: which of them the result needs, what they rest on, and what they copy from.

use std::collections::{BTreeMap, BTreeSet};

use ionian_domain::image::ImageConfig;

use super::planner::{MAX_PLAN_BYTES, StagePlanner};
use super::{BuildPlan, DockerfileError, ImageUse, LayersSource, PlanInputs, StagePlan};
use crate::dockerfile::{Dockerfile, InstructionKind, RunMount, Transfer, words};

/// overlayfs stacks at most 500 layers; an image also has those of its base.
const MAX_LAYERS_PER_STAGE: usize = 400;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StageBase {
    Scratch,
    /// As `FROM` names it: one of the request's base images, or a reference.
    Image(String),
    /// Index into [`BuildPlan::stages`].
    Stage(usize),
}

/// The stages that the result needs, before their base images are known.
#[derive(Debug, Clone)]
pub struct Outline {
    pub(super) dockerfile: Dockerfile,
    stages: Vec<StageOutline>,
    pub(super) global_args: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub(super) struct StageOutline {
    base: StageBase,
    /// The `FROM` line.
    from: usize,
    /// The instructions below it.
    instructions: std::ops::Range<usize>,
    /// What each `--from` of the stage means, by the word it uses.
    pub(super) sources: BTreeMap<String, LayersSource>,
}

/// Finds the stages that the last one needs.
pub fn outline(text: &str, build_args: &BTreeMap<String, String>) -> Result<Outline, DockerfileError> {
    let dockerfile = Dockerfile::parse(text)?;
    let (all, global_args) = all_stages(&dockerfile, build_args)?;
    let needed = needed_stages(&all);
    // Stages that nothing needs are dropped, and what refers to the others moves with them.
    let position = |stage: usize| needed.iter().position(|kept| *kept == stage).unwrap_or_default();
    let stages = needed
        .iter()
        .map(|index| {
            let mut stage = all[*index].clone();
            if let StageBase::Stage(base) = stage.base {
                stage.base = StageBase::Stage(position(base));
            }
            for source in stage.sources.values_mut() {
                if let LayersSource::Stage(other) = source {
                    *other = position(*other);
                }
            }
            stage
        })
        .collect();
    Ok(Outline {
        dockerfile,
        stages,
        global_args,
    })
}

fn all_stages(
    dockerfile: &Dockerfile,
    build_args: &BTreeMap<String, String>,
) -> Result<(Vec<StageOutline>, BTreeMap<String, String>), DockerfileError> {
    let mut globals = platform_args();
    let mut global_args = BTreeMap::new();
    let mut stages: Vec<StageOutline> = Vec::new();
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (at, instruction) in dockerfile.instructions.iter().enumerate() {
        let refuse = |problem: String| DockerfileError::at(instruction, problem);
        if let InstructionKind::From { image, platform, alias } = &instruction.kind {
            let lookup = |name: &str| globals.get(name).cloned();
            let image = words::expand(image, dockerfile.escape, &lookup).map_err(|error| refuse(error.to_string()))?;
            if image.is_empty() {
                return Err(refuse(
                    "the name of the base image is empty: set the ARG it uses".to_owned(),
                ));
            }
            if let Some(platform) = platform {
                let platform =
                    words::expand(platform, dockerfile.escape, &lookup).map_err(|error| refuse(error.to_string()))?;
                check_platform(&platform).map_err(refuse)?;
            }
            let base = match names.get(&image.to_ascii_lowercase()) {
                Some(stage) => StageBase::Stage(*stage),
                None if image == "scratch" => StageBase::Scratch,
                None => StageBase::Image(image),
            };
            if let Some(alias) = alias {
                names.insert(alias.clone(), stages.len());
            }
            stages.push(StageOutline {
                base,
                from: at,
                instructions: at + 1..at + 1,
                sources: BTreeMap::new(),
            });
            continue;
        }
        let index = stages.len();
        let Some(stage) = stages.last_mut() else {
            let InstructionKind::Arg(arguments) = &instruction.kind else {
                return Err(refuse("the Dockerfile must begin with FROM".to_owned()));
            };
            for (name, default) in arguments {
                let lookup = |name: &str| globals.get(name).cloned();
                let default = default
                    .as_ref()
                    .map(|word| words::expand(word, dockerfile.escape, &lookup))
                    .transpose();
                let default = default.map_err(|error| refuse(error.to_string()))?;
                if let Some(value) = build_args.get(name).cloned().or(default) {
                    globals.insert(name.clone(), value.clone());
                    global_args.insert(name.clone(), value);
                }
            }
            continue;
        };
        stage.instructions.end = at + 1;
        for word in from_words(&instruction.kind) {
            if word.contains('$') {
                return Err(refuse(
                    "variables are not allowed in --from: name the stage or the image".to_owned(),
                ));
            }
            let own = index - 1;
            let by_number = word.parse::<usize>().ok();
            let source = match names.get(&word.to_ascii_lowercase()).copied().or(by_number) {
                Some(stage) if stage < own => LayersSource::Stage(stage),
                Some(_) => return Err(refuse(format!("--from={word} is not a stage above this one"))),
                None => LayersSource::Image(word.to_owned()),
            };
            stage.sources.insert(word.to_owned(), source);
        }
    }
    if stages.is_empty() {
        return Err(DockerfileError::new(
            0,
            "the Dockerfile is empty: it must begin with FROM",
        ));
    }
    Ok((stages, global_args))
}

fn from_words(kind: &InstructionKind) -> Vec<&str> {
    match kind {
        InstructionKind::Copy(Transfer { from, .. }) => from.iter().map(String::as_str).collect(),
        InstructionKind::Run(run) => run
            .mounts
            .iter()
            .filter_map(|mount| match mount {
                RunMount::Bind { from, .. } => from.as_deref(),
                RunMount::Cache { .. } | RunMount::Secret { .. } | RunMount::Tmpfs { .. } => None,
            })
            .collect(),
        InstructionKind::From { .. }
        | InstructionKind::Add(_)
        | InstructionKind::Env(_)
        | InstructionKind::Arg(_)
        | InstructionKind::Workdir(_)
        | InstructionKind::User(_)
        | InstructionKind::Shell(_)
        | InstructionKind::Entrypoint(_)
        | InstructionKind::Cmd(_)
        | InstructionKind::Label(_)
        | InstructionKind::Inert => Vec::new(),
    }
}

fn needed_stages(all: &[StageOutline]) -> Vec<usize> {
    let mut needed = BTreeSet::new();
    let mut waiting = vec![all.len() - 1];
    while let Some(stage) = waiting.pop() {
        if !needed.insert(stage) {
            continue;
        }
        if let StageBase::Stage(base) = all[stage].base {
            waiting.push(base);
        }
        waiting.extend(all[stage].sources.values().filter_map(|source| match source {
            LayersSource::Stage(other) => Some(*other),
            LayersSource::Image(_) => None,
        }));
    }
    needed.into_iter().collect()
}

/// The platform that this host builds for, as Docker names it.
fn host_platform() -> (&'static str, &'static str) {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    ("linux", architecture)
}

fn check_platform(platform: &str) -> Result<(), String> {
    let (os, architecture) = host_platform();
    let mut parts = platform.splitn(3, '/');
    let fits = parts.next() == Some(os) && parts.next() == Some(architecture);
    if fits || platform.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this host builds for {os}/{architecture} only, not for {platform}"
    ))
}

/// Arguments that a stage may ask for by `ARG` without anybody setting them.
pub(super) fn platform_args() -> BTreeMap<String, String> {
    let (os, architecture) = host_platform();
    ["TARGET", "BUILD"]
        .iter()
        .flat_map(|side| {
            [
                (format!("{side}PLATFORM"), format!("{os}/{architecture}")),
                (format!("{side}OS"), os.to_owned()),
                (format!("{side}ARCH"), architecture.to_owned()),
                (format!("{side}VARIANT"), String::new()),
            ]
        })
        .collect()
}

impl Outline {
    /// The images to resolve before `Outline::plan`, each once, in a fixed order.
    pub fn images(&self) -> Vec<ImageUse> {
        let mut uses = BTreeSet::new();
        for stage in &self.stages {
            if let StageBase::Image(reference) = &stage.base {
                uses.insert(ImageUse {
                    reference: reference.clone(),
                    is_base: true,
                });
            }
            for source in stage.sources.values() {
                if let LayersSource::Image(reference) = source {
                    uses.insert(ImageUse {
                        reference: reference.clone(),
                        is_base: false,
                    });
                }
            }
        }
        uses.into_iter().collect()
    }

    pub(crate) fn plan(&self, inputs: &PlanInputs<'_>) -> Result<BuildPlan, DockerfileError> {
        let mut stages: Vec<StagePlan> = Vec::new();
        let mut number = 0;
        let mut budget = MAX_PLAN_BYTES;
        for stage in &self.stages {
            let base_config = match &stage.base {
                StageBase::Scratch => ImageConfig::default(),
                StageBase::Stage(index) => stages[*index].config.clone(),
                StageBase::Image(name) => inputs.images.get(name).cloned().unwrap_or_default(),
            };
            number += 1;
            let mut planner = StagePlanner::new(self, stage, inputs, base_config, &mut budget);
            let from_number = number;
            for instruction in &self.dockerfile.instructions[stage.instructions.clone()] {
                number += 1;
                planner.push(instruction, number)?;
            }
            let (steps, config) = planner
                .finish()
                .map_err(|problem| DockerfileError::at(&self.dockerfile.instructions[stage.from], problem))?;
            let layers = steps.iter().filter(|step| step.work.is_some()).count();
            if layers > MAX_LAYERS_PER_STAGE {
                let problem = format!(
                    "a stage makes {layers} layers, and {MAX_LAYERS_PER_STAGE} is the most: join its RUN lines"
                );
                return Err(DockerfileError::at(&self.dockerfile.instructions[stage.from], problem));
            }
            stages.push(StagePlan {
                base: stage.base.clone(),
                text: self.dockerfile.instructions[stage.from].text.clone(),
                number: from_number,
                steps,
                config,
            });
        }
        Ok(BuildPlan { stages, total: number })
    }
}
