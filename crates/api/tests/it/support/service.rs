//! A gRPC client on the service, without a network.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use ionian_api::{Api, MAX_MESSAGE_BYTES};
use ionian_proto::client::modal_client_client::ModalClientClient;
use tonic::body::Body;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};
use tower::Service;

pub(crate) type Client = ModalClientClient<InterceptedService<InProcess, Headers>>;

/// The service as a channel.
#[derive(Clone)]
pub(crate) struct InProcess(Api);

impl Service<http::Request<Body>> for InProcess {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let api = self.0.clone();
        Box::pin(async move { Ok(api.call(request).await) })
    }
}

/// What every request of a client carries.
#[derive(Clone)]
pub(crate) struct Headers(Vec<(AsciiMetadataKey, AsciiMetadataValue)>);

impl tonic::service::Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.0 {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        Ok(request)
    }
}

pub(crate) fn client_of(api: &Api, headers: &[(&str, &str)]) -> Client {
    let version = ("x-modal-client-version", "1.6.4");
    let headers = headers
        .iter()
        .chain([&version])
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect();
    ModalClientClient::with_interceptor(InProcess(api.clone()), Headers(headers))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// A request with an idempotency key, as a client's first or later try.
pub(crate) fn tried<T>(message: T, key: &str, attempt: u32) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-idempotency-key", key.parse().unwrap());
    request
        .metadata_mut()
        .insert("x-retry-attempt", attempt.to_string().parse().unwrap());
    request
}
