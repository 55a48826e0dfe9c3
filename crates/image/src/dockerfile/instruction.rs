//! From one logical line to an instruction: keyword, flags, forms.

use super::lines::{LogicalLine, mark};
use super::{
    CommandLine, DockerfileError, Instruction, InstructionKind, Run, RunMount, RunNetwork, Transfer, is_json_array,
    shorten, words,
};

const KEYWORDS: &str = "FROM, RUN, COPY, ADD, ENV, ARG, WORKDIR, USER, SHELL, ENTRYPOINT, CMD, LABEL, EXPOSE, VOLUME, STOPSIGNAL and HEALTHCHECK";

pub(super) fn parse(line: LogicalLine, escape: char) -> Result<Instruction, DockerfileError> {
    let text = if line.rest.is_empty() {
        line.keyword.clone()
    } else {
        format!("{} {}", line.keyword, line.rest)
    };
    let number = line.number;
    let kind = kind(line, escape).map_err(|problem| DockerfileError {
        line: number,
        text: shorten(&text),
        problem,
    })?;
    Ok(Instruction {
        line: number,
        text,
        kind,
    })
}

fn kind(line: LogicalLine, escape: char) -> Result<InstructionKind, String> {
    let LogicalLine {
        keyword,
        rest,
        heredocs,
        ..
    } = line;
    let required = || {
        if rest.is_empty() {
            Err(format!("{keyword} needs an argument"))
        } else {
            Ok(())
        }
    };
    match keyword.as_str() {
        "FROM" => from(&rest, escape),
        "RUN" => {
            required()?;
            let (flags, command) = flags(&rest, escape)?;
            let (mut mounts, mut network) = (Vec::new(), RunNetwork::Default);
            for (name, value) in flags {
                match (name.as_str(), value.as_deref()) {
                    ("mount", Some(value)) => mounts.push(mount(value)?),
                    ("network", Some("default")) => network = RunNetwork::Default,
                    ("network", Some("none")) => network = RunNetwork::None,
                    ("network", Some(other)) => {
                        return Err(format!("RUN --network={other} is not supported: use default or none"));
                    }
                    ("security", _) => {
                        return Err("RUN --security is not supported: builds run without privileges".to_owned());
                    }
                    (other, _) => return Err(format!("RUN knows no flag --{other}")),
                }
            }
            let command = command_line(&command)?;
            if matches!(&command, CommandLine::Shell(text) if text.is_empty()) {
                return Err("RUN needs a command".to_owned());
            }
            Ok(InstructionKind::Run(Run {
                command,
                heredocs,
                mounts,
                network,
            }))
        }
        "COPY" => Ok(InstructionKind::Copy(transfer("COPY", &rest, heredocs, escape)?)),
        "ADD" => Ok(InstructionKind::Add(transfer("ADD", &rest, heredocs, escape)?)),
        "ENV" => {
            required()?;
            Ok(InstructionKind::Env(pairs("ENV", &rest, escape)?))
        }
        "LABEL" => {
            required()?;
            Ok(InstructionKind::Label(pairs("LABEL", &rest, escape)?))
        }
        "ARG" => {
            required()?;
            words::split(&rest, escape)
                .into_iter()
                .map(argument)
                .collect::<Result<Vec<_>, _>>()
                .map(InstructionKind::Arg)
        }
        "WORKDIR" => {
            required()?;
            Ok(InstructionKind::Workdir(rest))
        }
        "USER" => {
            required()?;
            Ok(InstructionKind::User(rest))
        }
        "SHELL" => match command_line(&rest)? {
            CommandLine::Exec(argv) if !argv.is_empty() => Ok(InstructionKind::Shell(argv)),
            CommandLine::Exec(_) | CommandLine::Shell(_) => {
                Err(r#"SHELL needs a JSON array, such as ["/bin/bash", "-c"]"#.to_owned())
            }
        },
        "ENTRYPOINT" => Ok(InstructionKind::Entrypoint(command_line(&rest)?)),
        "CMD" => Ok(InstructionKind::Cmd(command_line(&rest)?)),
        "EXPOSE" | "VOLUME" | "STOPSIGNAL" | "HEALTHCHECK" | "MAINTAINER" => {
            required()?;
            Ok(InstructionKind::Inert)
        }
        "ONBUILD" => Err("ONBUILD is not supported: write the instruction into the image that needs it".to_owned()),
        unknown => {
            let unknown = shorten(unknown);
            Err(format!(
                "unknown instruction '{unknown}': the instructions are {KEYWORDS}"
            ))
        }
    }
}

fn from(rest: &str, escape: char) -> Result<InstructionKind, String> {
    let (flags, rest) = flags(rest, escape)?;
    let mut platform = None;
    for (name, value) in flags {
        match (name.as_str(), value) {
            ("platform", Some(value)) => platform = Some(value),
            (other, _) => return Err(format!("FROM knows no flag --{other}")),
        }
    }
    let words = words::split(&rest, escape);
    let (image, alias) = match words.as_slice() {
        [image] => (image, None),
        [image, middle, alias] if middle.eq_ignore_ascii_case("as") => (image, Some(alias.to_ascii_lowercase())),
        _ => return Err("FROM takes an image, and optionally a name for the stage: FROM image AS name".to_owned()),
    };
    if let Some(alias) = &alias
        && !(alias.starts_with(|c: char| c.is_ascii_lowercase())
            && alias
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')))
    {
        return Err(format!(
            "'{alias}' cannot name a stage: use letters, digits, '_', '-' and '.', beginning with a letter"
        ));
    }
    Ok(InstructionKind::From {
        image: image.clone(),
        platform,
        alias,
    })
}

/// A name without its dashes, and what follows `=`.
type Flag = (String, Option<String>);

/// Splits `--name=value` words off the front.
fn flags(rest: &str, escape: char) -> Result<(Vec<Flag>, String), String> {
    let mut flags = Vec::new();
    let mut rest = rest.trim_start();
    while rest.starts_with("--") {
        let end = flag_end(rest, escape);
        let (word, after) = rest.split_at(end);
        rest = after.trim_start();
        if word == "--" {
            break;
        }
        // Quotes go, variables stay: whoever uses the value knows what they mean there.
        let word =
            words::expand(word, escape, &|name| Some(format!("${{{name}}}"))).map_err(|error| error.to_string())?;
        let (name, value) = match word[2..].split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word[2..].to_owned(), None),
        };
        flags.push((name, value));
    }
    Ok((flags, rest.to_owned()))
}

fn flag_end(text: &str, escape: char) -> usize {
    let mut quote = None;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match quote {
            None if c.is_whitespace() => return at,
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if open == c => quote = None,
            None | Some(_) => {
                if c == escape {
                    chars.next();
                }
            }
        }
    }
    text.len()
}

fn command_line(rest: &str) -> Result<CommandLine, String> {
    if !is_json_array(rest) {
        return Ok(CommandLine::Shell(rest.to_owned()));
    }
    serde_json::from_str(rest)
        .map(CommandLine::Exec)
        .map_err(|_| "every element of the JSON array must be a string".to_owned())
}

fn argument(word: String) -> Result<(String, Option<String>), String> {
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
        None => (word, None),
    };
    if name.is_empty() {
        return Err("ARG needs a name before '='".to_owned());
    }
    Ok((name, value))
}

/// `name=value …`, or the old `name value with blanks`.
fn pairs(keyword: &str, rest: &str, escape: char) -> Result<Vec<(String, String)>, String> {
    let words = words::split(rest, escape);
    let first = words.first().ok_or_else(|| format!("{keyword} needs an argument"))?;
    if !first.contains('=') {
        let (name, value) = rest.split_once(char::is_whitespace).ok_or_else(|| {
            format!(
                "{keyword} {name} has no value: write {keyword} {name}=value",
                name = shorten(first)
            )
        })?;
        return Ok(vec![(name.to_owned(), value.trim_start().to_owned())]);
    }
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            Some(_) => Err(format!("{keyword} has no name before '=' in '{}'", shorten(word))),
            None => Err(format!(
                "cannot find '=' in '{}': write name=value, with quotes around a value that has blanks",
                shorten(word)
            )),
        })
        .collect()
}

fn transfer(keyword: &str, rest: &str, heredocs: Vec<super::Heredoc>, escape: char) -> Result<Transfer, String> {
    let (flags, rest) = flags(rest, escape)?;
    let (mut from, mut chown, mut chmod) = (None, None, None);
    for (name, value) in flags {
        match (name.as_str(), value) {
            ("from", Some(value)) if keyword == "COPY" => from = Some(value),
            ("chown", Some(value)) => chown = Some(value),
            ("chmod", Some(value)) => chmod = Some(value),
            ("exclude", Some(_)) => {
                return Err(format!(
                    "{keyword} --exclude is not supported: leave files out with the ignore patterns of the client"
                ));
            }
            // It says how to cache, not what to copy; layers here never depend on those below.
            ("link", value) if matches!(value.as_deref(), None | Some("true" | "false")) => {}
            ("parents", _) => {
                return Err(format!(
                    "{keyword} --parents is not supported: name the destination directory of each source"
                ));
            }
            ("keep-git-dir" | "checksum" | "unpack", _) if keyword == "ADD" => {
                return Err(format!(
                    "ADD --{name} is not supported: fetch with RUN (curl, git) instead"
                ));
            }
            (other, _) => return Err(format!("{keyword} knows no flag --{other}, or not without a value")),
        }
    }
    let words_are_literal = is_json_array(&rest);
    let mut words = match command_line(&rest)? {
        CommandLine::Exec(words) => words,
        CommandLine::Shell(text) => words::split(&text, escape),
    };
    let Some(destination) = words.pop().filter(|_| !words.is_empty()) else {
        return Err(format!("{keyword} needs at least one source and a destination"));
    };
    // The marks were found on the line; a quoted `"<<x"` would make the two disagree.
    let marked = words.iter().filter(|word| mark(word, escape).is_some()).count();
    if !words_are_literal && marked != heredocs.len() {
        return Err(format!("{keyword} cannot have a heredoc as its destination"));
    }
    if keyword == "ADD"
        && let Some(url) = words.iter().find(|word| is_remote(word))
    {
        return Err(format!(
            "ADD of a remote source ({}) is not supported: use RUN with curl, wget or git",
            shorten(url)
        ));
    }
    Ok(Transfer {
        from,
        chown,
        chmod,
        sources: words,
        destination,
        heredocs,
        words_are_literal,
    })
}

fn is_remote(word: &str) -> bool {
    ["http://", "https://", "git://", "git@", "ssh://"]
        .iter()
        .any(|scheme| word.starts_with(scheme))
}

fn mount(value: &str) -> Result<RunMount, String> {
    let mut options = Vec::new();
    let mut kind = "bind".to_owned();
    for field in value.split(',') {
        let (name, value) = match field.split_once('=') {
            Some((name, value)) => (name.trim().to_ascii_lowercase(), Some(value.trim().to_owned())),
            None => (field.trim().to_ascii_lowercase(), None),
        };
        if name == "type" {
            kind = value.unwrap_or_default();
        } else {
            options.push((name, value));
        }
    }
    let mut options = MountOptions { kind, options };
    let target = options.text(&["target", "dst", "destination"]);
    let parsed = match options.kind.as_str() {
        "bind" => {
            let read_only = !options.flag(&["rw", "readwrite"], false)? && options.flag(&["ro", "readonly"], true)?;
            RunMount::Bind {
                from: options.text(&["from"]),
                source: options.text(&["source", "src"]).unwrap_or_else(|| "/".to_owned()),
                target: options.required(target)?,
                read_only,
            }
        }
        "cache" => {
            if options.text(&["from", "source", "src"]).is_some() {
                return Err("a cache mount cannot have from or source here: fill it in a RUN".to_owned());
            }
            options.flag(&["ro", "readonly", "rw", "readwrite"], false)?;
            let exclusive = match options.text(&["sharing"]).as_deref() {
                None | Some("shared") => false,
                Some("locked" | "private") => true,
                Some(other) => {
                    return Err(format!(
                        "a cache mount knows no sharing={other}: use shared, locked or private"
                    ));
                }
            };
            RunMount::Cache {
                id: options.text(&["id"]),
                target: options.required(target)?,
                mode: options.octal("mode", 0o755)?,
                uid: options.number("uid")?,
                gid: options.number("gid")?,
                exclusive,
            }
        }
        "secret" => {
            let env = options.text(&["env"]);
            let id = options
                .text(&["id"])
                .or_else(|| {
                    target
                        .as_deref()
                        .and_then(|target| target.rsplit('/').next())
                        .map(str::to_owned)
                })
                .or_else(|| env.clone())
                .ok_or("a secret mount needs an id")?;
            RunMount::Secret {
                id,
                target,
                env,
                required: options.flag(&["required"], false)?,
                mode: options.octal("mode", 0o400)?,
                uid: options.number("uid")?,
                gid: options.number("gid")?,
            }
        }
        "tmpfs" => {
            options.text(&["size"]);
            RunMount::Tmpfs {
                target: options.required(target)?,
            }
        }
        "ssh" => return Err("RUN --mount=type=ssh is not supported: pass a token as a secret".to_owned()),
        other => {
            return Err(format!(
                "RUN knows no mount of type '{other}': use bind, cache, secret or tmpfs"
            ));
        }
    };
    match options.options.first() {
        Some((name, _)) => Err(format!("a {} mount knows no option '{name}'", options.kind)),
        None => Ok(parsed),
    }
}

/// What is left of a mount's options; each reader takes its own, so that unknown ones remain.
struct MountOptions {
    kind: String,
    options: Vec<(String, Option<String>)>,
}

impl MountOptions {
    fn take(&mut self, names: &[&str]) -> Option<Flag> {
        let at = self
            .options
            .iter()
            .position(|(name, _)| names.contains(&name.as_str()))?;
        Some(self.options.remove(at))
    }

    fn text(&mut self, names: &[&str]) -> Option<String> {
        self.take(names)
            .and_then(|(_, value)| value)
            .filter(|value| !value.is_empty())
    }

    fn required(&self, target: Option<String>) -> Result<String, String> {
        target.ok_or_else(|| format!("a {} mount needs a target", self.kind))
    }

    fn flag(&mut self, names: &[&str], default: bool) -> Result<bool, String> {
        match self.take(names) {
            None => Ok(default),
            Some((_, None)) => Ok(true),
            Some((_, Some(value))) => match value.as_str() {
                "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                other => Err(format!("'{other}' is neither true nor false")),
            },
        }
    }

    fn octal(&mut self, name: &str, default: u32) -> Result<u32, String> {
        self.text(&[name]).map_or(Ok(default), |text| {
            u32::from_str_radix(&text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| format!("{name}={text} is not an octal mode"))
        })
    }

    fn number(&mut self, name: &str) -> Result<u32, String> {
        self.text(&[name]).map_or(Ok(0), |text| {
            text.parse().map_err(|_| format!("{name}={text} is not a number"))
        })
    }
}
