//! A disk with a cache that forgets: what programs see, and what a power cut leaves.
//!
//! It promises no more than POSIX does, and one thing that every journal gives: a rename happens in both
//! directories or in none.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};

use crate::image::Files;
use crate::random::Random;
use crate::trace::{Operation, Record};

/// What disks write whole, or not at all.
const SECTORS: [u64; 2] = [512, 4096];

const ROOT: usize = 0;

/// Something becomes true. A sync has two moments: it covers what was there when it was begun, and
/// promises it when it returns.
#[derive(Debug)]
pub(crate) struct Moment {
    pub at: u64,
    record: usize,
    begins_sync: bool,
    pub ends_sync: bool,
}

/// The moments of a trace, in order.
pub(crate) fn moments(records: &[Record]) -> Vec<Moment> {
    let mut moments = Vec::with_capacity(records.len());
    for (number, record) in records.iter().enumerate() {
        let is_sync = record.is_sync();
        if is_sync {
            moments.push(Moment {
                at: record.begun,
                record: number,
                begins_sync: true,
                ends_sync: false,
            });
        }
        moments.push(Moment {
            at: record.ended,
            record: number,
            begins_sync: false,
            ends_sync: is_sync,
        });
    }
    moments.sort_by_key(|moment| moment.at);
    moments
}

type Names = BTreeMap<String, usize>;

enum Node {
    File(File),
    Directory(Directory),
}

#[derive(Default)]
struct File {
    inode: u64,
    content: Vec<u8>,
    synced: Arc<Vec<u8>>,
    /// Since then, in order.
    changes: Vec<Change>,
}

struct Change {
    at: u64,
    kind: ChangeKind,
}

enum ChangeKind {
    Write { offset: u64, data: Vec<u8> },
    Truncate { length: u64 },
}

#[derive(Default)]
struct Directory {
    names: Names,
    synced: Names,
    /// When the sync was begun that `synced` is of.
    synced_at: u64,
}

/// One step of the directory tree, to be done again from the start for torn disks.
enum Step {
    Add {
        directory: usize,
        name: String,
        node: usize,
    },
    Remove {
        directory: usize,
        name: String,
    },
    Move {
        from: (usize, String),
        to: (usize, String),
        node: usize,
    },
}

pub(crate) struct Disk {
    nodes: Vec<Node>,
    by_inode: HashMap<u64, usize>,
    steps: Vec<(u64, Step)>,
    /// So many steps are on disk for sure.
    synced_steps: usize,
    /// By record: the names that a running sync of a directory will have made safe.
    syncing: HashMap<usize, Names>,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            nodes: vec![Node::Directory(Directory::default())],
            by_inode: HashMap::new(),
            steps: Vec::new(),
            synced_steps: 0,
            syncing: HashMap::new(),
        }
    }
}

impl Disk {
    /// One moment passes. `forgets` is told a path and whether it is a directory's, and says whether its
    /// syncs do nothing.
    pub(crate) fn pass(
        &mut self,
        records: &[Record],
        moment: &Moment,
        forgets: impl Fn(&str, bool) -> bool,
    ) -> anyhow::Result<()> {
        let record = &records[moment.record];
        if record.is_sync() {
            let found = self.find(&record.path).map(|node| &self.nodes[node]);
            if forgets(&record.path, matches!(found, Some(Node::Directory(_)))) {
                return Ok(());
            }
        }
        if moment.begins_sync {
            if let Some(Node::Directory(directory)) = self.find(&record.path).map(|node| &self.nodes[node]) {
                self.syncing.insert(moment.record, directory.names.clone());
            }
            return Ok(());
        }
        let done = if moment.ends_sync {
            let names = self.syncing.remove(&moment.record);
            self.end_sync(record, names)
        } else {
            self.apply(record)
        };
        done.with_context(|| format!("{record:.200?}"))
    }

    fn apply(&mut self, record: &Record) -> anyhow::Result<()> {
        let at = record.ended;
        match &record.operation {
            Operation::Write { offset, data } => self.change(
                record,
                ChangeKind::Write {
                    offset: *offset,
                    data: data.clone(),
                },
            ),
            Operation::Truncate { length } => self.change(record, ChangeKind::Truncate { length: *length }),
            Operation::Create => {
                let (directory, name) = self.place(&record.path)?;
                if let Some(node) = self.names(directory)?.get(&name)
                    && let Node::File(file) = &self.nodes[*node]
                    && file.inode == record.inode
                {
                    return Ok(());
                }
                let node = self.add(Node::File(File {
                    inode: record.inode,
                    ..File::default()
                }));
                self.by_inode.insert(record.inode, node);
                self.step(at, Step::Add { directory, name, node })
            }
            Operation::MakeDirectory => {
                let (directory, name) = self.place(&record.path)?;
                let node = self.add(Node::Directory(Directory::default()));
                self.step(at, Step::Add { directory, name, node })
            }
            Operation::Rename { to } => {
                let node = self.find(&record.path).context("there is nothing to rename")?;
                let (from, to) = (self.place(&record.path)?, self.place(to)?);
                self.step(at, Step::Move { from, to, node })
            }
            Operation::Link { to } => {
                let node = self.find(&record.path).context("there is nothing to link")?;
                let (directory, name) = self.place(to)?;
                self.step(at, Step::Add { directory, name, node })
            }
            Operation::Unlink | Operation::RemoveDirectory => {
                let (directory, name) = self.place(&record.path)?;
                self.step(at, Step::Remove { directory, name })
            }
            Operation::Sync => bail!("a sync changes nothing by itself"),
        }
    }

    fn change(&mut self, record: &Record, kind: ChangeKind) -> anyhow::Result<()> {
        let node = *self.by_inode.get(&record.inode).context("nobody created this file")?;
        let Node::File(file) = &mut self.nodes[node] else {
            bail!("it is a directory");
        };
        apply(&mut file.content, &kind);
        file.changes.push(Change { at: record.ended, kind });
        Ok(())
    }

    fn end_sync(&mut self, record: &Record, names: Option<Names>) -> anyhow::Result<()> {
        let Some(names) = names else {
            // A file that was removed meanwhile may be synced all the same.
            let node = *self.by_inode.get(&record.inode).context("nobody created this file")?;
            let Node::File(file) = &mut self.nodes[node] else {
                bail!("it is a directory");
            };
            let covered = file
                .changes
                .iter()
                .take_while(|change| change.at <= record.begun)
                .count();
            let synced = Arc::make_mut(&mut file.synced);
            for change in file.changes.drain(..covered) {
                apply(synced, &change.kind);
            }
            return Ok(());
        };
        let Some(synced) = self.find(&record.path) else {
            return Ok(());
        };
        let Node::Directory(directory) = &mut self.nodes[synced] else {
            bail!("it is a file");
        };
        if directory.synced_at >= record.begun {
            return Ok(());
        }
        directory.synced_at = record.begun;
        directory.synced = names;
        let mut left: Vec<(usize, String, usize)> = Vec::new();
        for (number, (at, step)) in self.steps.iter().enumerate() {
            if *at > record.begun || step.directory() != synced {
                continue;
            }
            // A journal keeps steps in order.
            self.synced_steps = self.synced_steps.max(number + 1);
            if let Step::Move { from, node, .. } = step {
                left.push((from.0, from.1.clone(), *node));
            }
        }
        for (from, name, node) in left {
            if let Node::Directory(from) = &mut self.nodes[from]
                && from.synced.get(&name) == Some(&node)
                && from.names.get(&name) != Some(&node)
            {
                from.synced.remove(&name);
            }
        }
        Ok(())
    }

    /// What is left if nothing is that was not synced.
    pub(crate) fn dropped(&self) -> Files {
        let synced: Vec<Names> = self
            .nodes
            .iter()
            .map(|node| match node {
                Node::Directory(directory) => directory.synced.clone(),
                Node::File(_) => Names::new(),
            })
            .collect();
        self.files(&synced, |file| Arc::clone(&file.synced))
    }

    /// What is left if chance decides what of the rest is there.
    pub(crate) fn torn(&self, random: &mut Random) -> Files {
        let steps = self.synced_steps + random.below(self.steps.len() - self.synced_steps + 1);
        let mut names: Vec<Names> = self.nodes.iter().map(|_| Names::new()).collect();
        for (_, step) in &self.steps[..steps] {
            for (directory, name, node) in step.edits() {
                edit(&mut names[directory], name, node);
            }
        }
        let sector = SECTORS[random.below(SECTORS.len())];
        let percent = [10, 50, 90, 100][random.below(4)];
        self.files(&names, |file| {
            if file.changes.is_empty() {
                return Arc::clone(&file.synced);
            }
            let mut content = file.synced.as_ref().clone();
            for change in &file.changes {
                tear(&mut content, &change.kind, sector, || random.happens(percent));
            }
            Arc::new(content)
        })
    }

    /// Fails unless what programs saw at the end is what is in the directory.
    pub(crate) fn compare(&self, root: &Path) -> anyhow::Result<()> {
        let names: Vec<Names> = self
            .nodes
            .iter()
            .map(|node| match node {
                Node::Directory(directory) => directory.names.clone(),
                Node::File(_) => Names::new(),
            })
            .collect();
        for (path, content) in self.files(&names, |file| Arc::new(file.content.clone())) {
            let real = root.join(&path);
            match content {
                None => ensure!(real.is_dir(), "{path} is no directory"),
                Some(content) => {
                    let real = std::fs::read(&real).with_context(|| format!("cannot read {}", real.display()))?;
                    ensure!(real == *content, "{path} has other content ({} bytes)", real.len());
                }
            }
        }
        Ok(())
    }

    fn files(&self, names: &[Names], mut content: impl FnMut(&File) -> Arc<Vec<u8>>) -> Files {
        let mut files = Files::new();
        let mut open = vec![(String::new(), ROOT)];
        while let Some((path, directory)) = open.pop() {
            for (name, node) in &names[directory] {
                let below = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}/{name}")
                };
                match &self.nodes[*node] {
                    Node::File(file) => {
                        files.insert(below, Some(content(file)));
                    }
                    Node::Directory(_) => {
                        files.insert(below.clone(), None);
                        open.push((below, *node));
                    }
                }
            }
        }
        files
    }

    // Names

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn names(&self, directory: usize) -> anyhow::Result<&Names> {
        match &self.nodes[directory] {
            Node::Directory(directory) => Ok(&directory.names),
            Node::File(_) => bail!("a file has no names in it"),
        }
    }

    fn find(&self, path: &str) -> Option<usize> {
        let mut node = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            node = *self.names(node).ok()?.get(name)?;
        }
        Some(node)
    }

    /// The directory and the name in it.
    fn place(&self, path: &str) -> anyhow::Result<(usize, String)> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self
            .find(parent)
            .with_context(|| format!("nobody made the directory of {path}"))?;
        Ok((parent, name.to_owned()))
    }

    fn step(&mut self, at: u64, step: Step) -> anyhow::Result<()> {
        for (directory, name, node) in step.edits() {
            match &mut self.nodes[directory] {
                Node::Directory(directory) => edit(&mut directory.names, name, node),
                Node::File(_) => bail!("a file has no names in it"),
            }
        }
        self.steps.push((at, step));
        Ok(())
    }
}

impl Step {
    /// The directory whose sync makes it safe.
    fn directory(&self) -> usize {
        match self {
            Self::Add { directory, .. } | Self::Remove { directory, .. } => *directory,
            Self::Move { to, .. } => to.0,
        }
    }

    /// What becomes of which name in which directory, in order; no node: it goes.
    fn edits(&self) -> Vec<(usize, &str, Option<usize>)> {
        match self {
            Self::Add { directory, name, node } => vec![(*directory, name, Some(*node))],
            Self::Remove { directory, name } => vec![(*directory, name, None)],
            Self::Move { from, to, node } => vec![(from.0, &from.1, None), (to.0, &to.1, Some(*node))],
        }
    }
}

fn edit(names: &mut Names, name: &str, node: Option<usize>) {
    match node {
        Some(node) => names.insert(name.to_owned(), node),
        None => names.remove(name),
    };
}

fn apply(content: &mut Vec<u8>, change: &ChangeKind) {
    match change {
        ChangeKind::Write { offset, data } => write(content, *offset as usize, data),
        ChangeKind::Truncate { length } => content.resize(*length as usize, 0),
    }
}

fn write(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

/// Applies those sectors of a change that chance keeps.
fn tear(content: &mut Vec<u8>, change: &ChangeKind, sector: u64, mut keeps: impl FnMut() -> bool) {
    match change {
        ChangeKind::Truncate { .. } => {
            if keeps() {
                apply(content, change);
            }
        }
        ChangeKind::Write { offset, data } => {
            let mut at = *offset;
            let end = offset + data.len() as u64;
            while at < end {
                let next = end.min((at / sector + 1) * sector);
                if keeps() {
                    write(
                        content,
                        at as usize,
                        &data[(at - offset) as usize..(next - offset) as usize],
                    );
                }
                at = next;
            }
        }
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
