use std::fmt::Write;

use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;
use crate::context::ContextEntry;

/// What a test varies; everything else is empty.
#[derive(Default, Clone)]
struct Case {
    args: BTreeMap<String, String>,
    context: Vec<&'static str>,
    secrets: Vec<String>,
    base: ImageConfig,
    trust: HostTrust,
    gpu: Option<&'static str>,
}

impl Case {
    fn plan(&self, text: &str) -> Result<BuildPlan, DockerfileError> {
        let entries: Vec<_> = self
            .context
            .iter()
            .map(|path| ContextEntry {
                path: (*path).to_owned(),
                sha256_hex: layer_hex(path),
                mode: None,
            })
            .collect();
        let context = ContextTree::new(&entries).unwrap();
        let outline = outline(text, &self.args)?;
        let images = [("base".to_owned(), self.base.clone())].into();
        outline.plan(&PlanInputs {
            build_args: &self.args,
            context: &context,
            secret_names: &self.secrets,
            builder_version: "2025.06",
            gpu: self.gpu,
            trust: &self.trust,
            images: &images,
        })
    }

    fn identities(&self, text: &str) -> Vec<String> {
        let plan = self.plan(text).unwrap();
        let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
        steps
            .filter_map(|step| step.work.as_ref().map(|work| work.identity.clone()))
            .collect()
    }
}

fn layer_hex(text: &str) -> String {
    crate::layers::layer_key(&[text])
}

fn render(plan: &BuildPlan) -> String {
    let mut out = String::new();
    for stage in &plan.stages {
        writeln!(out, "{}/{} from {:?}", stage.number, plan.total, stage.base).unwrap();
        for step in &stage.steps {
            write!(out, "{}/{} ", step.number, plan.total).unwrap();
            match &step.work {
                None => writeln!(out, "config").unwrap(),
                Some(work) => {
                    let mut action = format!("{:?}", work.action);
                    // Digests of test files say nothing to a reader.
                    while let Some(at) = action.find("sha256_hex: \"") {
                        action.replace_range(at..at + "sha256_hex: \"".len() + 64 + 3, "");
                    }
                    writeln!(out, "{:?} {action}", work.directories).unwrap();
                }
            }
        }
        writeln!(out, "= {:?}", stage.config).unwrap();
    }
    out
}

#[expect(clippy::needless_pass_by_value, reason = "callers write `expect![…]` in place")]
fn check(case: &Case, text: &str, wanted: Expect) {
    wanted.assert_eq(&match case.plan(text) {
        Ok(plan) => render(&plan),
        Err(error) => format!("{error}\n"),
    });
}

fn problem(case: &Case, text: &str) -> String {
    case.plan(text).unwrap_err().to_string()
}

#[test]
fn uv_pip_install_with_requirements() {
    let case = Case {
        context: vec!["/.0_req.txt"],
        ..Case::default()
    };
    let text = "FROM base\nCOPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv\nCOPY /.0_req.txt /.uv/0/req.txt\n\
                RUN /.uv/uv pip install --python $(command -v python) --requirements /.uv/0/req.txt";
    check(
        &case,
        text,
        expect![[r#"
        1/4 from Image("base")
        2/4 [] Copy(CopyAction { source: Layers { source: Image("ghcr.io/astral-sh/uv:latest"), patterns: ["uv"] }, destination: "/.uv/uv", into_directory: false, chown: None, chmod: None, extract: false })
        3/4 [] Copy(CopyAction { source: Context { items: [File(ContextFile { path: ".0_req.txt", mode: 420 })], inline: [] }, destination: "/.uv/0/req.txt", into_directory: false, chown: None, chmod: None, extract: false })
        4/4 [] Run(RunAction { argv: ["/bin/sh", "-c", "/.uv/uv pip install --python $(command -v python) --requirements /.uv/0/req.txt"], env: [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: None })
        = ImageConfig { env: [], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
    "#]],
    );
    let uses = outline(text, &BTreeMap::new()).unwrap().images();
    assert_eq!(
        uses.iter().map(|image| image.is_base).collect::<Vec<_>>(),
        [true, false]
    );
}

#[test]
fn metadata_makes_no_layer_and_directories_come_with_the_next_one() {
    let text = "FROM base\nENV A=1 B=$A\nENV B=${A}2 PATH=/x:$PATH\nWORKDIR /app\nWORKDIR sub/../other\nUSER me\n\
                SHELL [\"/bin/bash\", \"-c\"]\nCMD serve\nLABEL a=b\nRUN make\nWORKDIR /late\nENTRYPOINT [\"x\"]";
    let case = Case {
        base: ImageConfig {
            env: vec![("PATH".to_owned(), "/bin".to_owned())],
            cmd: vec!["inherited".to_owned()],
            ..ImageConfig::default()
        },
        ..Case::default()
    };
    check(
        &case,
        text,
        expect![[r#"
        1/12 from Image("base")
        2/12 config
        3/12 config
        4/12 config
        5/12 config
        6/12 config
        7/12 config
        8/12 config
        9/12 config
        10/12 ["/app", "/app/other"] Run(RunAction { argv: ["/bin/bash", "-c", "make"], env: [("PATH", "/x:/bin"), ("A", "1"), ("B", "12")], workdir: "/app/other", user: Some("me"), mounts: [], has_network: true, gpu: None, script: None })
        11/12 ["/late"] Directories
        12/12 config
        = ImageConfig { env: [("PATH", "/x:/bin"), ("A", "1"), ("B", "12")], workdir: Some("/late"), user: Some("me"), entrypoint: ["x"], cmd: ["/bin/bash", "-c", "serve"], shell: ["/bin/bash", "-c"] }
    "#]],
    );
}

#[test]
fn an_entrypoint_resets_an_inherited_command() {
    let case = Case {
        base: ImageConfig {
            cmd: vec!["inherited".to_owned()],
            ..ImageConfig::default()
        },
        ..Case::default()
    };
    assert!(
        case.plan("FROM base\nENTRYPOINT [\"x\"]").unwrap().stages[0]
            .config
            .cmd
            .is_empty()
    );
    assert_eq!(
        case.plan("FROM base\nCMD [\"y\"]\nENTRYPOINT [\"x\"]").unwrap().stages[0]
            .config
            .cmd,
        ["y"]
    );
}

#[test]
fn stages_that_nothing_needs_are_left_out() {
    let text = "ARG TAG=1\nFROM a:$TAG AS one\nRUN one\nFROM unused AS two\nRUN two\nFROM one AS three\nRUN three\n\
                FROM scratch\nCOPY --from=three /x /y/\nCOPY --from=0 /z* /";
    check(
        &Case::default(),
        text,
        expect![[r#"
        1/7 from Image("a:1")
        2/7 [] Run(RunAction { argv: ["/bin/sh", "-c", "one"], env: [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: None })
        = ImageConfig { env: [], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
        3/7 from Stage(0)
        4/7 [] Run(RunAction { argv: ["/bin/sh", "-c", "three"], env: [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: None })
        = ImageConfig { env: [], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
        5/7 from Scratch
        6/7 [] Copy(CopyAction { source: Layers { source: Stage(1), patterns: ["x"] }, destination: "/y", into_directory: true, chown: None, chmod: None, extract: false })
        7/7 [] Copy(CopyAction { source: Layers { source: Stage(0), patterns: ["z*"] }, destination: "/", into_directory: true, chown: None, chmod: None, extract: false })
        = ImageConfig { env: [], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
    "#]],
    );
}

#[test]
fn arguments_come_from_the_request_then_the_stage_then_the_file() {
    let text = "ARG A=global\nARG B=global\nFROM base\nARG A\nARG B=stage\nARG C=stage\nARG D\nENV C=env\nRUN [\"x\"]";
    let run = |args: &[(&str, &str)]| {
        let args = args
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let plan = Case {
            args,
            ..Case::default()
        }
        .plan(text)
        .unwrap();
        let Some(Action::Run(run)) = plan.stages[0]
            .steps
            .last()
            .and_then(|step| step.work.clone())
            .map(|work| work.action)
        else {
            panic!("the last step is a RUN")
        };
        run.env
            .into_iter()
            .filter(|(name, _)| name != "PATH")
            .map(|(name, value)| format!("{name}={value}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(run(&[]), ["C=env", "A=global", "B=stage"]);
    assert_eq!(
        run(&[("A", "1"), ("B", "2"), ("C", "3"), ("D", "4")]),
        ["C=env", "A=1", "B=2", "D=4"]
    );
}

#[test]
fn heredocs_become_scripts_files_and_shell_input() {
    let text = "FROM base\nENV X=1\nRUN <<EOF\necho $X\nEOF\nRUN <<EOF\n#!/usr/bin/python\nprint(1)\nEOF\n\
                RUN cat <<EOF > /f\n$X\nEOF\nCOPY <<a <<'b' /d/\n\"$X\"\na\n$X\nb";
    check(
        &Case::default(),
        text,
        expect![[r##"
        1/6 from Image("base")
        2/6 config
        3/6 [] Run(RunAction { argv: ["/bin/sh", "-c", "echo $X\n"], env: [("X", "1"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: None })
        4/6 [] Run(RunAction { argv: ["/dev/.ionian-heredoc"], env: [("X", "1"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: Some("#!/usr/bin/python\nprint(1)\n") })
        5/6 [] Run(RunAction { argv: ["/bin/sh", "-c", "cat <<EOF > /f\n$X\nEOF\n"], env: [("X", "1"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/", user: None, mounts: [], has_network: true, gpu: None, script: None })
        6/6 [] Copy(CopyAction { source: Context { items: [], inline: [("a", "\"1\"\n"), ("b", "$X\n")] }, destination: "/d", into_directory: true, chown: None, chmod: None, extract: false })
        = ImageConfig { env: [("X", "1")], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
    "##]],
    );
}

#[test]
fn mistakes_name_the_line_and_the_remedy() {
    let case = Case {
        context: vec!["a", "d/b", "e/b"],
        ..Case::default()
    };
    for (text, part) in [
        ("", "the Dockerfile is empty"),
        (
            "RUN x\nFROM base",
            "line 1 of the Dockerfile (RUN x): the Dockerfile must begin with FROM",
        ),
        ("FROM base\nCOPY none /x", "no file of the build context matches 'none'"),
        ("FROM base\nCOPY ../a /x", "'..' is not allowed"),
        ("FROM base\nCOPY a d /x", "end it with '/'"),
        ("FROM base\nCOPY d/b e/b /x/", "two of the sources are named 'b'"),
        ("FROM base\nCOPY --chmod=rwx a /x", "octal mode"),
        ("FROM base\nCOPY --from=1 a /x", "not a stage above"),
        ("FROM base\nCOPY --from=$X a /x", "variables are not allowed in --from"),
        ("FROM --platform=linux/riscv64 base", "builds for linux/"),
        ("ARG A\nFROM $A", "set the ARG"),
        ("FROM base\nENV A='x", "never closed"),
        (
            "FROM base\nRUN --mount=type=secret,id=T,required=true x",
            "the secret 'T' is required",
        ),
        ("FROM base\nRUN --mount=type=tmpfs,target=/ x", "cannot cover the root"),
        ("FROM base\nRUN --mount=source=none,target=/x x", "matches 'none'"),
    ] {
        let problem = problem(&case, text);
        assert!(problem.contains(part), "{text}: {problem}");
    }
    let many = format!("FROM base\n{}", "RUN x\n".repeat(401));
    assert!(problem(&case, &many).contains("join its RUN lines"));
}

#[test]
fn what_decides_the_result_decides_the_identity() {
    let base = Case {
        context: vec!["a"],
        ..Case::default()
    };
    let run = |case: &Case| case.identities("FROM base\nARG V\nRUN x").remove(0);
    let plain = run(&base);
    assert_eq!(plain, run(&base));
    // Also under another line number, case or comment.
    assert_eq!(plain, base.identities("FROM base\n# why\nARG V\n\nrun x").remove(0));
    for other in [
        Case {
            args: [("V".to_owned(), "1".to_owned())].into(),
            ..base.clone()
        },
        Case {
            secrets: vec!["TOKEN".to_owned()],
            ..base.clone()
        },
        Case {
            gpu: Some("T4"),
            ..base.clone()
        },
        Case {
            base: ImageConfig {
                env: vec![("A".to_owned(), "1".to_owned())],
                ..ImageConfig::default()
            },
            ..base.clone()
        },
        Case {
            base: ImageConfig {
                user: Some("me".to_owned()),
                ..ImageConfig::default()
            },
            ..base.clone()
        },
        Case {
            trust: HostTrust {
                env: vec![("PIP_INDEX_URL".to_owned(), "u".to_owned())],
                ..HostTrust::default()
            },
            ..base.clone()
        },
    ] {
        assert_ne!(plain, run(&other));
    }
    // What does not decide it.
    for same in [
        Case {
            args: [("UNUSED".to_owned(), "1".to_owned())].into(),
            ..base.clone()
        },
        Case {
            base: ImageConfig {
                cmd: vec!["c".to_owned()],
                ..ImageConfig::default()
            },
            ..base.clone()
        },
        Case {
            trust: HostTrust {
                ca_bundle: Some("/x".into()),
                env: vec![("HTTPS_PROXY".to_owned(), "p".to_owned())],
            },
            ..base.clone()
        },
    ] {
        assert_eq!(plain, run(&same));
    }
    let copy = |case: &Case| case.identities("FROM base\nCOPY a /").remove(0);
    assert_eq!(
        copy(&base),
        copy(&Case {
            context: vec!["a", "unrelated"],
            ..base.clone()
        })
    );
    // A secret is for RUN only.
    assert_eq!(
        copy(&base),
        copy(&Case {
            secrets: vec!["TOKEN".to_owned()],
            ..base.clone()
        })
    );
}

#[test]
fn mounts_are_resolved() {
    let case = Case {
        context: vec!["req.txt"],
        ..Case::default()
    };
    let text = "FROM base AS b\nFROM base\nENV D=/data\nWORKDIR /w\nRUN --mount=type=cache,target=rel --mount=source=req.txt,target=$D/req.txt \
                --mount=type=bind,from=b,source=/x,target=/y --mount=type=secret,id=T --mount=type=secret,id=U,env=UU x";
    check(
        &case,
        text,
        expect![[r#"
        1/5 from Image("base")
        = ImageConfig { env: [], workdir: None, user: None, entrypoint: [], cmd: [], shell: [] }
        2/5 from Image("base")
        3/5 config
        4/5 config
        5/5 ["/w"] Run(RunAction { argv: ["/bin/sh", "-c", "x"], env: [("D", "/data"), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")], workdir: "/w", user: None, mounts: [Cache { id: "/w/rel", target: "/w/rel", mode: 493, uid: 0, gid: 0, exclusive: false }, Bind { source: Context(File(ContextFile { path: "req.txt", mode: 420 })), target: "/data/req.txt", read_only: true }, Bind { source: Layers { source: Stage(0), path: "/x" }, target: "/y", read_only: true }, Secret { name: "T", file: Some(SecretFile { target: "/run/secrets/T", mode: 256, uid: 0, gid: 0 }), env: None, required: false }, Secret { name: "U", file: None, env: Some("UU"), required: false }], has_network: true, gpu: None, script: None })
        = ImageConfig { env: [("D", "/data")], workdir: Some("/w"), user: None, entrypoint: [], cmd: [], shell: [] }
    "#]],
    );
}

#[test]
fn paths_are_joined_within_the_root() {
    for (workdir, path, wanted) in [
        ("/", "a", "/a"),
        ("/w", "../../a/./b//", "/a/b"),
        ("/w", "/x", "/x"),
        ("/w", ".", "/w"),
        ("/", "/", "/"),
    ] {
        assert_eq!(join_path(workdir, path), wanted);
    }
}

proptest! {
    #[test]
    fn values_that_the_client_quotes_arrive_as_they_are(value in "[^'\u{0}\r\n]{0,60}") {
        // `.env({"A": value})` sends `ENV A=` and the value as a shell would quote it.
        let plan = Case::default().plan(&format!("FROM base\nENV A='{value}'")).unwrap();
        prop_assert_eq!(&plan.stages[0].config.env, &[("A".to_owned(), value)]);
    }

    #[test]
    fn planning_is_deterministic_and_never_panics(
        lines in proptest::collection::vec("(RUN|COPY|ENV|WORKDIR|USER|ARG|FROM|CMD) [a-c=$/\\. ]{0,12}", 0..8),
    ) {
        let case = Case { context: vec!["a", "b/c"], ..Case::default() };
        let text = format!("FROM base\n{}", lines.join("\n"));
        prop_assert_eq!(case.plan(&text), case.plan(&text));
    }
}

#[test]
fn variables_cannot_grow_for_ever() {
    let long = "x".repeat(120 * 1024);
    // Within quotes, where the lexer reads on.
    let doubled = format!("FROM base\nENV A={long}\nENV B=\"{}\"", "$A".repeat(100_000));
    let error = Case::default().plan(&doubled).unwrap_err();
    assert!(error.problem.contains("grows beyond"), "{error}");
    let mut many = format!("FROM base\nENV A={long}\n");
    for variable in 0..20 {
        writeln!(many, "ENV A{variable}=$A").unwrap();
    }
    let error = Case::default().plan(&many).unwrap_err();
    assert!(error.problem.contains("are longer than"), "{error}");
    let mut names = "FROM base\nENV".to_owned();
    for variable in 0..5_000 {
        write!(names, " V{variable}=").unwrap();
    }
    let error = Case::default().plan(&names).unwrap_err();
    assert!(error.problem.contains("more than 4096 variables"), "{error}");
}

#[test]
fn a_plan_cannot_grow_for_ever() {
    let mut text = "FROM base\n".to_owned();
    // Eight times 120 KiB, in the environment of every RUN of every stage.
    for variable in 0..8 {
        writeln!(text, "ENV A{variable}={}", "x".repeat(120 * 1024)).unwrap();
    }
    text.push_str(&"RUN x\n".repeat(300));
    let error = Case::default().plan(&text).unwrap_err();
    assert!(error.problem.contains("amount to more than"), "{error}");
}

#[test]
fn an_empty_script_runs_and_does_nothing() {
    let plan = Case::default().plan("FROM base\nRUN <<EOF\nEOF\n").unwrap();
    let Some(Work {
        action: Action::Run(run),
        ..
    }) = &plan.stages[0].steps[0].work
    else {
        panic!("not a RUN");
    };
    assert_eq!(run.argv, ["/bin/sh", "-c", ""]);
}
