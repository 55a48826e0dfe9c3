//! The live containers as control knows them: credentials, cancellations, web addresses.
//!
//! The scheduler owns their life; this registry owns what their connections need.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use ionian_domain::function::Function;
use ionian_domain::web::{AnnouncedEndpoint, WebKind, WebTarget};
use ionian_domain::{AppId, CallId, ContainerId, FunctionId, InputId, Timestamp};
use parking_lot::{Mutex, RwLock};
use sha2::Sha256;
use tokio::sync::Notify;

/// Cancellations kept for a container whose heartbeat does not fetch them. A container runs at most
/// some hundreds of inputs, so this is more than can be meaningful.
const MAX_PENDING_CANCELS: usize = 10_000;

/// A container that was ordered and has not ended.
#[derive(Debug)]
pub struct ContainerEntry {
    pub id: ContainerId,
    pub app_id: AppId,
    pub app_name: String,
    pub environment_name: String,
    pub function_id: FunctionId,
    pub function: Arc<Function>,
    pub created_at: Timestamp,
    address: Mutex<Option<IpAddr>>,
    announced: Mutex<Vec<AnnouncedEndpoint>>,
    cancels: Mutex<Vec<InputId>>,
    cancelled: Notify,
    /// Inputs that this container was handed and has not answered. As many as it has slots.
    held: Mutex<HashMap<InputId, CallId>>,
}

impl ContainerEntry {
    pub fn new(
        id: ContainerId,
        app_name: String,
        environment_name: String,
        function: Arc<Function>,
        created_at: Timestamp,
    ) -> Self {
        Self {
            id,
            app_id: function.app_id,
            app_name,
            environment_name,
            function_id: function.id,
            function,
            created_at,
            address: Mutex::new(None),
            announced: Mutex::new(Vec::new()),
            cancels: Mutex::new(Vec::new()),
            cancelled: Notify::new(),
            held: Mutex::default(),
        }
    }

    pub(crate) fn hold(&self, input_id: InputId, call_id: CallId) {
        self.held.lock().insert(input_id, call_id);
    }

    pub(crate) fn let_go(&self, input_id: InputId) {
        self.held.lock().remove(&input_id);
    }

    /// Whether this container was handed the input and has not answered it.
    pub fn holds(&self, input_id: InputId) -> bool {
        self.held.lock().contains_key(&input_id)
    }

    /// Whether an input of this call runs here, so that the container may speak for the call.
    pub fn runs(&self, call_id: CallId) -> bool {
        self.held.lock().values().any(|held| *held == call_id)
    }

    pub(crate) fn announce(&self, endpoints: Vec<AnnouncedEndpoint>) {
        *self.announced.lock() = endpoints;
    }

    /// Holds a heartbeat until there are inputs to cancel, or for `hold`.
    pub async fn cancellations(&self, hold: Duration) -> Vec<InputId> {
        let take = || std::mem::take(&mut *self.cancels.lock());
        let pending = take();
        if !pending.is_empty() {
            return pending;
        }
        // `notify_one` keeps a permit, so a cancellation between the look and the wait is not missed.
        let _timeout = tokio::time::timeout(hold, self.cancelled.notified()).await;
        take()
    }
}

#[derive(Debug, Default)]
struct Inner {
    live: RwLock<HashMap<ContainerId, Arc<ContainerEntry>>>,
}

/// The registry. Cheap to clone.
#[derive(Clone)]
pub struct Containers {
    inner: Arc<Inner>,
    key: Arc<[u8; 32]>,
}

impl std::fmt::Debug for Containers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Containers").finish_non_exhaustive()
    }
}

impl Containers {
    /// `key` signs container credentials; it never leaves the process.
    pub fn new(key: [u8; 32]) -> Self {
        Self {
            inner: Arc::default(),
            key: Arc::new(key),
        }
    }

    pub fn insert(&self, entry: ContainerEntry) -> Arc<ContainerEntry> {
        let entry = Arc::new(entry);
        self.inner.live.write().insert(entry.id, Arc::clone(&entry));
        entry
    }

    pub fn find(&self, id: ContainerId) -> Option<Arc<ContainerEntry>> {
        self.inner.live.read().get(&id).cloned()
    }

    pub(crate) fn forget(&self, id: ContainerId) {
        self.inner.live.write().remove(&id);
    }

    pub(crate) fn cancel(&self, id: ContainerId, input_ids: Vec<InputId>) {
        if let Some(entry) = self.find(id) {
            let mut cancels = entry.cancels.lock();
            let room = MAX_PENDING_CANCELS.saturating_sub(cancels.len());
            cancels.extend(input_ids.into_iter().take(room));
            entry.cancelled.notify_one();
        }
    }

    pub(crate) fn started(&self, id: ContainerId, address: IpAddr) {
        if let Some(entry) = self.find(id) {
            *entry.address.lock() = Some(address);
        }
    }

    /// Where a ready container takes requests, and how many at a time.
    pub(crate) fn web_targets(&self, id: ContainerId) -> (u32, Vec<(Option<String>, WebTarget)>) {
        let Some(entry) = self.find(id) else {
            return (1, Vec::new());
        };
        let spec = &entry.function.spec;
        let slots = spec.concurrency.max_inputs.max(1);
        let address = *entry.address.lock();
        let announced = entry.announced.lock();
        let target = |method: &Option<String>, kind: WebKind, port: Option<u16>| {
            let direct = match kind {
                WebKind::WebServer => port,
                WebKind::AsgiApp | WebKind::FastapiEndpoint | WebKind::WsgiApp => announced
                    .iter()
                    .find(|endpoint| endpoint.method == *method)
                    .map(|endpoint| endpoint.port),
            };
            match (address, direct) {
                (Some(ip), Some(port)) => WebTarget::Direct(SocketAddr::new(ip, port)),
                (_, None) | (None, _) => WebTarget::DataChannel,
            }
        };
        let mut targets = Vec::new();
        if let Some(web) = &spec.web {
            targets.push((None, target(&None, web.kind, web.port)));
        }
        for (method, web) in &spec.web_methods {
            let method = Some(method.clone());
            let chosen = target(&method, web.kind, web.port);
            targets.push((method, chosen));
        }
        (slots, targets)
    }

    /// The credential that the container presents: its id and a signature. Nothing is stored, and the
    /// credential is worth nothing once the container has ended.
    pub fn issue_credential(&self, id: ContainerId) -> String {
        format!("{id}.{}", hex::encode(self.mac(id).finalize().into_bytes()))
    }

    /// The live container that presents this credential.
    pub fn authenticate(&self, credential: &str) -> Option<Arc<ContainerEntry>> {
        let (id, signature) = credential.split_once('.')?;
        let id: ContainerId = id.parse().ok()?;
        let signature = hex::decode(signature).ok()?;
        // Compares in constant time.
        self.mac(id).verify_slice(&signature).ok()?;
        self.find(id)
    }

    /// What shows later that the subject was given to this app's containers, or made by them. `purpose` keeps
    /// marks of one kind from passing for another's.
    pub fn mark(&self, app_id: AppId, purpose: &str, subject: &str) -> [u8; 32] {
        let mut mac = self.keyed();
        for part in ["ionian mark", purpose, &app_id.to_string(), subject] {
            mac.update(part.as_bytes());
            mac.update(b"\0");
        }
        mac.finalize().into_bytes().into()
    }

    fn keyed(&self) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(self.key.as_slice()).expect("HMAC takes keys of any length")
    }

    fn mac(&self, id: ContainerId) -> Hmac<Sha256> {
        let mut mac = self.keyed();
        mac.update(b"ionian container credential\0");
        mac.update(id.to_string().as_bytes());
        mac
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use ionian_domain::function::{
        Autoscaler, Concurrency, ContainerUse, FunctionKind, FunctionSpec, Resources, RetryPolicy,
    };
    use ionian_domain::network::Egress;
    use ionian_domain::web::WebSpec;
    use ionian_domain::{AppId, DefinitionId};

    use super::*;

    fn function(web: Option<WebSpec>) -> Function {
        Function {
            id: FunctionId::generate(),
            app_id: AppId::generate(),
            definition_id: DefinitionId::generate(),
            spec: FunctionSpec {
                name: "f".to_owned(),
                kind: FunctionKind::Function,
                is_class: false,
                is_server: false,
                container_use: ContainerUse::Repeated,
                image_id: None,
                mount_ids: Vec::new(),
                secret_ids: Vec::new(),
                volume_mounts: Vec::new(),
                object_dependencies: Vec::new(),
                resources: Resources::default(),
                timeout: Duration::from_mins(5),
                startup_timeout: Duration::from_mins(5),
                autoscaler: Autoscaler {
                    min_containers: 0,
                    max_containers: None,
                    buffer_containers: 0,
                    scaledown_window: Duration::from_mins(1),
                },
                concurrency: Concurrency {
                    max_inputs: 1,
                    target_inputs: 0,
                },
                batching: None,
                retry: RetryPolicy::NONE,
                web,
                web_methods: Vec::new(),
                methods: Vec::new(),
                runtime: None,
                egress: Egress::Open,
                mount_client_dependencies: true,
                client_version: "1.6.4".to_owned(),
                definition: Bytes::new(),
            },
            binding: None,
            created_at: Timestamp::now(),
        }
    }

    /// A container of a plain function.
    pub(crate) fn entry() -> ContainerEntry {
        entry_of(function(None))
    }

    fn entry_of(function: Function) -> ContainerEntry {
        let (app, environment) = ("app".to_owned(), "main".to_owned());
        ContainerEntry::new(
            ContainerId::generate(),
            app,
            environment,
            Arc::new(function),
            Timestamp::now(),
        )
    }

    #[test]
    fn a_credential_opens_its_own_container_while_that_lives() {
        let containers = Containers::new([7; 32]);
        let (one, two) = (containers.insert(entry()), containers.insert(entry()));
        let credential = containers.issue_credential(one.id);
        assert_eq!(containers.authenticate(&credential).unwrap().id, one.id);
        let (_, signature) = credential.split_once('.').unwrap();
        assert!(containers.authenticate(&format!("{}.{signature}", two.id)).is_none());
        assert!(
            containers
                .authenticate(&format!("{}.{}", one.id, "00".repeat(32)))
                .is_none()
        );
        assert!(containers.authenticate(&format!("{}.", one.id)).is_none());
        assert!(Containers::new([8; 32]).authenticate(&credential).is_none());
        containers.forget(one.id);
        assert!(containers.authenticate(&credential).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_heartbeat_is_held_until_there_is_something_to_cancel() {
        let containers = Containers::new([7; 32]);
        let entry = containers.insert(entry());
        let input = InputId::generate();
        let heartbeat = tokio::spawn({
            let entry = Arc::clone(&entry);
            async move { entry.cancellations(Duration::from_secs(12)).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        containers.cancel(entry.id, vec![input]);
        assert_eq!(heartbeat.await.unwrap(), [input]);
        assert!(entry.cancellations(Duration::from_secs(1)).await.is_empty());
    }

    #[test]
    fn a_container_speaks_for_a_call_while_it_runs_an_input_of_it() {
        let entry = entry();
        let (call, one, two) = (CallId::generate(), InputId::generate(), InputId::generate());
        entry.hold(one, call);
        entry.hold(two, call);
        entry.let_go(one);
        assert!(entry.runs(call));
        entry.let_go(two);
        assert!(!entry.runs(call));
    }

    #[test]
    fn a_web_container_is_reached_where_its_hook_announced_it() {
        let web = WebSpec {
            kind: WebKind::AsgiApp,
            label: "a".to_owned(),
            label_truncated: false,
            requires_proxy_auth: false,
            port: None,
            startup_timeout: Duration::ZERO,
        };
        let containers = Containers::new([7; 32]);
        let entry = containers.insert(entry_of(function(Some(web))));
        assert_eq!(containers.web_targets(entry.id).1, [(None, WebTarget::DataChannel)]);
        containers.started(entry.id, [10, 0, 0, 2].into());
        let endpoint = AnnouncedEndpoint {
            method: None,
            port: 8000,
        };
        entry.announce(vec![endpoint]);
        let direct = WebTarget::Direct(([10, 0, 0, 2], 8000).into());
        assert_eq!(containers.web_targets(entry.id), (1, vec![(None, direct)]));
    }
}
