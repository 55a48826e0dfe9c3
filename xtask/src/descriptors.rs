//! `cargo xtask descriptors OUT`: the descriptors of our `.proto` files, for tests in other languages.

use std::path::Path;

use anyhow::{Context, Result};

/// Writes an encoded `google.protobuf.FileDescriptorSet`, exactly as it was compiled into `ionian-proto`.
pub(crate) fn run(out: &Path) -> Result<()> {
    std::fs::write(out, ionian_proto::FILE_DESCRIPTOR_SET)
        .with_context(|| format!("failed to write descriptors to {}", out.display()))
}
