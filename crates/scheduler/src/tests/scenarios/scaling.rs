//! Scaling: 0 → 1 → n → 0, between minimum and maximum.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn minimum_containers_start_without_work_and_stay() {
    check(
        "
        fn f min=1 window=10s
        poll A
        +10m
        ",
        &expect![[r#"
            0s fn f min=1 window=10s
                record: A for f
                desired: A
            0s poll A
        "#]],
    );
}

#[test]
fn an_idle_container_stays_for_its_window() {
    check(
        "
        fn f window=10s
        call c f
        poll A
        done A c.0
        poll A
        +9s
        call d f
        done A d.0
        poll A
        +9s
        +1s
        exit A 0
        ",
        &expect![[r#"
            0s fn f window=10s
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
            9s call d f
                record: call d, d.0 waits, d.0 on A
                answer: yes, A gets d.0
            9s done A d.0
                record: d.0 is Success (output 1)
                answer: yes
            9s poll A
            19s …
                answer: A ends itself
            19s exit A 0
                record: A ended
                desired: nothing
        "#]],
    );
}

#[test]
fn the_newest_idle_container_goes_first() {
    check(
        "
        fn f window=10s min=1
        map m f 2
        poll A & poll B
        done A m.0 & done B m.1
        poll A & poll B
        +10s
        exit B 0
        ",
        &expect![[r#"
            0s fn f window=10s min=1
                record: A for f
                desired: A
            0s map m f 2
                record: call m, m.0 m.1 waits, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done A m.0 & done B m.1
                record: m.0 is Success (output 1), m.1 is Success (output 2)
                answer: yes, yes
            0s poll A & poll B
            10s …
                answer: B ends itself
            10s exit B 0
                record: B ended
                desired: A
        "#]],
    );
}

#[test]
fn a_buffer_is_kept_while_there_is_work() {
    check(
        "
        fn f buffer=1 window=10s
        call c f
        poll A & poll B
        done A c.0
        poll A
        +10s
        ",
        &expect![[r#"
            0s fn f buffer=1 window=10s
            0s call c f
                record: call c, c.0 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: c.0 on A
                answer: A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s poll A
            10s …
                answer: B ends itself, A ends itself
        "#]],
    );
}

#[test]
fn concurrent_inputs_share_a_container_up_to_the_target() {
    check(
        "
        fn f slots=4 target=2
        map m f 4
        poll A
        poll A
        poll A
        ",
        &expect![[r#"
            0s fn f slots=4 target=2
            0s map m f 4
                record: call m, m.0 m.1 m.2 m.3 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s poll A
                record: m.1 on A
                answer: A gets m.1
            0s poll A
                record: m.2 on A
                answer: A gets m.2
        "#]],
    );
}

#[test]
fn starts_are_limited_and_go_on_when_one_is_ready() {
    check(
        "
        fn f
        map m f 4
        poll A
        poll B
        ",
        &expect![[r#"
            0s fn f
            0s map m f 4
                record: call m, m.0 m.1 m.2 m.3 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A
                record: m.0 on A, C for f
                answer: A gets m.0
                desired: A, B, C
            0s poll B
                record: m.1 on B, D for f
                answer: B gets m.1
                desired: A, B, C, D
        "#]],
    );
}

/// Two starts that take longer than an import no longer count.
#[test]
fn a_slow_start_does_not_hold_up_others() {
    check(
        "
        fn slow
        fn g
        map m slow 2
        call c g
        +5s
        ",
        &expect![[r#"
            0s fn slow
            0s fn g
            0s map m slow 2
                record: call m, m.0 m.1 waits, A for slow, B for slow
                answer: yes
                desired: A, B
            0s call c g
                record: call c, c.0 waits
                answer: yes
            5s …
                record: C for g
                desired: A, B, C
        "#]],
    );
}

/// The first does not get everything before the second gets anything.
#[test]
fn functions_take_turns_when_they_start() {
    check(
        "
        fn f
        fn g
        map m f 3
        map n g 3
        poll A & poll B
        poll C & poll D
        ",
        &expect![[r#"
            0s fn f
            0s fn g
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s map n g 3
                record: call n, n.0 n.1 n.2 waits
                answer: yes
            0s poll A & poll B
                record: m.0 on A, m.1 on B, C for f, D for g
                answer: A gets m.0, B gets m.1
                desired: A, B, C, D
            0s poll C & poll D
                record: m.2 on C, n.0 on D, E for g, F for g
                answer: C gets m.2, D gets n.0
                desired: A, B, C, D, E, F
        "#]],
    );
}

/// A maximum of one says that two must never run.
#[test]
fn a_maximum_counts_containers_that_are_ending() {
    check(
        "
        fn f max=1 window=10s
        call c f
        poll A
        done A c.0
        poll A
        +10s
        call d f
        exit A 0
        ",
        &expect![[r#"
            0s fn f max=1 window=10s
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
            10s …
                answer: A ends itself
            10s call d f
                record: call d, d.0 waits
                answer: yes
            10s exit A 0
                record: A ended, B for f
                desired: B
        "#]],
    );
}

#[test]
fn single_use_containers_stay_within_the_maximum() {
    check(
        "
        fn f once max=1
        map m f 2
        poll A
        done A m.0
        exit A 0
        poll B
        ",
        &expect![[r#"
            0s fn f once max=1
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s exit A 0
                record: A ended, B for f
                desired: B
            0s poll B
                record: m.1 on B
                answer: B gets m.1
        "#]],
    );
}

#[test]
fn a_raised_minimum_starts_and_a_lowered_one_ends() {
    check(
        "
        fn f window=10s
        scale f min=2 window=10s
        poll A & poll B
        scale f min=0 window=10s
        +10s
        ",
        &expect![[r#"
            0s fn f window=10s
            0s scale f min=2 window=10s
                record: A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
            0s scale f min=0 window=10s
                answer: yes
            10s …
                answer: B ends itself, A ends itself
        "#]],
    );
}

#[test]
fn no_more_start_than_are_wanted() {
    check(
        "
        worker w starts=9
        fn f
        map m f 3
        ",
        &expect![[r#"
            0s worker w starts=9
            0s fn f
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f, B for f, C for f
                answer: yes
                desired: A, B, C
        "#]],
    );
}
