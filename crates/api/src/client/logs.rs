//! Logs of apps, live and stored.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use ionian_control::Control;
use ionian_control::logs::{LogFilter, Numbered};
use ionian_domain::app::AppState;
use ionian_domain::log::LogStream;
use ionian_domain::{AppId, ContainerId, FunctionId, Timestamp};
use ionian_proto::client as pb;
use tonic::Status;

use crate::context::Context;
use crate::service::Api;
use crate::{decode, encode, status};

/// The client reconnects when a stream ends.
const MAX_HOLD: Duration = Duration::from_mins(1);
/// A follower of a deployed app that names no entry starts this far back.
const FOLLOW_FROM: u64 = 100;
/// Entries in one stored answer. The client asks for this many, and takes a full answer for all there is.
const MAX_FETCHED: usize = 20_000;

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

/// What a client asks for, in the words of the three requests.
struct Wanted<'a> {
    function_id: &'a str,
    variant_id: &'a str,
    container_id: &'a str,
    stream: i32,
    text: String,
    /// Filters that entries here know nothing of.
    others: [&'a str; 2],
}

async fn filter(api: &Api, wanted: Wanted<'_>) -> Result<LogFilter, Status> {
    if wanted.others.iter().any(|id| !id.is_empty()) {
        return Err(Status::unimplemented(
            "log lines are not attributed to single calls on this server yet; filter by function or container instead",
        ));
    }
    let function_ids = match (
        decode::optional_id(wanted.variant_id)?,
        decode::optional_id(wanted.function_id)?,
    ) {
        (Some(variant), _) => vec![variant],
        (None, Some(function)) => api
            .control
            .functions()
            .with_variants(function)
            .await
            .map_err(status::from_error)?,
        (None, None) => Vec::new(),
    };
    Ok(LogFilter {
        function_ids,
        container_id: decode::optional_id(wanted.container_id)?,
        stream: LogStream::from_wire(wanted.stream),
        text: wanted.text,
        ..LogFilter::default()
    })
}

struct Follow {
    control: Control,
    app_id: AppId,
    after: u64,
    filter: LogFilter,
    deadline: tokio::time::Instant,
    ready: VecDeque<pb::TaskLogsBatch>,
    /// What the client was told of each container, for its status line.
    states: BTreeMap<ContainerId, (FunctionId, pb::TaskState)>,
    done: bool,
}

impl Follow {
    /// Whether all has been said: the app has stopped, or the one container that is followed has ended,
    /// and what ends has had its entries written.
    async fn is_over(&self) -> bool {
        let containers = self.control.snapshot().borrow().clone();
        match self.filter.container_id {
            Some(followed) => !containers.iter().any(|container| container.id == followed),
            None => {
                let app = self.control.apps().get(self.app_id).await;
                app.is_ok_and(|app| app.state == AppState::Stopped)
                    && !containers.iter().any(|container| container.app_id == self.app_id)
            }
        }
    }

    /// Tells what changed about the app's containers. Only to who follows the app as a whole.
    fn tell_states(&mut self) {
        if self.filter.container_id.is_some() || !self.filter.function_ids.is_empty() {
            return;
        }
        let containers = self.control.snapshot().borrow().clone();
        let now: BTreeMap<ContainerId, (FunctionId, pb::TaskState)> = containers
            .iter()
            .filter(|container| container.app_id == self.app_id && !container.ending)
            .map(|container| {
                let state = if container.ready {
                    pb::TaskState::Idle
                } else {
                    pb::TaskState::LoadingImage
                };
                (container.id, (container.function_id, state))
            })
            .collect();
        let ended = self.states.iter().filter(|(id, _)| !now.contains_key(id));
        let ended = ended.map(|(id, (function_id, _))| (*id, *function_id, pb::TaskState::Completed));
        let changed = now.iter().filter(|(id, state)| self.states.get(id) != Some(state));
        let changed = changed.map(|(id, (function_id, state))| (*id, *function_id, *state));
        self.ready
            .extend(ended.chain(changed).map(|(id, function_id, state)| pb::TaskLogsBatch {
                task_id: id.to_string(),
                function_id: function_id.to_string(),
                items: vec![pb::TaskLogs {
                    task_state: state.into(),
                    timestamp: Timestamp::now().as_unix_seconds(),
                    ..pb::TaskLogs::default()
                }],
                ..pb::TaskLogsBatch::default()
            }));
        self.states = now;
    }
}

pub(crate) async fn get(api: &Api, _: &Context, request: pb::AppGetLogsRequest) -> Result<LogStreamOut, Status> {
    let app_id: AppId = match (
        decode::optional_id(&request.app_id)?,
        decode::optional_id(&request.task_id)?,
    ) {
        (Some(app_id), _) => app_id,
        (None, Some(container)) => {
            api.control
                .tasks()
                .get(container)
                .await
                .map_err(status::from_error)?
                .app_id
        }
        (None, None) => return Err(status::invalid("the request names neither an app nor a container")),
    };
    let app = api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let wanted = Wanted {
        function_id: &request.function_id,
        variant_id: &request.parametrized_function_id,
        container_id: &request.task_id,
        stream: request.file_descriptor,
        text: request.search_text,
        others: [&request.function_call_id, &request.sandbox_id],
    };
    let filter = filter(api, wanted).await?;
    let after = match request
        .last_entry_id
        .split('-')
        .next()
        .and_then(|number| number.parse().ok())
    {
        Some(after) => after,
        None if app.state == AppState::Deployed => api.control.logs().newest(app_id).await.saturating_sub(FOLLOW_FROM),
        None => 0,
    };
    let hold = decode::seconds(request.timeout).min(MAX_HOLD);
    let follow = Follow {
        control: api.control.clone(),
        app_id,
        after,
        filter,
        deadline: tokio::time::Instant::now() + hold,
        ready: VecDeque::new(),
        states: BTreeMap::new(),
        done: false,
    };
    Ok(Box::pin(futures_util::stream::unfold(follow, next_batch)))
}

async fn next_batch(mut follow: Follow) -> Option<(Result<pb::TaskLogsBatch, Status>, Follow)> {
    loop {
        if let Some(batch) = follow.ready.pop_front() {
            return Some((Ok(batch), follow));
        }
        if follow.done {
            return None;
        }
        let mut containers = follow.control.snapshot();
        containers.mark_unchanged();
        follow.tell_states();
        // Looked at before the entries: what ended by then has had its entries written.
        let over = follow.is_over().await;
        let (entries, next, mut news) = follow
            .control
            .logs()
            .after(follow.app_id, follow.after, &follow.filter)
            .await;
        let moved = next > follow.after;
        follow.after = next;
        follow.ready.extend(batches(entries));
        if moved || !follow.ready.is_empty() {
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
    let wanted = Wanted {
        function_id: &request.function_id,
        variant_id: &request.parametrized_function_id,
        container_id: &request.task_id,
        stream: request.source,
        text: request.search_text,
        others: [&request.function_call_id, &request.sandbox_id],
    };
    let filter = LogFilter {
        since: decode::timestamp(request.since.as_ref()),
        until: decode::timestamp(request.until.as_ref()),
        ..filter(api, wanted).await?
    };
    let limit = match request.limit {
        0 => MAX_FETCHED,
        limit => (limit as usize).min(MAX_FETCHED),
    };
    let entries = api.control.logs().last(app_id, filter, limit).await;
    Ok(pb::AppFetchLogsResponse {
        batches: batches(entries),
    })
}

pub(crate) async fn count(
    api: &Api,
    _: &Context,
    request: pb::AppCountLogsRequest,
) -> Result<pb::AppCountLogsResponse, Status> {
    let app_id: AppId = decode::id(&request.app_id)?;
    api.control.apps().get(app_id).await.map_err(status::from_error)?;
    let wanted = Wanted {
        function_id: &request.function_id,
        variant_id: &request.parametrized_function_id,
        container_id: &request.task_id,
        stream: request.source,
        text: request.search_text,
        others: [&request.function_call_id, &request.sandbox_id],
    };
    let filter = LogFilter {
        since: decode::timestamp(request.since.as_ref()),
        until: decode::timestamp(request.until.as_ref()),
        ..filter(api, wanted).await?
    };
    let width = Duration::from_secs(u64::from(request.bucket_secs.max(1)));
    let counts = api.control.logs().count(app_id, filter, width).await;
    let buckets = counts
        .into_iter()
        .map(|(start, count)| pb::app_count_logs_response::LogBucket {
            bucket_start_at: Some(encode::proto_timestamp(start)),
            stdout_logs: count.stdout,
            stderr_logs: count.stderr,
            system_logs: count.info,
        })
        .collect();
    Ok(pb::AppCountLogsResponse {
        app_id: request.app_id,
        buckets,
    })
}
