//! The part of [`crate::fuzzing`] that concerns base images.

use std::fs::File;
use std::path::{Path, PathBuf};

use ionian_domain::image::ImageConfig;
use url::Url;

use super::{IndexFile, UnpackError, UnpackLimits, archive, oci, package_index, uv};

pub(crate) fn unpack_layer(
    limits: UnpackLimits,
    blob: File,
    diff_id: &str,
    target: &Path,
    lowers: &[PathBuf],
) -> Result<(u64, u64), UnpackError> {
    let unpacked = archive::unpack_layer_within(limits, blob, diff_id, target, lowers)?;
    Ok((unpacked.entries, unpacked.bytes))
}

pub(crate) fn image_config(json: &[u8]) -> Option<ImageConfig> {
    oci::fuzz_config(json)
}

pub(crate) fn index_page(page: &[u8], base: &Url) -> Option<Vec<IndexFile>> {
    package_index::parse_page(page, base).ok()
}

pub(crate) fn chosen_wheel(files: &[IndexFile], tag: &str) -> Option<String> {
    uv::fuzz_choice(files, tag)
}

pub(crate) fn extract_wheel(wheel: File, target: &Path) -> std::io::Result<()> {
    uv::extract_programs(wheel, target)
}
