//! Small decoders, one by the first byte: ids, lines of output, masks over secrets, answers of probes, and the data
//! channel between an app and the ingress, driven by a list of operations.

use std::sync::OnceLock;

use bytes::Bytes;
use futures_util::FutureExt;
use ionian_control::data_channel::{DataChannels, FromApp, ToApp, WebExchange, WebScope};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{
    AppId, BlobId, CallId, ClassId, ContainerId, DefinitionId, EnvironmentId, FunctionId, ImageId, InputId, MountId,
    Outcome, SecretId, TokenId, VolumeId,
};
use ionian_image::fuzzing;
use tokio::runtime::Runtime;

use crate::bytes_in::BytesIn;
use crate::logs;

const SECRETS: &[&str] = &["hunter22-secret", "hunter22", "line one\nline two of a key", "short"];
/// Shorter ones are not masked.
const MIN_SECRET_BYTES: usize = 6;
const MAX_OPERATIONS: usize = 200;

pub fn run(data: &[u8]) {
    logs::forbid_errors();
    let mut input = BytesIn(data);
    match input.byte() % 5 {
        0 => ids(&String::from_utf8_lossy(input.0)),
        1 => lines(input),
        2 => mask(input),
        3 => fuzzing::probes(input.0),
        _ => data_channel(input),
    }
}

fn ids(text: &str) {
    macro_rules! check {
        ($($id:ty),*) => {$(
            if let Ok(id) = text.parse::<$id>() {
                assert_eq!(id.to_string(), text);
            }
        )*};
    }
    check!(
        AppId,
        BlobId,
        CallId,
        ClassId,
        ContainerId,
        DefinitionId,
        EnvironmentId,
        FunctionId,
        ImageId,
        InputId,
        MountId,
        SecretId,
        TokenId,
        VolumeId
    );
}

/// However output arrives, it comes out in order, in pieces of bounded length, and valid text is not changed.
fn lines(mut input: BytesIn<'_>) {
    let mut chunks = Vec::new();
    while !input.is_empty() {
        let length = input.byte();
        // Every eighth chunk is long: repeated until it exceeds a piece.
        chunks.push((input.take(usize::from(length)), length.is_multiple_of(3)));
    }
    let whole: Vec<u8> = chunks.iter().flat_map(|(chunk, _)| chunk.iter().copied()).collect();
    let pieces = ionian_worker::fuzzing::split(chunks.iter().copied());
    for piece in &pieces {
        let newlines = piece.bytes().filter(|byte| *byte == b'\n').count();
        assert!(newlines == 0 || (newlines == 1 && piece.ends_with('\n')));
        // A byte that is no text becomes a character of three.
        assert!(!piece.is_empty() && piece.len() <= 3 * ionian_worker::fuzzing::MAX_PIECE_BYTES);
    }
    if let Ok(text) = std::str::from_utf8(&whole) {
        assert_eq!(pieces.concat(), text);
    }
}

/// No secret comes through, and where the output was cut makes no difference.
fn mask(mut input: BytesIn<'_>) {
    let mut pieces = Vec::new();
    while !input.is_empty() {
        pieces.push(input.short());
    }
    // The fuzzer need not spell the secrets: a byte stands for each.
    let spelled: Vec<Vec<u8>> = pieces
        .iter()
        .map(|piece| {
            piece
                .iter()
                .flat_map(|byte| match SECRETS.get(usize::from(byte.wrapping_sub(0xF0))) {
                    Some(secret) => secret.as_bytes().to_vec(),
                    None => vec![*byte],
                })
                .collect()
        })
        .collect();
    let pieces: Vec<&[u8]> = spelled.iter().map(Vec::as_slice).collect();
    let masked = fuzzing::mask(SECRETS, &pieces);
    for secret in SECRETS.iter().filter(|secret| secret.len() >= MIN_SECRET_BYTES) {
        let found = masked.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "a secret is in the log");
    }
    assert_eq!(
        masked,
        fuzzing::mask(SECRETS, &[&pieces.concat()]),
        "the cuts are visible"
    );
}

fn scope(websocket: bool, text: &[u8]) -> WebScope {
    WebScope {
        websocket,
        http_version: "1.1".to_owned(),
        method: "GET".to_owned(),
        scheme: "http".to_owned(),
        path: String::from_utf8_lossy(text).into_owned(),
        query_string: Bytes::copy_from_slice(text),
        headers: Vec::new(),
        client: None,
        subprotocols: Vec::new(),
    }
}

/// Operations of both sides in any order. None blocks for ever, an exchange's events keep their order and come once,
/// and nothing is left when its container is gone.
fn data_channel(mut input: BytesIn<'_>) {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    });
    let _entered = runtime.enter();
    let channels = DataChannels::default();
    let containers = [ContainerId::generate(), ContainerId::generate()];
    let mut exchanges: Vec<(Option<WebExchange>, CallId, InputId)> = Vec::new();
    let mut last_seen: Vec<u64> = Vec::new();
    for _ in 0..MAX_OPERATIONS {
        if input.is_empty() {
            break;
        }
        let operation = input.byte();
        let container = containers[usize::from(operation >> 7)];
        let which = usize::from(input.byte());
        let index = u64::from(input.byte());
        let chosen = (!exchanges.is_empty()).then(|| which % exchanges.len());
        match (operation & 0x7f) % 9 {
            0 => channels.attach(container),
            1 => channels.detach(container, &Outcome::decided(OutcomeStatus::InternalFailure, "it died")),
            2 => {
                if let Ok(exchange) = channels.open(container, None, scope(which % 2 == 0, input.short())) {
                    let ids = (exchange.call_id, exchange.input_id);
                    exchanges.push((Some(exchange), ids.0, ids.1));
                    last_seen.push(0);
                }
            }
            3 => {
                let poll = channels.next_input(container, std::time::Duration::from_mins(1));
                let _pending = poll.now_or_never();
            }
            4 => {
                let Some(at) = chosen else { continue };
                let event = from_app(&mut input);
                let _pending = channels.push(container, exchanges[at].1, index, event).now_or_never();
            }
            5 => {
                let Some(at) = chosen else { continue };
                let outcome = Outcome::decided(OutcomeStatus::Success, "");
                channels.finish(container, exchanges[at].2, outcome);
            }
            6 => {
                let Some(at) = chosen else { continue };
                if let Some(exchange) = &exchanges[at].0 {
                    let _full = exchange.to_app.try_send(to_app(&mut input));
                }
            }
            7 => {
                let Some(at) = chosen else { continue };
                let Some(inbound) = channels.inbound(container, exchanges[at].1) else {
                    continue;
                };
                // The stream goes on, or begins again, maybe at an index that never was.
                let last = if index < 128 { last_seen[at] } else { index - 128 };
                if let Some(Some((next, _))) = inbound.next(last).now_or_never() {
                    assert!(next > last || last > last_seen[at], "event {next} after {last}");
                    last_seen[at] = last_seen[at].max(next);
                }
            }
            _ => {
                let Some(at) = chosen else { continue };
                if which % 2 == 0 {
                    // The client goes away.
                    exchanges[at].0 = None;
                } else if let Some(exchange) = &mut exchanges[at].0 {
                    while let Some(Some(_)) = exchange.from_app.recv().now_or_never() {}
                }
            }
        }
    }
    for container in containers {
        channels.detach(container, &Outcome::decided(OutcomeStatus::Terminated, "the end"));
    }
    for (_, call_id, _) in &exchanges {
        assert!(containers.iter().all(|id| channels.inbound(*id, *call_id).is_none()));
    }
    // Tasks that wait for room give up with their receivers.
    drop(exchanges);
    runtime.block_on(tokio::task::yield_now());
}

pub(crate) fn from_app(input: &mut BytesIn<'_>) -> FromApp {
    let kind = input.byte();
    let bytes = Bytes::copy_from_slice(input.short());
    let pair = |bytes: &Bytes| {
        let at = bytes.iter().position(|byte| *byte == b':').unwrap_or(bytes.len());
        vec![(bytes.slice(..at), bytes.slice(at..))]
    };
    match kind % 8 {
        0 => FromApp::ResponseStart {
            status: input.number(),
            headers: pair(&bytes),
            trailers: kind & 0x80 != 0,
        },
        1 | 2 => FromApp::Body {
            bytes,
            more: kind & 0x80 != 0,
        },
        3 => FromApp::Trailers {
            headers: pair(&bytes),
            more: kind & 0x80 != 0,
        },
        4 => FromApp::WebsocketAccept {
            subprotocol: (kind & 0x80 != 0).then(|| String::from_utf8_lossy(&bytes).into_owned()),
            headers: pair(&bytes),
        },
        5 => FromApp::WebsocketText(String::from_utf8_lossy(&bytes).into_owned()),
        6 => FromApp::WebsocketBinary(bytes),
        _ => FromApp::WebsocketClose {
            code: input.number(),
            reason: String::from_utf8_lossy(&bytes).into_owned(),
        },
    }
}

fn to_app(input: &mut BytesIn<'_>) -> ToApp {
    let kind = input.byte();
    let bytes = Bytes::copy_from_slice(input.short());
    match kind % 6 {
        0 => ToApp::Body {
            bytes,
            more: kind & 0x80 != 0,
        },
        1 => ToApp::Disconnect,
        2 => ToApp::WebsocketConnect,
        3 => ToApp::WebsocketText(String::from_utf8_lossy(&bytes).into_owned()),
        4 => ToApp::WebsocketBinary(bytes),
        _ => ToApp::WebsocketDisconnect { code: input.number() },
    }
}
