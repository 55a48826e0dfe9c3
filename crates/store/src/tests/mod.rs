//! Tests on real files in temporary directories: a temporary database is a better fake than a mock.

#![expect(
    clippy::cloned_ref_to_slice_refs,
    reason = "`[noun.clone()]` reads as the list that is expected"
)]

mod apps;
mod calls;
mod crash;
mod measure;
mod model;
mod nouns;
mod opening;
mod payloads;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use ionian_domain::Timestamp;
use ionian_domain::app::{App, AppLayout, AppState};
use ionian_domain::call::{AttemptNumber, Call, CallKind, InputPayload, Invocation, Payload};
use ionian_domain::container::RuntimeKind;
use ionian_domain::environment::Environment;
use ionian_domain::function::{
    Autoscaler, Batching, Concurrency, ContainerUse, Function, FunctionKind, FunctionSpec, GpuRequest, Resources,
    RetryPolicy, VolumeMount,
};
use ionian_domain::ids::{
    AppId, CallId, ContainerId, DefinitionId, EnvironmentId, FunctionId, ImageId, InputId, MountId, SecretId, VolumeId,
};
use ionian_domain::network::Egress;
use ionian_domain::outcome::{Outcome, OutcomeStatus};
use ionian_domain::record::{NewInput, Write};
use ionian_domain::web::{WebKind, WebSpec};
use tempfile::TempDir;

use crate::Store;

/// A store in a directory that goes away with it.
pub(crate) struct TestStore {
    pub(crate) store: Store,
    pub(crate) path: PathBuf,
    _directory: TempDir,
}

impl TestStore {
    pub(crate) async fn open() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ionian.db");
        let store = Store::open(&path).await.unwrap();
        Self {
            store,
            path,
            _directory: directory,
        }
    }

    /// Opens the same file again. The first store is dropped and not closed, as in a crash.
    pub(crate) async fn reopen(&mut self) {
        self.store = Store::open(&self.path).await.unwrap();
    }
}

pub(crate) fn at(micros: i64) -> Timestamp {
    Timestamp(1_700_000_000_000_000 + micros)
}

pub(crate) fn environment(name: &str, is_default: bool) -> Environment {
    Environment {
        id: EnvironmentId::generate(),
        name: name.to_owned(),
        web_suffix: if is_default { String::new() } else { name.to_owned() },
        is_default,
        created_at: at(1),
    }
}

pub(crate) fn app(environment: &Environment, name: Option<&str>, created_at: Timestamp) -> App {
    App {
        id: AppId::generate(),
        environment_id: environment.id,
        name: name.map(str::to_owned),
        description: "an app".to_owned(),
        state: AppState::Initializing,
        created_at,
        deployed_at: None,
        stopped_at: None,
        version: 0,
        layout: AppLayout::default(),
        tags: BTreeMap::new(),
    }
}

pub(crate) fn web_spec(label: &str) -> WebSpec {
    WebSpec {
        kind: WebKind::WebServer,
        label: label.to_owned(),
        label_truncated: true,
        requires_proxy_auth: true,
        port: Some(8_000),
        startup_timeout: Duration::from_millis(5_500),
    }
}

/// A function with something in every field.
pub(crate) fn function(app: &App, name: &str) -> Function {
    Function {
        id: FunctionId::generate(),
        app_id: app.id,
        definition_id: DefinitionId::generate(),
        spec: FunctionSpec {
            name: name.to_owned(),
            kind: FunctionKind::Generator,
            is_class: true,
            is_server: false,
            container_use: ContainerUse::Single,
            image_id: Some(ImageId::generate()),
            mount_ids: vec![MountId::generate()],
            secret_ids: vec![SecretId::generate()],
            volume_mounts: vec![VolumeMount {
                volume_id: VolumeId::generate(),
                path: "/data".to_owned(),
                read_only: true,
                sub_path: Some("a".to_owned()),
            }],
            object_dependencies: vec!["im-1".to_owned()],
            resources: Resources {
                memory_mib: Some(128),
                gpu: Some(GpuRequest {
                    kind: "H100".to_owned(),
                    count: 2,
                }),
                ..Resources::default()
            },
            timeout: Duration::from_mins(5),
            startup_timeout: Duration::from_secs(30),
            autoscaler: Autoscaler {
                min_containers: 1,
                max_containers: None,
                buffer_containers: 2,
                scaledown_window: Duration::from_mins(1),
            },
            concurrency: Concurrency {
                max_inputs: 10,
                target_inputs: 8,
            },
            batching: Some(Batching {
                max_size: 4,
                wait: Duration::from_millis(20),
            }),
            retry: RetryPolicy {
                max_retries: 3,
                backoff_coefficient: 1.1,
                ..RetryPolicy::NONE
            },
            web: Some(web_spec("app-f")),
            web_methods: vec![("m".to_owned(), web_spec("app-c-m"))],
            methods: vec!["m".to_owned()],
            runtime: Some(RuntimeKind::Gvisor),
            egress: Egress::Allow(vec!["10.0.0.0/8".parse().unwrap()]),
            mount_client_dependencies: true,
            client_version: "1.6.4".to_owned(),
            definition: Bytes::from_static(b"\x00a definition\xff"),
        },
        binding: None,
        created_at: at(5),
    }
}

pub(crate) fn call(kind: CallKind, created_at: Timestamp) -> Call {
    Call {
        id: CallId::generate(),
        app_id: AppId::generate(),
        function_id: FunctionId::generate(),
        kind,
        invocation: Invocation::Sync,
        parent_input_id: Some(InputId::generate()),
        created_at,
        finished_inputs: None,
    }
}

pub(crate) fn payload(text: &str) -> InputPayload {
    InputPayload {
        payload: Payload::Inline(Bytes::copy_from_slice(text.as_bytes())),
        data_format: 1,
        method_name: Some("m".to_owned()),
    }
}

pub(crate) fn new_inputs(count: u32) -> Vec<NewInput> {
    (0..count)
        .map(|index| NewInput {
            id: InputId::generate(),
            index,
            payload: payload(&format!("input {index}")),
        })
        .collect()
}

/// The writes of a new call with inputs.
pub(crate) fn call_with_inputs(call: &Call, inputs: &[NewInput]) -> Vec<Write> {
    vec![
        Write::CallCreated { call: call.clone() },
        Write::InputsCreated {
            call_id: call.id,
            function_id: call.function_id,
            inputs: inputs.to_vec(),
            at: call.created_at,
        },
    ]
}

pub(crate) fn outcome(text: &str) -> Outcome {
    Outcome {
        payload: Payload::Inline(Bytes::copy_from_slice(text.as_bytes())),
        data_format: 1,
        ..Outcome::decided(OutcomeStatus::Success, "")
    }
}

pub(crate) fn finished(call: &Call, input: InputId, sequence: u64, outcome: Outcome, at: Timestamp) -> Write {
    Write::InputFinished {
        input_id: input,
        call_id: call.id,
        sequence,
        attempt: AttemptNumber(0),
        container_id: Some(ContainerId::generate()),
        outcome,
        started_at: Some(call.created_at),
        at,
    }
}
