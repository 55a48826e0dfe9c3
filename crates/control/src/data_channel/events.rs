//! What an app and its HTTP client say to each other, as ASGI has it.

use bytes::Bytes;
use ionian_domain::Outcome;

/// The ASGI scope of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebScope {
    pub websocket: bool,
    /// `1.1` or `2`.
    pub http_version: String,
    pub method: String,
    /// `http`, `https`, `ws` or `wss`.
    pub scheme: String,
    /// Percent-decoded path.
    pub path: String,
    pub query_string: Bytes,
    /// Names in lower case, in the order of the request.
    pub headers: Vec<(Bytes, Bytes)>,
    pub client: Option<(String, u16)>,
    pub subprotocols: Vec<String>,
}

/// An event for the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToApp {
    Body { bytes: Bytes, more: bool },
    Disconnect,
    WebsocketConnect,
    WebsocketText(String),
    WebsocketBinary(Bytes),
    WebsocketDisconnect { code: u16 },
}

/// An event from the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromApp {
    ResponseStart {
        status: u16,
        headers: Vec<(Bytes, Bytes)>,
        trailers: bool,
    },
    Body {
        bytes: Bytes,
        more: bool,
    },
    Trailers {
        headers: Vec<(Bytes, Bytes)>,
        more: bool,
    },
    WebsocketAccept {
        subprotocol: Option<String>,
        headers: Vec<(Bytes, Bytes)>,
    },
    WebsocketText(String),
    WebsocketBinary(Bytes),
    WebsocketClose {
        code: u16,
        reason: String,
    },
    /// The last event: how the app's call ended. A container that dies ends it as an internal failure.
    Finished(Outcome),
}
