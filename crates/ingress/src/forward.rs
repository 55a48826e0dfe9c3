//! What changes in a request's and a response's head on the way through.
//!
//! Hop-by-hop headers end here. What callers claim about themselves is dropped unless they are trusted
//! proxies, and what the platform knows is put in its place. Everything else passes untouched.

use std::net::{IpAddr, SocketAddr};

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Method, Request, Uri, Version, request, response};
use ipnet::IpNet;

use crate::respond::{RequestId, X_REQUEST_ID};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const X_IONIAN_CLIENT: HeaderName = HeaderName::from_static("x-ionian-client");
const X_IONIAN_SCHEME: HeaderName = HeaderName::from_static("x-ionian-scheme");
const X_IONIAN_REQUEST_ID: HeaderName = HeaderName::from_static("x-ionian-request-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
pub(crate) const MODAL_KEY: HeaderName = HeaderName::from_static("modal-key");
pub(crate) const MODAL_SECRET: HeaderName = HeaderName::from_static("modal-secret");

/// Who is at the other end of a connection. An extension of every request that reaches the platform
/// service.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    pub peer: SocketAddr,
    /// The address on which the peer reached us.
    pub local: SocketAddr,
    /// The peer's headers about its own clients are believed.
    pub is_trusted_proxy: bool,
    /// Header values that are the same for all requests of the connection.
    peer_ip: HeaderValue,
    peer_address: HeaderValue,
}

impl ConnectionInfo {
    pub(crate) fn new(peer: SocketAddr, local: SocketAddr, trusted_proxies: &[IpNet]) -> Self {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let value = |text: String| HeaderValue::try_from(text).expect("an address is a header value");
        Self {
            peer,
            local,
            is_trusted_proxy: trusted_proxies.iter().any(|net| net.contains(&peer.ip())),
            peer_ip: value(peer.ip().to_string()),
            peer_address: value(peer.to_string()),
        }
    }
}

/// What is known about the client behind the connection.
#[derive(Debug, Clone)]
pub(crate) struct ClientFacts {
    pub(crate) ip: IpAddr,
    /// 0 where a proxy in between did not tell it.
    pub(crate) port: u16,
    pub(crate) is_https: bool,
}

/// The host that a request names: the authority of HTTP/2 and absolute targets, else the header.
/// `None` where it has none, or two.
pub(crate) fn host<B>(request: &Request<B>) -> Option<&str> {
    if let Some(authority) = request.uri().authority() {
        return Some(authority.as_str());
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next()?;
    if hosts.next().is_some() {
        return None;
    }
    host.to_str().ok()
}

/// Whether the client asks to leave HTTP, and for what.
pub(crate) fn upgrade_of<B>(request: &Request<B>) -> Option<HeaderValue> {
    let upgrade = request.headers().get(UPGRADE)?;
    let asks = request.version() == Version::HTTP_11
        && lists(request.headers(), &CONNECTION, "upgrade")
        // `h2c` is not offered: who wants HTTP/2 in plaintext begins with it.
        && !upgrade.as_bytes().eq_ignore_ascii_case(b"h2c");
    asks.then(|| upgrade.clone())
}

pub(crate) fn is_websocket(upgrade: Option<&HeaderValue>) -> bool {
    upgrade.is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Makes a request's head ready for the app.
pub(crate) fn prepare_request(
    head: &mut request::Parts,
    connection: &ConnectionInfo,
    trusted_proxies: &[IpNet],
    request_id: &RequestId,
) -> ClientFacts {
    if let Some(authority) = head.uri.authority()
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        head.headers.insert(HOST, host);
    }
    let host = head.headers.get(HOST).cloned();
    head.uri = origin_form(&head.uri);
    let accepts_trailers = lists(&head.headers, &TE, "trailers");
    if head.headers.contains_key(TRANSFER_ENCODING) {
        // Chunks frame the body; a length beside them is an attack or a mistake.
        head.headers.remove(CONTENT_LENGTH);
    }
    strip_hop_by_hop(&mut head.headers);
    let headers = &mut head.headers;
    // The listener has answered it, when the body was first asked for.
    headers.remove(EXPECT);
    headers.remove(HTTP2_SETTINGS);
    if accepts_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if head.version == Version::HTTP_2 {
        join_cookies(headers);
    }
    head.version = Version::HTTP_11;

    let facts = if connection.is_trusted_proxy {
        from_trusted_proxy(headers, connection, trusted_proxies)
    } else {
        headers.remove(FORWARDED);
        headers.remove(X_REAL_IP);
        headers.insert(X_FORWARDED_FOR, connection.peer_ip.clone());
        headers.insert(X_IONIAN_CLIENT, connection.peer_address.clone());
        headers.remove(X_FORWARDED_HOST);
        if let Some(host) = host {
            headers.insert(X_FORWARDED_HOST, host);
        }
        ClientFacts {
            ip: connection.peer.ip(),
            port: connection.peer.port(),
            is_https: false,
        }
    };
    let scheme = HeaderValue::from_static(if facts.is_https { "https" } else { "http" });
    headers.insert(X_FORWARDED_PROTO, scheme.clone());
    headers.insert(X_IONIAN_SCHEME, scheme);
    headers.insert(X_IONIAN_REQUEST_ID, request_id.header());
    headers.insert(X_REQUEST_ID, request_id.header());
    facts
}

/// Makes a response's head ready for the client.
pub(crate) fn prepare_response(head: &mut response::Parts) {
    strip_hop_by_hop(&mut head.headers);
    // An HTTP/1.0 app must not turn the client's connection into one.
    head.version = Version::HTTP_11;
}

/// A request that may be sent twice (RFC 9110, 9.2.2), where it has no body.
pub(crate) fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS
    )
}

fn origin_form(uri: &Uri) -> Uri {
    if uri.authority().is_none() {
        return uri.clone();
    }
    uri.path_and_query()
        .map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()))
}

/// Whether a comma-separated header names `token`.
fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| item.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case(token))
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if let Some(connection) = headers.remove(CONNECTION) {
        // What the header names is for this hop too. `keep-alive` and `close` name nothing.
        let text = connection.to_str().unwrap_or("");
        for name in text.split(',').map(str::trim) {
            if !name.is_empty() && !name.eq_ignore_ascii_case("close") && !is_end_to_end(name) {
                headers.remove(name);
            }
        }
    }
    for name in [
        KEEP_ALIVE,
        PROXY_CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// Headers that a `Connection` header must not be able to take away: the app's security rests on them.
fn is_end_to_end(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case("content-length")
}

/// HTTP/2 may split cookies over several fields; HTTP/1.1 must not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let joined = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect::<Vec<_>>()
        .join(&b"; "[..]);
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// Reads what a trusted proxy says about its client, and adds the proxy itself to the chain.
fn from_trusted_proxy(headers: &mut HeaderMap, connection: &ConnectionInfo, trusted_proxies: &[IpNet]) -> ClientFacts {
    let chain = headers
        .get_all(X_FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect::<Vec<_>>()
        .join(", ");
    // From the right: the first address that is no trusted proxy is the client. Those left of it are
    // the client's own claims.
    let client = chain
        .rsplit(',')
        .filter_map(|item| item.trim().parse::<IpAddr>().ok())
        .find(|ip| !trusted_proxies.iter().any(|net| net.contains(ip)));
    let is_https = headers
        .get(X_FORWARDED_PROTO)
        .is_some_and(|proto| proto.as_bytes().eq_ignore_ascii_case(b"https"));
    let peer_ip = connection.peer.ip();
    let longer = if chain.is_empty() {
        peer_ip.to_string()
    } else {
        format!("{chain}, {peer_ip}")
    };
    if let Ok(value) = HeaderValue::try_from(longer) {
        headers.insert(X_FORWARDED_FOR, value);
    }
    let facts = match client {
        Some(ip) => ClientFacts { ip, port: 0, is_https },
        None => ClientFacts {
            ip: peer_ip,
            port: connection.peer.port(),
            is_https,
        },
    };
    let address = HeaderValue::try_from(SocketAddr::new(facts.ip, facts.port).to_string());
    headers.insert(X_IONIAN_CLIENT, address.expect("an address is a header value"));
    if !headers.contains_key(X_FORWARDED_HOST)
        && let Some(host) = headers.get(HOST).cloned()
    {
        headers.insert(X_FORWARDED_HOST, host);
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(build: impl FnOnce(request::Builder) -> request::Builder) -> request::Parts {
        build(Request::builder().uri("/a?b=c")).body(()).unwrap().into_parts().0
    }

    fn prepared(mut head: request::Parts, trusted: &[IpNet]) -> (request::Parts, ClientFacts) {
        let connection = ConnectionInfo::new(
            "10.0.0.9:4000".parse().unwrap(),
            "10.0.0.1:8800".parse().unwrap(),
            trusted,
        );
        let facts = prepare_request(&mut head, &connection, trusted, &RequestId::generate());
        (head, facts)
    }

    fn text<'a>(head: &'a request::Parts, name: &str) -> Option<&'a str> {
        head.headers.get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn what_strangers_claim_is_replaced() {
        let head = parts(|b| {
            b.header("host", "x.localhost")
                .header("x-forwarded-for", "1.2.3.4")
                .header("x-forwarded-proto", "https")
                .header("x-forwarded-host", "evil")
                .header("forwarded", "for=1.2.3.4")
                .header("x-ionian-client", "1.2.3.4:5")
                .header("x-ionian-scheme", "https")
        });
        let (head, facts) = prepared(head, &[]);
        assert_eq!(text(&head, "x-forwarded-for"), Some("10.0.0.9"));
        assert_eq!(text(&head, "x-forwarded-proto"), Some("http"));
        assert_eq!(text(&head, "x-forwarded-host"), Some("x.localhost"));
        assert_eq!(text(&head, "x-ionian-client"), Some("10.0.0.9:4000"));
        assert_eq!(text(&head, "x-ionian-scheme"), Some("http"));
        assert_eq!(text(&head, "forwarded"), None);
        assert!(!facts.is_https);
    }

    #[test]
    fn a_trusted_proxy_names_its_client() {
        let head = parts(|b| {
            b.header("host", "x.localhost")
                .header("x-forwarded-for", "6.6.6.6, 1.2.3.4, 10.0.0.7")
                .header("x-forwarded-proto", "https")
        });
        let (head, facts) = prepared(head, &["10.0.0.0/24".parse().unwrap()]);
        assert_eq!(facts.ip, "1.2.3.4".parse::<IpAddr>().unwrap());
        assert!(facts.is_https);
        assert_eq!(
            text(&head, "x-forwarded-for"),
            Some("6.6.6.6, 1.2.3.4, 10.0.0.7, 10.0.0.9")
        );
        assert_eq!(text(&head, "x-ionian-client"), Some("1.2.3.4:0"));
    }

    #[test]
    fn hop_by_hop_headers_end_here() {
        let head = parts(|b| {
            b.header("host", "x.localhost")
                .header("connection", "keep-alive, X-Private, host")
                .header("x-private", "1")
                .header("keep-alive", "5")
                .header("te", "trailers, deflate")
                .header("transfer-encoding", "chunked")
                .header("content-length", "5")
                .header("expect", "100-continue")
                .header("accept", "*/*")
        });
        let (head, _) = prepared(head, &[]);
        for gone in [
            "connection",
            "x-private",
            "keep-alive",
            "transfer-encoding",
            "content-length",
            "expect",
            "upgrade",
        ] {
            assert_eq!(text(&head, gone), None, "{gone}");
        }
        assert_eq!(text(&head, "te"), Some("trailers"));
        assert_eq!(text(&head, "host"), Some("x.localhost"));
        assert_eq!(text(&head, "accept"), Some("*/*"));
    }

    #[test]
    fn http2_becomes_http1() {
        let mut head = Request::builder()
            .version(Version::HTTP_2)
            .uri("http://x.localhost:8800/a?b=c")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .body(())
            .unwrap()
            .into_parts()
            .0;
        head.headers.remove(HOST);
        let (head, _) = prepared(head, &[]);
        assert_eq!(head.uri, "/a?b=c");
        assert_eq!(text(&head, "host"), Some("x.localhost:8800"));
        assert_eq!(text(&head, "cookie"), Some("a=1; b=2"));
        assert_eq!(head.version, Version::HTTP_11);
    }

    #[test]
    fn two_hosts_are_none() {
        let request = Request::builder()
            .header("host", "a")
            .header("host", "b")
            .body(())
            .unwrap();
        assert_eq!(host(&request), None);
    }
}
