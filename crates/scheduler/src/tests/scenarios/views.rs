//! What people are told of containers and pools.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn containers_and_pools_are_seen_as_they_are() {
    check(
        "
        views f
        fn f slots=2 max=2 window=10s
        +1s
        map m f 5
        views f
        poll A 2
        poll B 1
        views f
        stop B
        views f
        views g
        ",
        &expect![[r#"
                f: PoolStats { backlog: 0, containers: 0, running_inputs: 0, free_slots: 0 }
                runtimes: Some(RuntimeKinds(2))
            0s fn f slots=2 max=2 window=10s
            1s map m f 5
                record: call m, m.0 m.1 m.2 m.3 m.4 waits, A for f, B for f
                answer: yes
                desired: A, B
                A of f on w since 1s: starting, runs 0
                B of f on w since 1s: starting, runs 0
                f: PoolStats { backlog: 5, containers: 2, running_inputs: 0, free_slots: 0 }
                runtimes: Some(RuntimeKinds(2))
            1s poll A 2
                record: m.0 on A
                answer: A gets m.0
            1s poll B 1
                record: m.1 on B
                answer: B gets m.1
                A of f on w since 1s: ready, runs 1
                B of f on w since 1s: ready, runs 1
                f: PoolStats { backlog: 3, containers: 2, running_inputs: 2, free_slots: 2 }
                runtimes: Some(RuntimeKinds(2))
            1s stop B
                answer: yes
                desired: A, B stopped in 10s (Requested)
                A of f on w since 1s: ready, runs 1
                B of f on w since 1s: ending, runs 1
                f: PoolStats { backlog: 3, containers: 1, running_inputs: 2, free_slots: 1 }
                runtimes: Some(RuntimeKinds(2))
                A of f on w since 1s: ready, runs 1
                B of f on w since 1s: ending, runs 1
                g: PoolStats { backlog: 0, containers: 0, running_inputs: 0, free_slots: 0 }
                runtimes: Some(RuntimeKinds(2))
        "#]],
    );
}

#[test]
fn a_silent_workers_runtimes_are_not_there() {
    check(
        "
        silence 30s
        worker v gvisor
        views f
        heard w
        +20s
        heard w
        +11s
        views f
        ",
        &expect![[r#"
            0s worker v gvisor
                f: PoolStats { backlog: 0, containers: 0, running_inputs: 0, free_slots: 0 }
                runtimes: Some(RuntimeKinds(6))
            0s heard w
            20s heard w
            30s …
                f: PoolStats { backlog: 0, containers: 0, running_inputs: 0, free_slots: 0 }
                runtimes: Some(RuntimeKinds(2))
        "#]],
    );
}

#[test]
fn what_waits_for_its_next_try_is_seen() {
    check(
        "
        fn f retries=1/10s max=1
        map m f 2
        poll A
        fail A m.0
        views f
        ",
        &expect![[r#"
            0s fn f retries=1/10s max=1
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: m.0 on A
                answer: A gets m.0
            0s fail A m.0
                record: m.0#1 waits from 10s, 1 retries
                answer: yes
                A of f on w since 0s: ready, runs 0
                f: PoolStats { backlog: 2, containers: 1, running_inputs: 0, free_slots: 1 }
                runtimes: Some(RuntimeKinds(2))
        "#]],
    );
}
