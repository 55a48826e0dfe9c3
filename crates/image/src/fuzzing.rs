//! Doors for the fuzzers (`fuzz/`) to what this crate reads from strangers and keeps to itself otherwise. Nothing
//! but the fuzzers calls them, and they decide nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use ionian_domain::image::ImageConfig;
use url::Url;

use crate::base::IndexFile;
use crate::context::{ContextEntry, ContextTree};
use crate::dockerfile::DockerfileError;
use crate::plan::{BuildPlan, PlanInputs, outline};
use crate::rooted::Rooted;
use crate::trust::HostTrust;
use crate::{base, client_bundle, extract, inspect, output};

/// The limits of unpacking, small enough to be reached.
pub const MAX_UNPACKED_BYTES: u64 = 4 << 20;
pub const MAX_ENTRIES: u64 = 2_000;

const LIMITS: base::UnpackLimits = base::UnpackLimits {
    bytes: MAX_UNPACKED_BYTES,
    entries: MAX_ENTRIES,
};

/// Parses and plans a Dockerfile, as a build does before it runs the first step.
pub fn plan(
    text: &str,
    build_args: &BTreeMap<String, String>,
    context: &[ContextEntry],
    secret_names: &[String],
) -> Result<BuildPlan, DockerfileError> {
    let context = ContextTree::new(context).map_err(|problem| DockerfileError::new(0, problem))?;
    let outline = outline(text, build_args)?;
    let config = ImageConfig {
        env: vec![("PATH".to_owned(), "/usr/bin".to_owned())],
        workdir: Some("/srv".to_owned()),
        ..ImageConfig::default()
    };
    let images = outline
        .images()
        .into_iter()
        .map(|image| (image.reference, config.clone()))
        .collect();
    outline.plan(&PlanInputs {
        build_args,
        context: &context,
        secret_names,
        builder_version: "2025.06",
        gpu: None,
        trust: &HostTrust::default(),
        images: &images,
    })
}

/// Unpacks a layer of a base image; says how many entries and bytes it had.
pub fn unpack_layer(
    blob: File,
    diff_id: &str,
    target: &Path,
    lowers: &[PathBuf],
) -> Result<(u64, u64), base::UnpackError> {
    base::fuzzing::unpack_layer(LIMITS, blob, diff_id, target, lowers)
}

/// Unpacks an archive that `ADD` names. `Ok(false)` for a file that is none.
pub fn unpack_added(file: &File, root: &Path, destination: &Path) -> Result<bool, String> {
    let Some(archive) = extract::detect(file).map_err(|error| error.to_string())? else {
        return Ok(false);
    };
    let root = Rooted::open(root).map_err(|error| error.to_string())?;
    extract::extract_within(LIMITS, archive, file, &root, destination, None).map_err(|error| error.to_string())?;
    Ok(true)
}

/// The environment of the image whose configuration this is.
pub fn image_config(json: &[u8]) -> Option<ImageConfig> {
    base::fuzzing::image_config(json)
}

/// The files that a page of a package index lists, in whichever form it has.
pub fn index_page(page: &[u8], base: &Url) -> Option<Vec<IndexFile>> {
    base::fuzzing::index_page(page, base)
}

/// The version that is chosen out of the files of a project, for a tag.
pub fn chosen_wheel(files: &[IndexFile], tag: &str) -> Option<String> {
    base::fuzzing::chosen_wheel(files, tag)
}

/// Takes the programs out of a wheel.
pub fn extract_wheel(wheel: File, target: &Path) -> std::io::Result<()> {
    base::fuzzing::extract_wheel(wheel, target)
}

/// What is read out of an image's own programs and files.
pub fn probes(output: &[u8]) {
    inspect::fuzz(output);
    client_bundle::fuzz(&String::from_utf8_lossy(output));
}

/// The output of a step with its secrets masked, pushed in pieces.
pub fn mask(secrets: &[&str], pieces: &[&[u8]]) -> Vec<u8> {
    let mut masker = output::Masker::new(secrets.iter().copied());
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&masker.push(piece));
    }
    out.extend_from_slice(&masker.finish());
    out
}
