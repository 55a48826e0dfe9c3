//! What every runtime does alike.

use ionian_container::{Bind, ContainerConfig, Feature, NetworkMode, OpenError, Signal, StartError};
use ionian_domain::container::{ContainerExit, RuntimeKind};

use crate::support::{Subject, eventually, finish, processes_with, read_until, run, sandboxes_of};

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_and_output_arrive() {
    for subject in Subject::all("exit-codes").await {
        let runtime = subject.runtime();
        for code in [0, 1, 7, 127] {
            let script = format!("echo out {code}; echo err {code} >&2; exit {code}");
            let finished = run(runtime, subject.launch("exits", &["sh", "-c", &script])).await;
            assert_eq!(finished.exit, ContainerExit::Exited { code });
            assert_eq!(
                (finished.stdout, finished.stderr),
                (format!("out {code}\n"), format!("err {code}\n"))
            );
        }
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_and_working_directory_are_what_was_asked() {
    for subject in Subject::all("environment").await {
        let mut launch = subject.launch("environment", &["sh", "-c", "echo \"$GREETING|$NOT_ASKED|$(pwd)\""]);
        launch
            .env
            .push(("GREETING".to_owned(), "hello = 'world'\nagain".to_owned()));
        launch.workdir = "/tmp".to_owned();
        let finished = run(subject.runtime(), launch).await;
        assert_eq!(finished.stdout, "hello = 'world'\nagain||/tmp\n");
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_reaches_the_first_process_which_may_end_as_it_likes() {
    for subject in Subject::all("interrupt").await {
        let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.02; done";
        let mut container = subject
            .runtime()
            .start(subject.launch("interrupted", &["sh", "-c", script]))
            .await
            .unwrap();
        read_until(container.stdout.as_mut().unwrap(), "ready").await;
        container.signal(Signal::SIGINT).unwrap();
        let finished = finish(container).await;
        assert_eq!(finished.exit, ContainerExit::Exited { code: 3 });
        assert_eq!(finished.stdout, "interrupted\n");
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_ends_every_process_and_waiting_again_gives_the_same() {
    for subject in Subject::all("kill").await {
        let duration = format!("98765.{}", std::process::id());
        let name = format!("killed-{}", std::process::id());
        let script = format!("sleep {duration} & sleep {duration} & echo ready; wait");
        let mut container = subject
            .runtime()
            .start(subject.launch(&name, &["sh", "-c", &script]))
            .await
            .unwrap();
        read_until(container.stdout.as_mut().unwrap(), "ready").await;
        eventually("both children run", || subject.has_processes(&name, &duration, 2)).await;
        let handle = container.handle();
        handle.kill();
        assert_eq!(container.wait().await, ContainerExit::Signaled { signal: 9 });
        assert_eq!(container.wait().await, ContainerExit::Signaled { signal: 9 });
        eventually("the children are gone", || processes_with(&duration) == 0).await;
        eventually("so is a sandbox", || sandboxes_of(&name) == 0).await;
        // Too late, and no error.
        handle.signal(Signal::SIGTERM).unwrap();
        container.dispose().await.unwrap();
        handle.kill();
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_container_is_killed() {
    for subject in Subject::all("drop").await {
        let duration = format!("87654.{}", std::process::id());
        let name = format!("dropped-{}", std::process::id());
        let container = subject
            .runtime()
            .start(subject.launch(&name, &["sleep", &duration]))
            .await
            .unwrap();
        eventually("it runs", || subject.has_processes(&name, &duration, 1)).await;
        drop(container);
        eventually("it is gone", || processes_with(&duration) == 0).await;
        eventually("so is a sandbox", || sandboxes_of(&name) == 0).await;
        if let Subject::Isolated(platform) = &subject {
            eventually("its traces are gone", || platform.container_traces().is_empty()).await;
        }
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_command_is_an_error_that_names_it() {
    for subject in Subject::all("missing-command").await {
        let launch = subject.launch("missing", &["no-such-program-here"]);
        let error = subject.runtime().start(launch).await.unwrap_err();
        match error {
            StartError::Refused { message, .. } => assert!(message.contains("no-such-program-here"), "{message}"),
            StartError::Spawn { program, .. } => assert_eq!(program.to_str(), Some("no-such-program-here")),
            other => panic!("{other:?}"),
        }
        if let Subject::Isolated(platform) = &subject {
            assert_eq!(platform.container_traces(), Vec::<String>::new());
        }
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_launches_are_refused_before_anything_is_made() {
    for subject in Subject::all("impossible").await {
        let good = subject.launch("good-name_1.x", &["true"]);
        let mut launches = Vec::new();
        for name in ["", "-x", "a/b", "..", "a b", &"x".repeat(41)] {
            let mut launch = good.clone();
            name.clone_into(&mut launch.name);
            launches.push(launch);
        }
        let mut launch = good.clone();
        launch.argv.clear();
        launches.push(launch);
        let mut launch = good.clone();
        "relative".clone_into(&mut launch.workdir);
        launches.push(launch);
        let mut launch = good.clone();
        launch.env.push(("A=B".to_owned(), String::new()));
        launches.push(launch);
        let mut launch = good.clone();
        launch.argv.push("nul\0".to_owned());
        launches.push(launch);
        let mut launch = good.clone();
        launch.env.push(("BIG".to_owned(), "x".repeat(2_000_000)));
        launches.push(launch);
        let mut launch = good.clone();
        launch.binds.push(Bind {
            source: "/tmp".into(),
            target: "/a/../../b".to_owned(),
            read_only: true,
        });
        launches.push(launch);
        for launch in launches {
            let error = subject.runtime().start(launch).await.unwrap_err();
            assert!(matches!(error, StartError::InvalidLaunch { .. }), "{error:?}");
        }
        assert_eq!(
            run(subject.runtime(), good).await.exit,
            ContainerExit::Exited { code: 0 }
        );
        subject.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runtime_cannot_do_it_refuses_by_name() {
    for subject in Subject::all("refusals").await {
        let capabilities = subject.runtime().capabilities();
        let mut asked = Vec::new();
        let mut limited = subject.launch("limited", &["true"]);
        limited.limits.memory_bytes = Some(64 << 20);
        asked.push((Feature::Limits, limited));
        let mut bound = subject.launch("bound", &["true"]);
        bound.binds.push(Bind {
            source: "/tmp".into(),
            target: "/mnt".to_owned(),
            read_only: true,
        });
        asked.push((Feature::Binds, bound));
        let mut other_user = subject.launch("user", &["true"]);
        other_user.user = Some("1000".to_owned());
        asked.push((Feature::Users, other_user));
        let mut networked = subject.launch("network", &["true"]);
        networked.network = NetworkMode::Bridge;
        asked.push((Feature::OwnNetwork, networked));
        for (feature, launch) in asked {
            match subject.runtime().start(launch).await {
                Ok(container) => {
                    assert!(capabilities.has(feature), "{feature} was not refused");
                    container.dispose().await.unwrap();
                }
                Err(error) => {
                    assert!(matches!(error, StartError::Unsupported { .. }), "{error:?}");
                    assert!(!capabilities.has(feature), "{feature} was refused");
                }
            }
        }
        subject.close().await;
    }
}

#[tokio::test]
async fn a_runtime_that_is_not_there_is_never_replaced_by_another() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = ContainerConfig::new("gvisor", directory.path());
    config.runsc_path = Some(directory.path().join("no-runsc"));
    let Err(error) = ionian_container::open(RuntimeKind::Gvisor, config).await else {
        panic!("something was opened")
    };
    assert!(
        matches!(&error, OpenError::ProgramUnusable { program, .. } if program.ends_with("no-runsc")),
        "{error}"
    );
}
