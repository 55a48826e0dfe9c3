//! A server without its listener, for the targets that speak to the service: a store and blobs in a temporary
//! directory, a worker that starts nothing, and an app with everything that requests can name.
//!
//! It lives for [`MAX_INPUTS`] inputs, or until one of them has ended its app, and is then started anew, so that it
//! cannot grow for ever and most inputs find the same state.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use ionian_api::{Api, encode_container_arguments};
use ionian_blobs::UrlSigner;
use ionian_control::app::images::BuildLine;
use ionian_control::app::tokens::hash_secret;
use ionian_control::web::WebLink;
use ionian_control::{BuildFailure, Control, ControlConfig, Parts};
use ionian_domain::container::{ContainerExit, ContainerStarted, RuntimeKind, StartTimings};
use ionian_domain::image::{BuiltImage, ImageMetadata};
use ionian_domain::log::LogStream;
use ionian_domain::worker::{DesiredSet, DesiredState, WorkerCapacity, WorkerReport};
use ionian_domain::{ContainerId, Timestamp, TokenId};
use ionian_proto::client as pb;
use ionian_store::Store;
use ionian_store::tokens::TokenRecord;
use parking_lot::Mutex;
use prost::Message;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::scratch;

/// Each leaves rows and files behind; a platform starts in a fraction of a second.
const MAX_INPUTS: u32 = 1_000;
/// For what must happen, however loaded the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const SIGNING_KEY: [u8; 32] = [3; 32];
const SECRET: &str = "as-secret";
static LAST_DIRECTORY: Mutex<Option<TempDir>> = Mutex::new(None);
const FUNCTIONS: &[&str] = &["plain", "generator", "web"];

type Answer = Pin<Box<dyn Future<Output = http::Response<Body>> + Send>>;

pub(crate) struct Platform {
    pub(crate) control: Control,
    api: Api,
    pub(crate) signer: UrlSigner,
    /// Objects of the app, by the prefix of their ids, in the order in which they were made.
    pub(crate) ids: BTreeMap<[u8; 2], Vec<String>>,
    pub(crate) token_id: String,
    /// Of the containers of `plain`, `generator` and `web`.
    pub(crate) credentials: Vec<String>,
    store: Store,
    cancel: CancellationToken,
    essential: JoinSet<()>,
    _worker: JoinSet<()>,
    /// The ingress' end of everything, kept open.
    _web: WebLink,
    inputs: u32,
    dir: TempDir,
}

impl Platform {
    pub(crate) async fn start() -> Self {
        let dir = scratch::directory();
        let store = Store::open(&dir.path().join("ionian.db")).await.unwrap();
        let (content, blobs) = ionian_blobs::open_local(&dir.path().join("blobs")).await.unwrap();
        let cancel = CancellationToken::new();
        let started = Control::start(Parts {
            config: config(dir.path()),
            store: store.clone(),
            content,
            blobs,
            secret_key: Zeroizing::new([1; 32]),
            container_key: [2; 32],
            build: Arc::new(|_job, lines, _cancel| Box::pin(build(lines))),
            layers_present: Arc::new(|_| true),
            encode_arguments: Arc::new(encode_container_arguments),
            cancel: cancel.clone(),
        })
        .await
        .unwrap();
        let token_id = add_token(&store).await;
        let mut worker = JoinSet::new();
        worker.spawn(work(started.desired, started.reports));
        let signer = UrlSigner::new(SIGNING_KEY);
        let mut platform = Self {
            api: Api::new(started.control.clone(), signer.clone(), "http"),
            control: started.control,
            signer,
            ids: BTreeMap::new(),
            token_id,
            credentials: Vec::new(),
            store,
            cancel,
            essential: started.essential,
            _worker: worker,
            _web: started.web,
            inputs: 0,
            dir,
        };
        platform.deploy().await;
        platform
    }

    /// Counts an input; whether it was the last one for this platform. Fails where a task ended that must not.
    pub(crate) fn is_used_up(&mut self) -> bool {
        assert!(self.essential.try_join_next().is_none(), "an essential task ended");
        self.inputs += 1;
        self.inputs >= MAX_INPUTS
    }

    pub(crate) async fn stop(mut self) {
        self.cancel.cancel();
        self.essential.shutdown().await;
        self.store.close().await;
        // A build that is under way still writes its log there, which does not matter any more. So the directory stays
        // until the next platform ends.
        *LAST_DIRECTORY.lock() = Some(self.dir);
    }

    /// Sends a request to the service. Here alone, and with one type of body: the service is generic over it, and takes
    /// minutes to compile each time.
    pub(crate) fn send(&self, request: http::Request<Body>) -> Answer {
        let api = self.api.clone();
        Box::pin(async move { api.call(request).await.map(Body::new) })
    }

    pub(crate) fn remember(&mut self, bytes: &[u8]) {
        for id in find_ids(bytes) {
            let prefix = [bytes[id.start], bytes[id.start + 1]];
            let text = String::from_utf8_lossy(&bytes[id]).into_owned();
            let known = self.ids.entry(prefix).or_default();
            if !known.contains(&text) {
                known.push(text);
            }
        }
    }

    /// One request that must succeed; its ids are remembered.
    async fn ask<Q: Message, A: Message + Default>(&mut self, rpc: &str, request: Q) -> A {
        let mut body = BytesMut::new();
        let message = request.encode_to_vec();
        body.put_u8(0);
        body.put_u32(message.len() as u32);
        body.put_slice(&message);
        let request = http::Request::post(format!("http://fuzz.test/modal.client.ModalClient/{rpc}"))
            .header("content-type", "application/grpc")
            .header("x-modal-client-version", "1.6.4")
            .header("x-modal-token-id", &self.token_id)
            .header("x-modal-token-secret", SECRET)
            .body(Body::from(body.freeze()))
            .unwrap();
        let answer = self.send(request).await;
        assert!(
            !answer.headers().contains_key("grpc-status"),
            "{rpc}: {:?}",
            answer.headers()
        );
        let mut body = answer.into_body();
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.unwrap().into_data() {
                bytes.extend_from_slice(&data);
            }
        }
        self.remember(&bytes);
        // The last message of a stream is the one that says how it ended.
        let mut last = Bytes::new();
        let mut rest = bytes.freeze();
        while rest.len() >= 5 {
            let length = u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]) as usize;
            last = rest.slice(5..5 + length);
            rest = rest.slice(5 + length..);
        }
        A::decode(last).unwrap()
    }

    async fn deploy(&mut self) {
        let app: pb::AppCreateResponse = self
            .ask(
                "AppCreate",
                pb::AppCreateRequest {
                    description: "fuzz".to_owned(),
                    app_state: pb::AppState::Initializing.into(),
                    ..Default::default()
                },
            )
            .await;
        let image: pb::ImageGetOrCreateResponse = self
            .ask(
                "ImageGetOrCreate",
                pb::ImageGetOrCreateRequest {
                    image: Some(pb::Image {
                        dockerfile_commands: vec!["FROM python:3.11".to_owned()],
                        ..Default::default()
                    }),
                    ..Default::default()
                },
            )
            .await;
        let _built: pb::ImageJoinStreamingResponse = self
            .ask(
                "ImageJoinStreaming",
                pb::ImageJoinStreamingRequest {
                    image_id: image.image_id.clone(),
                    timeout: 20.0,
                    ..Default::default()
                },
            )
            .await;
        let _secret: pb::SecretGetOrCreateResponse = self
            .ask(
                "SecretGetOrCreate",
                pb::SecretGetOrCreateRequest {
                    deployment_name: "secret".to_owned(),
                    env_dict: [("KEY".to_owned(), "value".to_owned())].into(),
                    object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
                    ..Default::default()
                },
            )
            .await;
        let mut publish = pb::AppPublishRequest {
            app_id: app.app_id.clone(),
            name: "fuzz".to_owned(),
            app_state: pb::AppState::Deployed.into(),
            ..Default::default()
        };
        for tag in FUNCTIONS {
            let created: pb::FunctionCreateResponse = self
                .ask(
                    "FunctionCreate",
                    pb::FunctionCreateRequest {
                        app_id: app.app_id.clone(),
                        function: Some(function(tag, &image.image_id)),
                        ..Default::default()
                    },
                )
                .await;
            let definition_id = created.handle_metadata.unwrap_or_default().definition_id;
            publish
                .function_ids
                .insert((*tag).to_owned(), created.function_id.clone());
            publish.definition_ids.insert(created.function_id, definition_id);
        }
        let class: pb::ClassCreateResponse = self
            .ask(
                "ClassCreate",
                pb::ClassCreateRequest {
                    app_id: app.app_id.clone(),
                    only_class_function: true,
                    ..Default::default()
                },
            )
            .await;
        publish.class_ids.insert("Class".to_owned(), class.class_id);
        let functions = publish.function_ids.clone();
        let _published: pb::AppPublishResponse = self.ask("AppPublish", publish).await;
        let _blob: pb::BlobCreateResponse = self
            .ask(
                "BlobCreate",
                pb::BlobCreateRequest {
                    content_md5: "XUFAKrxLKna5cZ2REBfFkg==".to_owned(),
                    content_sha256_base64: "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=".to_owned(),
                    content_length: 5,
                },
            )
            .await;
        for tag in FUNCTIONS {
            let _call: pb::FunctionMapResponse = self
                .ask(
                    "FunctionMap",
                    pb::FunctionMapRequest {
                        function_id: functions[*tag].clone(),
                        function_call_type: pb::FunctionCallType::Map.into(),
                        pipelined_inputs: vec![pb::FunctionPutInputsItem {
                            input: Some(pb::FunctionInput {
                                args_oneof: Some(pb::function_input::ArgsOneof::Args(Bytes::from_static(b"\x80\x80"))),
                                data_format: pb::DataFormat::Cbor.into(),
                                ..Default::default()
                            }),
                            ..Default::default()
                        }],
                        ..Default::default()
                    },
                )
                .await;
            let id = self.container(&functions[*tag]).await;
            self.remember(id.to_string().as_bytes());
            self.credentials.push(self.control.containers().issue_credential(id));
        }
    }

    async fn container(&self, function_id: &str) -> ContainerId {
        let mut live = self.control.snapshot();
        let found = async {
            loop {
                let wanted = live
                    .borrow_and_update()
                    .iter()
                    .find(|container| container.function_id.to_string() == function_id)
                    .map(|container| container.id);
                match wanted {
                    Some(id) if self.control.containers().find(id).is_some() => return id,
                    Some(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                    None => live.changed().await.unwrap(),
                }
            }
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .expect("a container is ordered")
    }
}

fn function(tag: &str, image_id: &str) -> pb::Function {
    let is_generator = tag == "generator";
    pb::Function {
        module_name: "app".to_owned(),
        function_name: tag.to_owned(),
        function_type: if is_generator {
            pb::function::FunctionType::Generator.into()
        } else {
            pb::function::FunctionType::Function.into()
        },
        webhook_config: (tag == "web").then(|| pb::WebhookConfig {
            r#type: pb::WebhookType::AsgiApp.into(),
            ..Default::default()
        }),
        image_id: image_id.to_owned(),
        timeout_secs: 60,
        supported_input_formats: vec![pb::DataFormat::Pickle.into(), pb::DataFormat::Cbor.into()],
        supported_output_formats: vec![pb::DataFormat::Pickle.into(), pb::DataFormat::Cbor.into()],
        ..Default::default()
    }
}

/// Where ids stand in some bytes: two letters, a dash, 22 letters or digits.
pub(crate) fn find_ids(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    const LENGTH: usize = 25;
    let mut found = Vec::new();
    let mut at = 0;
    while at + LENGTH <= bytes.len() {
        let window = &bytes[at..at + LENGTH];
        if window[2] == b'-'
            && window[..2].iter().all(u8::is_ascii_lowercase)
            && window[3..].iter().all(u8::is_ascii_alphanumeric)
        {
            found.push(at..at + LENGTH);
            at += LENGTH;
        } else {
            at += 1;
        }
    }
    found
}

fn config(dir: &std::path::Path) -> ControlConfig {
    ControlConfig {
        workspace: "main".to_owned(),
        public_scheme: "http".to_owned(),
        base_domain: "fuzz.test".to_owned(),
        public_port: 80,
        image_builder_version: "2025.06".to_owned(),
        runtime: RuntimeKind::Process,
        allow_weaker_runtime: false,
        container_server_url: "http://10.0.0.1:9".to_owned(),
        web_hook: true,
        data_dir: dir.to_owned(),
        default_scaledown_window: Duration::from_mins(10),
        client_heartbeat_timeout: Duration::from_mins(10),
        journal: None,
        capacity: Some(WorkerCapacity {
            cpu_millis: 64_000,
            memory_mib: 64_000,
            max_starting: 64,
            runtimes: [RuntimeKind::Process].into(),
        }),
        scheduler: ionian_scheduler::Config::default(),
    }
}

async fn add_token(store: &Store) -> String {
    let id = TokenId::generate();
    let record = TokenRecord {
        id,
        name: "fuzzer".to_owned(),
        secret_hash: hash_secret(SECRET),
        created_at: Timestamp::now(),
        revoked_at: None,
        last_used_at: None,
    };
    store.tokens().insert(&record).await.unwrap();
    id.to_string()
}

pub(crate) fn token_secret() -> &'static str {
    SECRET
}

async fn build(lines: mpsc::Sender<BuildLine>) -> Result<BuiltImage, BuildFailure> {
    let line = BuildLine {
        at: Timestamp::now(),
        stream: LogStream::Stdout,
        text: "=> built\n".to_owned(),
    };
    let _gone = lines.send(line).await;
    Ok(BuiltImage {
        layers: vec!["layer".to_owned()],
        metadata: ImageMetadata {
            python_version_info: Some("Python 3.11.2".to_owned()),
            ..ImageMetadata::default()
        },
        ..BuiltImage::default()
    })
}

/// Says of every container that it started, or ended, as it is told.
async fn work(mut desired: watch::Receiver<DesiredSet>, reports: mpsc::Sender<WorkerReport>) {
    let mut known: BTreeMap<ContainerId, bool> = BTreeMap::new();
    loop {
        let set = desired.borrow_and_update().clone();
        known.retain(|id, _| set.containers.iter().any(|container| container.id == *id));
        for container in set.containers {
            let is_running = matches!(container.state, DesiredState::Running);
            if known.insert(container.id, is_running) == Some(is_running) {
                continue;
            }
            let report = if is_running {
                WorkerReport::Started(ContainerStarted {
                    container_id: container.id,
                    address: [127, 0, 0, 1].into(),
                    timings: StartTimings::default(),
                })
            } else {
                WorkerReport::Exited {
                    container_id: container.id,
                    exit: ContainerExit::Exited { code: 0 },
                }
            };
            if reports.send(report).await.is_err() {
                return;
            }
        }
        if desired.changed().await.is_err() {
            return;
        }
    }
}
