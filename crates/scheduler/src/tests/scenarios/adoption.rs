//! Containers that outlive the server.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn a_restart_leaves_running_inputs_where_they_run() {
    check(
        "
        fn f
        map m f 3
        poll A & poll B
        desired
        restart
        desired
        done A m.0
        poll A
        done B m.1
        done A m.2
        ",
        &expect![[r#"
            0s fn f
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B, C for f
                answer: A gets m.0, B gets m.1
                desired: A, B, C
                desired: A!, B!, C
            0s restart
                desired: A, B, C
                desired: A!, B!, C!
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s poll A
                record: m.2 on A
                answer: A gets m.2
            0s done B m.1
                record: m.1 is Success (output 2)
                answer: yes
            0s done A m.2
                record: m.2 is Success (output 3)
                answer: yes
        "#]],
    );
}

/// It asks for work, so it does not have what was recorded as handed to it.
#[test]
fn a_delivery_that_died_with_the_server_runs_again() {
    check(
        "
        fn f max=1
        call c f
        poll A
        restart
        poll A
        done A c.0
        done A c.0#1
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
            0s restart
                desired: A
            0s poll A
                record: c.0#1 waits from 0s, 0 retries, c.0#1 on A
                answer: A gets c.0#1
            0s done A c.0
                answer: yes
            0s done A c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

/// Only the newest delivery can have been on its way; a report of it says that it arrived.
#[test]
fn only_the_last_delivery_is_doubted() {
    check(
        "
        fn f slots=3 max=1
        map m f 3
        poll A
        +1s
        poll A
        restart
        poll A
        ",
        &expect![[r#"
            0s fn f slots=3 max=1
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            1s poll A
                record: m.1 on A
                answer: A gets m.1
            1s restart
                desired: A
            1s poll A
                record: m.1#1 waits from 1s, 0 retries, m.1#1 on A
                answer: A gets m.1#1
        "#]],
    );
    check(
        "
        fn f slots=2 max=1 batch=2/1s
        map m f 4
        poll A 2
        +1s
        poll A 2
        restart
        done A m.2
        poll A 2
        ",
        &expect![[r#"
            0s fn f slots=2 max=1 batch=2/1s
            0s map m f 4
                record: call m, m.0 m.1 m.2 m.3 waits, A for f
                answer: yes
                desired: A
            0s poll A 2
                record: m.0 on A, m.1 on A
                answer: A gets m.0 m.1
            1s poll A 2
                record: m.2 on A, m.3 on A
                answer: A gets m.2 m.3
            1s restart
                desired: A
            1s done A m.2
                record: m.2 is Success (output 1)
                answer: yes
            1s poll A 2
        "#]],
    );
}

#[test]
fn a_deadline_does_not_start_anew() {
    check(
        "
        fn f timeout=5m
        call c f
        poll A
        away 3m
        restart
        +2m
        ",
        &expect![[r#"
            0s fn f timeout=5m
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            180s restart
                desired: A
            300s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 300s'
                order: A lets go of c.0
        "#]],
    );
}

/// It may have ended in time, and be about to say so.
#[test]
fn a_time_that_ran_out_while_the_server_was_away_is_over_a_moment_later() {
    check(
        "
        fn f timeout=1m retries=1/10s
        map m f 2
        poll A & poll B
        away 5m
        restart
        done A m.0
        +60s
        ",
        &expect![[r#"
            0s fn f timeout=1m retries=1/10s
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            300s restart
                desired: A, B
            300s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            360s …
                record: m.1#1 waits from 370s, 1 retries
                order: B lets go of m.1
        "#]],
    );
}

/// Its exit while nobody listened says nothing about what it ran.
#[test]
fn a_container_that_ended_while_the_server_was_away_is_not_blamed() {
    check(
        "
        fn f
        call c f
        poll A
        restart
        exit A 1
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
            0s restart
                desired: A
            0s exit A 1
                record: A ended, c.0#1 waits from 0s, 0 retries, B for f
                desired: B
        "#]],
    );
    check(
        "
        fn f min=1
        poll A
        restart
        call c f
        exit A 1
        +1s
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s restart
                desired: A
            0s call c f
                record: call c, c.0 waits
                answer: yes
            0s exit A 1
                record: A ended
                desired: nothing
            0.1s …
                record: B for f
                desired: B
        "#]],
    );
}

#[test]
fn a_container_that_says_nothing_after_a_restart_is_replaced() {
    check(
        "
        fn f min=1 startup=30s
        poll A
        call c f
        done A c.0
        restart
        +30s
        exit A kill 9
        +1s
        ",
        &expect![[r#"
            0s fn f min=1 startup=30s
                record: A for f
                desired: A
            0s poll A
            0s call c f
                record: call c, c.0 waits, c.0 on A
                answer: yes, A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s restart
                desired: A
            30s …
                record: B for f
                desired: A stopped in 0s (TimedOut), B
            30s exit A kill 9
                record: A ended
                desired: B
        "#]],
    );
}

#[test]
fn a_deploy_while_the_server_was_away_drains_what_runs() {
    check(
        "
        fn f
        map m f 2
        poll A & poll B
        done B m.1
        fn f v=2 & shutdown
        restart
        done A m.0
        poll A
        poll B
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
            0s fn f v=2 & shutdown
                desired: A stopped in 10s (ShuttingDown), B stopped in 10s (ShuttingDown)
            0s restart
                desired: A, B
            0s done A m.0
                record: m.0 is Success (output 2)
                answer: yes
            0s poll A
                answer: A ends itself
            0s poll B
                answer: B ends itself
        "#]],
    );
}

#[test]
fn containers_of_an_app_that_is_gone_are_stopped() {
    check(
        "
        fn f
        call c f
        poll A
        gone f
        restart
        fn g
        call d g
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
            0s restart
                record: c.0 is Terminated (output 1) 'the input's app was stopped'
                desired: A stopped in 10s (AppStopped)
            0s fn g
            0s call d g
                record: call d, d.0 waits
                answer: yes
            0s exit A 0
                record: A ended, B for g
                desired: B
        "#]],
    );
}

/// It ends by itself after its input: nothing is planned onto it.
#[test]
fn a_single_use_container_takes_nothing_after_a_restart() {
    check(
        "
        fn f once
        call c f
        poll A
        restart
        call d f
        done A c.0
        exit A 0
        ",
        &expect![[r#"
            0s fn f once
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s restart
                desired: A
            0s call d f
                record: call d, d.0 waits, B for f
                answer: yes
                desired: A, B
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s exit A 0
                record: A ended
                desired: B
        "#]],
    );
}

/// Requests can go to it once it is known where it is.
#[test]
fn a_web_container_serves_again_when_its_worker_has_said_where_it_is() {
    check(
        "
        fn f web
        web f 1
        poll A
        restart
        poll A
        web f 1
        started A
        ",
        &expect![[r#"
            0s fn f web
            0s web f 1
                record: A for f
                desired: A
            0s poll A
                order: requests to A
            0s restart
                desired: A
            0s poll A
            0s web f 1
            0s started A
                order: requests to A
        "#]],
    );
    check(
        "
        fn f web
        web f 1
        serves A
        announced A
        restart
        started A
        web f 0 A=1
        web f 0
        +60s
        ",
        &expect![[r#"
            0s fn f web
            0s web f 1
                record: A for f
                desired: A
            0s serves A
                order: requests to A
            0s restart
                desired: A
            0s started A
                order: requests to A
            0s web f 0 A=1
            0s web f 0
            60s …
                order: no more requests to A
        "#]],
    );
}

#[test]
fn nothing_is_decided_before_the_record_was_read() {
    check(
        "
        fn f min=1
        poll A
        restart slowly
        poll A
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
        "#]],
    );
}

#[test]
fn a_single_use_container_has_as_long_as_before_a_restart() {
    check(
        "
        fn f once timeout=5m
        call c f
        poll A
        away 1m
        restart
        +5m
        ",
        &expect![[r#"
            0s fn f once timeout=5m
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            60s restart
                desired: A
            300s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 300s'
                order: A lets go of c.0
            305s …
                desired: A stopped in 0s (TimedOut)
        "#]],
    );
}

#[test]
fn a_report_of_an_earlier_delivery_says_nothing_of_the_last() {
    check(
        "
        fn f slots=2 max=1
        map m f 2
        poll A
        +1s
        poll A
        restart
        done A m.0
        poll A
        ",
        &expect![[r#"
            0s fn f slots=2 max=1
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            1s poll A
                record: m.1 on A
                answer: A gets m.1
            1s restart
                desired: A
            1s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            1s poll A
                record: m.1#1 waits from 1s, 0 retries, m.1#1 on A
                answer: A gets m.1#1
        "#]],
    );
}

#[test]
fn what_waits_does_not_fail_with_a_container_that_says_nothing_after_a_restart() {
    check(
        "
        fn f min=1 max=1 startup=30s
        poll A
        restart
        call c f
        +30s
        exit A kill 9
        ",
        &expect![[r#"
            0s fn f min=1 max=1 startup=30s
                record: A for f
                desired: A
            0s poll A
            0s restart
                desired: A
            0s call c f
                record: call c, c.0 waits
                answer: yes
            30s …
                desired: A stopped in 0s (TimedOut)
            30s exit A kill 9
                record: A ended, B for f
                desired: B
        "#]],
    );
}

/// Containers of that version ended with their server.
#[test]
fn a_container_whose_worker_was_not_recorded_is_lost() {
    check(
        "
        fn f
        map m f 2
        poll A
        unplaced A
        restart
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s restart
                record: A ended, m.0#1 waits from 0s, 0 retries, C for f
                desired: B, C
        "#]],
    );
}
