//! Workers: where containers go, and what becomes of them when a worker is silent.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn containers_go_where_most_is_free() {
    check(
        "
        worker y cpu=3000
        fn f cpu=1000
        map m f 9
        poll A & poll B & poll C
        +5s
        ",
        &expect![[r#"
            0s worker y cpu=3000
            0s fn f cpu=1000
            0s map m f 9
                record: call m, m.0 m.1 m.2 m.3 m.4 m.5 m.6 m.7 m.8 waits, A for f on y, B for f, C for f on y, D for f
                answer: yes
                desired: A on y, B, C on y, D
            0s poll A & poll B & poll C
                record: m.0 on A, m.1 on B, m.2 on C, E for f on y
                answer: A gets m.0, B gets m.1, C gets m.2
                desired: A on y, B, C on y, D, E on y
            5s …
        "#]],
    );
}

/// Each worker has its own limit.
#[test]
fn starts_are_limited_on_each_worker() {
    check(
        "
        worker y starts=1
        fn f
        map m f 9
        poll A
        ",
        &expect![[r#"
            0s worker y starts=1
            0s fn f
            0s map m f 9
                record: call m, m.0 m.1 m.2 m.3 m.4 m.5 m.6 m.7 m.8 waits, A for f, B for f on y, C for f
                answer: yes
                desired: A, B on y, C
            0s poll A
                record: m.0 on A, D for f
                answer: A gets m.0
                desired: A, B on y, C, D
        "#]],
    );
}

/// The idle container must end where that makes room.
#[test]
fn room_is_made_where_it_helps() {
    check(
        "
        worker y cpu=1000
        fn f cpu=1000
        fn g cpu=2000
        map m f 3
        poll A & poll B & poll C
        done A m.0 & done B m.1 & done C m.2
        +1s
        poll A & poll B & poll C
        call c g
        exit A 0 & exit C 0
        ",
        &expect![[r#"
            0s worker y cpu=1000
            0s fn f cpu=1000
            0s fn g cpu=2000
            0s map m f 3
                record: call m, m.0 m.1 m.2 waits, A for f, B for f on y, C for f
                answer: yes
                desired: A, B on y, C
            0s poll A & poll B & poll C
                record: m.0 on A, m.1 on B, m.2 on C
                answer: A gets m.0, B gets m.1, C gets m.2
            0s done A m.0 & done B m.1 & done C m.2
                record: m.0 is Success (output 1), m.1 is Success (output 2), m.2 is Success (output 3)
                answer: yes, yes, yes
            1s poll A & poll B & poll C
            1s call c g
                record: call c, c.0 waits
                answer: yes, A ends itself, C ends itself
            1s exit A 0 & exit C 0
                record: A ended, C ended, D for g
                desired: B on y, D
        "#]],
    );
}

/// It does not take a small machine while a larger one could hold it.
#[test]
fn what_fits_a_larger_worker_waits_for_it() {
    check(
        "
        worker y cpu=4000
        fn f cpu=4000
        fn g cpu=3000
        call c g
        call d f
        poll A
        done A c.0
        poll A
        exit A 0
        ",
        &expect![[r#"
            0s worker y cpu=4000
            0s fn f cpu=4000
            0s fn g cpu=3000
            0s call c g
                record: call c, c.0 waits, A for g on y
                answer: yes
                desired: A on y
            0s call d f
                record: call d, d.0 waits
                answer: yes
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s poll A
                answer: A ends itself
            0s exit A 0
                record: A ended, B for f on y
                desired: B on y
        "#]],
    );
}

#[test]
fn nothing_starts_without_a_worker() {
    check(
        "
        restart alone
        fn f
        call c f
        heard w
        worker w
        ",
        &expect![[r#"
            0s restart alone
            0s fn f
            0s call c f
                record: call c, c.0 waits
                answer: yes
            0s heard w
            0s worker w
                record: A for f
                desired: A
        "#]],
    );
}

#[test]
fn a_silent_worker_is_given_up() {
    check(
        "
        silence 30s
        worker y cpu=4000
        fn f
        call c f
        started A
        poll A
        +20s
        heard w
        +10s
        done A c.0
        poll A
        poll B
        heard y
        done B c.0#1
        ",
        &expect![[r#"
            0s worker y cpu=4000
            0s fn f
            0s call c f
                record: call c, c.0 waits, A for f on y
                answer: yes
                desired: A on y
            0s started A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            20s heard w
            30s …
                record: A ended, c.0#1 waits from 30s, 0 retries, B for f
                desired: B
            30s done A c.0
                answer: no: UnknownContainer
            30s poll A
                answer: A ends itself
            30s poll B
                record: c.0#1 on B
                answer: B gets c.0#1
            30s heard y
            30s done B c.0#1
                record: c.0#1 is Success (output 1)
                answer: yes
        "#]],
    );
}

#[test]
fn every_sign_of_life_counts() {
    check(
        "
        silence 30s
        fn f
        map m f 2
        +20s
        started A
        +20s
        exit B 0
        +20s
        heard w
        +20s
        worker w
        +29s
        +1s
        ",
        &expect![[r#"
            0s fn f
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            20s started A
            40s exit B 0
                record: B ended, m.0 is InitFailure (output 1) 'the container exited with code 0 before it was ready; the app's log shows what it printed', m.1 is InitFailure (output 2) 'the container exited with code 0 before it was ready; the app's log shows what it printed'
                desired: A
            60s heard w
            80s worker w
            110s …
                record: A ended
                desired: nothing
        "#]],
    );
}

/// After a restart a worker has the same time to come back as before.
#[test]
fn a_worker_that_does_not_come_back_after_a_restart_is_given_up() {
    check(
        "
        silence 30s
        fn f
        call c f
        poll A
        restart alone
        +30s
        worker y
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
            0s restart alone
                desired: A
            30s …
                record: A ended, c.0#1 waits from 30s, 0 retries
                desired: nothing
            30s worker y
                record: B for f on y
                desired: B on y
        "#]],
    );
}

#[test]
fn a_worker_that_is_heard_again_takes_containers() {
    check(
        "
        silence 30s
        fn f
        +30s
        call c f
        heard w
        ",
        &expect![[r#"
            0s fn f
            30s …
            30s call c f
                record: call c, c.0 waits
                answer: yes
            30s heard w
                record: A for f
                desired: A
        "#]],
    );
}

#[test]
fn a_container_goes_where_its_runtime_is() {
    check(
        "
        worker y cpu=100 gvisor
        fn f gvisor
        map m f 2
        +5s
        worker y cpu=200 gvisor
        ",
        &expect![[r#"
            0s worker y cpu=100 gvisor
            0s fn f gvisor
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f on y
                answer: yes
                desired: A on y
            5s …
            5s worker y cpu=200 gvisor
                record: B for f on y
                desired: A on y, B on y
        "#]],
    );
}

#[test]
fn a_function_whose_runtime_nobody_has_waits_and_that_is_said_once() {
    check(
        "
        fn f gvisor
        call c f
        +5s
        call d f
        fn f gvisor v=2
        worker y gvisor
        ",
        &expect![[r#"
            0s fn f gvisor
            0s call c f
                record: call c, c.0 waits
                answer: yes
                order: no gvisor for f
            5s call d f
                record: call d, d.0 waits
                answer: yes
            5s fn f gvisor v=2
                order: no gvisor for f
            5s worker y gvisor
                record: A for f on y, B for f on y
                desired: A on y, B on y
        "#]],
    );
}

/// An idle container on another worker is left alone.
#[test]
fn room_is_made_where_the_runtime_is() {
    check(
        "
        worker y cpu=100 gvisor
        fn f cpu=2000
        call c f
        poll A
        done A c.0
        poll A
        fn g gvisor
        call d g
        poll B
        fn h gvisor
        call e h
        done B d.0
        poll B
        ",
        &expect![[r#"
            0s worker y cpu=100 gvisor
            0s fn f cpu=2000
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
            0s fn g gvisor
            0s call d g
                record: call d, d.0 waits, B for g on y
                answer: yes
                desired: A, B on y
            0s poll B
                record: d.0 on B
                answer: B gets d.0
            0s fn h gvisor
            0s call e h
                record: call e, e.0 waits
                answer: yes
            0s done B d.0
                record: d.0 is Success (output 1)
                answer: yes
            0s poll B
                answer: B ends itself
        "#]],
    );
}

#[test]
fn what_ends_makes_room_on_its_own_worker_only() {
    check(
        "
        worker w cpu=1100
        worker y cpu=100
        fn f cpu=1000
        fn s cpu=100
        fn g cpu=200
        call c f
        poll A
        done A c.0
        poll A
        call d s
        poll B
        stop B
        call e g
        exit A 0
        ",
        &expect![[r#"
            0s worker w cpu=1100
            0s worker y cpu=100
            0s fn f cpu=1000
            0s fn s cpu=100
            0s fn g cpu=200
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
            0s call d s
                record: call d, d.0 waits, B for s on y
                answer: yes
                desired: A, B on y
            0s poll B
                record: d.0 on B
                answer: B gets d.0
            0s stop B
                answer: yes
                desired: A, B on y stopped in 10s (Requested)
            0s call e g
                record: call e, e.0 waits
                answer: yes, A ends itself
            0s exit A 0
                record: A ended, C for g
                desired: B on y stopped in 10s (Requested), C
        "#]],
    );
}
