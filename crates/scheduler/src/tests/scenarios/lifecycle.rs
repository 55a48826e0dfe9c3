//! Deploys, stops, restarts, shutdown.

use expect_test::expect;

use crate::tests::scenario::check;

/// What runs on them finishes; what comes next goes to the new ones.
#[test]
fn a_deploy_drains_the_old_containers() {
    check(
        "
        fn f
        map m f 2
        poll A & poll B
        done B m.1
        poll B
        fn f v=2
        call d f
        poll C
        done A m.0
        poll A
        exit A 0
        exit B 0
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done B m.1
                record: m.1 is Success (output 1)
                answer: yes
            0s poll B
            0s fn f v=2
                answer: B ends itself
            0s call d f
                record: call d, d.0 waits, C for f
                answer: yes
                desired: A, B, C
            0s poll C
                record: d.0 on C
                answer: C gets d.0
            0s done A m.0
                record: m.0 is Success (output 2)
                answer: yes
            0s poll A
                answer: A ends itself
            0s exit A 0
                record: A ended
                desired: B, C
            0s exit B 0
                record: B ended
                desired: C
        "#]],
    );
}

#[test]
fn a_deploy_replaces_containers_that_still_start() {
    check(
        "
        fn f
        call c f
        fn f v=2
        exit A kill 9
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
            0s exit A kill 9
                record: A ended
                desired: B
            0s poll B
                record: c.0 on B
                answer: B gets c.0
        "#]],
    );
}

#[test]
fn a_deploy_of_a_single_container_does_not_wait_for_the_old_one() {
    check(
        "
        fn f max=1
        call c f
        poll A
        fn f v=2 max=1
        call d f
        poll B
        done A c.0
        ",
        &expect![[r#"
            0s fn f max=1
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s fn f v=2 max=1
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s poll B
                record: d.0 on B
                answer: B gets d.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn a_stopped_app_ends_what_waits_and_what_runs() {
    check(
        "
        fn f max=1
        map m f 2
        poll A
        off f
        put m 1
        exit A 0
        ",
        &expect![[r#"
            0s fn f max=1
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s off f
                record: m.1 is Terminated (output 1) 'stopped', m.0 is Terminated (output 2) 'stopped'
                desired: A stopped in 10s (AppStopped)
            0s put m 1
                answer: no: UnknownFunction
            0s exit A 0
                record: A ended
                desired: nothing
        "#]],
    );
}

#[test]
fn an_app_that_comes_back_gets_new_containers() {
    check(
        "
        fn f
        call c f
        poll A
        done A c.0
        poll A
        off f
        fn f
        call d f
        poll B
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
            0s poll A
            0s off f
                answer: A ends itself
            0s fn f
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s poll B
                record: d.0 on B
                answer: B gets d.0
            0s exit A 0
                record: A ended
                desired: B
        "#]],
    );
}

#[test]
fn a_stop_request_is_graceful_or_not() {
    check(
        "
        fn f
        map m f 2
        poll A & poll B
        drain A
        stop B
        exit B 0
        done A m.0
        poll A
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s drain A
                answer: yes
            0s stop B
                answer: yes
                desired: A, B stopped in 10s (Requested)
            0s exit B 0
                record: B ended, m.1#1 waits from 0s, 0 retries, C for f
                desired: A, C
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s poll A
                answer: A ends itself
        "#]],
    );
}

/// It got its kill switch, and its exit hooks hang.
#[test]
fn a_drain_that_takes_too_long_is_ended() {
    check(
        "
        fn f timeout=1m
        call c f
        poll A
        done A c.0
        poll A
        drain A
        +30s
        exit A kill 9
        ",
        &expect![[r#"
            0s fn f timeout=1m
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
            0s poll A
            0s drain A
                answer: A ends itself, yes
            30s …
                desired: A stopped in 10s (Requested)
            30s exit A kill 9
                record: A ended
                desired: nothing
        "#]],
    );
}

#[test]
fn a_restart_runs_again_what_ran() {
    check(
        "
        fn f max=1 retries=1/10s
        map m f 3
        poll A
        fail A m.0
        poll A
        restart
        exit A lost
        +1s
        poll B
        +10s
        done B m.1#1
        poll B
        done B m.0#1
        poll B
        ",
        &expect![[r#"
            0s fn f max=1 retries=1/10s
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s fail A m.0
                record: m.0#1 waits from 10s, 1 retries
                answer: yes
            0s poll A
                record: m.1 on A
                answer: A gets m.1
            0s restart
                desired: A
            0s exit A lost
                record: A ended, m.1#1 waits from 0s, 0 retries, B for f
                desired: B
            1s poll B
                record: m.1#1 on B
                answer: B gets m.1#1
            10s …
            11s done B m.1#1
                record: m.1#1 is Success (output 1)
                answer: yes
            11s poll B
                record: m.0#1 on B
                answer: B gets m.0#1
            11s done B m.0#1
                record: m.0#1 is Success (output 2)
                answer: yes
            11s poll B
                record: m.2 on B
                answer: B gets m.2
        "#]],
    );
}

#[test]
fn a_restart_forgets_inputs_of_apps_that_are_gone() {
    check(
        "
        fn f
        call c f
        gone f
        restart
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s restart
                record: c.0 is Terminated (output 1) 'the input's app was stopped'
                desired: A stopped in 10s (AppStopped)
        "#]],
    );
}

/// What ran before is not known until the record is read.
#[test]
fn nothing_starts_before_the_record_is_read() {
    check(
        "
        fn f min=1
        poll A
        restart slowly
        poll A
        call c f
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s restart: functions
            0s restart slowly
                desired: A
            0s poll A
            0s call c f
                record: call c, c.0 waits, c.0 on A
                answer: yes, A gets c.0
        "#]],
    );
}

#[test]
fn a_shutdown_stops_everything_and_starts_nothing() {
    check(
        "
        fn f
        map m f 3
        poll A
        shutdown
        poll A
        exit A 0
        exit B kill 9
        call d f
        ",
        &expect![[r#"
            0s fn f
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A
                record: m.0 on A, C for f
                answer: A gets m.0
                desired: A, B, C
            0s shutdown
                desired: A stopped in 10s (ShuttingDown), B stopped in 10s (ShuttingDown), C stopped in 10s (ShuttingDown)
            0s poll A
                answer: A ends itself
            0s exit A 0
                record: A ended, m.0#1 waits from 0s, 0 retries
                desired: B stopped in 10s (ShuttingDown), C stopped in 10s (ShuttingDown)
            0s exit B kill 9
                record: B ended
                desired: C stopped in 10s (ShuttingDown)
            0s call d f
                record: call d, d.0 waits
                answer: yes
        "#]],
    );
}

/// What was answered before the crash is not asked for again; what was not is, and finds nothing.
#[test]
fn a_client_repeats_its_last_word_after_a_restart() {
    check(
        "
        fn f
        map m f 1
        poll A
        done A m.0
        close m
        restart
        close m
        consume m
        ",
        &expect![[r#"
            0s fn f
            0s map m f 1
                record: call m, m.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s close m
                record: m has 1 inputs
                answer: yes
            0s restart
                desired: A
            0s close m
                record: m has 1 inputs
                answer: yes
            0s consume m
                record: m was read
        "#]],
    );
}

/// What becomes free while the server ends is not used.
#[test]
fn nothing_that_waits_for_room_starts_during_a_shutdown() {
    check(
        "
        fn f cpu=2000
        map m f 2
        poll A
        shutdown
        exit A 0
        ",
        &expect![[r#"
            0s fn f cpu=2000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s shutdown
                desired: A stopped in 10s (ShuttingDown)
            0s exit A 0
                record: A ended, m.0#1 waits from 0s, 0 retries
                desired: nothing
        "#]],
    );
}

#[test]
fn a_busy_container_that_drains_gets_nothing_more() {
    check(
        "
        fn f slots=2
        call c f
        poll A
        drain A
        call d f
        poll A
        done A c.0
        ",
        &expect![[r#"
            0s fn f slots=2
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s drain A
                answer: yes
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s poll A
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: A ends itself, yes
        "#]],
    );
}

#[test]
fn a_single_use_container_has_its_timeout_and_the_grace() {
    check(
        "
        fn f once timeout=1m
        call c f
        poll A
        +1m
        let-go A c.0
        +5m
        ",
        &expect![[r#"
            0s fn f once timeout=1m
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            60s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 60s'
                order: A lets go of c.0
            60s let-go A c.0
                answer: yes
            90s …
                desired: A stopped in 10s (ScaleDown)
        "#]],
    );
}
