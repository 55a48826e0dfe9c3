//! What registries and image layouts have in common: manifests, configurations, and layers to install.
//!
//! A source only has to find a manifest and to hand out blobs; turning them into layers of the store
//! happens here, the same for all. Layers are keyed by their chain id (the content of the layer and of
//! everything below it), so images that share their first layers share them on disk too.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use futures_util::{StreamExt, TryStreamExt};
use ionian_domain::image::{BuiltImage, ImageConfig, ImageMetadata};
use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciImageManifest};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::archive::unpack_layer;
use super::{BaseError, layout, registry};
use crate::layers::{Begin, LayerNote, LayerStore, layer_key};
use crate::step::BuildLog;

/// Docker itself stops at 127 layers; overlayfs takes 500.
const MAX_LAYERS: usize = 256;
/// Downloads at once for one image, as Docker's default.
const PARALLEL_DOWNLOADS: usize = 3;
/// A compressed layer. CUDA images have some of 4 GiB.
const MAX_LAYER_BLOB_BYTES: i64 = 32 << 30;
/// Configurations are a few kilobytes; the largest known ones hold long histories.
pub(super) const MAX_CONFIG_BYTES: i64 = 8 << 20;

/// Part of the key of every layer that comes from an archive. Raise it when unpacking changes.
const UNPACK_VERSION: &str = "oci-layer-1";

/// A manifest for this machine, and where its blobs are.
pub(super) struct FoundImage {
    /// How the build log calls where it was found.
    pub(super) origin: String,
    pub(super) manifest: OciImageManifest,
    pub(super) config_json: Vec<u8>,
    pub(super) blobs: Blobs,
}

/// Where the blobs of an image are.
pub(super) enum Blobs {
    Registry(registry::RegistryBlobs),
    Layout(layout::Layout),
}

impl Blobs {
    /// A blob as a file without a name, its digest verified.
    async fn fetch(&self, descriptor: &OciDescriptor) -> Result<File, BaseError> {
        match self {
            Self::Registry(registry) => registry.download(descriptor).await,
            Self::Layout(layout) => layout.open_verified(descriptor).await,
        }
    }
}

/// The parts of an OCI image configuration that are used here. Both OCI and Docker write it so.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    shell: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// The name that OCI uses for this machine's processor.
pub(super) fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The entry of a multi-platform index for this machine.
pub(super) fn select_platform(entries: &[ImageIndexEntry]) -> Option<&ImageIndexEntry> {
    let matches = |entry: &&ImageIndexEntry| {
        entry.platform.as_ref().is_some_and(|platform| {
            platform.os.to_string() == "linux" && platform.architecture.to_string() == host_architecture()
        })
    };
    let unnamed = |entry: &&ImageIndexEntry| entry.platform.is_none();
    // An index with one manifest and no platform is what tools write for a single image.
    entries
        .iter()
        .find(matches)
        .or_else(|| entries.iter().find(unnamed).filter(|_| entries.len() == 1))
}

/// Downloads what is missing of an image and makes its layers exist.
pub(super) async fn install(
    reference: &str,
    found: FoundImage,
    layers: &LayerStore,
    log: &BuildLog,
) -> Result<BuiltImage, BaseError> {
    let invalid = |why: String| BaseError::InvalidImage {
        reference: reference.to_owned(),
        why,
    };
    let config: ConfigFile = serde_json::from_slice(&found.config_json)
        .map_err(|error| invalid(format!("its configuration cannot be read: {error}")))?;
    if !config.os.is_empty() && config.os != "linux" {
        return Err(invalid(format!("it is for {}, not for linux", config.os)));
    }
    if !config.architecture.is_empty() && config.architecture != host_architecture() {
        let (is, host) = (&config.architecture, host_architecture());
        return Err(invalid(format!(
            "it is for {is} processors, and this machine has {host}"
        )));
    }
    let descriptors = &found.manifest.layers;
    let diff_ids = &config.rootfs.diff_ids;
    if descriptors.len() != diff_ids.len() {
        let (listed, described) = (descriptors.len(), diff_ids.len());
        return Err(invalid(format!(
            "its manifest has {listed} layers and its configuration {described}"
        )));
    }
    if descriptors.len() > MAX_LAYERS {
        return Err(invalid(format!(
            "it has {} layers; at most {MAX_LAYERS} can be stacked",
            descriptors.len()
        )));
    }
    for descriptor in descriptors {
        if !(0..=MAX_LAYER_BLOB_BYTES).contains(&descriptor.size) {
            return Err(invalid(format!(
                "layer {} has the size {}",
                descriptor.digest, descriptor.size
            )));
        }
    }
    for diff_id in diff_ids {
        if !is_sha256(diff_id) {
            return Err(invalid(format!("'{diff_id}' is not a layer digest")));
        }
    }

    let keys = chain_keys(diff_ids);
    let missing: Vec<usize> = (0..keys.len())
        .filter(|index| !layers.contains(&keys[*index]))
        .collect();
    let bytes: i64 = missing.iter().map(|index| descriptors[*index].size).sum();
    log.line(format!(
        "base image {reference} from {}: {} layers, {} to get ({:.1} MB)",
        found.origin,
        keys.len(),
        missing.len(),
        bytes as f64 / 1e6,
    ))
    .await;

    // Downloads run ahead of unpacking, which needs the layers below and so goes in order.
    let blobs = &found.blobs;
    let mut downloads = futures_util::stream::iter(missing.iter().copied())
        .map(|index| async move { blobs.fetch(&descriptors[index]).await.map(|file| (index, file)) })
        .buffered(PARALLEL_DOWNLOADS);
    let mut done = 0;
    while let Some((index, blob)) = downloads.try_next().await? {
        done += 1;
        let key = &keys[index];
        // Nothing is held while waiting for another maker of this layer but the blob just fetched.
        let draft = match layers.begin(key).await? {
            Begin::Exists => continue,
            Begin::Build(draft) => draft,
        };
        let lowers: Vec<PathBuf> = keys[..index].iter().map(|key| layers.fs_path(key)).collect();
        let (target, diff_id) = (draft.fs().to_owned(), diff_ids[index].clone());
        let unpacked = tokio::task::spawn_blocking(move || unpack_layer(blob, &diff_id, &target, &lowers))
            .await
            .map_err(|_| BaseError::TaskLost)?
            .map_err(|source| BaseError::Unpack {
                reference: reference.to_owned(),
                source,
            })?;
        let note = LayerNote {
            made_by: format!("{reference} {}", diff_ids[index]),
            parent: index.checked_sub(1).map(|below| keys[below].clone()),
        };
        draft.commit(note).await?;
        log.line(format!(
            "  layer {done}/{}: {} files, {:.1} MB",
            missing.len(),
            unpacked.entries,
            unpacked.bytes as f64 / 1e6,
        ))
        .await;
    }
    Ok(BuiltImage {
        layers: keys,
        config: run_config(config.config.unwrap_or_default()),
        metadata: ImageMetadata::default(),
    })
}

pub(super) fn is_sha256(digest: &str) -> bool {
    digest.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64
            && hex
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    })
}

/// One key per layer, each depending on all below it.
fn chain_keys(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Option<String> = None;
    diff_ids
        .iter()
        .map(|diff_id| {
            let id = match &chain {
                None => diff_id.clone(),
                Some(below) => {
                    format!("sha256:{}", hex::encode(Sha256::digest(format!("{below} {diff_id}"))))
                }
            };
            chain = Some(id.clone());
            layer_key(&[UNPACK_VERSION, id.as_str()])
        })
        .collect()
}

fn run_config(config: RunConfig) -> ImageConfig {
    let text = |value: Option<String>| value.filter(|text| !text.is_empty());
    let mut env: Vec<(String, String)> = Vec::new();
    let mut position: BTreeMap<String, usize> = BTreeMap::new();
    for pair in config.env.unwrap_or_default() {
        // An entry without `=` names a variable of the build machine; it has no value here.
        let Some((name, value)) = pair.split_once('=') else {
            continue;
        };
        match position.get(name) {
            Some(index) => value.clone_into(&mut env[*index].1),
            None => {
                position.insert(name.to_owned(), env.len());
                env.push((name.to_owned(), value.to_owned()));
            }
        }
    }
    ImageConfig {
        env,
        workdir: text(config.working_dir),
        user: text(config.user),
        entrypoint: config.entrypoint.unwrap_or_default(),
        cmd: config.cmd.unwrap_or_default(),
        shell: config.shell.unwrap_or_default(),
    }
}

/// For the fuzzers: what an image's configuration comes to.
pub(super) fn fuzz_config(json: &[u8]) -> Option<ImageConfig> {
    let config: ConfigFile = serde_json::from_slice(json).ok()?;
    let _keys = chain_keys(&config.rootfs.diff_ids);
    Some(run_config(config.config.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_with_the_same_content_on_different_bases_are_different() {
        let (a, b) = (
            format!("sha256:{}", "a".repeat(64)),
            format!("sha256:{}", "b".repeat(64)),
        );
        let one = chain_keys(&[a.clone(), b.clone()]);
        let two = chain_keys(&[b.clone(), b.clone()]);
        assert_ne!(one[1], two[1]);
        assert_eq!(one[0], chain_keys(&[a])[0]);
    }

    #[test]
    fn a_configuration_of_nulls_is_an_empty_one() {
        let json = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
            "config":{"Env":null,"Cmd":null,"User":"","WorkingDir":""}}"#;
        let config: ConfigFile = serde_json::from_str(json).unwrap();
        assert_eq!(run_config(config.config.unwrap_or_default()), ImageConfig::default());
    }

    #[test]
    fn the_last_value_of_a_variable_wins() {
        let config = RunConfig {
            env: Some(vec!["A=1".into(), "B=2=3".into(), "A=4".into()]),
            ..RunConfig::default()
        };
        let env = run_config(config).env;
        assert_eq!(env, vec![("A".into(), "4".into()), ("B".into(), "2=3".into())]);
    }

    #[test]
    fn digests_are_checked_before_they_become_paths() {
        assert!(is_sha256(&format!("sha256:{}", "0".repeat(64))));
        assert!(!is_sha256("sha256:../../etc/passwd"));
        assert!(!is_sha256(&format!("sha512:{}", "0".repeat(64))));
    }
}
