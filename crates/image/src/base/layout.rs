//! Base images from OCI image layouts on this machine's disk.
//!
//! For `python:3.11-slim`, `<dir>` being the configured directory, the first of these that exists is used:
//!
//! 1. `<dir>/python:3.11-slim/`, a layout directory, or `<dir>/python:3.11-slim.tar`, the same as an
//!    uncompressed `oci-archive`. Slashes in the name are written `_`: `<dir>/ghcr.io_astral-sh_uv:0.5`.
//! 2. `<dir>/python/` or `<dir>/python.tar`, a layout whose index has a manifest that is annotated
//!    `org.opencontainers.image.ref.name` = `3.11-slim`. This is what
//!    `skopeo copy docker://python:3.11-slim oci:<dir>/python:3.11-slim` writes.
//!
//! Names are tried as people write them (`python`) and in full (`docker.io_library_python`). The files are
//! the operator's, but every blob is verified against its digest all the same: disks and copies fail.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, ImageIndexEntry, OCI_IMAGE_INDEX_MEDIA_TYPE, OciDescriptor, OciImageIndex,
};

use super::archive::file_digest;
use super::oci::{Blobs, FoundImage, MAX_CONFIG_BYTES, is_sha256, select_platform};
use super::reference::BaseReference;
use super::{Answer, BaseError};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// An index may list an index (one per platform); deeper ones do not occur.
const MAX_INDEX_DEPTH: usize = 3;
/// Files in an archive; each layer and manifest is one.
const MAX_ARCHIVE_ENTRIES: usize = 10_000;

/// An opened layout: a directory or an archive.
#[derive(Clone)]
pub(super) struct Layout {
    path: PathBuf,
    archive: Option<Arc<Archive>>,
    scratch_dir: PathBuf,
}

/// Where the files of an archive are within it.
struct Archive {
    file: File,
    entries: HashMap<PathBuf, (u64, u64)>,
}

/// Finds an image by the rule above.
pub(super) async fn find(
    dir: &Path,
    scratch_dir: &Path,
    reference: &BaseReference,
) -> Result<Answer<FoundImage>, BaseError> {
    let (dir, scratch_dir, reference) = (dir.to_owned(), scratch_dir.to_owned(), reference.clone());
    tokio::task::spawn_blocking(move || find_blocking(&dir, &scratch_dir, &reference))
        .await
        .map_err(|_| BaseError::TaskLost)?
}

fn find_blocking(dir: &Path, scratch_dir: &Path, reference: &BaseReference) -> Result<Answer<FoundImage>, BaseError> {
    for (name, is_tagged) in candidates(reference) {
        for path in [dir.join(&name), dir.join(format!("{name}.tar"))] {
            let Some(layout) = Layout::open(&path, scratch_dir)? else {
                continue;
            };
            if let Some(entry) = layout.select(reference, is_tagged)? {
                return layout.load(&entry).map(Answer::Found);
            }
        }
    }
    Ok(Answer::Absent(format!("{} has no OCI layout of it", dir.display())))
}

/// Names to look for, and whether the name alone says which image is meant.
fn candidates(reference: &BaseReference) -> Vec<(String, bool)> {
    let suffix = match (reference.tag(), reference.digest()) {
        (_, Some(digest)) => format!("@{digest}"),
        (tag, None) => format!(":{}", tag.unwrap_or("latest")),
    };
    let mut names = vec![reference.familiar_name().replace('/', "_")];
    let full = reference.full_name().replace('/', "_");
    if !names.contains(&full) {
        names.push(full);
    }
    let tagged = names.iter().map(|name| (format!("{name}{suffix}"), true));
    let untagged = names.iter().map(|name| (name.clone(), false));
    tagged.chain(untagged).collect()
}

impl Layout {
    fn open(path: &Path, scratch_dir: &Path) -> Result<Option<Self>, BaseError> {
        let error = |source| BaseError::Layout {
            path: path.to_owned(),
            source,
        };
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(error(source)),
        };
        let archive = if metadata.is_file() {
            Some(Arc::new(Archive::open(path).map_err(error)?))
        } else {
            None
        };
        let layout = Self {
            path: path.to_owned(),
            archive,
            scratch_dir: scratch_dir.to_owned(),
        };
        // A directory that happens to have the name is not an image.
        Ok(if layout.has(Path::new("index.json")) {
            Some(layout)
        } else {
            None
        })
    }

    fn has(&self, name: &Path) -> bool {
        match &self.archive {
            Some(archive) => archive.entries.contains_key(name),
            None => self.path.join(name).is_file(),
        }
    }

    /// The manifest that a reference means, `None` where the layout does not have it.
    fn select(&self, reference: &BaseReference, is_tagged: bool) -> Result<Option<ImageIndexEntry>, BaseError> {
        let index: OciImageIndex = self.parse(&self.read_small(Path::new("index.json"))?, "index.json")?;
        let named = |entry: &&ImageIndexEntry| {
            let name = entry.annotations.as_ref().and_then(|notes| notes.get(REF_NAME));
            match (reference.digest(), reference.tag()) {
                (Some(digest), _) => entry.digest == digest,
                (None, tag) => name.is_some_and(|name| Some(name.as_str()) == tag || *name == reference.to_string()),
            }
        };
        if let Some(entry) = index.manifests.iter().find(named) {
            return Ok(Some(entry.clone()));
        }
        if !is_tagged {
            return Ok(None);
        }
        Ok(match index.manifests.as_slice() {
            [only] => Some(only.clone()),
            several => select_platform(several).cloned(),
        })
    }

    fn load(&self, entry: &ImageIndexEntry) -> Result<FoundImage, BaseError> {
        let mut entry = entry.clone();
        for _ in 0..MAX_INDEX_DEPTH {
            let descriptor = OciDescriptor {
                digest: entry.digest.clone(),
                size: entry.size,
                media_type: entry.media_type.clone(),
                ..OciDescriptor::default()
            };
            let json = self.read_blob(&descriptor)?;
            if [OCI_IMAGE_INDEX_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE].contains(&entry.media_type.as_str()) {
                let index: OciImageIndex = self.parse(&json, &entry.digest)?;
                entry = select_platform(&index.manifests)
                    .ok_or_else(|| self.invalid("it has no image for this machine's processor"))?
                    .clone();
                continue;
            }
            let manifest: oci_client::manifest::OciImageManifest = self.parse(&json, &entry.digest)?;
            let config_json = self.read_blob(&manifest.config)?;
            return Ok(FoundImage {
                origin: format!("the OCI layout {}", self.path.display()),
                manifest,
                config_json,
                blobs: Blobs::Layout(self.clone()),
            });
        }
        Err(self.invalid("its indexes point at each other"))
    }

    fn read_blob(&self, descriptor: &OciDescriptor) -> Result<Vec<u8>, BaseError> {
        if !(0..=MAX_CONFIG_BYTES).contains(&descriptor.size) {
            return Err(self.invalid("a manifest or configuration in it is too large"));
        }
        let mut file = self.open_checked(descriptor)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|source| self.error(source))?;
        Ok(bytes)
    }

    /// A blob as a file, verified.
    pub(super) async fn open_verified(&self, descriptor: &OciDescriptor) -> Result<File, BaseError> {
        let (layout, descriptor) = (self.clone(), descriptor.clone());
        tokio::task::spawn_blocking(move || layout.open_checked(&descriptor))
            .await
            .map_err(|_| BaseError::TaskLost)?
    }

    fn open_checked(&self, descriptor: &OciDescriptor) -> Result<File, BaseError> {
        // The digest becomes a path: nothing but hexadecimal digits may be in it.
        if !is_sha256(&descriptor.digest) {
            return Err(self.invalid("it names a blob by something other than a sha256 digest"));
        }
        let name = Path::new("blobs").join(descriptor.digest.replace(':', "/"));
        let mut file = self.open_file(&name, u64::try_from(descriptor.size).unwrap_or(0))?;
        let actual = file_digest(&mut file).map_err(|source| self.error(source))?;
        if actual != descriptor.digest {
            return Err(self.invalid(&format!(
                "blob {} is damaged: its content is {actual}",
                descriptor.digest
            )));
        }
        Ok(file)
    }

    fn read_small(&self, name: &Path) -> Result<Vec<u8>, BaseError> {
        let limit = MAX_CONFIG_BYTES as u64;
        let mut bytes = Vec::new();
        let file = self.open_file(name, limit)?;
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|source| self.error(source))?;
        Ok(bytes)
    }

    /// Opens a file of the layout; one in an archive is copied out, up to `limit` bytes.
    fn open_file(&self, name: &Path, limit: u64) -> Result<File, BaseError> {
        let Some(archive) = &self.archive else {
            return File::open(self.path.join(name)).map_err(|source| self.error(source));
        };
        let Some((offset, size)) = archive.entries.get(name).copied() else {
            return Err(self.invalid(&format!("{} is missing in it", name.display())));
        };
        if size > limit {
            return Err(self.invalid(&format!("{} is larger than its manifest says", name.display())));
        }
        let mut copy = tempfile::tempfile_in(&self.scratch_dir).map_err(|source| self.error(source))?;
        let mut range = Range {
            file: &archive.file,
            offset,
            left: size,
        };
        io::copy(&mut range, &mut copy)
            .and_then(|_| copy.seek(SeekFrom::Start(0)))
            .map_err(|source| self.error(source))?;
        Ok(copy)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, json: &[u8], what: &str) -> Result<T, BaseError> {
        serde_json::from_slice(json).map_err(|error| self.invalid(&format!("{what} cannot be read: {error}")))
    }

    fn error(&self, source: io::Error) -> BaseError {
        BaseError::Layout {
            path: self.path.clone(),
            source,
        }
    }

    fn invalid(&self, why: &str) -> BaseError {
        self.error(io::Error::new(io::ErrorKind::InvalidData, why.to_owned()))
    }
}

impl Archive {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut entries = HashMap::new();
        let mut tar = tar::Archive::new(file.try_clone()?);
        // Only headers are read; the library seeks over the content. Names are used as keys, not as paths.
        for entry in tar.entries_with_seek()? {
            let entry = entry?;
            if entries.len() >= MAX_ARCHIVE_ENTRIES {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the archive has too many files",
                ));
            }
            if entry.header().entry_type().is_file() {
                let name = entry
                    .path()?
                    .components()
                    .filter(|part| !matches!(part, std::path::Component::CurDir))
                    .collect();
                entries.insert(name, (entry.raw_file_position(), entry.size()));
            }
        }
        Ok(Self { file, entries })
    }
}

/// Part of a file, read without moving its position, which other readers share.
struct Range<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Range<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..want], self.offset)?;
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}
