//! Attempts: retried by policy, lost through no fault of the user's, superseded.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn a_failure_is_retried_after_its_back_off() {
    check(
        "
        fn f retries=2/1s
        call c f
        poll A
        fail A c.0
        poll A
        +1s
        fail A c.0#1
        poll A
        +2s
        fail A c.0#2
        ",
        &expect![[r#"
            0s fn f retries=2/1s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s fail A c.0
                record: c.0#1 waits from 1s, 1 retries
                answer: yes
            0s poll A
            1s …
                record: c.0#1 on A
                answer: A gets c.0#1
            1s fail A c.0#1
                record: c.0#2 waits from 3s, 2 retries
                answer: yes
            1s poll A
            3s …
                record: c.0#2 on A
                answer: A gets c.0#2
            3s fail A c.0#2
                record: c.0#2 is Failure (output 1) 'ValueError'
                answer: yes
        "#]],
    );
}

#[test]
fn a_failure_without_retries_is_the_outcome() {
    check(
        "
        fn f
        call c f
        poll A
        fail A c.0
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
            0s fail A c.0
                record: c.0 is Failure (output 1) 'ValueError'
                answer: yes
        "#]],
    );
}

#[test]
fn a_crash_is_the_users_failure() {
    check(
        "
        fn f retries=1/0s
        call c f
        poll A
        exit A kill 11
        poll B
        exit B oom
        ",
        &expect![[r#"
            0s fn f retries=1/0s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s exit A kill 11
                record: A ended, c.0#1 waits from 0s, 1 retries, B for f
                desired: B
            0s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            0s exit B oom
                record: B ended, c.0#1 is Failure (output 1) 'the container ran out of memory and was killed while it ran this input; the app's log shows what it printed'
                desired: nothing
        "#]],
    );
}

#[test]
fn a_container_killed_from_outside_costs_no_retry() {
    check(
        "
        fn f
        call c f
        poll A
        exit A kill 9
        poll B
        done B c.0#1
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
            0s exit A kill 9
                record: A ended, c.0#1 waits from 0s, 0 retries, B for f
                desired: B
            0s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            0s done B c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn an_input_that_is_always_lost_is_given_up() {
    check(
        "
        fn f
        call c f
        poll A
        exit A lost
        poll B
        exit B lost
        poll C
        exit C lost
        poll D
        exit D lost
        poll E
        exit E lost
        poll F
        exit F lost
        poll G
        exit G lost
        poll H
        exit H lost
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
            0s exit A lost
                record: A ended, c.0#1 waits from 0s, 0 retries, B for f
                desired: B
            0s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            0s exit B lost
                record: B ended, c.0#2 waits from 0s, 0 retries, C for f
                desired: C
            0s poll C
                record: c.0#2 on C
                answer: C gets c.0#2
            0s exit C lost
                record: C ended, c.0#3 waits from 0s, 0 retries, D for f
                desired: D
            0s poll D
                record: c.0#3 on D
                answer: D gets c.0#3
            0s exit D lost
                record: D ended, c.0#4 waits from 0s, 0 retries, E for f
                desired: E
            0s poll E
                record: c.0#4 on E
                answer: E gets c.0#4
            0s exit E lost
                record: E ended, c.0#5 waits from 0s, 0 retries, F for f
                desired: F
            0s poll F
                record: c.0#5 on F
                answer: F gets c.0#5
            0s exit F lost
                record: F ended, c.0#6 waits from 0s, 0 retries, G for f
                desired: G
            0s poll G
                record: c.0#6 on G
                answer: G gets c.0#6
            0s exit G lost
                record: G ended, c.0#7 waits from 0s, 0 retries, H for f
                desired: H
            0s poll H
                record: c.0#7 on H
                answer: H gets c.0#7
            0s exit H lost
                record: H ended, c.0#7 is InternalFailure (output 1) 'the input was given up after 8 containers were lost under it; the last one: the container was lost when its worker restarted'
                desired: nothing
        "#]],
    );
}

#[test]
fn a_superseded_report_changes_nothing() {
    check(
        "
        fn f
        call c f
        poll A
        lost A c.0
        poll A
        done A c.0
        done A c.0#1
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
            0s lost A c.0
                record: c.0#1 waits from 0s, 0 retries
            0s poll A
                record: c.0#1 on A
                answer: A gets c.0#1
            0s done A c.0
                answer: yes
            0s done A c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn a_delivery_that_found_nobody_is_taken_back() {
    check(
        "
        fn f
        call c f
        poll A
        lost A c.0
        poll A
        done A c.0#1
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
            0s lost A c.0
                record: c.0#1 waits from 0s, 0 retries
            0s poll A
                record: c.0#1 on A
                answer: A gets c.0#1
            0s done A c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn a_dropped_poll_gets_nothing() {
    check(
        "
        fn f max=1
        call c f
        poll A
        done A c.0
        poll A
        drop A
        call d f
        poll A
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
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s poll A
            0s drop A
            0s call d f
                record: call d, d.0 waits
                answer: yes
            0s poll A
                record: d.0 on A
                answer: A gets d.0
        "#]],
    );
}

#[test]
fn a_second_poll_supersedes_the_first() {
    check(
        "
        fn f min=1
        poll A
        poll A
        call c f
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s poll A
                answer: an older poll asks again
            0s call c f
                record: call c, c.0 waits, c.0 on A
                answer: yes, A gets c.0
        "#]],
    );
}

#[test]
fn a_stale_drop_leaves_the_next_poll_alone() {
    check(
        "
        fn f min=1
        poll A
        poll A
        drop A old
        call c f
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s poll A
                answer: an older poll asks again
            0s drop A old
            0s call c f
                record: call c, c.0 waits, c.0 on A
                answer: yes, A gets c.0
        "#]],
    );
}

#[test]
fn a_lost_input_keeps_its_place() {
    check(
        "
        fn f max=1
        map m f 3
        poll A
        exit A lost
        poll B
        ",
        &expect![[r#"
            0s fn f max=1
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s exit A lost
                record: A ended, m.0#1 waits from 0s, 0 retries, B for f
                desired: B
            0s poll B
                record: m.0#1 on B
                answer: B gets m.0#1
        "#]],
    );
}

#[test]
fn a_stranger_that_polls_is_told_to_end() {
    check(
        "
        poll Q
        ",
        &expect![[r#"
            0s poll Q
                answer: Q ends itself
        "#]],
    );
}

/// An asynchronous input reports that it was cancelled when its container is told to end. Nobody
/// cancelled it, so it runs again elsewhere.
#[test]
fn an_input_that_its_ending_container_cancels_runs_again() {
    check(
        "
        fn f
        call c f
        poll A
        stop A
        let-go A c.0
        exit A 0
        poll B
        done B c.0#1
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
            0s stop A
                answer: yes
                desired: A stopped in 10s (Requested)
            0s let-go A c.0
                record: c.0#1 waits from 0s, 0 retries, B for f
                answer: yes
                desired: A stopped in 10s (Requested), B
            0s exit A 0
                record: A ended
                desired: B
            0s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            0s done B c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

/// The attempt was decided when its time was over; the next one waits already.
#[test]
fn a_container_that_dies_while_it_lets_go_costs_nothing_more() {
    check(
        "
        fn f timeout=10s retries=1/1s
        call c f
        poll A
        +10s
        exit A 1
        +1s
        poll B
        done B c.0#1
        ",
        &expect![[r#"
            0s fn f timeout=10s retries=1/1s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            10s …
                record: c.0#1 waits from 11s, 1 retries
                order: A lets go of c.0
            10s exit A 1
                record: A ended
                desired: nothing
            11s …
                record: B for f
                desired: B
            11s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            11s done B c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}
