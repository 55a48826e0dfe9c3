//! One connection to the server, with the headers of an official client.

use std::time::Duration;

use anyhow::{Context, ensure};
use ionian_proto::client as pb;
use ionian_proto::client::modal_client_client::ModalClientClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::Server;

/// No answer of these takes longer on a machine that works.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A release of the client that the server knows; its own is the only one that it was told of.
const CLIENT_VERSION: &str = "1.6.4";

/// How long to wait for the first input to fail. Its container cannot start, which the server notices at once.
const FAILURE_SECONDS: f32 = 30.0;

pub(crate) type Client = ModalClientClient<InterceptedService<Channel, Headers>>;

/// Adds who asks, and a key of its own to every request, as the client does.
#[derive(Clone)]
pub(crate) struct Headers {
    token_id: MetadataValue<Ascii>,
    token_secret: MetadataValue<Ascii>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let key = format!("{:032x}", rand::random::<u128>());
        let headers = request.metadata_mut();
        headers.insert("x-modal-client-version", MetadataValue::from_static(CLIENT_VERSION));
        headers.insert("x-modal-client-type", MetadataValue::from_static("1"));
        headers.insert("x-modal-token-id", self.token_id.clone());
        headers.insert("x-modal-token-secret", self.token_secret.clone());
        headers.insert(
            "x-idempotency-key",
            key.parse().map_err(|_| Status::internal("hex is no header value"))?,
        );
        Ok(request)
    }
}

/// Opens a connection of its own.
pub(crate) async fn connect(server: &Server) -> anyhow::Result<Client> {
    let channel = Endpoint::new(server.url.clone())
        .with_context(|| format!("{} is no URL", server.url))?
        .timeout(TIMEOUT)
        .tcp_nodelay(true)
        .connect()
        .await
        .with_context(|| format!("no server answers at {}", server.url))?;
    let headers = Headers {
        token_id: server.token_id.parse().context("the token's id is no header value")?,
        token_secret: server
            .token_secret
            .parse()
            .context("the token's secret is no header value")?,
    };
    Ok(ModalClientClient::with_interceptor(channel, headers))
}

/// An app with one function that cannot start, because it has no image.
pub(crate) struct Deployed {
    pub app_id: String,
    pub function_id: String,
}

/// Deploys an app and has its function fail until the server pauses its starts. From then on, for four seconds, its
/// inputs are recorded and nothing else happens to them.
pub(crate) async fn deploy(client: &mut Client, app_name: &str) -> anyhow::Result<Deployed> {
    const FUNCTION: &str = "f";
    let app_id = client
        .app_get_or_create(pb::AppGetOrCreateRequest {
            app_name: app_name.to_owned(),
            object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
            ..Default::default()
        })
        .await?
        .into_inner()
        .app_id;
    let function_id = client
        .function_create(pb::FunctionCreateRequest {
            app_id: app_id.clone(),
            function: Some(pb::Function {
                module_name: "load".to_owned(),
                function_name: FUNCTION.to_owned(),
                function_type: pb::function::FunctionType::Function.into(),
                ..Default::default()
            }),
            ..Default::default()
        })
        .await?
        .into_inner()
        .function_id;
    client
        .app_publish(pb::AppPublishRequest {
            app_id: app_id.clone(),
            name: app_name.to_owned(),
            app_state: pb::AppState::Deployed.into(),
            function_ids: [(FUNCTION.to_owned(), function_id.clone())].into(),
            client_version: CLIENT_VERSION.to_owned(),
            ..Default::default()
        })
        .await?;
    let call = pb::FunctionMapRequest {
        function_id: function_id.clone(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        pipelined_inputs: items(0, 1, &bytes::Bytes::new()),
        ..Default::default()
    };
    let function_call_id = client.function_map(call).await?.into_inner().function_call_id;
    let failed = client
        .function_get_outputs(pb::FunctionGetOutputsRequest {
            function_call_id,
            timeout: FAILURE_SECONDS,
            ..Default::default()
        })
        .await?
        .into_inner();
    ensure!(failed.outputs.len() == 1, "a function without an image did not fail");
    Ok(Deployed { app_id, function_id })
}

/// Stops an app: what waits for its function ends now, and not in the middle of another measurement.
pub(crate) async fn stop(client: &mut Client, app_id: String) -> anyhow::Result<()> {
    client
        .app_stop(pb::AppStopRequest {
            app_id,
            ..Default::default()
        })
        .await?;
    Ok(())
}

/// Inputs as `.map()` sends them.
pub(crate) fn items(first: i32, count: i32, arguments: &bytes::Bytes) -> Vec<pb::FunctionPutInputsItem> {
    (first..first + count)
        .map(|idx| pb::FunctionPutInputsItem {
            idx,
            input: Some(pb::FunctionInput {
                args_oneof: Some(pb::function_input::ArgsOneof::Args(arguments.clone())),
                data_format: pb::DataFormat::Pickle.into(),
                ..Default::default()
            }),
            ..Default::default()
        })
        .collect()
}
