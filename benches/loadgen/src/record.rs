//! Writes everything that a server acknowledges as durable, and records each acknowledgement.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use ionian_proto::client as pb;
use md5::{Digest as _, Md5};
use serde::Serialize;
use sha2::Sha256;
use tokio::task::JoinSet;

use crate::Server;
use crate::client::{self, Client, items};

/// Inputs in the batches of a map: more than one row, less than the bench's.
const BATCH: i32 = 7;

/// A blob of several pages of a file system, so that a torn write can be seen.
const BLOB_BYTES: usize = 40_000;

/// One acknowledged thing. `e2e/powerloss` reads these.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Acknowledged {
    Inputs {
        call_id: String,
        input_ids: Vec<String>,
        arguments: String,
    },
    Secret {
        secret_id: String,
    },
    Deployed {
        app_id: String,
        function_id: String,
    },
    Blob {
        blob_id: String,
        sha256_hex: String,
    },
    Content {
        sha256_hex: String,
    },
    Mount {
        mount_id: String,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    /// Of the clock that does not jump and that all processes share, after the acknowledgement came.
    monotonic_ns: u64,
    #[serde(flatten)]
    acknowledged: &'a Acknowledged,
}

#[derive(Clone)]
struct Record(Arc<Mutex<File>>);

impl Record {
    fn note(&self, acknowledged: &Acknowledged) -> anyhow::Result<()> {
        let line = Line {
            monotonic_ns: monotonic_ns()?,
            acknowledged,
        };
        let mut text = serde_json::to_string(&line)?;
        text.push('\n');
        let mut file = self.0.lock().map_err(|_| anyhow::anyhow!("another caller panicked"))?;
        file.write_all(text.as_bytes())
            .context("cannot record an acknowledgement")
    }
}

pub(crate) async fn run(server: &Server, path: &Path, callers: usize, length: Duration) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let record = Record(Arc::new(Mutex::new(file)));
    let end = Instant::now() + length;
    let mut tasks = JoinSet::new();
    for number in 0..callers {
        let client = client::connect(server).await?;
        tasks.spawn(act_until(client, number, record.clone(), end));
    }
    while let Some(done) = tasks.join_next().await {
        done.context("a caller panicked")??;
    }
    Ok(())
}

async fn act_until(mut client: Client, caller: usize, record: Record, end: Instant) -> anyhow::Result<()> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let mut round = 0_u32;
    let mut function_id = String::new();
    while Instant::now() < end {
        // Rarely: a new version of the app, as people deploy.
        if round.is_multiple_of(8) {
            let app = Box::pin(client::deploy(&mut client, &format!("app-{caller}-{}", round / 16))).await?;
            function_id.clone_from(&app.function_id);
            record.note(&Acknowledged::Deployed {
                app_id: app.app_id,
                function_id: app.function_id,
            })?;
        }
        spawn(&mut client, &function_id, &record).await?;
        map(&mut client, &function_id, &record).await?;
        match round % 4 {
            0 => secret(&mut client, &format!("secret-{caller}-{round}"), &record).await?,
            1 => {
                let (blob_id, _) = blob(&mut client, &http, &record).await?;
                spawn_blob(&mut client, &function_id, blob_id, &record).await?;
            }
            2 => content(&mut client, &http, &record).await?,
            _ => {}
        }
        round += 1;
    }
    Ok(())
}

async fn spawn(client: &mut Client, function_id: &str, record: &Record) -> anyhow::Result<()> {
    let arguments = random_bytes(100);
    start(
        client,
        function_id,
        items(0, 1, &arguments),
        hex::encode(&arguments),
        record,
    )
    .await
}

/// A call whose argument is too long for a message.
async fn spawn_blob(client: &mut Client, function_id: &str, blob_id: String, record: &Record) -> anyhow::Result<()> {
    let mut inputs = items(0, 1, &Bytes::new());
    let input = inputs
        .first_mut()
        .and_then(|item| item.input.as_mut())
        .context("one input")?;
    input.args_oneof = Some(pb::function_input::ArgsOneof::ArgsBlobId(blob_id.clone()));
    start(client, function_id, inputs, blob_id, record).await
}

async fn start(
    client: &mut Client,
    function_id: &str,
    inputs: Vec<pb::FunctionPutInputsItem>,
    arguments: String,
    record: &Record,
) -> anyhow::Result<()> {
    let call = pb::FunctionMapRequest {
        function_id: function_id.to_owned(),
        function_call_type: pb::FunctionCallType::Unary.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        pipelined_inputs: inputs,
        ..Default::default()
    };
    let started = client.function_map(call).await?.into_inner();
    record.note(&Acknowledged::Inputs {
        call_id: started.function_call_id,
        input_ids: started
            .pipelined_inputs
            .into_iter()
            .map(|input| input.input_id)
            .collect(),
        arguments,
    })
}

async fn map(client: &mut Client, function_id: &str, record: &Record) -> anyhow::Result<()> {
    let call = pb::FunctionMapRequest {
        function_id: function_id.to_owned(),
        function_call_type: pb::FunctionCallType::Map.into(),
        function_call_invocation_type: pb::FunctionCallInvocationType::Async.into(),
        ..Default::default()
    };
    let call_id = client.function_map(call).await?.into_inner().function_call_id;
    for batch in 0..2 {
        let arguments = random_bytes(600);
        let put = pb::FunctionPutInputsRequest {
            function_id: function_id.to_owned(),
            function_call_id: call_id.clone(),
            inputs: items(batch * BATCH, BATCH, &arguments),
        };
        let inputs = client.function_put_inputs(put).await?.into_inner().inputs;
        record.note(&Acknowledged::Inputs {
            call_id: call_id.clone(),
            input_ids: inputs.into_iter().map(|input| input.input_id).collect(),
            arguments: hex::encode(&arguments),
        })?;
    }
    Ok(())
}

async fn secret(client: &mut Client, name: &str, record: &Record) -> anyhow::Result<()> {
    let created = client
        .secret_get_or_create(pb::SecretGetOrCreateRequest {
            deployment_name: name.to_owned(),
            object_creation_type: pb::ObjectCreationType::CreateIfMissing.into(),
            env_dict: [("KEY".to_owned(), hex::encode(random_bytes(16)))].into(),
            ..Default::default()
        })
        .await?;
    record.note(&Acknowledged::Secret {
        secret_id: created.into_inner().secret_id,
    })
}

/// Uploads a blob by the URL that the server gives.
async fn blob(client: &mut Client, http: &reqwest::Client, record: &Record) -> anyhow::Result<(String, String)> {
    let body = random_bytes(BLOB_BYTES);
    let sha256 = Sha256::digest(&body);
    let created = client
        .blob_create(pb::BlobCreateRequest {
            content_md5: STANDARD.encode(Md5::digest(&body)),
            content_sha256_base64: STANDARD.encode(sha256),
            content_length: body.len() as i64,
        })
        .await?
        .into_inner();
    let Some(pb::blob_create_response::UploadTypeOneof::UploadUrl(url)) = created.upload_type_oneof else {
        anyhow::bail!("a small blob was given no single URL");
    };
    let answer = http
        .put(&url)
        .header("content-type", "application/octet-stream")
        .header("content-md5", STANDARD.encode(Md5::digest(&body)))
        .body(body)
        .send()
        .await?;
    ensure!(
        answer.status().is_success(),
        "an upload was answered with {}",
        answer.status()
    );
    let sha256_hex = hex::encode(sha256);
    record.note(&Acknowledged::Blob {
        blob_id: created.blob_id.clone(),
        sha256_hex: sha256_hex.clone(),
    })?;
    Ok((created.blob_id, sha256_hex))
}

/// Files of a mount: one inline, one by way of a blob; then the mount that names both.
async fn content(client: &mut Client, http: &reqwest::Client, record: &Record) -> anyhow::Result<()> {
    let inline = random_bytes(5_000);
    let inline_hex = hex::encode(Sha256::digest(&inline));
    put_file(
        client,
        &inline_hex,
        pb::mount_put_file_request::DataOneof::Data(inline),
        record,
    )
    .await?;
    let (blob_id, blob_hex) = blob(client, http, record).await?;
    put_file(
        client,
        &blob_hex,
        pb::mount_put_file_request::DataOneof::DataBlobId(blob_id),
        record,
    )
    .await?;
    let file = |filename: &str, sha256_hex: String| pb::MountFile {
        filename: filename.to_owned(),
        sha256_hex,
        ..Default::default()
    };
    let mount_id = client
        .mount_get_or_create(pb::MountGetOrCreateRequest {
            object_creation_type: pb::ObjectCreationType::AnonymousOwnedByApp.into(),
            files: vec![file("/root/a.py", inline_hex), file("/root/b.py", blob_hex)],
            ..Default::default()
        })
        .await?
        .into_inner()
        .mount_id;
    record.note(&Acknowledged::Mount { mount_id })
}

async fn put_file(
    client: &mut Client,
    sha256_hex: &str,
    data: pb::mount_put_file_request::DataOneof,
    record: &Record,
) -> anyhow::Result<()> {
    client
        .mount_put_file(pb::MountPutFileRequest {
            sha256_hex: sha256_hex.to_owned(),
            data_oneof: Some(data),
        })
        .await?;
    record.note(&Acknowledged::Content {
        sha256_hex: sha256_hex.to_owned(),
    })
}

/// The clock itself: `Instant` does not tell its number, and another program compares it.
fn monotonic_ns() -> anyhow::Result<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[expect(unsafe_code, reason = "the standard library does not tell the number of this clock")]
    // SAFETY: the pointer is to a whole timespec of ours, which the call fills in.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) } != 0;
    ensure!(
        !failed,
        "cannot read the monotonic clock: {}",
        std::io::Error::last_os_error()
    );
    Ok(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

fn random_bytes(count: usize) -> Bytes {
    (0..count).map(|_| rand::random::<u8>()).collect()
}
