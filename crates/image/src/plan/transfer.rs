//! `COPY` and `ADD`: which files, to where.

use super::planner::StagePlanner;
use super::{CopyAction, CopySource, heredoc_content, is_file, join_path};
use crate::context::{ContextItem, ContextTree, normalize};
use crate::dockerfile::{Transfer, words};

/// One `COPY` of more than this many files would make a key of hundreds of megabytes.
const MAX_FILES: usize = 1_000_000;

pub(super) fn plan(stage: &StagePlanner<'_>, transfer: &Transfer, extract: bool) -> Result<CopyAction, String> {
    let word = |word: &str| {
        if transfer.words_are_literal {
            expand_literal(stage, word)
        } else {
            stage.expand(word)
        }
    };
    let raw_destination = word(&transfer.destination)?;
    if raw_destination.is_empty() {
        return Err("the destination is empty".to_owned());
    }
    let destination = join_path(&stage.workdir(), &raw_destination);
    let mut into_directory = raw_destination.ends_with('/')
        || raw_destination.ends_with("/.")
        || raw_destination == "."
        || destination == "/";
    if transfer.sources.len() > 1 && !into_directory {
        return Err("with more than one source the destination is a directory: end it with '/'".to_owned());
    }
    let source = if let Some(from) = &transfer.from {
        let patterns = transfer
            .sources
            .iter()
            .map(|source| normalize(&word(source)?))
            .collect::<Result<Vec<_>, String>>()?;
        CopySource::Layers {
            source: stage.source(from),
            patterns,
        }
    } else {
        let mut heredocs = transfer.heredocs.iter();
        let (mut items, mut inline, mut files) = (Vec::new(), Vec::new(), 0);
        for source in &transfer.sources {
            if !transfer.words_are_literal && crate::dockerfile::is_heredoc_mark(source, stage.escape()) {
                let heredoc = heredocs.next().ok_or("a heredoc has no content")?;
                let content = heredoc_content(heredoc, stage.escape(), &|name| stage.lookup(name))?;
                inline.push((heredoc.name.clone(), content));
                continue;
            }
            let source = word(source)?;
            let found = stage.inputs.context.select(&source)?;
            // An empty context is copied as such: `add_local_dir` of a directory without files.
            if found.is_empty() {
                return Err(format!(
                    "no file of the build context matches '{source}': check its path and the ignore patterns"
                ));
            }
            into_directory |= found.len() > 1;
            files += found.iter().map(file_count).sum::<usize>();
            // At once, not at the end: every source may name all files of the context.
            if files > MAX_FILES {
                return Err(format!(
                    "{files} files are to be copied at once, and {MAX_FILES} is the most"
                ));
            }
            items.extend(found);
        }
        if let Some(name) = collision(&items, &inline) {
            return Err(format!(
                "two of the sources are named '{name}': copy them to different directories"
            ));
        }
        CopySource::Context { items, inline }
    };
    let chown = transfer.chown.as_deref().map(|word| stage.expand(word)).transpose()?;
    if chown.as_deref().is_some_and(str::is_empty) {
        return Err("--chown is empty".to_owned());
    }
    let chmod = transfer
        .chmod
        .as_deref()
        .map(|word| -> Result<u32, String> {
            let text = stage.expand(word)?;
            u32::from_str_radix(&text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| format!("--chmod={text} is not an octal mode, such as 755"))
        })
        .transpose()?;
    Ok(CopyAction {
        source,
        destination,
        into_directory,
        chown,
        chmod,
        extract,
    })
}

fn file_count(item: &ContextItem) -> usize {
    match item {
        ContextItem::File(_) => 1,
        ContextItem::Directory(files) => files.len(),
    }
}

/// The one file or directory of the context that a bind mount names.
pub(super) fn single(context: &ContextTree, path: &str) -> Result<ContextItem, String> {
    let mut found = context.select(path)?;
    match (found.pop(), found.is_empty()) {
        (Some(item), true) => Ok(item),
        (Some(_), false) => Err(format!("'{path}' names several files of the build context")),
        (None, _) => Err(format!("no file of the build context matches '{path}'")),
    }
}

/// In the JSON form variables count, and quotes are characters like any other.
fn expand_literal(stage: &StagePlanner<'_>, word: &str) -> Result<String, String> {
    let escape = stage.escape();
    let guarded: String = word
        .chars()
        .flat_map(|c| {
            if c == '"' || c == '\'' {
                vec![escape, c]
            } else {
                vec![c]
            }
        })
        .collect();
    words::expand(&guarded, escape, &|name| stage.lookup(name)).map_err(|error| error.to_string())
}

fn collision<'a>(items: &'a [ContextItem], inline: &'a [(String, String)]) -> Option<&'a str> {
    let names = items
        .iter()
        .filter_map(is_file)
        .map(|file| file.path.as_str())
        .chain(inline.iter().map(|(name, _)| name.as_str()));
    let mut seen = std::collections::BTreeSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}
