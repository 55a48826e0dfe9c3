//! Dockerfiles, as a client's commands join to them: `text`, and after a zero byte the paths of the build context.
//!
//! The plan must be the same each time, stay inside of the context and of the image, and a parsed instruction, written
//! down again, must mean the same.

use std::collections::BTreeMap;

use ionian_image::ContextEntry;
use ionian_image::dockerfile::{Dockerfile, InstructionKind};
use ionian_image::fuzzing::plan;
use ionian_image::plan::{Action, BuildPlan, CopySource, LayersSource, PlannedMount};

const CONTEXT: &[&str] = &[
    "app.py",
    "src/a.py",
    "src/b.py",
    "src/deep/er/c",
    "requirements.txt",
    "/x",
    "s p",
];
const MAX_CONTEXT: usize = 200;

pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (text, paths) = text.split_once('\0').unwrap_or((&text, ""));
    let context: Vec<ContextEntry> = CONTEXT
        .iter()
        .copied()
        .chain(paths.split('\n').filter(|path| !path.is_empty()).take(MAX_CONTEXT))
        .map(|path| ContextEntry {
            path: path.to_owned(),
            sha256_hex: "a".repeat(64),
            mode: None,
        })
        .collect();
    if let Ok(parsed) = Dockerfile::parse(text) {
        check_text(&parsed);
    }
    let args = BTreeMap::from([
        ("VERSION".to_owned(), "1.2".to_owned()),
        ("EMPTY".to_owned(), String::new()),
    ]);
    let secrets = ["TOKEN".to_owned()];
    let planned = plan(text, &args, &context, &secrets);
    assert_eq!(
        planned,
        plan(text, &args, &context, &secrets),
        "the same text, another plan"
    );
    match planned {
        Ok(plan) => check_plan(&plan),
        Err(error) => assert!(
            error.to_string().len() < 1 << 20,
            "the refusal is longer than anybody reads"
        ),
    }
}

/// Written down again without its heredocs, an instruction means what it meant.
fn check_text(parsed: &Dockerfile) {
    for instruction in &parsed.instructions {
        let has_heredocs = match &instruction.kind {
            InstructionKind::Run(run) => !run.heredocs.is_empty(),
            InstructionKind::Copy(transfer) | InstructionKind::Add(transfer) => !transfer.heredocs.is_empty(),
            _ => false,
        };
        // At the end of a line the escape character would join it to the next one.
        if has_heredocs || instruction.text.ends_with(parsed.escape) {
            continue;
        }
        let again = format!("# escape={}\n{}", parsed.escape, instruction.text);
        let again = Dockerfile::parse(&again).expect("an instruction that was understood is understood again");
        assert_eq!(again.instructions.len(), 1, "{:?}", instruction.text);
        assert_eq!(again.instructions[0].kind, instruction.kind);
    }
}

fn check_plan(plan: &BuildPlan) {
    for (at, stage) in plan.stages.iter().enumerate() {
        for step in &stage.steps {
            let Some(work) = &step.work else { continue };
            assert!(work.identity.len() == 64 && work.identity.bytes().all(|byte| byte.is_ascii_hexdigit()));
            work.directories.iter().for_each(|path| check_inside(path));
            for source in work.sources() {
                if let LayersSource::Stage(other) = source {
                    assert!(*other < at, "a step takes files from a stage that is not there yet");
                }
            }
            match &work.action {
                Action::Run(run) => {
                    assert!(!run.argv.is_empty());
                    check_inside(&run.workdir);
                    for mount in &run.mounts {
                        match mount {
                            PlannedMount::Bind { target, .. }
                            | PlannedMount::Cache { target, .. }
                            | PlannedMount::Tmpfs { target } => check_inside(target),
                            PlannedMount::Secret { file, .. } => {
                                if let Some(file) = file {
                                    check_inside(&file.target);
                                }
                            }
                        }
                    }
                }
                Action::Copy(copy) => {
                    check_inside(&copy.destination);
                    if let CopySource::Layers { patterns, .. } = &copy.source {
                        assert!(patterns.iter().all(|pattern| !climbs(pattern)));
                    }
                }
                Action::Directories => {}
            }
        }
    }
}

fn check_inside(path: &str) {
    assert!(path.starts_with('/') && !climbs(path), "{path:?} leaves the image");
}

fn climbs(path: &str) -> bool {
    path.split('/').any(|component| component == "..")
}
