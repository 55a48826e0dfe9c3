//! Builds images for real: overlay mounts, commands in a chroot, layers on a disk. Needs root.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and says what it skips"
)]

mod host;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use host::Host;
use ionian_image::{BuildError, HostTrust, MountedRoot, StepExit};
use tokio_util::sync::CancellationToken;

/// Every test needs a host, or is skipped with a line that says so.
macro_rules! host {
    () => {
        match Host::new().await {
            Some(host) => host,
            None => return,
        }
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_build_upon_each_other_and_are_built_once() {
    let host = host!();
    let commands = [
        "FROM base",
        "ENV WHO=world",
        "WORKDIR /app",
        "RUN echo hello $WHO > greeting",
        "CMD [\"x\"]",
        "RUN cat greeting",
    ];
    let (result, log) = host.build(host.request(&commands)).await;
    let image = result.unwrap();
    assert_eq!(host.read(&image, "app/greeting"), "hello world\n");
    assert_eq!(image.config.workdir.as_deref(), Some("/app"));
    assert!(log.contains("Step 4/6: RUN echo hello $WHO > greeting\n"), "{log}");
    assert!(
        log.contains("hello world\n") && log.contains("Step 6/6: done in "),
        "{log}"
    );
    // The last RUN wrote nothing: it is cached, and it is no layer.
    assert_eq!(image.layers.len(), 2);
    assert_eq!(host.ran().len(), 2);

    let again = host.build(host.request(&commands)).await;
    assert_eq!(again.0.unwrap(), image);
    assert!(host.ran().is_empty());
    // Another image shares the steps.
    let (result, log) = host
        .build(host.request(&[&commands[..4], &["RUN echo more"]].concat()))
        .await;
    result.unwrap();
    assert!(
        log.contains("Step 4/5: RUN echo hello $WHO > greeting [cached]"),
        "{log}"
    );
    assert_eq!(host.ran(), ["echo more"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_built_image_is_found_without_work_until_a_layer_is_gone() {
    let host = host!();
    let request = host.request(&["FROM base", "RUN touch /x"]);
    assert_eq!(host.builder.find_cached(&request).await, None);
    let image = host.build(request.clone()).await.0.unwrap();
    host.ran();
    assert_eq!(host.builder.find_cached(&request).await.as_ref(), Some(&image));
    let layer = host.layers.fs_path(&image.layers[1]);
    fs::remove_dir_all(layer.parent().unwrap()).unwrap();
    assert_eq!(host.builder.find_cached(&request).await, None);
    host.build(request).await.0.unwrap();
    assert_eq!(host.ran(), ["touch /x"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_builds_at_once_execute_once() {
    let host = host!();
    let commands = ["FROM base", "RUN sleep 1; echo slow > /slow", "RUN echo after > /after"];
    let (one, two) = tokio::join!(host.build(host.request(&commands)), host.build(host.request(&commands)));
    assert_eq!(one.0.unwrap(), two.0.unwrap());
    assert_eq!(host.ran().len(), 2);
    let logs = one.1 + &two.1;
    assert!(logs.contains("made by another build"), "{logs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_step_names_itself_its_exit_and_its_last_words() {
    let host = host!();
    let (result, log) = host
        .build(host.request(&[
            "FROM base",
            "RUN echo fine",
            "RUN echo to stdout; echo no matching distribution >&2; exit 7",
        ]))
        .await;
    let error = result.unwrap_err();
    assert!(error.is_user_fault());
    assert!(matches!(
        error,
        BuildError::StepFailed {
            exit: StepExit::Exited(7),
            ..
        }
    ));
    let text = error.to_string();
    assert!(text.starts_with("step 3/3 failed: RUN echo to stdout"), "{text}");
    assert!(
        text.contains("exited with status 7") && text.contains("no matching distribution"),
        "{text}"
    );
    assert!(log.contains("no matching distribution"), "{log}");
    // The step before it is kept, and the failed one is not.
    host.ran();
    host.build(host.request(&[
        "FROM base",
        "RUN echo fine",
        "RUN echo to stdout; echo no matching distribution >&2; exit 7",
    ]))
    .await
    .0
    .unwrap_err();
    assert_eq!(host.ran().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_and_replaced_files_stay_so() {
    let host = host!();
    let image = host
        .built(&[
            "FROM base",
            "RUN mkdir -p /d/sub && touch /d/sub/old /d/gone",
            "RUN rm /d/gone && rm -r /d/sub && mkdir /d/sub && touch /d/sub/new",
        ])
        .await;
    let view = host.view(&image);
    assert!(!view.path().join("d/gone").exists());
    let names: Vec<_> = fs::read_dir(view.path().join("d/sub"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["new"]);
    let whiteout = fs::symlink_metadata(host.layers.fs_path(image.layers.last().unwrap()).join("d/gone")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_is_copied_with_modes_and_owners() {
    let host = host!();
    let mut request = host.request(&[
        "FROM base",
        "COPY . /",
        "COPY script.sh /usr/local/bin",
        "COPY --chown=app:staff --chmod=640 data/*.txt /texts/",
        "COPY --chown=app data /data",
        "COPY <<note /etc/lib-link/note\nhello\nnote",
    ]);
    request.context = vec![
        host.context("/script.sh", b"#!/bin/sh\n", Some(0o755)),
        host.context("/data/a.txt", b"a", None),
        host.context("/data/b.txt", b"b", None),
        host.context("/lib/through-a-link", b"l", None),
    ];
    let (result, log) = host.build(request).await;
    let image = result.unwrap_or_else(|error| panic!("{error}\n{log}"));
    let view = host.view(&image);
    let attributes = |path: &str| {
        let metadata = fs::symlink_metadata(view.path().join(path)).unwrap();
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    assert_eq!(attributes("script.sh"), (0o755, 0, 0));
    assert_eq!(attributes("usr/local/bin/script.sh"), (0o755, 0, 0));
    assert_eq!(attributes("texts/a.txt"), (0o640, 1234, 50));
    assert_eq!(attributes("data/b.txt"), (0o644, 1234, 1234));
    // Links of the image are followed, inside of it.
    assert!(view.path().join("lib").is_symlink());
    assert_eq!(fs::read(view.path().join("usr/lib/through-a-link")).unwrap(), b"l");
    assert_eq!(fs::read(view.path().join("usr/lib/note")).unwrap(), b"hello\n");
    assert_eq!(attributes(""), (0o755, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_content_builds_again_and_unrelated_content_does_not() {
    let host = host!();
    let build = async |content: &[u8], other: &[u8]| {
        let mut request = host.request(&["FROM base", "COPY f /f", "RUN cat /f"]);
        request.context = vec![host.context("f", content, None), host.context("unrelated", other, None)];
        host.build(request).await.0.unwrap();
        host.ran().len()
    };
    assert_eq!(build(b"1", b"x").await, 1);
    assert_eq!(build(b"1", b"y").await, 0);
    assert_eq!(build(b"2", b"y").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_from_other_stages() {
    let host = host!();
    let image = host
        .built(&[
            "FROM base AS made",
            "RUN mkdir -p /out/d && echo one > /out/d/one && ln /out/d/one /out/d/same && ln -s /etc/passwd /out/link && chmod 4755 /out/d/one && touch /out/x.a /out/y.a",
            "FROM scratch",
            "COPY --from=made /out /copy/",
            "COPY --from=made /out/?.a /globbed/",
            "WORKDIR /late/dir",
        ])
        .await;
    let view = host.view(&image);
    let one = fs::metadata(view.path().join("copy/d/one")).unwrap();
    assert_eq!((one.mode() & 0o7777, one.nlink()), (0o4755, 2));
    assert_eq!(
        fs::read_link(view.path().join("copy/link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(view.path().join("globbed/x.a").exists() && view.path().join("globbed/y.a").exists());
    assert!(view.path().join("late/dir").is_dir());
    assert_eq!(image.metadata.python_version_info, None);

    let (result, _) = host
        .build(host.request(&["FROM base AS made", "FROM base", "COPY --from=made /none /x"]))
        .await;
    let error = result.unwrap_err();
    assert!(
        error.is_user_fault() && error.to_string().contains("no file '/none'"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn links_of_an_image_do_not_lead_to_the_host() {
    let host = host!();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "of the host").unwrap();
    let outside_path = outside.path().display().to_string();
    let trap = format!("RUN ln -s {outside_path} /absolute && ln -s ../../../../..{outside_path} /climbing");
    for commands in [
        vec!["FROM base", &trap, "COPY f /absolute/f"],
        vec!["FROM base", &trap, "COPY f /climbing/f"],
        vec!["FROM base", &trap, "WORKDIR /absolute/made"],
        vec![
            "FROM base AS a",
            &trap,
            "FROM base",
            "COPY --from=a /absolute/secret /stolen",
        ],
        vec![
            "FROM base AS a",
            &trap,
            "FROM base",
            "RUN --mount=from=a,source=/climbing,target=/m cat /m/secret",
        ],
    ] {
        let mut request = host.request(&commands);
        request.context = vec![host.context("f", b"x", None)];
        let (result, log) = host.build(request).await;
        let error = result.unwrap_err();
        assert!(error.is_user_fault(), "{commands:?}: {error:?}");
        assert!(!log.contains("of the host"), "{log}");
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_seen_by_commands_and_by_nothing_else() {
    let host = host!();
    let value = "hunter2-hunter2";
    let mut request = host.request(&[
        "FROM base",
        "RUN test \"$TOKEN\" = hunter2-\"\"hunter2 && echo token is $TOKEN",
        "RUN --mount=type=secret,id=TOKEN cat /run/secrets/TOKEN",
        "RUN --mount=type=secret,id=TOKEN,env=OTHER test -n \"$OTHER\"",
        "RUN touch /done",
    ]);
    request.secrets = vec![("TOKEN".to_owned(), value.to_owned())];
    assert!(!format!("{request:?}").contains(value));
    let (result, log) = host.build(request.clone()).await;
    let image = result.unwrap_or_else(|error| panic!("{error}\n{log}"));
    assert!(log.contains("token is ***"), "{log}");
    assert!(!log.contains(value), "{log}");
    assert!(!serde_json::to_string(&image).unwrap().contains(value));
    assert_eq!(host.holds(value.as_bytes()), Vec::<std::path::PathBuf>::new());
    assert!(!host.view(&image).path().join("run/secrets").exists());
    // Another value is no reason to build again.
    let key = host.builder.plan_key(&request);
    request.secrets[0].1 = "another value".to_owned();
    assert_eq!(host.builder.plan_key(&request), key);
}

#[tokio::test(flavor = "multi_thread")]
async fn caches_stay_and_scripts_and_context_mounts_leave_nothing() {
    let host = host!();
    let mut request = host.request(&[
        "FROM base",
        "RUN --mount=type=cache,target=/root/.cache/x,sharing=locked echo kept > /root/.cache/x/f",
        "RUN --mount=type=cache,target=/root/.cache/x cat /root/.cache/x/f > /from-cache",
        "RUN --mount=type=bind,target=/ctx cat /ctx/d/f > /from-context",
        "RUN --mount=type=tmpfs,target=/t touch /t/x",
        "RUN <<EOF\n#!/bin/sh\necho script > /from-script\nEOF",
    ]);
    request.context = vec![host.context("d/f", b"context", None)];
    let (result, log) = host.build(request).await;
    let image = result.unwrap_or_else(|error| panic!("{error}\n{log}"));
    let view = host.view(&image);
    let read = |path: &str| fs::read_to_string(view.path().join(path)).unwrap();
    assert_eq!(
        (read("from-cache"), read("from-context"), read("from-script")),
        ("kept\n".into(), "context".into(), "script\n".into())
    );
    for path in ["root/.cache", "ctx", "t", "dev/.ionian-heredoc"] {
        assert!(!view.path().join(path).exists(), "{path} is still there");
    }
    assert_eq!(fs::read_dir(host.dir.path().join("scratch")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_bundle_is_seen_and_left_behind_nowhere() {
    let bundle = tempfile::NamedTempFile::new().unwrap();
    fs::write(bundle.path(), "the bundle").unwrap();
    let trust = HostTrust {
        ca_bundle: Some(bundle.path().to_owned()),
        env: vec![("PIP_INDEX_URL".to_owned(), "https://index.example/simple".to_owned())],
    };
    let Some(host) = Host::with(trust, Duration::from_mins(1)).await else {
        return;
    };
    let image = host
        .built(&[
            "FROM base",
            "RUN cat $SSL_CERT_FILE > /seen; echo $PIP_INDEX_URL >> /seen",
        ])
        .await;
    assert_eq!(host.read(&image, "seen"), "the bundlehttps://index.example/simple\n");
    assert!(!host.view(&image).path().join("__ionian").exists());
    assert!(image.config.env.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_stops_and_keeps_what_was_finished() {
    let host = host!();
    let commands = ["FROM base", "RUN touch /first", "RUN sleep 600"];
    let cancel = CancellationToken::new();
    let begun = Instant::now();
    let stop = async {
        while host.runner.ran.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        cancel.cancel();
    };
    let ((result, _), ()) = tokio::join!(host.build_until(host.request(&commands), cancel.clone()), stop);
    assert!(matches!(result, Err(BuildError::Cancelled)));
    assert!(begun.elapsed() < Duration::from_secs(30));
    host.ran();
    host.built(&commands[..2]).await;
    assert!(host.ran().is_empty(), "the finished step was built again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_dies_in_the_middle_counts_for_nothing() {
    let host = host!();
    let commands = ["FROM base", "RUN echo half > /half && sleep 600"];
    // Dropping the future is what happens to a build when its task is aborted.
    let request = host.request(&commands);
    let build = host.builder.build(
        request.clone(),
        ionian_image::BuildLog::discard(),
        CancellationToken::new(),
    );
    assert!(tokio::time::timeout(Duration::from_millis(500), build).await.is_err());
    assert_eq!(host.ran().len(), 1);
    assert_eq!(host.builder.find_cached(&request).await, None);
    let layers = fs::read_dir(host.dir.path().join("layers/l")).unwrap().count();
    assert_eq!(layers, 1, "only the base image is a layer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_takes_too_long_is_killed() {
    let Some(host) = Host::with(HostTrust::default(), Duration::from_millis(300)).await else {
        return;
    };
    let (result, _) = host.build(host.request(&["FROM base", "RUN sleep 600"])).await;
    assert!(matches!(
        result,
        Err(BuildError::StepFailed {
            exit: StepExit::TimedOut,
            ..
        })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forced_build_replaces_what_was_cached() {
    let host = host!();
    let commands = [
        "FROM base",
        "RUN cat /proc/uptime > /when || echo $$ > /when",
        "RUN cat /when",
    ];
    let first = host.built(&commands).await;
    let mut request = host.request(&commands);
    request.force = true;
    let forced = host.build(request).await.0.unwrap();
    assert_ne!(first.layers, forced.layers);
    host.ran();
    assert_eq!(host.built(&commands).await, forced);
    // Also for an image that only shares the step.
    let other = host.built(&[commands[0], commands[1], "RUN touch /other"]).await;
    assert_eq!(other.layers[1], forced.layers[1]);
    assert_eq!(host.ran(), ["touch /other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_image_is_inspected() {
    let host = host!();
    let image = host
        .built(&["FROM base", "RUN mkdir -p /site/Foo_Bar-1.2.dist-info"])
        .await;
    assert_eq!(
        image.metadata.python_version_info.as_deref(),
        Some("Python 3.11.2 (main)")
    );
    assert_eq!(image.metadata.libc_version_info.as_deref(), Some("glibc 2.36"));
    assert_eq!(
        image.metadata.python_packages.get("foo-bar").map(String::as_str),
        Some("1.2")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_the_users_and_say_what_to_do() {
    let host = host!();
    for (commands, part) in [
        (vec!["FROM base", "FROBNICATE x"], "unknown instruction 'FROBNICATE'"),
        (
            vec!["FROM base", "COPY nothing /x"],
            "no file of the build context matches",
        ),
        (
            vec!["FROM base", "COPY --chown=nobody-here <<f /x", "f"],
            "does not know 'nobody-here'",
        ),
        (
            vec![
                "FROM base",
                "COPY <<passwd /etc",
                "passwd",
                "COPY <<f /etc/passwd/f",
                "f",
            ],
            "is a file",
        ),
        (vec!["FROM base", "RUN no-such-command"], "exited with status 127"),
        (vec!["FROM registry.invalid/none"], "no source has the image"),
    ] {
        let (result, _) = host.build(host.request(&commands)).await;
        let error = result.unwrap_err();
        assert!(
            error.is_user_fault() && error.to_string().contains(part),
            "{commands:?}: {error}"
        );
    }
}
