use std::time::Duration;

use bytes::Bytes;
use ionian_domain::outcome::OutcomeStatus;

use super::*;

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(30);

fn scope(websocket: bool) -> WebScope {
    WebScope {
        websocket,
        http_version: "1.1".to_owned(),
        method: "GET".to_owned(),
        scheme: "http".to_owned(),
        path: "/".to_owned(),
        query_string: Bytes::new(),
        headers: Vec::new(),
        client: None,
        subprotocols: Vec::new(),
    }
}

fn body(text: &'static str, more: bool) -> ToApp {
    ToApp::Body {
        bytes: Bytes::from_static(text.as_bytes()),
        more,
    }
}

fn opened(websocket: bool) -> (DataChannels, ContainerId, WebExchange) {
    let channels = DataChannels::default();
    let container = ContainerId::generate();
    channels.attach(container);
    let exchange = channels.open(container, None, scope(websocket)).unwrap();
    (channels, container, exchange)
}

#[tokio::test(start_paused = true)]
async fn a_poll_that_came_before_its_container_was_known_gets_the_request() {
    let channels = DataChannels::default();
    let container = ContainerId::generate();
    let poll = tokio::spawn({
        let channels = channels.clone();
        async move { channels.next_input(container, LONG).await }
    });
    tokio::time::sleep(SOON).await;
    channels.attach(container);
    let exchange = channels.open(container, None, scope(false)).unwrap();
    let input = poll.await.unwrap().expect("the poll is answered");
    assert_eq!(input.call_id, exchange.call_id);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_is_unknown_has_no_requests() {
    let channels = DataChannels::default();
    assert!(channels.next_input(ContainerId::generate(), SOON).await.is_none());
    assert!(channels.open(ContainerId::generate(), None, scope(false)).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_reconnects_resumes_where_it_stopped() {
    let (channels, container, exchange) = opened(false);
    exchange.to_app.send(body("one", true)).await.unwrap();
    exchange.to_app.send(body("two", false)).await.unwrap();
    let inbound = channels.inbound(container, exchange.call_id).unwrap();
    assert_eq!(inbound.next(0).await, Some((1, body("one", true))));
    assert_eq!(inbound.next(1).await, Some((2, body("two", false))));
    assert_eq!(inbound.next(1).await, Some((2, body("two", false))));
}

#[tokio::test(start_paused = true)]
async fn an_app_hears_once_that_its_client_left_and_its_stream_stays_open() {
    for websocket in [false, true] {
        let (channels, container, exchange) = opened(websocket);
        let input_id = exchange.input_id;
        let inbound = channels.inbound(container, exchange.call_id).unwrap();
        // Taken up by the container before the client leaves.
        channels.next_input(container, SOON).await.unwrap();
        drop(exchange);
        let expected = if websocket {
            ToApp::WebsocketDisconnect { code: 1006 }
        } else {
            ToApp::Disconnect
        };
        assert_eq!(inbound.next(0).await, Some((1, expected)));
        assert!(tokio::time::timeout(SOON, inbound.next(1)).await.is_err());
        let outcome = Outcome::decided(OutcomeStatus::Success, "");
        assert!(channels.finish(container, input_id, outcome));
        assert_eq!(inbound.next(1).await, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_whose_client_left_is_not_handed_out() {
    let (channels, container, exchange) = opened(false);
    drop(exchange);
    assert!(channels.next_input(container, SOON).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_request_that_runs_is_cancelled_when_nobody_waits_for_it() {
    let containers = Containers::new([0; 32]);
    let channels = DataChannels::new(containers.clone());
    let entry = containers.insert(crate::containers::tests::entry());
    channels.attach(entry.id);
    let exchange = channels.open(entry.id, None, scope(false)).unwrap();
    let input_id = exchange.input_id;
    channels.next_input(entry.id, SOON).await.unwrap();
    drop(exchange);
    assert_eq!(entry.cancellations(SOON).await, [input_id]);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_was_cut_off_while_it_waited_is_taken_when_it_is_repeated() {
    let (channels, container, mut exchange) = opened(false);
    let call_id = exchange.call_id;
    let chunk = |index: u64| FromApp::Body {
        bytes: Bytes::from(index.to_string()),
        more: true,
    };
    for index in 1..=16 {
        assert!(channels.push(container, call_id, index, chunk(index)).await);
    }
    // The buffer is full: the request waits, and its connection breaks.
    let cut = tokio::time::timeout(SOON, channels.push(container, call_id, 17, chunk(17))).await;
    assert!(cut.is_err());
    assert_eq!(exchange.from_app.recv().await, Some(chunk(1)));
    assert!(channels.push(container, call_id, 17, chunk(17)).await);
    // A repetition of what went through is not sent twice.
    assert!(channels.push(container, call_id, 17, chunk(17)).await);
    for index in 2..=17 {
        assert_eq!(exchange.from_app.recv().await, Some(chunk(index)));
    }
    assert!(tokio::time::timeout(SOON, exchange.from_app.recv()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn another_container_reaches_nothing_of_an_exchange() {
    let (channels, container, exchange) = opened(false);
    let other = ContainerId::generate();
    channels.attach(other);
    assert!(channels.inbound(other, exchange.call_id).is_none());
    let start = FromApp::Body {
        bytes: Bytes::new(),
        more: false,
    };
    assert!(!channels.push(other, exchange.call_id, 1, start).await);
    let outcome = Outcome::decided(OutcomeStatus::Success, "");
    assert!(!channels.finish(other, exchange.input_id, outcome.clone()));
    assert!(channels.finish(container, exchange.input_id, outcome));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_container_ends_its_exchanges() {
    let (channels, container, mut exchange) = opened(false);
    let outcome = Outcome::decided(OutcomeStatus::InternalFailure, "the container ended");
    channels.detach(container, &outcome);
    assert_eq!(exchange.from_app.recv().await, Some(FromApp::Finished(outcome)));
}
