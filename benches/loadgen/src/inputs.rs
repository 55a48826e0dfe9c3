//! Acknowledged inputs per second from many callers at once.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use ionian_proto::client as pb;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::client::{self, Client, items};
use crate::{Server, disk};

/// What the client puts into one `FunctionPutInputs`.
const BATCH: i32 = 49;

/// Functions that take the batches: one of them has no more than 100,000 inputs that wait, and a fast disk
/// acknowledges more than that within a measurement.
const FUNCTIONS: usize = 8;

/// A small pickle: `f.remote(1, "a", key=…)` is not much longer.
const ARGUMENT_BYTES: usize = 64;

/// One round: three measurements, right after each other.
#[derive(Serialize)]
struct Round {
    fdatasyncs_per_second: f64,
    single: Rate,
    batches: Rate,
}

#[derive(Serialize)]
struct Rate {
    inputs_per_second: f64,
    /// Of a request, from its sending to its acknowledgement.
    median_ms: f64,
    worst_ms: f64,
}

/// What every caller of a measurement does.
#[derive(Clone)]
enum Load {
    /// `.spawn()`: a call with one input.
    Single { function_id: String },
    /// `.spawn_map()` or `.map()`: more inputs for a call.
    Batches {
        function_id: String,
        call_id: String,
        next: Arc<AtomicI32>,
    },
}

/// Prints one line of JSON per round.
pub(crate) async fn measure(
    server: &Server,
    disk: &Path,
    callers: usize,
    rounds: usize,
    length: Duration,
) -> anyhow::Result<()> {
    let mut clients = Vec::with_capacity(callers);
    for _ in 0..callers {
        clients.push(client::connect(server).await?);
    }
    let first = clients.first_mut().context("at least one caller is needed")?;
    let mut owner = first.clone();
    for number in 0..=rounds {
        let fdatasyncs_per_second = syncs(disk.to_owned(), length).await?;
        let app = Box::pin(client::deploy(&mut owner, &format!("load-{number}-single"))).await?;
        let function_id = app.function_id;
        let single = run(&clients, &[Load::Single { function_id }], length).await?;
        client::stop(&mut owner, app.app_id).await?;

        let mut apps = Vec::new();
        let mut loads = Vec::new();
        for function in 0..FUNCTIONS {
            let app = Box::pin(client::deploy(&mut owner, &format!("load-{number}-batches-{function}"))).await?;
            loads.push(batches(&mut owner, app.function_id).await?);
            apps.push(app.app_id);
        }
        let batches = run(&clients, &loads, length).await?;
        for app in apps {
            client::stop(&mut owner, app).await?;
        }
        let round = Round {
            fdatasyncs_per_second,
            single,
            batches,
        };
        // The first round warms caches and connections.
        if number > 0 {
            writeln!(std::io::stdout(), "{}", serde_json::to_string(&round)?)?;
        }
    }
    Ok(())
}

async fn syncs(disk: PathBuf, length: Duration) -> anyhow::Result<f64> {
    tokio::task::spawn_blocking(move || disk::syncs_per_second(&disk, length)).await?
}

/// A new call that takes batches.
async fn batches(owner: &mut Client, function_id: String) -> anyhow::Result<Load> {
    let call = pb::FunctionMapRequest {
        function_id: function_id.clone(),
        function_call_type: pb::FunctionCallType::Map.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        ..Default::default()
    };
    Ok(Load::Batches {
        function_id,
        call_id: owner.function_map(call).await?.into_inner().function_call_id,
        next: Arc::default(),
    })
}

/// The callers take the loads in turn.
async fn run(clients: &[Client], loads: &[Load], length: Duration) -> anyhow::Result<Rate> {
    let begun = Instant::now();
    let mut callers = JoinSet::new();
    for (client, load) in clients.iter().zip(loads.iter().cycle()) {
        callers.spawn(call_until(client.clone(), load.clone(), begun + length));
    }
    let mut latencies: Vec<Duration> = Vec::new();
    let mut inputs = 0;
    while let Some(done) = callers.join_next().await {
        let (sent, of_one) = done.context("a caller panicked")??;
        inputs += sent;
        latencies.extend(of_one);
    }
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort();
    let milliseconds = |latency: Option<&Duration>| latency.map_or(0.0, |latency| latency.as_secs_f64() * 1e3);
    Ok(Rate {
        inputs_per_second: f64::from(inputs) / seconds,
        median_ms: milliseconds(latencies.get(latencies.len() / 2)),
        worst_ms: milliseconds(latencies.last()),
    })
}

/// One caller: a request, its acknowledgement, the next one.
async fn call_until(mut client: Client, load: Load, end: Instant) -> anyhow::Result<(i32, Vec<Duration>)> {
    let arguments = Bytes::from(vec![0x80; ARGUMENT_BYTES]);
    let mut latencies = Vec::new();
    let mut inputs = 0;
    while Instant::now() < end {
        let begun = Instant::now();
        inputs += match &load {
            Load::Single { function_id } => {
                let call = pb::FunctionMapRequest {
                    function_id: function_id.clone(),
                    function_call_type: pb::FunctionCallType::Unary.into(),
                    function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
                    pipelined_inputs: items(0, 1, &arguments),
                    ..Default::default()
                };
                client.function_map(call).await?.into_inner().pipelined_inputs.len() as i32
            }
            Load::Batches {
                function_id,
                call_id,
                next,
            } => {
                let put = pb::FunctionPutInputsRequest {
                    function_id: function_id.clone(),
                    function_call_id: call_id.clone(),
                    inputs: items(next.fetch_add(BATCH, Ordering::Relaxed), BATCH, &arguments),
                };
                client.function_put_inputs(put).await?.into_inner().inputs.len() as i32
            }
        };
        latencies.push(begun.elapsed());
    }
    Ok((inputs, latencies))
}
