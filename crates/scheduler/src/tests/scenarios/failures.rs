//! Containers that cannot be set up, hang, or end by themselves.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn a_failing_import_fails_what_waits() {
    check(
        "
        fn f
        map m f 2
        broken A
        exit A 0
        exit B 1
        +5s
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s broken A
                record: m.0 is InitFailure (output 1) 'ImportError: no module named x', m.1 is InitFailure (output 2) 'ImportError: no module named x'
                answer: yes
                desired: A stopped in 10s (Requested), B
            0s exit A 0
                record: A ended
                desired: B
            0s exit B 1
                record: B ended
                order: 2 failures, pause until 4s
                desired: nothing
        "#]],
    );
}

/// No endless loop of restarts: pauses grow to a minute.
#[test]
fn a_failing_minimum_is_backed_off_from() {
    check(
        "
        fn f min=1
        broken A
        exit A 0
        broken B
        exit B 0
        +4s
        exit C 1
        +8s
        exit D 1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s broken A
                record: B for f
                answer: yes
                desired: A stopped in 10s (Requested), B
            0s exit A 0
                record: A ended
                desired: B
            0s broken B
                answer: yes
                order: 2 failures, pause until 4s
                desired: B stopped in 10s (Requested)
            0s exit B 0
                record: B ended
                desired: nothing
            4s …
                record: C for f
                desired: C
            4s exit C 1
                record: C ended
                order: 3 failures, pause until 12s
                desired: nothing
            12s …
                record: D for f
                desired: D
            12s exit D 1
                record: D ended
                order: 4 failures, pause until 28s
                desired: nothing
        "#]],
    );
}

#[test]
fn a_container_that_ends_when_it_is_ready_is_backed_off_from() {
    check(
        "
        fn f min=1
        poll A
        exit A 1
        poll B
        exit B 1
        +4s
        poll C
        exit C 1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s exit A 1
                record: A ended, B for f
                answer: A asks again
                desired: B
            0s poll B
            0s exit B 1
                record: B ended
                answer: B asks again
                order: 2 failures, pause until 4s
                desired: nothing
            4s …
                record: C for f
                desired: C
            4s poll C
            4s exit C 1
                record: C ended
                answer: C asks again
                order: 3 failures, pause until 12s
                desired: nothing
        "#]],
    );
}

#[test]
fn an_answer_forgives_failures() {
    check(
        "
        fn f min=1
        exit A 1
        poll B
        call c f
        done B c.0
        exit B 1
        exit C 1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s exit A 1
                record: A ended, B for f
                desired: B
            0s poll B
            0s call c f
                record: call c, c.0 waits, c.0 on B
                answer: yes, B gets c.0
            0s done B c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s exit B 1
                record: B ended, C for f
                desired: C
            0s exit C 1
                record: C ended, D for f
                desired: D
        "#]],
    );
}

#[test]
fn a_start_failure_of_the_platform_is_tried_again() {
    check(
        "
        fn f
        call c f
        exit A unstarted
        exit B unstarted
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s exit A unstarted
                record: A ended, B for f
                desired: B
            0s exit B unstarted
                record: B ended, c.0 is InternalFailure (output 1) 'the container could not start: no image'
                order: 2 failures, pause until 4s
                desired: nothing
        "#]],
    );
}

#[test]
fn a_worker_that_restarts_is_not_the_functions_fault() {
    check(
        "
        fn f
        map m f 2
        exit A lost & exit B lost
        +100ms
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s exit A lost & exit B lost
                record: A ended, B ended
                desired: nothing
            0.1s …
                record: C for f, D for f
                desired: C, D
        "#]],
    );
}

#[test]
fn a_failure_beside_a_serving_container_is_its_own() {
    check(
        "
        fn f
        call c f
        poll A
        call d f
        exit B 1
        done A c.0
        poll A
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s exit B 1
                record: B ended, C for f
                desired: A, C
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s poll A
                record: d.0 on A
                answer: A gets d.0
        "#]],
    );
}

/// A redeploy fixed it: what waits must not get the old error.
#[test]
fn a_late_failure_of_an_old_definition_says_nothing() {
    check(
        "
        fn f
        call c f
        fn f v=2
        broken A
        exit A 0
        poll B
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s fn f v=2
                record: B for f
                desired: A stopped in 0s (Superseded), B
            0s broken A
                answer: yes
            0s exit A 0
                record: A ended
                desired: B
            0s poll B
                record: c.0 on B
                answer: B gets c.0
        "#]],
    );
}

#[test]
fn a_start_that_hangs_is_given_up() {
    check(
        "
        fn f startup=20s
        call c f
        +20s
        exit A kill 9
        ",
        &expect![[r#"
            0s fn f startup=20s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            20s …
                record: c.0 is InitFailure (output 1) 'the container was not ready after its startup timeout of 20s; raise `startup_timeout=` (or `timeout=`) if it needs longer'
                desired: A stopped in 0s (TimedOut)
            20s exit A kill 9
                record: A ended
                desired: nothing
        "#]],
    );
}

#[test]
fn a_runtime_that_no_longer_asks_is_replaced() {
    check(
        "
        fn f min=1
        poll A
        drop A
        +90s
        call c f
        exit A kill 9
        poll B
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s drop A
            90s …
                record: B for f
                desired: A stopped in 10s (TimedOut), B
            90s call c f
                record: call c, c.0 waits
                answer: yes
            90s exit A kill 9
                record: A ended
                desired: B
            90s poll B
                record: c.0 on B
                answer: B gets c.0
        "#]],
    );
}

#[test]
fn an_exit_is_acknowledged_each_time_it_is_told() {
    check(
        "
        fn f
        call c f
        poll A
        done A c.0
        exit A 0
        exit A 0
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s exit A 0
                record: A ended
                desired: nothing
            0s exit A 0
                desired: nothing
        "#]],
    );
}

#[test]
fn a_failing_deploy_fails_what_waits_while_the_old_one_serves() {
    check(
        "
        fn f
        call c f
        poll A
        fn f v=2
        call d f
        broken B
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s fn f v=2
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s broken B
                record: d.0 is InitFailure (output 1) 'ImportError: no module named x'
                answer: yes
                desired: A, B stopped in 10s (Requested)
        "#]],
    );
}

#[test]
fn a_container_that_ended_after_a_minute_was_of_use() {
    check(
        "
        fn f min=1
        poll A
        +60s
        exit A 1
        poll B
        exit B 1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            60s exit A 1
                record: A ended, B for f
                answer: A asks again
                desired: B
            60s poll B
            60s exit B 1
                record: B ended, C for f
                answer: B asks again
                desired: C
        "#]],
    );
}

#[test]
fn a_container_that_was_ready_until_it_was_ended_forgives_failures() {
    check(
        "
        fn f min=1
        exit A 1
        poll B
        stop B
        exit B 0
        exit C 1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s exit A 1
                record: A ended, B for f
                desired: B
            0s poll B
            0s stop B
                record: C for f
                answer: B ends itself, yes
                desired: B, C
            0s exit B 0
                record: B ended
                desired: C
            0s exit C 1
                record: C ended, D for f
                desired: D
        "#]],
    );
}

/// Neither the pause after failures nor what runs.
#[test]
fn the_same_definition_again_changes_nothing() {
    check(
        "
        fn f min=1
        exit A 1
        exit B 1
        fn f min=1
        +4s
        poll C
        fn f min=1
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s exit A 1
                record: A ended, B for f
                desired: B
            0s exit B 1
                record: B ended
                order: 2 failures, pause until 4s
                desired: nothing
            0s fn f min=1
            4s …
                record: C for f
                desired: C
            4s poll C
            4s fn f min=1
        "#]],
    );
}

#[test]
fn a_pause_that_is_over_does_not_wake_what_waits_for_room() {
    check(
        "
        fn f min=1 cpu=2000
        fn g cpu=2000
        exit A 1
        exit B 1
        call c g
        poll C
        +30s
        ",
        &expect![[r#"
            0s fn f min=1 cpu=2000
                record: A for f
                desired: A
            0s fn g cpu=2000
            0s exit A 1
                record: A ended, B for f
                desired: B
            0s exit B 1
                record: B ended
                order: 2 failures, pause until 4s
                desired: nothing
            0s call c g
                record: call c, c.0 waits, C for g
                answer: yes
                desired: C
            0s poll C
                record: c.0 on C
                answer: C gets c.0
            4s …
        "#]],
    );
}
