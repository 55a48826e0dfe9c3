//! From the text of a Dockerfile to logical lines: parser directives, comments, continuations, heredocs.

use super::{DockerfileError, words};

/// A Dockerfile longer than this is a mistake (a file pasted into a heredoc belongs into the context).
const MAX_TEXT_BYTES: usize = 4 * 1024 * 1024;

/// One instruction before it is understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogicalLine {
    /// Where it starts, counted from 1.
    pub(super) number: usize,
    pub(super) keyword: String,
    /// What follows the keyword, continuations joined.
    pub(super) rest: String,
    pub(super) heredocs: Vec<Heredoc>,
}

/// A text that follows its instruction, up to a line that holds its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    pub name: String,
    /// With a newline after every line; without leading tabs where it began with `<<-`.
    pub content: String,
    /// Whether variables are replaced in it (its name was not quoted). Matters for `COPY` alone:
    /// in `RUN` the shell sees to it.
    pub expands: bool,
}

/// The logical lines of a Dockerfile and its escape character.
pub(super) fn read(text: &str) -> Result<(Vec<LogicalLine>, char), DockerfileError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(DockerfileError::new(
            1,
            format!("the Dockerfile is longer than {MAX_TEXT_BYTES} bytes"),
        ));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let physical: Vec<&str> = text
        .split('\n')
        .map(|line| line.strip_suffix('\r').unwrap_or(line))
        .collect();
    let (escape, mut at) = directives(&physical)?;
    let mut lines = Vec::new();
    while at < physical.len() {
        let number = at + 1;
        let first = physical[at].trim_start();
        at += 1;
        if first.is_empty() || first.starts_with('#') {
            continue;
        }
        let (mut joined, mut continues) = continuation(first, escape);
        while continues && at < physical.len() {
            let next = physical[at];
            at += 1;
            let trimmed = next.trim_start();
            // Comments and empty lines do not end a continued instruction.
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            let (part, more) = continuation(next, escape);
            joined.push_str(&part);
            continues = more;
        }
        let joined = joined.trim();
        if joined.is_empty() {
            continue;
        }
        let (keyword, rest) = joined.split_once(char::is_whitespace).unwrap_or((joined, ""));
        let keyword = keyword.to_ascii_uppercase();
        let rest = rest.trim_start().to_owned();
        let mut heredocs = Vec::new();
        if matches!(keyword.as_str(), "RUN" | "COPY" | "ADD") && !super::is_json_array(&rest) {
            for mark in marks(&rest, escape) {
                let (content, next) = heredoc(&physical, at, &mark).ok_or_else(|| {
                    DockerfileError::new(number, format!("the heredoc '{}' has no line that ends it", mark.name))
                })?;
                at = next;
                heredocs.push(Heredoc {
                    name: mark.name,
                    content,
                    expands: mark.expands,
                });
            }
        }
        lines.push(LogicalLine {
            number,
            keyword,
            rest,
            heredocs,
        });
    }
    Ok((lines, escape))
}

/// `# escape=` and its like, which count only before anything else; and where the rest begins.
fn directives(physical: &[&str]) -> Result<(char, usize), DockerfileError> {
    let mut escape = None;
    for (at, line) in physical.iter().enumerate() {
        let directive = line
            .trim_start()
            .strip_prefix('#')
            .and_then(|line| line.split_once('='))
            .map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim()));
        match directive {
            Some((name, value)) if name == "escape" => {
                let previous = match value {
                    "\\" => escape.replace('\\'),
                    "`" => escape.replace('`'),
                    other => {
                        let problem = format!("the escape character must be \\ or `, not '{other}'");
                        return Err(DockerfileError::new(at + 1, problem));
                    }
                };
                if previous.is_some() {
                    return Err(DockerfileError::new(at + 1, "the escape directive is given twice"));
                }
            }
            // Which frontend parses the file is decided: this one.
            Some((name, _)) if name == "syntax" || name == "check" => {}
            Some(_) | None => return Ok((escape.unwrap_or('\\'), at)),
        }
    }
    Ok((escape.unwrap_or('\\'), physical.len()))
}

/// A line without its continuation character, and whether it had one. A doubled one is text.
fn continuation(line: &str, escape: char) -> (String, bool) {
    let trimmed = line.trim_end_matches([' ', '\t']);
    match trimmed.strip_suffix(escape) {
        Some(body) if !body.ends_with(escape) => (body.to_owned(), true),
        Some(_) | None => (line.to_owned(), false),
    }
}

pub(super) struct Mark {
    pub(super) name: String,
    chomps: bool,
    expands: bool,
}

/// The heredocs that a line announces, in order.
fn marks(rest: &str, escape: char) -> Vec<Mark> {
    words::split(rest, escape)
        .iter()
        .filter_map(|word| mark(word, escape))
        .collect()
}

/// Understands `<<NAME`, `<<-NAME`, `3<<"NAME"`. `<<<` is a shell's own business.
pub(super) fn mark(word: &str, escape: char) -> Option<Mark> {
    let word = word
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .strip_prefix("<<")?;
    let (chomps, name) = word.strip_prefix('-').map_or((false, word), |name| (true, name));
    if name.is_empty() || name.contains('<') {
        return None;
    }
    let expands = !name.contains(['"', '\'', escape]);
    let name = words::expand(name, escape, &|_| None)
        .ok()
        .filter(|name| !name.is_empty())?;
    Some(Mark { name, chomps, expands })
}

fn heredoc(physical: &[&str], mut at: usize, mark: &Mark) -> Option<(String, usize)> {
    let mut content = String::new();
    while let Some(line) = physical.get(at) {
        at += 1;
        let line = if mark.chomps {
            line.trim_start_matches('\t')
        } else {
            line
        };
        if line == mark.name {
            return Some((content, at));
        }
        content.push_str(line);
        content.push('\n');
    }
    None
}
