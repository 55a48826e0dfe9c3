//! Cancellation and timeouts: an input is decided at once, its container gets a moment.

use expect_test::expect;

use crate::tests::scenario::check;

/// Nobody else would close the map, so this does.
#[test]
fn a_cancelled_call_ends_waiting_and_running_inputs() {
    check(
        "
        fn f max=1
        map m f 3
        poll A
        cancel m
        let-go A m.0
        poll A
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
            0s cancel m
                record: m has 3 inputs, m.0 is Terminated (output 1) 'cancelled', m.1 is Terminated (output 2) 'cancelled', m.2 is Terminated (output 3) 'cancelled'
                answer: yes
                order: A lets go of m.0
            0s let-go A m.0
                answer: yes
            0s poll A
        "#]],
    );
}

#[test]
fn a_container_that_does_not_let_go_is_killed() {
    check(
        "
        fn f max=1
        call c f
        poll A
        cancel c
        call d f
        +5s
        exit A kill 9
        poll B
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
            0s cancel c
                record: c.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of c.0
            0s call d f
                record: call d, d.0 waits
                answer: yes
            5s …
                desired: A stopped in 0s (TimedOut)
            5s exit A kill 9
                record: A ended, B for f
                desired: B
            5s poll B
                record: d.0 on B
                answer: B gets d.0
        "#]],
    );
}

/// The other input of the killed container runs again, for free.
#[test]
fn cancelling_with_kill_spares_other_calls() {
    check(
        "
        fn f slots=2
        call c f & call d f
        poll A
        poll A
        cancel c kill
        exit A kill 9
        poll B
        ",
        &expect![[r#"
            0s fn f slots=2
            0s call c f & call d f
                record: call c, c.0 waits, call d, d.0 waits, A for f
                answer: yes, yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s poll A
                record: d.0 on A
                answer: A gets d.0
            0s cancel c kill
                record: c.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of c.0
                desired: A stopped in 0s (Requested)
            0s exit A kill 9
                record: A ended, d.0#1 waits from 0s, 0 retries, B for f
                desired: B
            0s poll B
                record: d.0#1 on B
                answer: B gets d.0#1
        "#]],
    );
}

#[test]
fn inputs_that_come_after_the_cancellation_are_cancelled() {
    check(
        "
        fn f max=1
        map m f 1
        cancel m
        put m 2
        ",
        &expect![[r#"
            0s fn f max=1
            0s map m f 1
                record: call m, m.0 waits, A for f
                answer: yes
                desired: A
            0s cancel m
                record: m has 1 inputs, m.0 is Terminated (output 1) 'cancelled'
                answer: yes
            0s put m 2
                record: m.1 m.2 waits, m.1 is Terminated (output 2) 'cancelled', m.2 is Terminated (output 3) 'cancelled'
                answer: yes
        "#]],
    );
}

#[test]
fn a_cancelled_retry_does_not_come_back() {
    check(
        "
        fn f retries=1/10s
        call c f
        poll A
        fail A c.0
        cancel c
        +20s
        ",
        &expect![[r#"
            0s fn f retries=1/10s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s fail A c.0
                record: c.0#1 waits from 10s, 1 retries
                answer: yes
            0s cancel c
                record: c.0#1 is Terminated (output 1) 'cancelled'
                answer: yes
        "#]],
    );
}

#[test]
fn a_late_result_of_a_cancelled_input_is_ignored() {
    check(
        "
        fn f
        call c f
        poll A
        cancel c
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
            0s cancel c
                record: c.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of c.0
            0s done A c.0
                answer: yes
            0s poll A
        "#]],
    );
}

#[test]
fn an_attempt_that_overruns_is_a_timeout() {
    check(
        "
        fn f timeout=10s
        call c f
        poll A
        +10s
        let-go A c.0
        poll A
        ",
        &expect![[r#"
            0s fn f timeout=10s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            10s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 10s'
                order: A lets go of c.0
            10s let-go A c.0
                answer: yes
            10s poll A
        "#]],
    );
}

#[test]
fn a_timeout_of_one_input_leaves_its_neighbours_alone() {
    check(
        "
        fn f slots=3 timeout=10s
        map m f 2
        poll A
        +5s
        poll A
        +5s
        let-go A m.0
        done A m.1
        ",
        &expect![[r#"
            0s fn f slots=3 timeout=10s
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            5s poll A
                record: m.1 on A
                answer: A gets m.1
            10s …
                record: m.0 is Timeout (output 1) 'Task's current input hit its timeout of 10s'
                order: A lets go of m.0
            10s let-go A m.0
                answer: yes
            10s done A m.1
                record: m.1 is Success (output 2)
                answer: yes
        "#]],
    );
}

/// The hanging input has its outcome; the one beside it was not to blame.
#[test]
fn a_neighbour_of_an_input_that_hangs_runs_again() {
    check(
        "
        fn f slots=2 timeout=10s max=1
        call c f
        poll A
        +8s
        call d f
        poll A
        +7s
        exit A kill 9
        poll B
        ",
        &expect![[r#"
            0s fn f slots=2 timeout=10s max=1
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            8s call d f
                record: call d, d.0 waits
                answer: yes
            8s poll A
                record: d.0 on A
                answer: A gets d.0
            10s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 10s'
                order: A lets go of c.0
            15s …
                desired: A stopped in 0s (TimedOut)
            15s exit A kill 9
                record: A ended, d.0#1 waits from 15s, 0 retries, B for f
                desired: B
            15s poll B
                record: d.0#1 on B
                answer: B gets d.0#1
        "#]],
    );
}

/// The runtime cancels by the input's name, so the next attempt waits until the last has let go. The input behind it does not wait.
#[test]
fn a_timed_out_attempt_is_not_retried_beside_itself() {
    check(
        "
        fn f slots=2 timeout=10s retries=1/0s max=1
        call c f
        poll A
        poll A
        +10s
        call d f
        poll A
        let-go A c.0
        poll A
        done A c.0#1 d.0
        ",
        &expect![[r#"
            0s fn f slots=2 timeout=10s retries=1/0s max=1
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s poll A
            10s …
                record: c.0#1 waits from 10s, 1 retries
                order: A lets go of c.0
            10s call d f
                record: call d, d.0 waits, d.0 on A
                answer: yes, A gets d.0
            10s poll A
            10s let-go A c.0
                record: c.0#1 on A
                answer: yes, A gets c.0#1
            10s poll A
            10s done A c.0#1 d.0
                record: c.0#1 is Success (output 1), d.0 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn a_runtime_that_ends_itself_to_cancel_takes_no_neighbour_along() {
    check(
        "
        fn f slots=2
        call c f & call d f
        poll A
        poll A
        cancel c
        exit A 0
        poll B
        ",
        &expect![[r#"
            0s fn f slots=2
            0s call c f & call d f
                record: call c, c.0 waits, call d, d.0 waits, A for f
                answer: yes, yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s poll A
                record: d.0 on A
                answer: A gets d.0
            0s cancel c
                record: c.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of c.0
            0s exit A 0
                record: A ended, d.0#1 waits from 0s, 0 retries, B for f
                desired: B
            0s poll B
                record: d.0#1 on B
                answer: B gets d.0#1
        "#]],
    );
}

/// What happens to another container meanwhile does not shorten it.
#[test]
fn each_container_has_its_whole_time_to_let_go() {
    check(
        "
        fn f timeout=3s
        map m f 1
        call c f
        poll A & poll B
        +1s
        cancel m
        +10s
        ",
        &expect![[r#"
            0s fn f timeout=3s
            0s map m f 1
                record: call m, m.0 waits, A for f
                answer: yes
                desired: A
            0s call c f
                record: call c, c.0 waits, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, c.0 on B
                answer: A gets m.0, B gets c.0
            1s cancel m
                record: m has 1 inputs, m.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of m.0
            3s …
                record: c.0 is Timeout (output 1) 'Task's current input hit its timeout of 3s'
                order: B lets go of c.0
            6s …
                desired: A stopped in 0s (TimedOut), B
            8s …
                desired: A stopped in 0s (TimedOut), B stopped in 0s (TimedOut)
        "#]],
    );
}

#[test]
fn an_order_to_end_is_hastened_and_never_put_off() {
    check(
        "
        fn f
        call c f
        poll A
        stop A
        cancel c kill
        stop A
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
            0s cancel c kill
                record: c.0 is Terminated (output 1) 'cancelled'
                answer: yes
                order: A lets go of c.0
                desired: A stopped in 0s (Requested)
            0s stop A
                answer: yes
        "#]],
    );
}
