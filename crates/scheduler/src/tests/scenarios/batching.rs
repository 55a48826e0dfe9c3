//! Batching: inputs wait for company, but not for long.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn a_batch_waits_for_more_until_its_time_is_over() {
    check(
        "
        fn f batch=4/200ms min=1
        poll A 4
        map m f 2
        +100ms
        put m 1
        +100ms
        done A m.0 m.1 m.2
        ",
        &expect![[r#"
            0s fn f batch=4/200ms min=1
                record: A for f
                desired: A
            0s poll A 4
            0s map m f 2
                record: call m, m.0 m.1 waits
                answer: yes
            0.1s put m 1
                record: m.2 waits
                answer: yes
            0.2s …
                record: m.0 on A, m.1 on A, m.2 on A
                answer: A gets m.0 m.1 m.2
            0.2s done A m.0 m.1 m.2
                record: m.0 is Success (output 1), m.1 is Success (output 2), m.2 is Success (output 3)
                answer: yes
        "#]],
    );
}

#[test]
fn a_full_batch_does_not_wait() {
    check(
        "
        fn f batch=2/10s min=1
        poll A 2
        map m f 5
        done A m.0 m.1
        poll A 2
        ",
        &expect![[r#"
            0s fn f batch=2/10s min=1
                record: A for f
                desired: A
            0s poll A 2
            0s map m f 5
                record: call m, m.0 m.1 m.2 m.3 m.4 waits, m.0 on A, m.1 on A, B for f, C for f
                answer: yes, A gets m.0 m.1
                desired: A, B, C
            0s done A m.0 m.1
                record: m.0 is Success (output 1), m.1 is Success (output 2)
                answer: yes
            0s poll A 2
                record: m.2 on A, m.3 on A
                answer: A gets m.2 m.3
        "#]],
    );
}

#[test]
fn a_lone_input_is_late_by_the_wait_only() {
    check(
        "
        fn f batch=8/1s
        call c f
        +300ms
        poll A 8
        +700ms
        ",
        &expect![[r#"
            0s fn f batch=8/1s
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0.3s poll A 8
            1s …
                record: c.0 on A
                answer: A gets c.0
        "#]],
    );
}

#[test]
fn a_smaller_poll_gets_a_smaller_batch() {
    check(
        "
        fn f batch=4/0s min=1
        map m f 3
        poll A 2
        ",
        &expect![[r#"
            0s fn f batch=4/0s min=1
                record: A for f
                desired: A
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits
                answer: yes
            0s poll A 2
                record: m.0 on A, m.1 on A
                answer: A gets m.0 m.1
        "#]],
    );
}

#[test]
fn a_batched_pool_plans_by_batches() {
    check(
        "
        fn f batch=10/0s
        map m f 15
        ",
        &expect![[r#"
            0s fn f batch=10/0s
            0s map m f 15
                answer: no: QueueFull
        "#]],
    );
}
