//! gRPC requests through the real service: whatever sender, method, metadata and bytes.
//!
//! An input is a list of requests, each: a byte of [flags](Flags), the method's name (short), what the flags ask for,
//! and the message (long). Ids in messages are replaced by ids of the same kind that exist, or else most mutations
//! would end at "no such app"; ids that answers bring can be named by the requests behind them.
//!
//! Every request is answered within a limit, unless it is one that waits for others; no answer is larger than a
//! message may be; and afterwards the service answers a good request.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::OnceLock;
use std::time::Duration;

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use http_body_util::BodyExt;
use ionian_api::MAX_MESSAGE_BYTES;
use parking_lot::Mutex;
use tokio::runtime::Runtime;

use crate::bytes_in::BytesIn;
use crate::logs;
use crate::platform::{PATIENCE, Platform, find_ids, token_secret};

const MAX_REQUESTS: usize = 8;
/// For requests that wait for something to happen, which mostly does not: they are given up.
const MOMENT: Duration = Duration::from_millis(3);
/// So much of an answer is looked at for ids.
const MAX_LOOKED_AT: usize = 64 * 1024;

/// They may be held until something happens.
const WAITING: &[&str] = &[
    "AppGetLogs",
    "ContainerHeartbeat",
    "FunctionCallGetDataIn",
    "FunctionCallGetDataOut",
    "FunctionCallPutDataOut",
    "FunctionGetInputs",
    "FunctionGetOutputs",
    "FunctionMap",
    "FunctionPutInputs",
    "ImageGetOrCreate",
    "ImageJoinStreaming",
    "SandboxWait",
];

/// They end what later inputs need.
const ENDING: &[&str] = &[
    "AppClientDisconnect",
    "AppPublish",
    "AppStop",
    "ContainerStop",
    "SecretDelete",
    "TaskResult",
];

/// What the first byte of a request says.
struct Flags(u8);

impl Flags {
    fn sender(&self) -> u8 {
        self.0 & 3
    }

    /// The message comes with a key, and the key says whether it is a retry.
    fn has_key(&self) -> bool {
        self.0 & 4 != 0
    }

    /// The bytes are the body as it is, without the five bytes that gRPC has before a message.
    fn is_unframed(&self) -> bool {
        self.0 & 8 != 0
    }

    /// The body comes in two pieces.
    fn is_split(&self) -> bool {
        self.0 & 16 != 0
    }

    /// Ids stay as they are.
    fn keeps_ids(&self) -> bool {
        self.0 & 32 != 0
    }

    /// One more header, name and value from the bytes.
    fn has_header(&self) -> bool {
        self.0 & 64 != 0
    }

    /// The frame says that its message is compressed.
    fn is_compressed(&self) -> bool {
        self.0 & 128 != 0
    }
}

pub fn run(data: &[u8]) {
    static STATE: OnceLock<Mutex<(Runtime, Option<Platform>)>> = OnceLock::new();
    logs::forbid_errors();
    let state = STATE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Mutex::new((runtime, None))
    });
    let mut state = state.lock();
    let (runtime, platform) = &mut *state;
    runtime.block_on(async {
        let mut current = match platform.take() {
            Some(current) => current,
            None => Platform::start().await,
        };
        let mut ids = current.ids.clone();
        let mut input = BytesIn(data);
        let mut is_ended = false;
        for _ in 0..MAX_REQUESTS {
            if input.is_empty() {
                break;
            }
            is_ended |= request(&current, &mut input, &mut ids).await;
        }
        check_alive(&current).await;
        if current.is_used_up() || is_ended {
            current.stop().await;
        } else {
            *platform = Some(current);
        }
    });
}

/// Sends one request; returns whether it may have ended something.
async fn request(platform: &Platform, input: &mut BytesIn<'_>, ids: &mut BTreeMap<[u8; 2], Vec<String>>) -> bool {
    let flags = Flags(input.byte());
    let rpc = input.text();
    let Ok(path) = format!("http://fuzz.test/modal.client.ModalClient/{rpc}").parse::<http::Uri>() else {
        return false;
    };
    let mut request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x-modal-client-version", "1.6.4");
    request = match flags.sender() {
        0 => request
            .header("x-modal-token-id", &platform.token_id)
            .header("x-modal-token-secret", token_secret()),
        3 => request,
        sender => {
            let which = usize::from(input.byte()) % (platform.credentials.len() * usize::from(sender));
            let credential = platform.credentials.get(which).map_or("", String::as_str);
            request.header("x-ionian-container", credential)
        }
    };
    if flags.has_key() {
        let key = input.byte();
        request = request
            .header("x-idempotency-key", format!("key-{}", key & 7))
            .header("x-retry-attempt", (key >> 6).to_string());
    }
    if flags.has_header() {
        let (name, value) = (input.text().to_lowercase(), input.short());
        let is_header = name.parse::<http::HeaderName>().is_ok() && http::HeaderValue::from_bytes(value).is_ok();
        if is_header {
            request = request.header(name, value);
        }
    }
    let mut message = input.long().to_vec();
    if !flags.keeps_ids() {
        replace_ids(&mut message, ids);
    }
    let mut body = BytesMut::new();
    if !flags.is_unframed() {
        body.put_u8(u8::from(flags.is_compressed()));
        body.put_u32(message.len() as u32);
    }
    body.put_slice(&message);
    let body = body.freeze();
    let cut = if flags.is_split() { body.len() / 2 } else { body.len() };
    let pieces = [body.slice(..cut), body.slice(cut..)].map(Ok::<_, Infallible>);
    let request = request.body(Body::from_stream(stream::iter(pieces))).unwrap();
    let exchange = async {
        let answer = platform.send(request).await;
        let mut body = answer.into_body();
        let (mut length, mut seen) = (0, Vec::new());
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { break };
            if let Some(data) = frame.data_ref() {
                length += data.len();
                seen.extend_from_slice(&data[..data.len().min(MAX_LOOKED_AT - seen.len())]);
            }
            // A stream has many messages.
            assert!(length <= MAX_MESSAGE_BYTES, "an answer of {length} bytes");
        }
        seen
    };
    let waits = WAITING.contains(&rpc.as_str());
    let answer = tokio::time::timeout(if waits { MOMENT } else { PATIENCE }, exchange).await;
    match answer {
        Ok(seen) => {
            for id in find_ids(&seen) {
                let prefix = [seen[id.start], seen[id.start + 1]];
                let known = ids.entry(prefix).or_default();
                known.push(String::from_utf8_lossy(&seen[id]).into_owned());
            }
        }
        Err(_) => assert!(waits, "{rpc} has no answer after {PATIENCE:?}"),
    }
    ENDING.contains(&rpc.as_str())
}

/// The last character of an id chooses among those that exist; `Z` leaves it as it is.
fn replace_ids(message: &mut [u8], ids: &BTreeMap<[u8; 2], Vec<String>>) {
    for id in find_ids(message) {
        let known = ids.get(&[message[id.start], message[id.start + 1]]);
        let chosen = message[id.end - 1];
        if let Some(known) = known.filter(|known| !known.is_empty() && chosen != b'Z') {
            let existing = &known[usize::from(chosen) % known.len()];
            message[id].copy_from_slice(existing.as_bytes());
        }
    }
}

async fn check_alive(platform: &Platform) {
    let request = http::Request::post("http://fuzz.test/modal.client.ModalClient/WorkspaceNameLookup")
        .header("content-type", "application/grpc")
        .header("x-modal-client-version", "1.6.4")
        .header("x-modal-token-id", &platform.token_id)
        .header("x-modal-token-secret", token_secret())
        .body(Body::from(Bytes::from_static(&[0; 5])))
        .unwrap();
    let answer = tokio::time::timeout(PATIENCE, platform.send(request)).await;
    let answer = answer.expect("the service answers no more");
    assert!(!answer.headers().contains_key("grpc-status"), "{:?}", answer.headers());
}
