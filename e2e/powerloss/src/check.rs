//! Opens what a power cut left, and looks for everything that was acknowledged.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use ionian_blobs::{BlobStore, ContentHash, ContentStore};
use ionian_domain::call::Payload;
use ionian_domain::{CallId, InputId};
use ionian_store::Store;
use sha2::{Digest as _, Sha256};

use crate::acknowledged::{Acknowledged, Line};
use crate::random::Random;

/// The newest acknowledgements of each kind are the ones that a power cut can take: these are read again, with
/// their content, and some per cent of the older ones.
const NEWEST: usize = 20;
const SAMPLE: usize = 10;

/// More than any call of the load has.
const INPUTS_OF_CALL: u32 = 1_000;

/// Larger than any blob of the load.
const BLOB_LIMIT: u64 = 1 << 20;

/// The keys without which sealed secrets and signed URLs are worth nothing.
const KEYS: [&str; 2] = ["keys/secrets.key", "keys/signing.key"];
const KEY_HEX_LENGTH: u64 = 64;

pub(crate) async fn check(directory: &Path, acknowledged: &[&Line], random: &mut Random) -> anyhow::Result<()> {
    let store = Store::open(&directory.join("ionian.db"))
        .await
        .map_err(anyhow::Error::new)?;
    let checked = check_store(&store, directory, acknowledged, random).await;
    store.close().await;
    checked
}

async fn check_store(
    store: &Store,
    directory: &Path,
    acknowledged: &[&Line],
    random: &mut Random,
) -> anyhow::Result<()> {
    let problems = store.meta().check_integrity().await?;
    ensure!(problems.is_empty(), "the database is damaged: {}", problems.join("; "));
    let (content, blobs) = ionian_blobs::open_local(&directory.join("blobs")).await?;
    check_inputs(store, acknowledged, random).await?;
    let mut seen: HashMap<&'static str, usize> = HashMap::new();
    for line in acknowledged.iter().rev() {
        let (kind, text) = (kind(&line.acknowledged), format!("{:?}", line.acknowledged));
        let count = seen.entry(kind).or_default();
        *count += 1;
        let reads = *count <= NEWEST || random.happens(SAMPLE);
        check_one(store, &content, &blobs, &line.acknowledged, reads)
            .await
            .context(text)?;
    }
    if !acknowledged.is_empty() {
        for key in KEYS {
            let length = std::fs::metadata(directory.join(key))
                .with_context(|| format!("{key} is gone"))?
                .len();
            ensure!(length == KEY_HEX_LENGTH, "{key} has {length} bytes");
        }
    }
    Ok(())
}

fn kind(acknowledged: &Acknowledged) -> &'static str {
    match acknowledged {
        Acknowledged::Inputs { .. } => "inputs",
        Acknowledged::Secret { .. } => "secret",
        Acknowledged::Deployed { .. } => "deployed",
        Acknowledged::Blob { .. } => "blob",
        Acknowledged::Content { .. } => "content",
        Acknowledged::Mount { .. } => "mount",
        Acknowledged::Token { .. } => "token",
    }
}

async fn check_one(
    store: &Store,
    content: &ContentStore,
    blobs: &BlobStore,
    acknowledged: &Acknowledged,
    reads: bool,
) -> anyhow::Result<()> {
    match acknowledged {
        // All at once, above.
        Acknowledged::Inputs { .. } => {}
        Acknowledged::Secret { secret_id } => {
            let secret = store
                .secrets()
                .find(secret_id.parse()?)
                .await?
                .context("the secret is gone")?;
            ensure!(!secret.sealed.is_empty(), "the secret has no content");
        }
        Acknowledged::Deployed { app_id, function_id } => {
            let app = store.apps().find(app_id.parse()?).await?.context("the app is gone")?;
            ensure!(app.version > 0 && app.state.accepts_work(), "the app is not deployed");
            let function = store.functions().find_published(function_id.parse()?).await?;
            ensure!(function.is_some(), "the function is not published");
        }
        Acknowledged::Blob { blob_id, sha256_hex } => {
            let id = blob_id.parse()?;
            let info = blobs.info(id).await?;
            ensure!(info.sha256.to_string() == *sha256_hex, "the blob has another checksum");
            if reads {
                let bytes = blobs.read_all(id, BLOB_LIMIT).await?;
                ensure!(
                    hex::encode(Sha256::digest(&bytes)) == *sha256_hex,
                    "the blob has other content"
                );
            }
        }
        Acknowledged::Content { sha256_hex } => {
            let hash: ContentHash = sha256_hex.parse()?;
            ensure!(content.contains(hash).await?, "the content is gone");
            if reads {
                let bytes = content.read(hash, BLOB_LIMIT).await?;
                ensure!(
                    hex::encode(Sha256::digest(&bytes)) == *sha256_hex,
                    "it is not what its name says"
                );
            }
        }
        Acknowledged::Mount { mount_id } => {
            let mount = store
                .mounts()
                .find(mount_id.parse()?)
                .await?
                .context("the mount is gone")?;
            ensure!(!mount.files.is_empty(), "the mount has no files");
        }
        Acknowledged::Token { token_id } => {
            let token = store.tokens().find(token_id.parse()?).await?;
            ensure!(token.is_some(), "the token is gone");
        }
    }
    Ok(())
}

/// Calls, their inputs and their arguments. What recovery starts from must agree with itself, too.
async fn check_inputs(store: &Store, acknowledged: &[&Line], random: &mut Random) -> anyhow::Result<()> {
    let pending = store.calls().load_pending().await?;
    let mut unfinished: HashMap<CallId, u32> = HashMap::new();
    for input in &pending.inputs {
        *unfinished.entry(input.call_id).or_default() += 1;
    }
    for call in &pending.calls {
        let (id, found) = (call.call.id, unfinished.remove(&call.call.id).unwrap_or_default());
        let expected = call.input_count - call.finished_count;
        ensure!(
            found == expected,
            "call {id} has {found} of {expected} unfinished inputs"
        );
    }
    ensure!(
        unfinished.is_empty(),
        "inputs wait whose call is gone or finished: {unfinished:?}"
    );

    let mut arguments_of: HashMap<InputId, &str> = HashMap::new();
    let mut count = 0;
    for line in acknowledged.iter().rev() {
        let Acknowledged::Inputs {
            call_id,
            input_ids,
            arguments,
        } = &line.acknowledged
        else {
            continue;
        };
        count += 1;
        if count > NEWEST && !random.happens(SAMPLE) {
            continue;
        }
        let found = store.calls().inputs(call_id.parse()?, 0, INPUTS_OF_CALL).await?;
        let found: HashSet<String> = found.iter().map(|input| input.id.to_string()).collect();
        for id in input_ids {
            ensure!(found.contains(id), "input {id} of call {call_id} is gone");
            arguments_of.insert(id.parse()?, arguments);
        }
    }
    let ids: Vec<InputId> = arguments_of.keys().copied().collect();
    let payloads = store.calls().input_payloads(&ids).await?;
    for (id, arguments) in arguments_of {
        let payload = payloads.get(&id).map(|payload| &payload.payload);
        match payload {
            None => bail!("the arguments of input {id} are gone"),
            Some(Payload::Inline(bytes)) => ensure!(hex::encode(bytes) == arguments, "input {id} has other arguments"),
            Some(Payload::Blob(blob)) => ensure!(blob == arguments, "input {id} has another blob"),
        }
    }
    Ok(())
}
