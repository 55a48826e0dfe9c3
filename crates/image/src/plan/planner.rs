//! The steps of one stage: what every instruction does to the configuration, and what makes a layer.

use std::collections::{BTreeMap, BTreeSet};

use ionian_domain::image::ImageConfig;

use super::stages::{Outline, StageOutline, platform_args};
use super::{
    Action, BindSource, DEFAULT_PATH, DockerfileError, ENGINE_VERSION, LayersSource, PlanInputs, PlannedMount,
    RunAction, SCRIPT_TARGET, SecretFile, Step, Work, join_path, transfer,
};
use crate::dockerfile::{CommandLine, Instruction, InstructionKind, Run, RunMount, RunNetwork, words};
use crate::layers::layer_key;

/// More arguments than this are a mistake.
const MAX_ARGUMENTS: usize = 4096;

/// More variables than this are one, too.
const MAX_VARIABLES: usize = 4096;

/// Names and values of all variables and arguments together. `execve` refuses longer environments; and every `RUN`
/// has a copy.
const MAX_ENVIRONMENT_BYTES: usize = 1024 * 1024;

/// What the steps of one plan may amount to, in the form that their identities are made of: a step is as large as its
/// environment, or as the list of files that it copies.
pub(super) const MAX_PLAN_BYTES: usize = 256 * 1024 * 1024;

/// The state of a stage while its instructions go by.
pub(super) struct StagePlanner<'a> {
    outline: &'a Outline,
    stage: &'a StageOutline,
    pub(super) inputs: &'a PlanInputs<'a>,
    pub(super) config: ImageConfig,
    args: BTreeMap<String, String>,
    cmd_is_set: bool,
    /// Directories of `WORKDIR`s that no layer has made yet, and the step that asked first.
    pending: Vec<String>,
    pending_since: Option<usize>,
    steps: Vec<Step>,
    /// What is left of [`MAX_PLAN_BYTES`] for this stage and the ones behind it.
    budget: &'a mut usize,
}

impl<'a> StagePlanner<'a> {
    pub(super) fn new(
        outline: &'a Outline,
        stage: &'a StageOutline,
        inputs: &'a PlanInputs<'a>,
        config: ImageConfig,
        budget: &'a mut usize,
    ) -> Self {
        Self {
            budget,
            outline,
            stage,
            inputs,
            config,
            args: BTreeMap::new(),
            cmd_is_set: false,
            pending: Vec::new(),
            pending_since: None,
            steps: Vec::new(),
        }
    }

    pub(super) fn escape(&self) -> char {
        self.outline.dockerfile.escape
    }

    /// `ENV` wins over `ARG`, and later `ENV`s over earlier ones.
    pub(super) fn lookup(&self, name: &str) -> Option<String> {
        let set = self
            .config
            .env
            .iter()
            .rev()
            .find(|(other, _)| other == name)
            .map(|(_, value)| value.clone());
        set.or_else(|| self.args.get(name).cloned())
    }

    pub(super) fn expand(&self, word: &str) -> Result<String, String> {
        words::expand(word, self.escape(), &|name| self.lookup(name)).map_err(|error| error.to_string())
    }

    pub(super) fn workdir(&self) -> String {
        self.config.workdir.clone().unwrap_or_else(|| "/".to_owned())
    }

    pub(super) fn source(&self, from: &str) -> LayersSource {
        // `outline` has seen every `--from`; anything else is an image by that name.
        self.stage
            .sources
            .get(from)
            .cloned()
            .unwrap_or_else(|| LayersSource::Image(from.to_owned()))
    }

    /// Takes the next instruction, which is the step with this number.
    pub(super) fn push(&mut self, instruction: &Instruction, number: usize) -> Result<(), DockerfileError> {
        let work = self
            .instruction(&instruction.kind, number)
            .map_err(|problem| DockerfileError::at(instruction, problem))?;
        self.steps.push(Step {
            number,
            text: instruction.text.clone(),
            line: instruction.line,
            work,
        });
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<(Vec<Step>, ImageConfig), String> {
        self.flush_directories()?;
        Ok((self.steps, self.config))
    }

    fn instruction(&mut self, kind: &InstructionKind, number: usize) -> Result<Option<Work>, String> {
        match kind {
            // `outline` has cut the file at every FROM.
            InstructionKind::From { .. } | InstructionKind::Inert => {}
            InstructionKind::Run(run) => {
                let action = Action::Run(self.run(run)?);
                return self.work(action).map(Some);
            }
            InstructionKind::Copy(copy) => {
                let action = Action::Copy(transfer::plan(self, copy, false)?);
                return self.work(action).map(Some);
            }
            InstructionKind::Add(add) => {
                let action = Action::Copy(transfer::plan(self, add, true)?);
                return self.work(action).map(Some);
            }
            InstructionKind::Env(pairs) => {
                // All of one line see the environment before it.
                let pairs: Vec<_> = pairs
                    .iter()
                    .map(|(name, value)| Ok((self.expand(name)?, self.expand(value)?)))
                    .collect::<Result<_, String>>()?;
                for (name, value) in pairs {
                    check_variable(&name, &value)?;
                    match self.config.env.iter_mut().find(|(other, _)| *other == name) {
                        Some(entry) => entry.1 = value,
                        None => self.config.env.push((name, value)),
                    }
                    if self.config.env.len() > MAX_VARIABLES {
                        return Err(format!("an image has more than {MAX_VARIABLES} variables"));
                    }
                }
                self.check_environment()?;
            }
            InstructionKind::Label(pairs) => {
                // No part of our image configuration; expanded to report mistakes.
                for (name, value) in pairs {
                    self.expand(name)?;
                    self.expand(value)?;
                }
            }
            InstructionKind::Arg(arguments) => {
                for (name, default) in arguments {
                    let default = default.as_deref().map(|word| self.expand(word)).transpose()?;
                    let value = self
                        .inputs
                        .build_args
                        .get(name)
                        .cloned()
                        .or(default)
                        .or_else(|| self.outline.global_args.get(name).cloned())
                        .or_else(|| platform_args().remove(name));
                    if let Some(value) = value {
                        check_variable(name, &value)?;
                        self.args.insert(name.clone(), value);
                    }
                    if self.args.len() > MAX_ARGUMENTS {
                        return Err(format!("a stage has more than {MAX_ARGUMENTS} arguments"));
                    }
                }
                self.check_environment()?;
            }
            InstructionKind::Workdir(word) => {
                let path = join_path(&self.workdir(), &self.expand(word)?);
                if path.contains('\0') {
                    return Err("WORKDIR has a zero byte".to_owned());
                }
                if path != "/" && self.config.workdir.as_deref() != Some(path.as_str()) && !self.pending.contains(&path)
                {
                    self.pending.push(path.clone());
                    self.pending_since.get_or_insert(number);
                }
                self.config.workdir = Some(path);
            }
            InstructionKind::User(word) => {
                let user = self.expand(word)?;
                if user.is_empty() {
                    return Err("USER needs a name or a number".to_owned());
                }
                self.config.user = Some(user);
            }
            InstructionKind::Shell(argv) => self.config.shell.clone_from(argv),
            InstructionKind::Entrypoint(command) => {
                self.config.entrypoint = self.argv(command);
                // A command that came with the base was meant for the base's entrypoint.
                if !self.cmd_is_set {
                    self.config.cmd.clear();
                }
            }
            InstructionKind::Cmd(command) => {
                self.config.cmd = self.argv(command);
                self.cmd_is_set = true;
            }
        }
        Ok(None)
    }

    fn argv(&self, command: &CommandLine) -> Vec<String> {
        match command {
            CommandLine::Exec(argv) => argv.clone(),
            CommandLine::Shell(text) if text.is_empty() => Vec::new(),
            CommandLine::Shell(text) => self.shell().into_iter().chain([text.clone()]).collect(),
        }
    }

    fn shell(&self) -> Vec<String> {
        if self.config.shell.is_empty() {
            vec!["/bin/sh".to_owned(), "-c".to_owned()]
        } else {
            self.config.shell.clone()
        }
    }

    fn run(&self, run: &Run) -> Result<RunAction, String> {
        let mut script = None;
        let argv = match (&run.command, run.heredocs.as_slice()) {
            (CommandLine::Exec(argv), _) if argv.is_empty() => return Err("RUN [] has no command".to_owned()),
            (CommandLine::Exec(argv), _) => argv.clone(),
            (CommandLine::Shell(_), []) => self.argv(&run.command),
            // Nothing but a heredoc: its content is the script, with an interpreter of its own or not.
            (CommandLine::Shell(text), [only]) if words::split(text, self.escape()).len() == 1 => {
                if only.content.starts_with("#!") {
                    script = Some(only.content.clone());
                    vec![SCRIPT_TARGET.to_owned()]
                } else {
                    // An empty script is one that does nothing.
                    self.shell().into_iter().chain([only.content.clone()]).collect()
                }
            }
            // The shell understands heredocs itself.
            (CommandLine::Shell(text), several) => {
                let mut full = text.clone();
                for heredoc in several {
                    full.push('\n');
                    full.push_str(&heredoc.content);
                    full.push_str(&heredoc.name);
                }
                full.push('\n');
                self.argv(&CommandLine::Shell(full))
            }
        };
        let mut env = self.config.env.clone();
        let set: BTreeSet<&str> = self.config.env.iter().map(|(name, _)| name.as_str()).collect();
        let args = self.args.iter().filter(|(name, _)| !set.contains(name.as_str()));
        env.extend(args.map(|(name, value)| (name.clone(), value.clone())));
        if env.iter().all(|(name, _)| name != "PATH") {
            env.push(("PATH".to_owned(), DEFAULT_PATH.to_owned()));
        }
        let mounts = run
            .mounts
            .iter()
            .map(|mount| self.mount(mount))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(RunAction {
            argv,
            env,
            workdir: self.workdir(),
            user: self.config.user.clone(),
            mounts,
            has_network: run.network == RunNetwork::Default,
            gpu: self.inputs.gpu.map(str::to_owned),
            script,
        })
    }

    fn mount(&self, mount: &RunMount) -> Result<PlannedMount, String> {
        let target = |word: &str| -> Result<String, String> {
            match join_path(&self.workdir(), &self.expand(word)?) {
                root if root == "/" => Err("a mount cannot cover the root directory".to_owned()),
                path => Ok(path),
            }
        };
        match mount {
            RunMount::Bind {
                from,
                source,
                target: at,
                read_only,
            } => {
                let path = self.expand(source)?;
                let source = match from {
                    Some(from) if *read_only => BindSource::Layers {
                        source: self.source(from),
                        path: join_path("/", &path),
                    },
                    Some(_) => return Err("a bind mount with from= is read-only: leave rw out".to_owned()),
                    None => BindSource::Context(transfer::single(self.inputs.context, &path)?),
                };
                Ok(PlannedMount::Bind {
                    source,
                    target: target(at)?,
                    read_only: *read_only,
                })
            }
            RunMount::Cache {
                id,
                target: at,
                mode,
                uid,
                gid,
                exclusive,
            } => {
                let target = target(at)?;
                let id = id
                    .as_deref()
                    .map(|id| self.expand(id))
                    .transpose()?
                    .unwrap_or_else(|| target.clone());
                Ok(PlannedMount::Cache {
                    id,
                    target,
                    mode: *mode,
                    uid: *uid,
                    gid: *gid,
                    exclusive: *exclusive,
                })
            }
            RunMount::Secret {
                id,
                target: at,
                env,
                required,
                mode,
                uid,
                gid,
            } => {
                // With env= alone there is no file.
                let file = match (at, env) {
                    (None, Some(_)) => None,
                    (Some(at), _) => Some(target(at)?),
                    (None, None) => Some(target(&format!("/run/secrets/{id}"))?),
                };
                let file = file.map(|target| SecretFile {
                    target,
                    mode: *mode,
                    uid: *uid,
                    gid: *gid,
                });
                let is_known = self.inputs.secret_names.contains(id);
                if *required && !is_known {
                    return Err(format!(
                        "the secret '{id}' is required: give the image a secret with a variable of that name"
                    ));
                }
                Ok(PlannedMount::Secret {
                    name: id.clone(),
                    file,
                    env: env.clone(),
                    required: *required,
                })
            }
            RunMount::Tmpfs { target: at } => Ok(PlannedMount::Tmpfs { target: target(at)? }),
        }
    }

    fn check_environment(&self) -> Result<(), String> {
        let variables = self.config.env.iter().map(|(name, value)| name.len() + value.len());
        let arguments = self.args.iter().map(|(name, value)| name.len() + value.len());
        if variables.chain(arguments).sum::<usize>() > MAX_ENVIRONMENT_BYTES {
            return Err(format!(
                "the variables and arguments are longer than {MAX_ENVIRONMENT_BYTES} bytes together"
            ));
        }
        Ok(())
    }

    fn work(&mut self, action: Action) -> Result<Work, String> {
        let directories = std::mem::take(&mut self.pending);
        self.pending_since = None;
        let identity = self.identity(&directories, &action)?;
        Ok(Work {
            directories,
            action,
            identity,
        })
    }

    /// What no later step makes is made by the first `WORKDIR` that asked.
    fn flush_directories(&mut self) -> Result<(), String> {
        let Some(since) = self.pending_since.take() else {
            return Ok(());
        };
        let work = self.work(Action::Directories)?;
        if let Some(step) = self.steps.iter_mut().find(|step| step.number == since) {
            step.work = Some(work);
        }
        Ok(())
    }

    fn identity(&mut self, directories: &[String], action: &Action) -> Result<String, String> {
        let (secrets, settings) = match action {
            Action::Run(_) => (self.inputs.secret_names, self.inputs.trust.result_settings()),
            Action::Copy(_) | Action::Directories => (&[][..], Vec::new()),
        };
        let described = serde_json::json!({
            "builder": self.inputs.builder_version,
            "directories": directories,
            "action": action,
            "secrets": secrets,
            "settings": settings,
        });
        let described = described.to_string();
        *self.budget = self.budget.checked_sub(described.len()).ok_or_else(|| {
            format!(
                "the steps amount to more than {MAX_PLAN_BYTES} bytes together: use fewer RUN lines, fewer files, or \
                 shorter variables"
            )
        })?;
        Ok(layer_key(&[ENGINE_VERSION, &described]))
    }
}

/// What `execve` could not pass on.
fn check_variable(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
        return Err(format!("'{}' cannot name a variable", name.escape_default()));
    }
    Ok(())
}
