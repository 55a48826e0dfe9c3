//! The live containers as control knows them: credentials, cancellations, web addresses.
//!
//! The scheduler owns their life; this registry owns what their connections need.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use ionian_domain::function::Function;
use ionian_domain::web::{WebKind, WebTarget};
use ionian_domain::{AppId, ContainerId, FunctionId, InputId, Timestamp};
use parking_lot::{Mutex, RwLock};
use sha2::Sha256;
use tokio::sync::Notify;

/// Cancellations kept for a container whose heartbeat does not fetch them. A container runs at most
/// some hundreds of inputs, so this is more than can be meaningful.
const MAX_PENDING_CANCELS: usize = 10_000;

/// One endpoint that a container's web hook announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnouncedEndpoint {
    pub method: Option<String>,
    pub port: u16,
}

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
        }
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
        Self { inner: Arc::default(), key: Arc::new(key) }
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

    /// The container's web hook serves these endpoints. Comes before the container is ready.
    pub fn announce(&self, entry: &ContainerEntry, endpoints: Vec<AnnouncedEndpoint>) {
        *entry.announced.lock() = endpoints;
    }

    /// Where a ready container takes requests, and how many at a time.
    pub(crate) fn web_targets(&self, id: ContainerId) -> (u32, Vec<(Option<String>, WebTarget)>) {
        let Some(entry) = self.find(id) else { return (1, Vec::new()) };
        let spec = &entry.function.spec;
        let slots = spec.concurrency.max_inputs.max(1);
        let address = *entry.address.lock();
        let announced = entry.announced.lock();
        let target = |method: &Option<String>, kind: WebKind, port: Option<u16>| {
            let direct = match kind {
                WebKind::WebServer => port,
                WebKind::AsgiApp | WebKind::FastapiEndpoint | WebKind::WsgiApp => {
                    announced.iter().find(|endpoint| endpoint.method == *method).map(|endpoint| endpoint.port)
                }
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

    fn mac(&self, id: ContainerId) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.key.as_slice()).expect("HMAC takes keys of any length");
        mac.update(b"ionian container credential\0");
        mac.update(id.to_string().as_bytes());
        mac
    }
}
