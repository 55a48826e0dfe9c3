//! What control and ingress say to each other about web endpoints.
//!
//! Control publishes the whole route table when it changes, and every change of a pool's containers in
//! order. Ingress reports demand. No request passes through here (design D5): the scheduler hears of
//! demand, never of requests.

use std::collections::HashMap;
use std::sync::Arc;

use ionian_domain::web::{PoolEvent, Route};
use ionian_domain::{ContainerId, FunctionId, Timestamp};
use tokio::sync::{mpsc, watch};

use crate::data_channel::DataChannels;

/// Every endpoint, by the first label of its host name in lower case (`<workspace>--<label>`).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RouteTable {
    pub by_host_label: HashMap<String, Arc<Route>>,
}

/// How many requests one function's pool has, told when it matters (see [`DemandSender`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DemandReport {
    pub function_id: FunctionId,
    /// Requests that wait for a slot.
    pub queued: u32,
    pub containers: Vec<ContainerUse>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContainerUse {
    pub container_id: ContainerId,
    pub in_flight: u32,
    /// When a request last began or ended there. Scale-down counts idle time from here.
    pub last_active: Timestamp,
}

/// Carries demand to the scheduler. A report replaces the one before it of the same function.
///
/// Ingress sends at once when a request starts to wait or when a draining container becomes empty,
/// and otherwise at most a few times per second and function, so that a busy endpoint costs the
/// scheduler nothing per request. A report must follow any activity within a second or so, because
/// idle containers are stopped by what the reports say.
#[derive(Debug, Clone)]
pub struct DemandSender(pub mpsc::Sender<DemandReport>);

impl DemandSender {
    /// Waits while control is behind: dropping a report could leave a request without a container.
    pub async fn send(&self, report: DemandReport) {
        // The receiver is gone only while the process shuts down, when nobody will start containers.
        let _closed = self.0.send(report).await;
    }
}

/// Everything the ingress gets from control, once, at start.
#[derive(Debug)]
pub struct WebLink {
    pub routes: watch::Receiver<Arc<RouteTable>>,
    pub pool: mpsc::Receiver<PoolEvent>,
    pub demand: DemandSender,
    pub data_channels: DataChannels,
}
