//! Who answers a request: the platform or a web endpoint.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Method, Request, Response, Version};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceExt};

use crate::Ingress;
use crate::body::{BoxError, PlatformBody, ResponseBody};
use crate::forward::{self, ConnectionInfo};
use crate::host::{self, HostKind};
use crate::proxy;
use crate::respond::{self, Failure, RequestId};

/// Answers gRPC and the platform's own paths. Each request has a [`ConnectionInfo`] among its extensions.
pub type PlatformService = BoxCloneSyncService<Request<Incoming>, Response<PlatformBody>, Infallible>;

/// Adapts an axum `Router` or any other service of that shape.
///
/// `tonic`'s `Routes` become a `Router` by `into_axum_router()`, to which the HTTP paths are added.
pub fn platform_service<S, B>(service: S) -> PlatformService
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let boxed = service.map_response(|response: Response<B>| response.map(|b| b.map_err(Into::into).boxed_unsync()));
    BoxCloneSyncService::new(boxed)
}

/// Everything that a listener can reach.
#[derive(Clone)]
pub struct Services {
    pub platform: PlatformService,
    pub ingress: Ingress,
}

/// What one listener serves.
#[derive(Clone)]
pub(crate) enum Mode {
    /// Platform and web endpoints, told apart by host.
    Public { ingress: Ingress },
    /// The platform alone, whatever the host: the listener on the containers' bridge.
    PlatformOnly,
}

/// Paths of the platform on hosts that are no web endpoint.
const PLATFORM_PATHS: [&str; 2] = ["/_blobs/", "/_ionian/"];
const HEALTH_PATH: &str = "/healthz";

/// The page at "/" while there is nothing to see.
const FRONT_PAGE: &str = "This is Ionian, a self-hosted serverless platform.\n\
    Point the client at this address (MODAL_SERVER_URL), or open the URL of a web endpoint.\n";

pub(crate) async fn answer(
    mode: &Mode,
    platform: &PlatformService,
    connection: &Arc<ConnectionInfo>,
    request: Request<Incoming>,
) -> Response<ResponseBody> {
    if is_grpc(request.headers()) {
        return ask_platform(platform, connection, request).await;
    }
    if request.method() == Method::CONNECT {
        // Neither a forward proxy nor (yet) websockets over HTTP/2.
        return refuse(&request, &Failure::BadRequest("CONNECT is not served here"));
    }
    if forward::host(&request).is_none() && request.version() == Version::HTTP_11 {
        // RFC 9112, section 3.2.
        return refuse(
            &request,
            &Failure::BadRequest("an HTTP/1.1 request needs one Host header"),
        );
    }
    if let Mode::Public { ingress } = mode
        && let Some(host) = forward::host(&request)
        && let HostKind::Web { label } = host::classify(host, &ingress.inner.config.base_domains)
    {
        let inner = &ingress.inner;
        let route = inner.routes.borrow().by_host_label.get(label.as_ref()).cloned();
        return match route {
            Some(route) => proxy::handle(inner, connection, route, request).await,
            None => {
                let host = respond::echo(host::without_port(host));
                let workspace = inner.config.workspace.clone();
                refuse(&request, &Failure::NoSuchEndpoint { host, workspace })
            }
        };
    }
    let path = request.uri().path();
    if path == HEALTH_PATH || PLATFORM_PATHS.iter().any(|prefix| path.starts_with(prefix)) {
        return ask_platform(platform, connection, request).await;
    }
    if path == "/" {
        let mut response = Response::new(ResponseBody::whole(Bytes::from_static(FRONT_PAGE.as_bytes())));
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        return response;
    }
    refuse(
        &request,
        &Failure::NotFound {
            path: respond::echo(path),
        },
    )
}

fn refuse<B>(request: &Request<B>, failure: &Failure) -> Response<ResponseBody> {
    respond::failure(failure, &RequestId::of(request.headers()), None)
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

async fn ask_platform(
    platform: &PlatformService,
    connection: &Arc<ConnectionInfo>,
    mut request: Request<Incoming>,
) -> Response<ResponseBody> {
    request.extensions_mut().insert(ConnectionInfo::clone(connection));
    match platform.clone().oneshot(request).await {
        Ok(response) => response.map(ResponseBody::Platform),
        Err(never) => match never {},
    }
}
