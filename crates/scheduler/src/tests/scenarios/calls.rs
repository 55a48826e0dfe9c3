//! Calls: accepted, delivered, answered, closed.

use expect_test::expect;

use crate::tests::scenario::check;

/// From nothing to a result and back to nothing.
#[test]
fn a_call_starts_a_container_and_is_answered() {
    check(
        "
        fn f
        call c f
        poll A
        done A c.0
        poll A
        +60s
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
            60s …
                answer: A ends itself
            60s exit A 0
                record: A ended
                desired: nothing
        "#]],
    );
}

#[test]
fn a_warm_container_gets_an_input_in_the_turn_it_came() {
    check(
        "
        fn f min=1
        poll A
        call c f
        ",
        &expect![[r#"
            0s fn f min=1
                record: A for f
                desired: A
            0s poll A
            0s call c f
                record: call c, c.0 waits, c.0 on A
                answer: yes, A gets c.0
        "#]],
    );
}

#[test]
fn a_map_scales_out_and_packs_the_oldest() {
    check(
        "
        fn f max=2
        map m f 4
        poll A & poll B
        done A m.0
        poll A
        done B m.1
        done A m.2
        poll A & poll B
        close m
        ",
        &expect![[r#"
            0s fn f max=2
            0s map m f 4
                record: call m, m.0 m.1 m.2 m.3 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
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
            0s poll A & poll B
                record: m.3 on A
                answer: A gets m.3
            0s close m
                record: m has 4 inputs
                answer: yes
        "#]],
    );
}

/// The client repeats a request whose answer it did not get, also when the call has finished meanwhile.
#[test]
fn a_repeated_start_is_the_same_call() {
    check(
        "
        fn f
        call c f
        again c f
        poll A
        done A c.0
        again c f
        ",
        &expect![[r#"
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s again c f
                answer: yes
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s again c f
                answer: yes
        "#]],
    );
}

#[test]
fn a_repeated_put_adds_nothing() {
    check(
        "
        fn f max=1
        map m f 1
        put m 1
        reput m 1
        poll A
        done A m.0
        poll A
        done A m.1
        reput m 1
        ",
        &expect![[r#"
            0s fn f max=1
            0s map m f 1
                record: call m, m.0 waits, A for f
                answer: yes
                desired: A
            0s put m 1
                record: m.1 waits
                answer: yes
            0s reput m 1
                answer: yes
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s poll A
                record: m.1 on A
                answer: A gets m.1
            0s done A m.1
                record: m.1 is Success (output 2)
                answer: yes
            0s reput m 1
                answer: yes
        "#]],
    );
}

#[test]
fn unknown_things_are_refused() {
    check(
        "
        fn f
        call c g
        put n 1
        drain Q
        off f
        call d f
        scale f min=1
        ",
        &expect![[r#"
            0s fn f
            0s call c g
                answer: no: UnknownFunction
            0s put n 1
                answer: no: UnknownCall
            0s drain Q
                answer: no: UnknownContainer
            0s off f
            0s call d f
                answer: no: UnknownFunction
            0s scale f min=1
                answer: no: UnknownFunction
        "#]],
    );
}

#[test]
fn a_full_queue_says_so() {
    check(
        "
        fn f max=1
        map m f 9
        put m 2
        put m 1
        ",
        &expect![[r#"
            0s fn f max=1
            0s map m f 9
                record: call m, m.0 m.1 m.2 m.3 m.4 m.5 m.6 m.7 m.8 waits, A for f
                answer: yes
                desired: A
            0s put m 2
                answer: no: QueueFull
            0s put m 1
                record: m.11 waits
                answer: yes
        "#]],
    );
}

/// What still runs will be read, so the first word is ignored.
#[test]
fn a_consumed_map_is_forgotten() {
    check(
        "
        fn f
        map m f 1
        consume m
        poll A
        done A m.0
        close m
        consume m
        put m 1
        ",
        &expect![[r#"
            0s fn f
            0s map m f 1
                record: call m, m.0 waits, A for f
                answer: yes
                desired: A
            0s consume m
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s close m
                record: m has 1 inputs
                answer: yes
            0s consume m
                record: m was read
            0s put m 1
                answer: no: UnknownCall
        "#]],
    );
}

/// Late words about it are answered; the store decides whether they mean anything.
#[test]
fn a_unary_call_is_forgotten_with_its_result() {
    check(
        "
        fn f
        call c f
        poll A
        done A c.0
        consume c
        cancel c
        close c
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
            0s consume c
                record: c was read
            0s cancel c
                answer: yes
            0s close c
                record: c has 1 inputs
                answer: yes
        "#]],
    );
}

/// Its client was killed before it said that all inputs had come.
#[test]
fn an_abandoned_map_is_closed_after_an_hour() {
    check(
        "
        fn f
        map m f 1
        poll A
        done A m.0
        poll A
        +2m
        exit A 0
        +59m
        put m 1
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
            0s poll A
            60s …
                answer: A ends itself
            90s …
                desired: A stopped in 10s (ScaleDown)
            120s exit A 0
                record: A ended
                desired: nothing
            3600s …
                record: m has 1 inputs
            3660s put m 1
                answer: no: UnknownCall
        "#]],
    );
}

#[test]
fn an_open_map_whose_client_still_speaks_stays_open() {
    check(
        "
        fn f window=1m
        map m f 0
        +59m
        put m 1
        poll A
        done A m.0
        poll A
        +59m
        exit A 0
        put m 1
        ",
        &expect![[r#"
            0s fn f window=1m
            0s map m f 0
                record: call m
                answer: yes
            3540s put m 1
                record: m.0 waits, A for f
                answer: yes
                desired: A
            3540s poll A
                record: m.0 on A
                answer: A gets m.0
            3540s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            3540s poll A
            3600s …
                answer: A ends itself
            3630s …
                desired: A stopped in 10s (ScaleDown)
            7080s exit A 0
                record: A ended
                desired: nothing
            7080s put m 1
                record: m.1 waits, B for f
                answer: yes
                desired: B
        "#]],
    );
}

#[test]
fn a_put_that_is_repeated_after_its_call_was_forgotten_adds_nothing() {
    check(
        "
        fn f
        map m f 1
        poll A
        done A m.0
        close m
        consume m
        reput m 0
        put m 0
        put m 1
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
            0s consume m
                record: m was read
            0s reput m 0
                answer: yes
            0s put m 0
                answer: no: UnknownCall
            0s put m 1
                answer: no: UnknownCall
        "#]],
    );
}

/// It is closed in the record already.
#[test]
fn a_map_that_was_closed_and_never_read_is_forgotten_after_an_hour() {
    check(
        "
        fn f window=10m
        map m f 1
        poll A
        done A m.0
        close m
        exit A 0
        +60m
        put m 1
        ",
        &expect![[r#"
            0s fn f window=10m
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
            0s exit A 0
                record: A ended
                desired: nothing
            3600s …
            3600s put m 1
                answer: no: UnknownCall
        "#]],
    );
}

#[test]
fn what_waits_for_its_next_try_counts_in_a_full_queue() {
    check(
        "
        fn f max=1 retries=1/1m
        map m f 10
        poll A
        fail A m.0
        put m 1
        ",
        &expect![[r#"
            0s fn f max=1 retries=1/1m
            0s map m f 10
                record: call m, m.0 m.1 m.2 m.3 m.4 m.5 m.6 m.7 m.8 m.9 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s fail A m.0
                record: m.0#1 waits from 60s, 1 retries
                answer: yes
            0s put m 1
                answer: no: QueueFull
        "#]],
    );
}
