//! Upgraded connections (websockets) to apps with a socket: bytes in both directions, unread.
//!
//! Extensions, message sizes and close codes are between client and app. The slot is held until the
//! tunnel closes; the request's timeout, an idle limit and the container's end close it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Response, StatusCode};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::body::ResponseBody;
use crate::forward;
use crate::proxy::{AttemptError, Exchanging, Outgoing, bounded, connecting, not_reached};
use crate::respond::Failure;
use crate::slots::SlotLease;
use crate::stream::{Live, StreamBody};
use crate::upstream::{DirectTarget, Exchange};

/// Per direction. Idle websockets are many, and each costs two of these.
const COPY_BUFFER: usize = 8 * 1024;

/// For the client's half of the upgrade, once the app has agreed.
const UPGRADE_WITHIN: Duration = Duration::from_secs(10);

/// Asks the app to upgrade; on 101 the two connections become one.
pub(crate) async fn open(
    exchanging: &Exchanging<'_>,
    target: &DirectTarget,
    lease: SlotLease,
    outgoing: &mut Outgoing,
    deadline: Instant,
) -> Result<Response<ResponseBody>, AttemptError> {
    let timeout = exchanging.route.timeout;
    let limits = &exchanging.ingress.config.limits;
    let container = Arc::clone(lease.container());
    let connection = connecting(deadline, timeout, &container.gone, target.connect(limits)).await?;
    let (mut sender, task) = connection.spawn();

    let mut request = outgoing.take(false);
    if let Some(upgrade) = &exchanging.upgrade {
        request
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        request.headers_mut().insert(UPGRADE, upgrade.clone());
    }
    let sent = bounded(deadline, timeout, &container.gone, sender.try_send_request(request)).await?;
    let mut response = match sent {
        Ok(response) => response,
        Err(mut error) => {
            return Err(match error.take_message() {
                Some(request) => {
                    outgoing.put_back(request);
                    not_reached(error.into_error())
                }
                None => Failure::AppDisconnected(error.into_error().into()).into(),
            });
        }
    };
    let app = (response.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| hyper::upgrade::on(&mut response));
    let upgraded_to = response.headers().get(UPGRADE).cloned();
    let (mut head, body) = response.into_parts();
    forward::prepare_response(&mut head);
    match (app, outgoing.client_upgrade.take()) {
        (Some(app), Some(client)) => {
            head.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            if let Some(protocol) = upgraded_to.or_else(|| exchanging.upgrade.clone()) {
                head.headers.insert(UPGRADE, protocol);
            }
            let ends = Ends {
                deadline,
                idle: limits.tunnel_idle_timeout,
                gone: container.gone.clone(),
                shutdown: exchanging.ingress.shutdown.clone(),
            };
            // Kind: per request. Ends with either side, or by one of its `Ends`.
            exchanging.ingress.tunnels.spawn(async move {
                run(client, app, &ends).await;
                drop((task, lease));
            });
            Ok(Response::from_parts(head, ResponseBody::empty()))
        }
        (None, _) => {
            // The app declined: an ordinary response.
            let live = Live {
                exchange: Exchange::apart(body, task),
                lease,
                route: Arc::clone(exchanging.route),
            };
            let body = StreamBody::new([None, None], live, deadline, exchanging.request_id.clone());
            Ok(Response::from_parts(head, ResponseBody::Stream(body)))
        }
        (Some(_), None) => Err(Failure::AppDisconnected("the app upgraded without being asked".into()).into()),
    }
}

/// What ends a tunnel besides its two sides.
struct Ends {
    deadline: Instant,
    idle: Duration,
    gone: CancellationToken,
    shutdown: CancellationToken,
}

async fn run(client: OnUpgrade, app: OnUpgrade, ends: &Ends) {
    let both = async { tokio::try_join!(client, app) };
    let Ok(Ok((client, app))) = tokio::time::timeout(UPGRADE_WITHIN, both).await else {
        return; // One of them left before it began.
    };
    let activity = Arc::new(Activity::new());
    let mut client = Watched::new(client, &activity);
    let mut app = Watched::new(app, &activity);
    tokio::select! {
        // How it ends is between client and app: a reset is no event for the platform.
        _ended = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut app, COPY_BUFFER, COPY_BUFFER) => {}
        () = activity.idle_for(ends.idle) => {}
        () = tokio::time::sleep_until(ends.deadline) => {}
        () = ends.gone.cancelled() => {}
        () = ends.shutdown.cancelled() => {}
    }
}

/// When bytes last arrived from either side.
struct Activity {
    began: Instant,
    last_millis: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            last_millis: AtomicU64::new(0),
        }
    }

    fn note(&self) {
        let millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_millis.store(millis, Ordering::Relaxed);
    }

    /// Returns when nothing arrived for `limit`.
    async fn idle_for(&self, limit: Duration) {
        loop {
            let until = self.began + Duration::from_millis(self.last_millis.load(Ordering::Relaxed)) + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// One side of a tunnel, whose reads are noted.
struct Watched {
    io: TokioIo<Upgraded>,
    activity: Arc<Activity>,
}

impl Watched {
    fn new(upgraded: Upgraded, activity: &Arc<Activity>) -> Self {
        Self {
            io: TokioIo::new(upgraded),
            activity: Arc::clone(activity),
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if polled.is_ready() {
            self.activity.note();
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
