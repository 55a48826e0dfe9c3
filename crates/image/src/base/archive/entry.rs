//! One entry of an archive: its header, and the extended headers in front of it.
//!
//! Everything here is read from a stranger's archive; what comes out has bounded size and a path without
//! `..`. Where the path leads is for the [`super::unpacker`] to find out.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;
use tar::EntryType;

use super::UnpackError;

/// Long names and extended headers are read into memory; the kernel takes no path above 4 KiB and no
/// attribute above 64 KiB, so this leaves room for a dozen attributes.
pub(crate) const MAX_HEADER_RECORD_BYTES: u64 = 1 << 20;

fn read_record(entry: &mut impl Read) -> Result<Vec<u8>, UnpackError> {
    let mut record = Vec::new();
    entry
        .take(MAX_HEADER_RECORD_BYTES + 1)
        .read_to_end(&mut record)
        .map_err(UnpackError::Read)?;
    if record.len() as u64 > MAX_HEADER_RECORD_BYTES {
        return Err(too_large());
    }
    Ok(record)
}

fn too_large() -> UnpackError {
    UnpackError::TooLarge {
        limit: MAX_HEADER_RECORD_BYTES,
        what: "bytes in a header record",
    }
}

pub(super) fn read_long_name(entry: &mut impl Read) -> Result<Vec<u8>, UnpackError> {
    let mut name = read_record(entry)?;
    while name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

/// What extended headers say of the entry that follows them.
#[derive(Debug, Default)]
pub(super) struct ExtraHeaders {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    uid: Option<u64>,
    gid: Option<u64>,
    size: Option<u64>,
    mtime_secs: Option<i64>,
    xattrs: Vec<(String, Vec<u8>)>,
    /// Of all extended headers in front of one entry: attributes of each are kept.
    bytes: u64,
}

impl ExtraHeaders {
    pub(super) fn read_pax(&mut self, entry: &mut impl Read) -> Result<(), UnpackError> {
        let record = read_record(entry)?;
        self.bytes += record.len() as u64;
        if self.bytes > MAX_HEADER_RECORD_BYTES {
            return Err(too_large());
        }
        for item in tar::PaxExtensions::new(&record) {
            let item = item.map_err(UnpackError::Read)?;
            let Ok(key) = item.key() else { continue };
            let value = item.value_bytes();
            let number = || item.value().ok().and_then(|text| text.parse::<u64>().ok());
            match key {
                "path" => self.path = Some(value.to_vec()),
                "linkpath" => self.link = Some(value.to_vec()),
                "uid" => self.uid = number(),
                "gid" => self.gid = number(),
                "size" => self.size = number(),
                "mtime" => {
                    // Seconds with a fraction, which no image depends on.
                    self.mtime_secs = item.value().ok().and_then(|text| text.split('.').next()?.parse().ok());
                }
                key => {
                    if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                        self.xattrs.push((name.to_owned(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// One entry, its extended headers applied.
#[derive(Debug)]
pub(super) struct EntryInfo {
    pub(super) shown: String,
    pub(super) kind: EntryType,
    pub(super) path: PathBuf,
    pub(super) link: Option<Vec<u8>>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime_secs: i64,
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(String, Vec<u8>)>,
}

impl EntryInfo {
    pub(super) fn new(header: &tar::Header, extra: ExtraHeaders) -> Result<Self, UnpackError> {
        let raw_path = extra.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = shown(&raw_path);
        let refused = |why| UnpackError::Refused {
            entry: shown.clone(),
            why,
        };
        let size = header.size().map_err(UnpackError::Read)?;
        if extra.size.is_some_and(|larger| larger != size) {
            return Err(refused("files above 8 GiB are not supported"));
        }
        let id = |from_extra: Option<u64>, from_header: io::Result<u64>| {
            let id = match from_extra {
                Some(id) => id,
                None => from_header.map_err(UnpackError::Read)?,
            };
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| refused("its owner is out of range"))
        };
        // Other entries may have anything in these fields.
        let is_device = matches!(header.entry_type(), EntryType::Char | EntryType::Block);
        let number = |field: io::Result<Option<u32>>| field.map_err(UnpackError::Read).map(Option::unwrap_or_default);
        let device = if is_device {
            (number(header.device_major())?, number(header.device_minor())?)
        } else {
            (0, 0)
        };
        Ok(Self {
            kind: header.entry_type(),
            path: relative(&raw_path).map_err(refused)?,
            link: extra
                .link
                .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned)),
            mode: header.mode().map_err(UnpackError::Read)? & 0o7777,
            uid: id(extra.uid, header.uid())?,
            gid: id(extra.gid, header.gid())?,
            size,
            mtime_secs: match extra.mtime_secs {
                Some(secs) => secs,
                None => i64::try_from(header.mtime().map_err(UnpackError::Read)?).unwrap_or(0),
            },
            device,
            xattrs: extra.xattrs,
            shown,
        })
    }

    pub(super) fn refused(&self, why: &'static str) -> UnpackError {
        UnpackError::Refused {
            entry: self.shown.clone(),
            why,
        }
    }

    pub(super) fn io(&self, action: &'static str) -> impl FnOnce(Errno) -> UnpackError {
        let entry = self.shown.clone();
        move |source| UnpackError::Io {
            action,
            entry,
            source: source.into(),
        }
    }
}

fn shown(path: &[u8]) -> String {
    let mut text = String::from_utf8_lossy(path).into_owned();
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// The path below the root of the image; `/a`, `./a` and `a` are the same.
pub(super) fn relative(path: &[u8]) -> Result<PathBuf, &'static str> {
    if path.contains(&0) {
        return Err("its name has a zero byte");
    }
    let mut clean = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => return Err("its name leaves the image with '..'"),
            Component::Prefix(_) => return Err("its name has a drive"),
        }
    }
    Ok(clean)
}
