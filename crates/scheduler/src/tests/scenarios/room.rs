//! Room: who starts on a machine that is full, and which idle containers end for it.

use expect_test::expect;

use crate::tests::scenario::check;

/// The idle container of the one function makes room for the other.
#[test]
fn a_full_machine_starts_more_when_something_ends() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000
        map m f 2
        poll A & poll B
        call c g
        done A m.0
        poll A
        exit A 0
        poll C
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s call c g
                record: call c, c.0 waits
                answer: yes
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s poll A
                answer: A ends itself
            0s exit A 0
                record: A ended, C for g
                desired: B, C
            0s poll C
                record: c.0 on C
                answer: C gets c.0
        "#]],
    );
}

#[test]
fn the_longest_idle_container_makes_room() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000
        fn h cpu=1000
        call c f
        call d g
        poll A
        done A c.0
        poll A
        +1s
        poll B
        done B d.0
        poll B
        call e h
        exit A 0
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000
            0s fn h cpu=1000
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s call d g
                record: call d, d.0 waits, B for g
                answer: yes
                desired: A, B
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s done A c.0
                record: c.0 is Success (output 1)
                answer: yes
            0s poll A
            1s poll B
                record: d.0 on B
                answer: B gets d.0
            1s done B d.0
                record: d.0 is Success (output 1)
                answer: yes
            1s poll B
            1s call e h
                record: call e, e.0 waits
                answer: yes, A ends itself
            1s exit A 0
                record: A ended, C for h
                desired: B, C
        "#]],
    );
}

#[test]
fn a_minimum_is_not_evicted() {
    check(
        "
        fn f cpu=1000 min=2
        fn g cpu=1000
        poll A & poll B
        call c g
        ",
        &expect![[r#"
            0s fn f cpu=1000 min=2
                record: A for f, B for f
                desired: A, B
            0s fn g cpu=1000
            0s poll A & poll B
            0s call c g
                record: call c, c.0 waits
                answer: yes
        "#]],
    );
}

/// The big one needs the whole machine, so the idle container stays until the busy one is idle too.
#[test]
fn nobody_is_evicted_in_vain() {
    check(
        "
        fn f cpu=1000
        fn g cpu=2000
        map m f 2
        poll A & poll B
        done A m.0
        poll A
        call c g
        done B m.1
        poll B
        exit A 0
        exit B 0
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=2000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done A m.0
                record: m.0 is Success (output 1)
                answer: yes
            0s poll A
            0s call c g
                record: call c, c.0 waits
                answer: yes
            0s done B m.1
                record: m.1 is Success (output 2)
                answer: yes, A ends itself
            0s poll B
                answer: B ends itself
            0s exit A 0
                record: A ended
                desired: B
            0s exit B 0
                record: B ended, C for g
                desired: C
        "#]],
    );
}

#[test]
fn a_buffer_evicts_nobody() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000 buffer=1
        call c f
        poll A
        done A c.0
        poll A
        call d g
        poll B
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000 buffer=1
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
            0s call d g
                record: call d, d.0 waits, B for g
                answer: yes
                desired: A, B
            0s poll B
                record: d.0 on B
                answer: B gets d.0
        "#]],
    );
}

#[test]
fn a_small_function_passes_a_big_one_that_waits() {
    check(
        "
        fn f cpu=1500
        fn g cpu=1500
        fn h cpu=200
        call c f
        poll A
        call d g
        call e h
        exit A 1
        ",
        &expect![[r#"
            0s fn f cpu=1500
            0s fn g cpu=1500
            0s fn h cpu=200
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s call d g
                record: call d, d.0 waits
                answer: yes
            0s call e h
                record: call e, e.0 waits, B for h
                answer: yes
                desired: A, B
            0s exit A 1
                record: A ended, c.0 is Failure (output 1) 'the container exited with code 1 while it ran this input; the app's log shows what it printed', C for g
                desired: B, C
        "#]],
    );
}

#[test]
fn what_is_larger_than_the_machine_gets_all_of_it() {
    check(
        "
        fn f cpu=9000
        fn g
        call c f
        call d g
        poll A
        done A c.0
        poll A
        exit A 0
        ",
        &expect![[r#"
            0s fn f cpu=9000
            0s fn g
            0s call c f
                record: call c, c.0 waits, A for f
                answer: yes
                desired: A
            0s call d g
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
                record: A ended, B for g
                desired: B
        "#]],
    );
}

#[test]
fn what_is_larger_than_the_machine_waits_until_nothing_else_runs() {
    check(
        "
        fn f cpu=9000
        fn g
        call d g
        poll A
        call c f
        done A d.0
        poll A
        exit A 0
        ",
        &expect![[r#"
            0s fn f cpu=9000
            0s fn g
            0s call d g
                record: call d, d.0 waits, A for g
                answer: yes
                desired: A
            0s poll A
                record: d.0 on A
                answer: A gets d.0
            0s call c f
                record: call c, c.0 waits
                answer: yes
            0s done A d.0
                record: d.0 is Success (output 1)
                answer: yes
            0s poll A
                answer: A ends itself
            0s exit A 0
                record: A ended, B for f
                desired: B
        "#]],
    );
}

#[test]
fn two_that_wait_get_the_room_of_two() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000
        fn h cpu=1000
        map m f 2
        poll A & poll B
        done A m.0 & done B m.1
        poll A & poll B
        call c g & call d h
        exit A 0 & exit B 0
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000
            0s fn h cpu=1000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done A m.0 & done B m.1
                record: m.0 is Success (output 1), m.1 is Success (output 2)
                answer: yes, yes
            0s poll A & poll B
            0s call c g & call d h
                record: call c, c.0 waits, call d, d.0 waits
                answer: yes, yes, A ends itself, B ends itself
            0s exit A 0 & exit B 0
                record: A ended, B ended, C for g, D for h
                desired: C, D
        "#]],
    );
}

/// It may get work before that.
#[test]
fn nobody_makes_room_while_nothing_may_start() {
    check(
        "
        worker w starts=1
        fn f cpu=1500
        fn g cpu=1500
        fn h
        call c f
        poll A
        done A c.0
        poll A
        call d h
        call e g
        +5s
        ",
        &expect![[r#"
            0s worker w starts=1
            0s fn f cpu=1500
            0s fn g cpu=1500
            0s fn h
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
            0s call d h
                record: call d, d.0 waits, B for h
                answer: yes
                desired: A, B
            0s call e g
                record: call e, e.0 waits
                answer: yes
            5s …
                answer: A ends itself
        "#]],
    );
}

#[test]
fn a_minimum_is_not_evicted_for_one_that_needs_more_than_the_rest() {
    check(
        "
        fn f cpu=1000 min=1
        fn g cpu=2000
        map m f 2
        poll A & poll B
        done A m.0 & done B m.1
        poll A & poll B
        call c g
        ",
        &expect![[r#"
            0s fn f cpu=1000 min=1
                record: A for f
                desired: A
            0s fn g cpu=2000
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
            0s call c g
                record: call c, c.0 waits
                answer: yes
        "#]],
    );
}

#[test]
fn nobody_is_evicted_where_room_comes_anyway() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000
        map m f 2
        poll A & poll B
        done A m.0 & done B m.1
        poll A & poll B
        stop A
        call c g
        exit A 0
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done A m.0 & done B m.1
                record: m.0 is Success (output 1), m.1 is Success (output 2)
                answer: yes, yes
            0s poll A & poll B
            0s stop A
                answer: A ends itself, yes
            0s call c g
                record: call c, c.0 waits
                answer: yes
            0s exit A 0
                record: A ended, C for g
                desired: B, C
        "#]],
    );
}

/// Neither asks for work at the moment; whichever does first gets it.
#[test]
fn a_container_that_inputs_wait_for_does_not_make_room() {
    check(
        "
        fn f cpu=1000
        fn g cpu=1000
        map m f 2
        poll A & poll B
        done A m.0 & done B m.1
        call c f & call d g
        poll A
        poll B
        ",
        &expect![[r#"
            0s fn f cpu=1000
            0s fn g cpu=1000
            0s map m f 2
                record: call m, m.0 m.1 waits, A for f, B for f
                answer: yes
                desired: A, B
            0s poll A & poll B
                record: m.0 on A, m.1 on B
                answer: A gets m.0, B gets m.1
            0s done A m.0 & done B m.1
                record: m.0 is Success (output 1), m.1 is Success (output 2)
                answer: yes, yes
            0s call c f & call d g
                record: call c, c.0 waits, call d, d.0 waits
                answer: yes, yes
            0s poll A
                record: c.0 on A
                answer: A gets c.0
            0s poll B
                answer: B ends itself
        "#]],
    );
}
