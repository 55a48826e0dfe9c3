use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;

#[expect(clippy::needless_pass_by_value, reason = "callers write `expect![…]` in place")]
fn check(text: &str, wanted: Expect) {
    let shown = match Dockerfile::parse(text) {
        Ok(file) => file.instructions.iter().fold(String::new(), |shown, instruction| {
            shown
                + &format!(
                    "{}: {:?}
",
                    instruction.line, instruction.kind
                )
        }),
        Err(error) => format!("{error}\n"),
    };
    wanted.assert_eq(&shown);
}

fn problem(text: &str) -> String {
    Dockerfile::parse(text).unwrap_err().to_string()
}

#[test]
fn what_the_client_sends_for_debian_slim() {
    check(
        "FROM python:3.11.12-slim-bookworm\nRUN apt-get update\nRUN echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections\nCMD [\"sleep\", \"172800\"]",
        expect![[r#"
            1: From { image: "python:3.11.12-slim-bookworm", platform: None, alias: None }
            2: Run(Run { command: Shell("apt-get update"), heredocs: [], mounts: [], network: Default })
            3: Run(Run { command: Shell("echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections"), heredocs: [], mounts: [], network: Default })
            4: Cmd(Exec(["sleep", "172800"]))
        "#]],
    );
}

#[test]
fn continuations_comments_and_empty_lines() {
    check(
        "# a comment\nFROM base\nRUN cd /tmp && \\ \n  # inside\n\n  poetry install \\\n  --no-root\nrun a\\\\\nENV A='b c' B=d\\ e\nENV OLD a \"b\" c\n",
        expect![[r#"
            2: From { image: "base", platform: None, alias: None }
            3: Run(Run { command: Shell("cd /tmp &&   poetry install   --no-root"), heredocs: [], mounts: [], network: Default })
            8: Run(Run { command: Shell("a\\\\"), heredocs: [], mounts: [], network: Default })
            9: Env([("A", "'b c'"), ("B", "d\\ e")])
            10: Env([("OLD", "a \"b\" c")])
        "#]],
    );
}

#[test]
fn another_escape_character() {
    check(
        "# syntax=docker/dockerfile:1\n# escape=`\nFROM base\nRUN dir `\n c:\\\n",
        expect![[r#"
            3: From { image: "base", platform: None, alias: None }
            4: Run(Run { command: Shell("dir  c:\\"), heredocs: [], mounts: [], network: Default })
        "#]],
    );
}

#[test]
fn heredocs() {
    check(
        "RUN <<EOF\nset -e\nFROM here is text\nEOF\nRUN python3 <<-'PY' && true\n\tprint(1)\n\tPY\nCOPY <<one <<\"two\" /dir/\n1 $A\none\n2\ntwo\nRUN cat <<<x\nCMD x",
        expect![[r#"
            1: Run(Run { command: Shell("<<EOF"), heredocs: [Heredoc { name: "EOF", content: "set -e\nFROM here is text\n", expands: true }], mounts: [], network: Default })
            5: Run(Run { command: Shell("python3 <<-'PY' && true"), heredocs: [Heredoc { name: "PY", content: "print(1)\n", expands: false }], mounts: [], network: Default })
            8: Copy(Transfer { from: None, chown: None, chmod: None, sources: ["<<one", "<<\"two\""], destination: "/dir/", heredocs: [Heredoc { name: "one", content: "1 $A\n", expands: true }, Heredoc { name: "two", content: "2\n", expands: false }], words_are_literal: false })
            13: Run(Run { command: Shell("cat <<<x"), heredocs: [], mounts: [], network: Default })
            14: Cmd(Shell("x"))
        "#]],
    );
    assert_eq!(
        problem("RUN <<EOF\nnever"),
        "line 1 of the Dockerfile: the heredoc 'EOF' has no line that ends it"
    );
}

#[test]
fn flags_and_mounts() {
    check(
        "FROM --platform=$BUILDPLATFORM golang AS Build\nCOPY --from=ghcr.io/astral-sh/uv:latest --chown=1:2 --chmod=755 /uv /.uv/uv\nRUN --mount=type=cache,target=/root/.cache,sharing=locked --mount=type=secret,id=TOKEN --mount=source=a,target=/b --network=none --mount=type=tmpfs,target=/t make --flag\nCOPY [\"a b\", \"/c d\"]\nADD x.tar.gz /",
        expect![[r#"
            1: From { image: "golang", platform: Some("${BUILDPLATFORM}"), alias: Some("build") }
            2: Copy(Transfer { from: Some("ghcr.io/astral-sh/uv:latest"), chown: Some("1:2"), chmod: Some("755"), sources: ["/uv"], destination: "/.uv/uv", heredocs: [], words_are_literal: false })
            3: Run(Run { command: Shell("make --flag"), heredocs: [], mounts: [Cache { id: None, target: "/root/.cache", mode: 493, uid: 0, gid: 0, exclusive: true }, Secret { id: "TOKEN", target: None, env: None, required: false, mode: 256, uid: 0, gid: 0 }, Bind { from: None, source: "a", target: "/b", read_only: true }, Tmpfs { target: "/t" }], network: None })
            4: Copy(Transfer { from: None, chown: None, chmod: None, sources: ["a b"], destination: "/c d", heredocs: [], words_are_literal: true })
            5: Add(Transfer { from: None, chown: None, chmod: None, sources: ["x.tar.gz"], destination: "/", heredocs: [], words_are_literal: false })
        "#]],
    );
}

#[test]
fn metadata_instructions() {
    check(
        "ARG A B=1 C='x y'\nWORKDIR '/a b'\nUSER app:app\nSHELL [\"/bin/bash\", \"-c\"]\nENTRYPOINT [\"x\"]\nENTRYPOINT\nCMD echo [1]\nCMD [ -f x ]\nLABEL a=b\nEXPOSE 80\nVOLUME [\"/v\"]\nSTOPSIGNAL 9\nHEALTHCHECK NONE\nMAINTAINER me",
        expect![[r#"
            1: Arg([("A", None), ("B", Some("1")), ("C", Some("'x y'"))])
            2: Workdir("'/a b'")
            3: User("app:app")
            4: Shell(["/bin/bash", "-c"])
            5: Entrypoint(Exec(["x"]))
            6: Entrypoint(Shell(""))
            7: Cmd(Shell("echo [1]"))
            8: Cmd(Shell("[ -f x ]"))
            9: Label([("a", "b")])
            10: Inert
            11: Inert
            12: Inert
            13: Inert
            14: Inert
        "#]],
    );
}

#[test]
fn what_is_not_supported_says_which_line_and_what_to_do() {
    assert_eq!(
        problem("FROM base\nFROBNICATE x"),
        "line 2 of the Dockerfile (FROBNICATE x): unknown instruction 'FROBNICATE': the instructions are FROM, RUN, COPY, \
         ADD, ENV, ARG, WORKDIR, USER, SHELL, ENTRYPOINT, CMD, LABEL, EXPOSE, VOLUME, STOPSIGNAL and HEALTHCHECK"
    );
    for (text, part) in [
        ("ONBUILD RUN x", "ONBUILD is not supported: write"),
        ("ADD https://example.com/x /x", "use RUN with curl"),
        ("ADD git@example.com:x /x", "use RUN with curl"),
        ("COPY x", "at least one source and a destination"),
        ("COPY", "at least one source and a destination"),
        ("RUN", "RUN needs an argument"),
        ("RUN --mount=type=tmpfs,target=/x", "RUN needs a command"),
        ("RUN --mount=type=ssh x", "pass a token as a secret"),
        ("RUN --mount=type=cache x", "a cache mount needs a target"),
        ("RUN --mount=type=cache,target=/x,size=1 x", "knows no option 'size'"),
        ("RUN --security=insecure x", "without privileges"),
        ("COPY --exclude=*.md . /", "ignore patterns"),
        ("RUN --frob x", "knows no flag --frob"),
        ("RUN [\"a\", 1]", "must be a string"),
        ("ENV A", "write ENV A=value"),
        ("ENV A=b c", "cannot find '=' in 'c'"),
        ("SHELL bash", "JSON array"),
        ("FROM a b", "FROM image AS name"),
        ("FROM a AS 9", "cannot name a stage"),
        ("# escape=x\nFROM a", "must be \\ or `"),
    ] {
        let problem = problem(text);
        assert!(problem.contains(part), "{text}: {problem}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "(FROM|RUN|COPY|ENV|ARG|ADD|#|<<A|A|\\[|\\]|\"|'|\\\\|\n|\t| |--from=|--mount=|=|,|\\$\\{|\\}|é){0,40}") {
        let _ = Dockerfile::parse(&text);
    }

    #[test]
    fn any_bytes_are_text_or_refused(text in "\\PC{0,200}") {
        let _ = Dockerfile::parse(&text);
    }

    #[test]
    fn where_a_command_is_broken_over_lines_does_not_matter(words in proptest::collection::vec("[a-z0-9./-]{1,8}", 1..12)) {
        let broken = format!("RUN {}", words.join(" \\\n"));
        let whole = format!("RUN {}", words.join(" "));
        // `--x` at the front would be a flag.
        prop_assume!(!words[0].starts_with("--"));
        prop_assert_eq!(Dockerfile::parse(&broken), Dockerfile::parse(&whole));
    }

    #[test]
    fn heredoc_content_arrives_as_it_is(lines in proptest::collection::vec("[^\n\r]{0,20}", 0..8)) {
        prop_assume!(lines.iter().all(|line| line != "END"));
        let content = [lines.as_slice(), &[String::new()]].concat().join("\n");
        let file = Dockerfile::parse(&format!("RUN cat <<END\n{content}END\nCMD x")).unwrap();
        prop_assert_eq!(file.instructions.len(), 2);
        let InstructionKind::Run(run) = &file.instructions[0].kind else { panic!("not a RUN") };
        prop_assert_eq!(&run.heredocs[0].content, &content);
    }
}
