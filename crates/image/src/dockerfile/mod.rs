//! Parses the Dockerfile that a client's commands make when joined by newlines.
//!
//! The result is what the text says and nothing more: variables are still in place, and no image, file
//! or clock was looked at. Every instruction of the Dockerfile reference is either understood here or
//! refused with an error that names the line and says what to do; none is skipped silently.

mod instruction;
mod lines;
pub mod words;

pub use lines::Heredoc;

/// More instructions than this are a mistake: overlayfs could not stack their layers.
const MAX_INSTRUCTIONS: usize = 10_000;

/// Longer instructions are cut in messages.
const MAX_SHOWN_CHARS: usize = 160;

/// The user's Dockerfile cannot be understood, or asks for something that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", place(*.line, .text))]
pub struct DockerfileError {
    /// Counted from 1; zero where the whole file is meant.
    pub line: usize,
    /// The instruction as written, cut where it is long.
    pub text: String,
    pub problem: String,
}

impl DockerfileError {
    pub(crate) fn new(line: usize, problem: impl Into<String>) -> Self {
        Self {
            line,
            text: String::new(),
            problem: problem.into(),
        }
    }

    pub(crate) fn at(instruction: &Instruction, problem: impl Into<String>) -> Self {
        Self {
            line: instruction.line,
            text: shorten(&instruction.text),
            problem: problem.into(),
        }
    }
}

fn place(line: usize, text: &str) -> String {
    match (line, text) {
        (0, _) => String::new(),
        (line, "") => format!("line {line} of the Dockerfile: "),
        (line, text) => format!("line {line} of the Dockerfile ({text}): "),
    }
}

/// One line, short enough for a message.
pub(crate) fn shorten(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(MAX_SHOWN_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    pub escape: char,
    pub instructions: Vec<Instruction>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// Where it starts, counted from 1.
    pub line: usize,
    /// The keyword in upper case and the rest as written, continuations joined.
    pub text: String,
    pub kind: InstructionKind,
}

/// Words are as written: quotes, escapes and variables are still in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstructionKind {
    From {
        image: String,
        platform: Option<String>,
        alias: Option<String>,
    },
    Run(Run),
    Copy(Transfer),
    Add(Transfer),
    Env(Vec<(String, String)>),
    Arg(Vec<(String, Option<String>)>),
    Workdir(String),
    User(String),
    Shell(Vec<String>),
    Entrypoint(CommandLine),
    Cmd(CommandLine),
    Label(Vec<(String, String)>),
    /// `EXPOSE`, `VOLUME`, `STOPSIGNAL`, `HEALTHCHECK` and `MAINTAINER`: about running under Docker.
    /// They are checked for form and have no meaning on this platform.
    Inert,
}

/// The shell form or the exec form of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandLine {
    Shell(String),
    Exec(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub command: CommandLine,
    pub heredocs: Vec<Heredoc>,
    pub mounts: Vec<RunMount>,
    pub network: RunNetwork,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunNetwork {
    Default,
    /// `--network=none`.
    None,
}

/// One `--mount=…` of a `RUN`. Words are as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunMount {
    Bind {
        from: Option<String>,
        source: String,
        target: String,
        read_only: bool,
    },
    Cache {
        id: Option<String>,
        target: String,
        mode: u32,
        uid: u32,
        gid: u32,
        exclusive: bool,
    },
    Secret {
        id: String,
        target: Option<String>,
        env: Option<String>,
        required: bool,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    Tmpfs {
        target: String,
    },
}

/// A `COPY` or an `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    pub from: Option<String>,
    pub chown: Option<String>,
    pub chmod: Option<String>,
    pub sources: Vec<String>,
    pub destination: String,
    /// Sources of the form `<<NAME` find their content here.
    pub heredocs: Vec<Heredoc>,
    /// In the JSON form words are what they say: no quotes are removed.
    pub words_are_literal: bool,
}

impl Dockerfile {
    pub fn parse(text: &str) -> Result<Self, DockerfileError> {
        let (lines, escape) = lines::read(text)?;
        if lines.len() > MAX_INSTRUCTIONS {
            let problem = format!("the Dockerfile has more than {MAX_INSTRUCTIONS} instructions");
            return Err(DockerfileError::new(0, problem));
        }
        let instructions = lines
            .into_iter()
            .map(|line| instruction::parse(line, escape))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { escape, instructions })
    }
}

/// Whether a `COPY` source stands for a heredoc.
pub(crate) fn is_heredoc_mark(word: &str, escape: char) -> bool {
    lines::mark(word, escape).is_some()
}

/// Whether the exec form is meant. A `[` that begins no JSON is a shell's test command.
fn is_json_array(rest: &str) -> bool {
    rest.starts_with('[') && serde_json::from_str::<Vec<serde_json::Value>>(rest).is_ok()
}

#[cfg(test)]
mod tests;
