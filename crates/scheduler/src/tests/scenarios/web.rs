//! The HTTP lane: demand comes from the ingress, and so does the news that a container is empty.

use expect_test::expect;

use crate::tests::scenario::check;

#[test]
fn waiting_requests_start_a_container() {
    check(
        "
        fn w web slots=10
        web w 3
        poll A
        web w 0 A=3
        ",
        &expect![[r#"
            0s fn w web slots=10
            0s web w 3
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=3
        "#]],
    );
}

#[test]
fn full_containers_and_a_queue_start_another() {
    check(
        "
        fn w web slots=2
        web w 2
        poll A
        web w 1 A=2
        poll B
        web w 0 A=2 B=1
        ",
        &expect![[r#"
            0s fn w web slots=2
            0s web w 2
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 1 A=2
                record: B for w
                desired: A, B
            0s poll B
                order: requests to B
            0s web w 0 A=2 B=1
        "#]],
    );
}

/// The ingress may have given it a request meanwhile: its kill switch waits for the ingress' word.
#[test]
fn an_idle_web_container_drains_through_the_ingress() {
    check(
        "
        fn w web window=10s
        web w 1
        poll A
        web w 0 A=1
        web w 0 A=0
        +10s
        drop A
        poll A
        web w 0 A=0
        exit A 0
        ",
        &expect![[r#"
            0s fn w web window=10s
            0s web w 1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=1
            0s web w 0 A=0
            10s …
                order: no more requests to A
            10s drop A
            10s poll A
            10s web w 0 A=0
                answer: A ends itself
            10s exit A 0
                record: A ended
                order: A is gone
                desired: nothing
        "#]],
    );
}

#[test]
fn a_request_that_crossed_the_drain_gets_its_time() {
    check(
        "
        fn w web window=10s timeout=100s
        web w 1
        poll A
        web w 0 A=0
        +10s
        web w 0 A=1
        +60s
        web w 0 A=0
        exit A 0
        ",
        &expect![[r#"
            0s fn w web window=10s timeout=100s
            0s web w 1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=0
            10s …
                order: no more requests to A
            10s web w 0 A=1
            70s web w 0 A=0
                answer: A ends itself
            70s exit A 0
                record: A ended
                order: A is gone
                desired: nothing
        "#]],
    );
}

#[test]
fn an_ingress_that_says_nothing_does_not_hold_a_container() {
    check(
        "
        fn w web window=10s
        web w 1
        poll A
        web w 0 A=0
        +50s
        exit A 0
        ",
        &expect![[r#"
            0s fn w web window=10s
            0s web w 1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=0
            10s …
                order: no more requests to A
            40s …
                answer: A ends itself
                desired: A stopped in 10s (ScaleDown)
            50s exit A 0
                record: A ended
                order: A is gone
                desired: nothing
        "#]],
    );
}

#[test]
fn requests_that_wait_for_a_broken_app_fail_at_once() {
    check(
        "
        fn w web
        web w 2
        broken A
        web w 0
        exit A 0
        ",
        &expect![[r#"
            0s fn w web
            0s web w 2
                record: A for w, B for w
                desired: A, B
            0s broken A
                answer: yes
                order: requests fail: 'ImportError: no module named x'
                desired: A stopped in 10s (Requested), B
            0s web w 0
            0s exit A 0
                record: A ended
                order: A is gone
                desired: B
        "#]],
    );
}

#[test]
fn a_server_that_never_polls_is_stopped_when_it_is_drained() {
    check(
        "
        fn w web window=10s
        web w 1
        serves A
        web w 0 A=1
        web w 0 A=0
        +10s
        web w 0 A=0
        exit A 0
        ",
        &expect![[r#"
            0s fn w web window=10s
            0s web w 1
                record: A for w
                desired: A
            0s serves A
                order: requests to A
            0s web w 0 A=1
            0s web w 0 A=0
            10s …
                order: no more requests to A
            10s web w 0 A=0
                desired: A stopped in 10s (ScaleDown)
            10s exit A 0
                record: A ended
                order: A is gone
                desired: nothing
        "#]],
    );
}

#[test]
fn a_dead_web_container_is_replaced_while_requests_wait() {
    check(
        "
        fn w web
        web w 1
        poll A
        web w 1 A=1
        exit A kill 9
        web w 2
        ",
        &expect![[r#"
            0s fn w web
            0s web w 1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 1 A=1
                record: B for w
                desired: A, B
            0s exit A kill 9
                record: A ended
                answer: A asks again
                order: A is gone
                desired: B
            0s web w 2
                record: C for w
                desired: B, C
        "#]],
    );
}

/// The ingress says what waits once, and again only when it changes.
#[test]
fn requests_that_wait_while_their_app_is_gone_find_it_when_it_is_back() {
    check(
        "
        fn w web
        web w 1
        off w
        exit A 0
        fn w web
        poll B
        web w 0 B=1
        ",
        &expect![[r#"
            0s fn w web
            0s web w 1
                record: A for w
                desired: A
            0s off w
                desired: A stopped in 10s (AppStopped)
            0s exit A 0
                record: A ended
                order: A is gone
                desired: nothing
            0s fn w web
                record: B for w
                desired: B
            0s poll B
                order: requests to B
            0s web w 0 B=1
        "#]],
    );
}

#[test]
fn an_idle_server_that_never_polls_does_not_hang() {
    check(
        "
        fn w web min=1
        serves A
        +10m
        ",
        &expect![[r#"
            0s fn w web min=1
                record: A for w
                desired: A
            0s serves A
                order: requests to A
        "#]],
    );
}

#[test]
fn a_web_container_that_ends_before_it_served_is_backed_off_from() {
    check(
        "
        fn w web min=1
        poll A
        web w 0 A=0
        exit A 1
        poll B
        web w 0 B=0
        exit B 1
        ",
        &expect![[r#"
            0s fn w web min=1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=0
            0s exit A 1
                record: A ended, B for w
                answer: A asks again
                order: A is gone
                desired: B
            0s poll B
                order: requests to B
            0s web w 0 B=0
            0s exit B 1
                record: B ended
                answer: B asks again
                order: 2 failures, pause until 4s, B is gone
                desired: nothing
        "#]],
    );
    check(
        "
        fn w web min=1
        poll A
        web w 0 A=1
        web w 0 A=0
        exit A 1
        poll B
        web w 0 B=1
        web w 0 B=0
        exit B 1
        ",
        &expect![[r#"
            0s fn w web min=1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=1
            0s web w 0 A=0
            0s exit A 1
                record: A ended, B for w
                answer: A asks again
                order: A is gone
                desired: B
            0s poll B
                order: requests to B
            0s web w 0 B=1
            0s web w 0 B=0
            0s exit B 1
                record: B ended, C for w
                answer: B asks again
                order: B is gone
                desired: C
        "#]],
    );
}

#[test]
fn a_long_request_that_crossed_the_drain_has_its_timeout_and_the_grace() {
    check(
        "
        fn w web window=10s timeout=100s
        web w 1
        poll A
        web w 0 A=0
        +10s
        web w 0 A=1
        +150s
        ",
        &expect![[r#"
            0s fn w web window=10s timeout=100s
            0s web w 1
                record: A for w
                desired: A
            0s poll A
                order: requests to A
            0s web w 0 A=0
            10s …
                order: no more requests to A
            10s web w 0 A=1
            140s …
                answer: A ends itself
                desired: A stopped in 10s (ScaleDown)
        "#]],
    );
}

#[test]
fn a_container_that_requests_wait_for_does_not_make_room() {
    check(
        "
        fn w web cpu=1000
        fn g cpu=1000
        web w 2
        poll A & poll B
        web w 0 A=0 B=0
        web w 1 A=0 B=0 & call c g
        web w 0 A=1 B=0
        ",
        &expect![[r#"
            0s fn w web cpu=1000
            0s fn g cpu=1000
            0s web w 2
                record: A for w, B for w
                desired: A, B
            0s poll A & poll B
                order: requests to A, requests to B
            0s web w 0 A=0 B=0
            0s web w 1 A=0 B=0 & call c g
                record: call c, c.0 waits
                answer: yes
            0s web w 0 A=1 B=0
                order: no more requests to B
        "#]],
    );
}
