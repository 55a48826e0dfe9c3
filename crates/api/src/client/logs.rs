//! Logs of apps, live and stored.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use ionian_control::Control;
use ionian_control::logs::{LogFilter, Numbered};
use ionian_domain::AppId;
use ionian_domain::app::AppState;
use ionian_domain::log::LogStream;
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, encode, status};

/// The client reconnects when a stream ends.
const MAX_HOLD: Duration = Duration::from_mins(1);
/// A follower of a deployed app that names no entry starts this far back.
const FOLLOW_FROM: u64 = 100;
/// Entries in one stored answer.
const MAX_FETCHED: usize = 10_000;

type LogStreamOut = Pin<Box<dyn Stream<Item = Result<pb::TaskLogsBatch, Status>> + Send>>;

/// Groups neighbouring entries of one container, as the client prints them.
fn batches(entries: Vec<Numbered>) -> Vec<pb::TaskLogsBatch> {
    let mut batches: Vec<pb::TaskLogsBatch> = Vec::new();
    for (number, entry) in entries {
        let task_id = entry.container_id.to_string();
        let item = pb::TaskLogs {
            data: entry.text.clone(),
            timestamp: entry.at.as_unix_seconds(),
            timestamp_ns: u64::try_from(entry.at.micros()).unwrap_or(0) * 1_000,
            file_descriptor: entry.stream.wire(),
            ..pb::TaskLogs::default()
        };
        let entry_id = format!("{number}-0");
        match batches.last_mut() {
            Some(batch) if batch.task_id == task_id => {
                batch.items.push(item);
                batch.entry_id = entry_id;
            }
            Some(_) | None => batches.push(pb::TaskLogsBatch {
                task_id,
                items: vec![item],
                entry_id,
                function_id: entry.function_id.to_string(),
                ..pb::TaskLogsBatch::default()
            }),
        }
    }
    batches
}

struct Follow {
    control: Control,
    app_id: AppId,
    after: u64,
    filter: LogFilter,
    deadline: tokio::time::Instant,
    ready: std::vec::IntoIter<pb::TaskLogsBatch>,
    done: bool,
}

/// Whether the app has stopped, and its containers have ended and said all they had to say.
async fn is_over(control: &Control, app_id: AppId) -> bool {
    let stopped = control.apps().get(app_id).await.is_ok_and(|app| app.state == AppState::Stopped);
    stopped && !control.snapshot().borrow().iter().any(|container| container.app_id == app_id)
}

pub(crate) async fn get(api: &Api, _: &Context, request: pb::AppGetLogsRequest) -> Result<LogStreamOut, Status> {
    let app_id: AppId = match decode::optional_id(&request.app_id)? {
        Some(app_id) => app_id,
        None => {
            let container = decode::id(&request.task_id)?;
            api.control
                .containers()
                .find(container)
                .map(|entry| entry.app_id)
                .ok_or_else(|| Status::not_found(format!("container {container} is not running")))?
        }
    };
    let app = api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let filter = LogFilter {
        function_id: decode::optional_id(&request.function_id)?,
        container_id: decode::optional_id(&request.task_id)?,
        stream: LogStream::from_wire(request.file_descriptor),
        text: request.search_text,
        ..LogFilter::default()
    };
    let after = match request.last_entry_id.split('-').next().and_then(|number| number.parse().ok()) {
        Some(after) => after,
        None if app.state == AppState::Deployed => api.control.logs().newest(app_id).saturating_sub(FOLLOW_FROM),
        None => 0,
    };
    let hold = decode::seconds(request.timeout).min(MAX_HOLD);
    let follow = Follow {
        control: api.control.clone(),
        app_id,
        after,
        filter,
        deadline: tokio::time::Instant::now() + hold,
        ready: Vec::new().into_iter(),
        done: false,
    };
    Ok(Box::pin(futures_util::stream::unfold(follow, next_batch)))
}

async fn next_batch(mut follow: Follow) -> Option<(Result<pb::TaskLogsBatch, Status>, Follow)> {
    loop {
        if let Some(batch) = follow.ready.next() {
            return Some((Ok(batch), follow));
        }
        if follow.done {
            return None;
        }
        let mut containers = follow.control.snapshot();
        containers.mark_unchanged();
        // Looked at before the entries: what ended by then has had its entries written.
        let over = is_over(&follow.control, follow.app_id).await;
        let (entries, next, mut news) =
            follow.control.logs().after(follow.app_id, follow.after, follow.filter.clone()).await;
        let moved = next > follow.after;
        follow.after = next;
        if !entries.is_empty() {
            follow.ready = batches(entries).into_iter();
            continue;
        }
        if moved {
            continue;
        }
        if over {
            follow.done = true;
            let batch = pb::TaskLogsBatch {
                app_done: true,
                entry_id: format!("{}-0", follow.after),
                ..pb::TaskLogsBatch::default()
            };
            return Some((Ok(batch), follow));
        }
        tokio::select! {
            _ = news.changed() => {}
            _ = containers.changed() => {}
            () = tokio::time::sleep_until(follow.deadline) => return None,
        }
    }
}

pub(crate) async fn fetch(
    api: &Api,
    _: &Context,
    request: pb::AppFetchLogsRequest,
) -> Result<pb::AppFetchLogsResponse, Status> {
    let app_id = decode::id(&request.app_id)?;
    api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let filter = LogFilter {
        function_id: decode::optional_id(&request.function_id)?,
        container_id: decode::optional_id(&request.task_id)?,
        stream: LogStream::from_wire(request.source),
        since: decode::timestamp(request.since.as_ref()),
        until: decode::timestamp(request.until.as_ref()),
        text: request.search_text,
    };
    let limit = match request.limit {
        0 => MAX_FETCHED,
        limit => (limit as usize).min(MAX_FETCHED),
    };
    let entries = api.control.logs().last(app_id, filter, limit).await;
    Ok(pb::AppFetchLogsResponse { batches: batches(entries) })
}

pub(crate) async fn count(
    api: &Api,
    _: &Context,
    request: pb::AppCountLogsRequest,
) -> Result<pb::AppCountLogsResponse, Status> {
    let app_id: AppId = decode::id(&request.app_id)?;
    api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let filter = LogFilter {
        function_id: decode::optional_id(&request.function_id)?,
        container_id: decode::optional_id(&request.task_id)?,
        stream: LogStream::from_wire(request.source),
        since: decode::timestamp(request.since.as_ref()),
        until: decode::timestamp(request.until.as_ref()),
        text: request.search_text,
    };
    let width = i64::from(request.bucket_secs.max(1)) * 1_000_000;
    let mut buckets: std::collections::BTreeMap<i64, pb::app_count_logs_response::LogBucket> =
        std::collections::BTreeMap::new();
    for (_, entry) in api.control.logs().last(app_id, filter, usize::MAX).await {
        let start = entry.at.micros().div_euclid(width) * width;
        let bucket = buckets.entry(start).or_insert_with(|| pb::app_count_logs_response::LogBucket {
            bucket_start_at: Some(encode::proto_timestamp(ionian_domain::Timestamp(start))),
            ..Default::default()
        });
        match entry.stream {
            LogStream::Stdout => bucket.stdout_logs += 1,
            LogStream::Stderr => bucket.stderr_logs += 1,
            LogStream::Info => bucket.system_logs += 1,
        }
    }
    Ok(pb::AppCountLogsResponse { app_id: request.app_id, buckets: buckets.into_values().collect() })
}
