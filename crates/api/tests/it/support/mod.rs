//! One platform per test, and the words in which tests talk about it.

mod builder;
pub(crate) mod container;
pub(crate) mod deploy;
mod service;
mod worker;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ionian_api::{Api, encode_container_arguments};
use ionian_blobs::UrlSigner;
use ionian_control::app::tokens::hash_secret;
use ionian_control::{Control, ControlConfig, Parts, Started};
use ionian_domain::container::RuntimeKind;
use ionian_domain::worker::WorkerCapacity;
use ionian_domain::{ContainerId, FunctionId, Timestamp, TokenId};
use ionian_store::Store;
use ionian_store::tokens::TokenRecord;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use zeroize::Zeroizing;

pub(crate) use builder::Builder;
pub(crate) use container::Container;
pub(crate) use deploy::{Deploy, DeployedApp, cbor_input};
pub(crate) use service::{Client, client_of, tried};
pub(crate) use worker::{Survivors, Worker};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Shorter than a test may wait for nothing to happen.
pub(crate) const MOMENT: Duration = Duration::from_millis(150);

pub(crate) const SECRET: &str = "as-secret";

/// A running server without its listener.
pub(crate) struct Platform {
    pub control: Control,
    pub api: Api,
    pub store: Store,
    pub builder: Arc<Builder>,
    pub worker: Worker,
    pub token_id: TokenId,
    /// Kept open: the ingress' end of everything.
    pub web: ionian_control::web::WebLink,
    cancel: CancellationToken,
    essential: JoinSet<()>,
    dir: Arc<tempfile::TempDir>,
}

impl Platform {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    pub(crate) async fn start_with(configure: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Self::start_on(dir, Survivors::Live, configure).await
    }

    async fn start_on(
        dir: Arc<tempfile::TempDir>,
        survivors: Survivors,
        configure: impl FnOnce(&mut ControlConfig),
    ) -> Self {
        let store = Store::open(&dir.path().join("ionian.db")).await.unwrap();
        let (content, blobs) = ionian_blobs::open_local(&dir.path().join("blobs")).await.unwrap();
        let builder = Arc::new(Builder::default());
        let cancel = CancellationToken::new();
        let mut config = config(dir.path());
        configure(&mut config);
        let started = Control::start(Parts {
            config,
            store: store.clone(),
            content,
            blobs,
            secret_key: Zeroizing::new([1; 32]),
            container_key: [2; 32],
            build: builder.build_fn(),
            layers_present: Arc::new(|_| true),
            encode_arguments: Arc::new(encode_container_arguments),
            cancel: cancel.clone(),
        })
        .await
        .unwrap();
        let Started {
            control,
            web,
            desired,
            reports,
            essential,
        } = started;
        let token_id = match store.tokens().list().await.unwrap().first() {
            Some(token) => token.id,
            None => add_token(&store).await,
        };
        Self {
            api: Api::new(control.clone(), UrlSigner::new([3; 32]), "http"),
            worker: Worker::start(desired, reports, survivors),
            control,
            store,
            builder,
            token_id,
            web,
            cancel,
            essential,
            dir,
        }
    }

    /// Ends without a word, as by a kill, and starts on what is on the disk. Containers go on.
    pub(crate) async fn restart(self) -> Self {
        self.restart_with(Survivors::Live, |_| ()).await
    }

    pub(crate) async fn restart_with(self, survivors: Survivors, configure: impl FnOnce(&mut ControlConfig)) -> Self {
        let Self {
            cancel,
            mut essential,
            store,
            worker,
            dir,
            control,
            api,
            ..
        } = self;
        cancel.cancel();
        worker.stop().await;
        essential.shutdown().await;
        drop((control, api));
        store.close().await;
        Self::start_on(dir, survivors, configure).await
    }

    /// A developer's client.
    pub(crate) fn client(&self) -> Client {
        client_of(
            &self.api,
            &[
                ("x-modal-token-id", &self.token_id.to_string()),
                ("x-modal-token-secret", SECRET),
            ],
        )
    }

    /// A container that was ordered by an earlier server.
    pub(crate) fn survivor(&self, id: ContainerId) -> Container {
        Container::new(self, id)
    }

    /// Waits until a container of this function was ordered, and is it.
    pub(crate) async fn container(&self, function_id: FunctionId) -> Container {
        self.container_but(function_id, &[]).await
    }

    /// The same, with containers that are known already left out.
    pub(crate) async fn container_but(&self, function_id: FunctionId, known: &[ContainerId]) -> Container {
        let id = eventually("a container of the function", || async {
            let live = self.control.snapshot().borrow().clone();
            let wanted = live
                .iter()
                .find(|c| c.function_id == function_id && !c.ending && !known.contains(&c.id))?;
            self.control.containers().find(wanted.id).map(|entry| entry.id)
        })
        .await;
        Container::new(self, id)
    }

    pub(crate) async fn deploy(&self, name: &str) -> Deploy {
        Deploy::begin(self, name).await
    }
}

fn config(dir: &Path) -> ControlConfig {
    ControlConfig {
        workspace: "team".to_owned(),
        public_scheme: "http".to_owned(),
        base_domain: "example.test".to_owned(),
        public_port: 8080,
        image_builder_version: "2025.06".to_owned(),
        runtime: RuntimeKind::Process,
        allow_weaker_runtime: false,
        container_server_url: "http://10.0.0.1:9".to_owned(),
        web_hook: true,
        data_dir: dir.to_owned(),
        default_scaledown_window: Duration::from_mins(1),
        client_heartbeat_timeout: Duration::from_mins(1),
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

async fn add_token(store: &Store) -> TokenId {
    let id = TokenId::generate();
    let record = TokenRecord {
        id,
        name: "tester".to_owned(),
        secret_hash: hash_secret(SECRET),
        created_at: Timestamp::now(),
        revoked_at: None,
        last_used_at: None,
    };
    store.tokens().insert(&record).await.unwrap();
    id
}

/// Looks again until there is something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Fails where something that should come does not.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("waited too long")
}

/// A refused request: its code, and a part of what its sender is told.
#[track_caller]
pub(crate) fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, words: &str) {
    let status = answer.expect_err("the request should be refused");
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(
        status.message().contains(words),
        "{:?} should say {words:?}",
        status.message()
    );
}
