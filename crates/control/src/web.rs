//! What control and ingress say to each other about web endpoints.
//!
//! Control publishes the whole route table when it changes, and every change of a pool's containers in
//! order. Ingress reports demand. No request passes through here (design D5): the scheduler hears of
//! demand, never of requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ionian_domain::web::{PoolEvent, Route};
use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};
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

/// A request that a container answered, for the app's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedRequest {
    pub app_id: AppId,
    pub function_id: FunctionId,
    pub container_id: ContainerId,
    pub method: String,
    pub path: String,
    pub status: u16,
    /// From the request's head to the response's, waiting for a container included.
    pub duration: Duration,
    /// Requests since the last one told that were left out, because there were too many to read.
    pub left_out: u32,
}

/// Lines that nobody reads must not cost the requests that everybody waits for: beyond so many per
/// second, requests are counted and not told.
const TOLD_PER_SECOND: u32 = 50;
/// Told requests that wait for their line.
const TOLD_QUEUE: usize = 256;

/// Tells of served requests. Never waits.
#[derive(Debug)]
pub struct RequestLog {
    sender: mpsc::Sender<ServedRequest>,
    started: Instant,
    /// The second that `told` counts in.
    second: AtomicU64,
    told: AtomicU32,
    left_out: AtomicU32,
}

impl RequestLog {
    pub fn channel() -> (Self, mpsc::Receiver<ServedRequest>) {
        let (sender, receiver) = mpsc::channel(TOLD_QUEUE);
        let log = Self {
            sender,
            started: Instant::now(),
            second: AtomicU64::new(0),
            told: AtomicU32::new(0),
            left_out: AtomicU32::new(0),
        };
        (log, receiver)
    }

    /// Tells of a request unless there were too many this second. `describe` is called only then; it
    /// gets the number of requests left out before.
    pub fn tell(&self, describe: impl FnOnce(u32) -> ServedRequest) {
        let second = self.started.elapsed().as_secs();
        // Two requests that see the second change together both start the count anew: a few lines more.
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.told.store(0, Ordering::Relaxed);
        }
        if self.told.fetch_add(1, Ordering::Relaxed) >= TOLD_PER_SECOND {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if self.sender.try_send(describe(left_out)).is_err() {
            self.left_out.fetch_add(left_out + 1, Ordering::Relaxed);
        }
    }
}

/// Everything the ingress gets from control, once, at start.
#[derive(Debug)]
pub struct WebLink {
    pub routes: watch::Receiver<Arc<RouteTable>>,
    pub pool: mpsc::Receiver<PoolEvent>,
    pub demand: DemandSender,
    pub data_channels: DataChannels,
    pub requests: RequestLog,
}
