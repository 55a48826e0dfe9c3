//! The gRPC service: what every request passes before its handler, and which handler that is.
//!
//! In this order: the RPC is one that we answer (else its sentence), the sender is who it says, and it
//! may send this RPC. Handlers below decode, call one method of control and encode.

use std::sync::Arc;
use std::time::Duration;

use ionian_blobs::UrlSigner;
use ionian_control::{Caller, Control, DISK_FULL};
use ionian_proto::client as pb;
use pb::modal_client_server::{ModalClient, ModalClientServer};
use tonic::body::Body;
use tonic::codegen::BoxStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use tower::Service;

use crate::client::{apps, blobs, calls, environments, functions, images, logs, mounts, secrets, tasks, workspace};
use crate::container::{data, inputs, lifecycle};
use crate::context::{self, Context};
use crate::coverage::Coverage;
use crate::request_body::{BoundedBody, Held, MemoryBudgets};
use crate::status;
use crate::worker::{self, WorkerGateway};

/// Context files, serialized closures and pages of results are this large at most.
pub const MAX_MESSAGE_BYTES: usize = 128 * 1024 * 1024;

/// How often a container asks again while the disk is full.
const FULL_DISK_PAUSE: Duration = Duration::from_secs(1);

const SERVICE_PREFIX: &str = "/modal.client.ModalClient/";

/// What handlers share. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    pub(crate) control: Control,
    pub(crate) signer: UrlSigner,
    coverage: Arc<Coverage>,
    scheme: &'static str,
    budgets: MemoryBudgets,
    /// Where workers may connect, too.
    workers: Option<WorkerGateway>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// `scheme` is how the listener that this serves is reached, for URLs in answers.
    pub fn new(control: Control, signer: UrlSigner, scheme: &'static str) -> Self {
        Self {
            control,
            signer,
            coverage: Arc::new(Coverage::load()),
            scheme,
            budgets: MemoryBudgets::default(),
            workers: None,
        }
    }

    /// Takes workers in as well. For listeners that containers do not reach.
    #[must_use]
    pub fn with_workers(mut self, workers: WorkerGateway) -> Self {
        self.workers = Some(workers);
        self
    }

    /// Answers one gRPC request.
    pub async fn call<B>(&self, mut request: http::Request<B>) -> http::Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        if let Some(workers) = &self.workers
            && request.uri().path().starts_with(worker::SERVICE_PREFIX)
        {
            return workers.call(request).await;
        }
        let Some(rpc) = request.uri().path().strip_prefix(SERVICE_PREFIX).map(str::to_owned) else {
            let path: String = request.uri().path().chars().take(120).collect();
            return Status::unimplemented(format!("{path} is not a service of this server")).into_http();
        };
        if let Some(sentence) = self.coverage.refusal(&rpc) {
            return Status::unimplemented(sentence).into_http();
        }
        let metadata = MetadataMap::from_headers(request.headers().clone());
        // Counts the request's bytes until it is answered.
        let held = match context::authenticate(&self.control, &metadata, &rpc).await {
            Ok(caller) => {
                let held = Held::new(self.budgets.of(&caller));
                let base_url = self.base_url(&request);
                request
                    .extensions_mut()
                    .insert(Context::new(caller, base_url, &metadata));
                held
            }
            Err(status) => return status.into_http(),
        };
        let request = request.map(|body| BoundedBody::new(body, Arc::clone(&held)));
        let mut server = ModalClientServer::new(self.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        match server.call(request).await {
            Ok(response) => response,
            Err(infallible) => match infallible {},
        }
    }

    /// Says which directory is on the disk that is full. A container comes back until there is room: what it
    /// has to say, such as a result, would be lost otherwise.
    fn explain_full_disk(&self, context: &Context, status: &Status) -> Option<Status> {
        if status.code() != Code::ResourceExhausted || status.message() != DISK_FULL {
            return None;
        }
        let dir = self.control.data_dir().display();
        let explained = Status::resource_exhausted(format!(
            "{DISK_FULL}: nothing can be kept in {dir}; ask the server's operator to make room there, after which \
             everything goes on by itself"
        ));
        Some(match &context.caller {
            Caller::Client { .. } => explained,
            Caller::Container { .. } => status::retry_after(&explained, FULL_DISK_PAUSE),
        })
    }

    /// The address by which the sender reached us is the one that its URLs must have.
    fn base_url<B>(&self, request: &http::Request<B>) -> String {
        let authority = request.uri().authority().map(ToString::to_string).or_else(|| {
            request
                .headers()
                .get(http::header::HOST)
                .and_then(|host| host.to_str().ok())
                .map(str::to_owned)
        });
        match authority {
            Some(authority) => format!("{}://{authority}", self.scheme),
            None => self.control.config().public_url(&self.control.config().base_domain),
        }
    }
}

fn context<T>(request: &Request<T>) -> Result<Context, Status> {
    request
        .extensions()
        .get::<Context>()
        .cloned()
        .ok_or_else(|| Status::unauthenticated("this request needs a token"))
}

macro_rules! handlers {
    (
        unary { $($method:ident($request:ty) -> $response:ty = $handler:path;)* }
        streams { $($stream:ident($stream_request:ty) -> $item:ty = $stream_handler:path;)* }
    ) => {
        /// Every RPC that has a handler, in the form of a Rust name.
        #[cfg(test)]
        pub(crate) const HANDLED: &[&str] = &[$(stringify!($method),)* $(stringify!($stream),)*];

        #[tonic::async_trait]
        impl ModalClient for Api {
            $(
                async fn $method(&self, request: Request<$request>) -> Result<Response<$response>, Status> {
                    let context = context(&request)?;
                    let answer = $handler(self, &context, request.into_inner()).await;
                    answer.map(Response::new).map_err(|status| self.explain_full_disk(&context, &status).unwrap_or(status))
                }
            )*
            $(
                async fn $stream(
                    &self,
                    request: Request<$stream_request>,
                ) -> Result<Response<BoxStream<$item>>, Status> {
                    let context = context(&request)?;
                    let answer = $stream_handler(self, &context, request.into_inner()).await;
                    answer
                        .map(|stream| Response::new(stream as BoxStream<$item>))
                        .map_err(|status| self.explain_full_disk(&context, &status).unwrap_or(status))
                }
            )*
        }
    };
}

handlers! {
    unary {
        client_hello(()) -> pb::ClientHelloResponse = workspace::hello;
        auth_token_get(pb::AuthTokenGetRequest) -> pb::AuthTokenGetResponse = workspace::auth_token;
        workspace_name_lookup(()) -> pb::WorkspaceNameLookupResponse = workspace::name_lookup;
        token_info_get(pb::TokenInfoGetRequest) -> pb::TokenInfoGetResponse = workspace::token_info;
        environment_get_or_create(pb::EnvironmentGetOrCreateRequest) -> pb::EnvironmentGetOrCreateResponse = environments::get_or_create;
        environment_list(()) -> pb::EnvironmentListResponse = environments::list;
        environment_create(pb::EnvironmentCreateRequest) -> () = environments::create;

        app_create(pb::AppCreateRequest) -> pb::AppCreateResponse = apps::create;
        app_get_or_create(pb::AppGetOrCreateRequest) -> pb::AppGetOrCreateResponse = apps::get_or_create;
        app_get_by_deployment_name(pb::AppGetByDeploymentNameRequest) -> pb::AppGetByDeploymentNameResponse = apps::get_by_deployment_name;
        app_get_lifecycle(pb::AppGetLifecycleRequest) -> pb::AppGetLifecycleResponse = apps::get_lifecycle;
        app_get_layout(pb::AppGetLayoutRequest) -> pb::AppGetLayoutResponse = apps::get_layout;
        app_publish(pb::AppPublishRequest) -> pb::AppPublishResponse = apps::publish;
        app_heartbeat(pb::AppHeartbeatRequest) -> () = apps::heartbeat;
        app_client_disconnect(pb::AppClientDisconnectRequest) -> () = apps::client_disconnect;
        app_stop(pb::AppStopRequest) -> () = apps::stop;
        app_list(pb::AppListRequest) -> pb::AppListResponse = apps::list;
        app_deployment_history(pb::AppDeploymentHistoryRequest) -> pb::AppDeploymentHistoryResponse = apps::deployment_history;
        app_fetch_logs(pb::AppFetchLogsRequest) -> pb::AppFetchLogsResponse = logs::fetch;
        app_count_logs(pb::AppCountLogsRequest) -> pb::AppCountLogsResponse = logs::count;

        mount_batched_check_existence(pb::MountBatchedCheckExistenceRequest) -> pb::MountBatchedCheckExistenceResponse = mounts::check_existence;
        mount_put_file(pb::MountPutFileRequest) -> pb::MountPutFileResponse = mounts::put_file;
        mount_get_or_create(pb::MountGetOrCreateRequest) -> pb::MountGetOrCreateResponse = mounts::get_or_create;
        blob_create(pb::BlobCreateRequest) -> pb::BlobCreateResponse = blobs::create;
        blob_get(pb::BlobGetRequest) -> pb::BlobGetResponse = blobs::get;
        image_get_or_create(pb::ImageGetOrCreateRequest) -> pb::ImageGetOrCreateResponse = images::get_or_create;
        image_from_id(pb::ImageFromIdRequest) -> pb::ImageFromIdResponse = images::from_id;
        secret_get_or_create(pb::SecretGetOrCreateRequest) -> pb::SecretGetOrCreateResponse = secrets::get_or_create;
        secret_list(pb::SecretListRequest) -> pb::SecretListResponse = secrets::list;
        secret_delete(pb::SecretDeleteRequest) -> () = secrets::delete;
        secret_get_info(pb::SecretGetInfoRequest) -> pb::SecretGetInfoResponse = secrets::get_info;

        function_precreate(pb::FunctionPrecreateRequest) -> pb::FunctionPrecreateResponse = functions::precreate;
        function_create(pb::FunctionCreateRequest) -> pb::FunctionCreateResponse = functions::create;
        function_get(pb::FunctionGetRequest) -> pb::FunctionGetResponse = functions::get;
        function_get_by_id(pb::FunctionGetByIdRequest) -> pb::FunctionGetByIdResponse = functions::get_by_id;
        function_bind_params(pb::FunctionBindParamsRequest) -> pb::FunctionBindParamsResponse = functions::bind_params;
        function_get_current_stats(pb::FunctionGetCurrentStatsRequest) -> pb::FunctionStats = functions::current_stats;
        function_update_scheduling_params(pb::FunctionUpdateSchedulingParamsRequest) -> pb::FunctionUpdateSchedulingParamsResponse = functions::update_scheduling;
        class_create(pb::ClassCreateRequest) -> pb::ClassCreateResponse = functions::class_create;
        class_get(pb::ClassGetRequest) -> pb::ClassGetResponse = functions::class_get;

        function_map(pb::FunctionMapRequest) -> pb::FunctionMapResponse = calls::map;
        function_put_inputs(pb::FunctionPutInputsRequest) -> pb::FunctionPutInputsResponse = calls::put_inputs;
        function_finish_inputs(pb::FunctionFinishInputsRequest) -> () = calls::finish_inputs;
        function_get_outputs(pb::FunctionGetOutputsRequest) -> pb::FunctionGetOutputsResponse = calls::get_outputs;
        function_call_cancel(pb::FunctionCallCancelRequest) -> () = calls::cancel;
        function_call_from_id(pb::FunctionCallFromIdRequest) -> pb::FunctionCallFromIdResponse = calls::from_id;

        task_list(pb::TaskListRequest) -> pb::TaskListResponse = tasks::list;
        task_get_info(pb::TaskGetInfoRequest) -> pb::TaskGetInfoResponse = tasks::get_info;
        container_stop(pb::ContainerStopRequest) -> pb::ContainerStopResponse = tasks::stop;

        container_hello(()) -> () = lifecycle::hello;
        container_heartbeat(pb::ContainerHeartbeatRequest) -> pb::ContainerHeartbeatResponse = lifecycle::heartbeat;
        container_server_lifecycle_ready(pb::ContainerServerLifecycleReadyRequest) -> () = lifecycle::server_ready;
        task_result(pb::TaskResultRequest) -> () = lifecycle::task_result;
        function_get_inputs(pb::FunctionGetInputsRequest) -> pb::FunctionGetInputsResponse = inputs::get;
        function_put_outputs(pb::FunctionPutOutputsRequest) -> () = inputs::put_outputs;
        function_get_dynamic_concurrency(pb::FunctionGetDynamicConcurrencyRequest) -> pb::FunctionGetDynamicConcurrencyResponse = inputs::dynamic_concurrency;
        function_call_put_data_out(pb::FunctionCallPutDataRequest) -> () = data::put_out;
    }
    streams {
        app_get_logs(pb::AppGetLogsRequest) -> pb::TaskLogsBatch = logs::get;
        image_join_streaming(pb::ImageJoinStreamingRequest) -> pb::ImageJoinStreamingResponse = images::join;
        function_call_get_data_in(pb::FunctionCallGetDataRequest) -> pb::DataChunk = data::get_in;
        function_call_get_data_out(pb::FunctionCallGetDataRequest) -> pb::DataChunk = calls::get_data_out;
    }
}
