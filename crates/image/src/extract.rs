//! Unpacks the tar archives that `ADD` names into the merged view of a step.
//!
//! An archive is a stranger's: `..`, device nodes and bombs are refused, and its links are resolved
//! inside the image like all others (see [`crate::rooted`]).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Timespec, Timestamps};
use tar::EntryType;

use crate::base::{MAX_HEADER_RECORD_BYTES, UNPACK_LIMITS, UnpackLimits};
use crate::rooted::{Attributes, Rooted};

/// A tar archive begins with a header of this size.
const TAR_BLOCK: usize = 512;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ExtractError {
    #[error("{0}")]
    Refused(String),
    #[error("failed to unpack an archive")]
    Io(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Archive {
    Tar,
    Gzip,
    Zstd,
}

/// Whether a file is an archive that `ADD` unpacks. The file is left at its start.
pub(crate) fn detect(mut file: &File) -> Result<Option<Archive>, ExtractError> {
    let mut start = Vec::new();
    file.take(TAR_BLOCK as u64).read_to_end(&mut start)?;
    file.rewind()?;
    let compression = match start.as_slice() {
        [0x1f, 0x8b, ..] => Archive::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Archive::Zstd,
        [b'B', b'Z', b'h', b'1'..=b'9', ..] | [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let why = "bzip2 and xz are not supported by ADD: COPY it and unpack it with RUN, or use gzip or zstd";
            return Err(ExtractError::Refused(why.to_owned()));
        }
        _ => return Ok(is_tar(&start).then_some(Archive::Tar)),
    };
    let mut inside = Vec::new();
    // A compressed file that is no archive is copied as it is, also where it is damaged.
    let readable = reader(compression, file)?
        .take(TAR_BLOCK as u64)
        .read_to_end(&mut inside)
        .is_ok();
    file.rewind()?;
    Ok((readable && is_tar(&inside)).then_some(compression))
}

/// By the checksum of the first header, which every kind of tar has.
fn is_tar(start: &[u8]) -> bool {
    let Some(block) = start.get(..TAR_BLOCK) else {
        return false;
    };
    let mut header = tar::Header::new_old();
    header.as_mut_bytes().copy_from_slice(block);
    let unsigned: u32 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
        .sum();
    block[0] != 0 && header.cksum().is_ok_and(|wanted| wanted == unsigned)
}

fn reader<'a>(archive: Archive, file: &'a File) -> io::Result<Box<dyn Read + 'a>> {
    let buffered = BufReader::new(file);
    Ok(match archive {
        Archive::Tar => Box::new(buffered),
        Archive::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Archive::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?),
    })
}

pub(crate) fn extract(
    archive: Archive,
    file: &File,
    root: &Rooted,
    destination: &Path,
    owner: Option<(u32, u32)>,
) -> Result<(), ExtractError> {
    extract_within(UNPACK_LIMITS, archive, file, root, destination, owner)
}

pub(crate) fn extract_within(
    limits: UnpackLimits,
    archive: Archive,
    file: &File,
    root: &Rooted,
    destination: &Path,
    owner: Option<(u32, u32)>,
) -> Result<(), ExtractError> {
    let UnpackLimits {
        bytes: max_bytes,
        entries: max_entries,
    } = limits;
    check_records(archive, file, max_bytes)?;
    let limited = reader(archive, file)?.take(max_bytes);
    let mut entries = tar::Archive::new(limited);
    let (dir_uid, dir_gid) = owner.unwrap_or((0, 0));
    put(root.ensure_dir(destination, &Attributes::new(0o755, dir_uid, dir_gid)))?;
    let mut count = 0;
    let mut bytes = 0_u64;
    for entry in entries.entries()? {
        let mut entry = entry?;
        count += 1;
        // A sparse file may claim any size without holding it in the archive.
        bytes = bytes.saturating_add(entry.size());
        if count > max_entries || bytes > max_bytes {
            return Err(ExtractError::Refused(format!(
                "it has more than {max_entries} entries or {max_bytes} bytes"
            )));
        }
        let name = relative(&entry.path_bytes())?;
        let target = destination.join(&name);
        let header = entry.header();
        let (uid, gid) = match owner {
            Some(owner) => owner,
            None => (
                u32::try_from(header.uid()?).unwrap_or(0),
                u32::try_from(header.gid()?).unwrap_or(0),
            ),
        };
        let mut attributes = Attributes::new(header.mode()? & 0o7777, uid, gid);
        let modified = Timespec {
            tv_sec: i64::try_from(header.mtime()?).unwrap_or(0),
            tv_nsec: 0,
        };
        attributes.times = Some(Timestamps {
            last_access: modified,
            last_modification: modified,
        });
        match header.entry_type() {
            EntryType::Directory => put(root.ensure_dir(&target, &attributes))?,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                put(root.write_file(&target, &mut entry, &attributes))?;
            }
            EntryType::Symlink => {
                let link = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused(&name, "is a link to nothing"))?;
                put(root.write_link(&target, std::ffi::OsStr::from_bytes(&link), &attributes))?;
            }
            EntryType::Link => {
                let link = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused(&name, "is a link to nothing"))?;
                put(root.write_hard_link(&target, &destination.join(relative(&link)?), &attributes))?;
            }
            EntryType::Fifo => put(root.write_fifo(&target, &attributes))?,
            EntryType::Char | EntryType::Block => return Err(refused(&name, "is a device node")),
            EntryType::XGlobalHeader => {}
            _ => return Err(refused(&name, "is of a kind that is not supported")),
        }
    }
    Ok(())
}

/// Refuses header records (long names, extended headers) that the library would read into memory whole. It knows no
/// limit for them, and a compressed gigabyte is a small file; so they are looked at before it does.
fn check_records(archive: Archive, mut file: &File, max_bytes: u64) -> Result<(), ExtractError> {
    let mut entries = tar::Archive::new(reader(archive, file)?.take(max_bytes));
    for entry in entries.entries()?.raw(true) {
        let entry = entry?;
        let is_record = matches!(
            entry.header().entry_type(),
            EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink
        );
        if is_record && entry.size() > MAX_HEADER_RECORD_BYTES {
            return Err(ExtractError::Refused(format!(
                "it has a header record of more than {MAX_HEADER_RECORD_BYTES} bytes"
            )));
        }
    }
    file.rewind()?;
    Ok(())
}

fn put<T>(result: io::Result<T>) -> Result<(), ExtractError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error().is_none() && error.kind() == io::ErrorKind::Other => {
            Err(ExtractError::Refused(error.to_string()))
        }
        Err(error) => Err(error.into()),
    }
}

fn relative(name: &[u8]) -> Result<PathBuf, ExtractError> {
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(refused(path, "leaves its directory by '..'"));
    }
    Ok(path
        .components()
        .filter(|component| matches!(component, Component::Normal(_)))
        .collect())
}

fn refused(path: &Path, why: &str) -> ExtractError {
    ExtractError::Refused(format!("its entry '{}' {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            // Written by hand, because the library refuses the very names that are tested here.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_uid(u64::from(rustix::process::getuid().as_raw()));
            header.set_gid(u64::from(rustix::process::getgid().as_raw()));
            header.set_mtime(1_000_000_000);
            let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
            if is_link {
                header.as_gnu_mut().unwrap().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            let content = if is_link { "" } else { content };
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpack(bytes: &[u8]) -> (tempfile::TempDir, Result<(), ExtractError>) {
        let dir = tempfile::tempdir().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let root = Rooted::open(&dir.path().join("root")).unwrap();
        let archive = detect(&file).unwrap().expect("it is an archive");
        let result = extract(archive, &file, &root, Path::new("/to"), None);
        (dir, result)
    }

    #[test]
    fn plain_and_compressed_archives_are_unpacked() {
        let plain = archive(&[
            ("d/", EntryType::Directory, ""),
            ("d/f", EntryType::Regular, "content"),
            ("l", EntryType::Symlink, "/etc/passwd"),
            ("h", EntryType::Link, "d/f"),
        ]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        for bytes in [
            plain.clone(),
            gzip.finish().unwrap(),
            zstd::encode_all(plain.as_slice(), 1).unwrap(),
        ] {
            let (dir, result) = unpack(&bytes);
            result.unwrap();
            let to = dir.path().join("root/to");
            assert_eq!(std::fs::read(to.join("h")).unwrap(), b"content");
            assert_eq!(std::fs::read_link(to.join("l")).unwrap(), Path::new("/etc/passwd"));
        }
    }

    #[test]
    fn archives_that_reach_out_are_refused() {
        for (name, kind, content, why) in [
            ("../x", EntryType::Regular, "x", "leaves its directory"),
            ("h", EntryType::Link, "../../etc/passwd", "leaves its directory"),
            ("dev", EntryType::Char, "", "device node"),
            ("dev", EntryType::Block, "", "device node"),
        ] {
            let (_dir, result) = unpack(&archive(&[("ok", EntryType::Regular, ""), (name, kind, content)]));
            let error = result.unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
    }

    #[test]
    fn a_link_in_the_archive_leads_nowhere_outside() {
        let outside = tempfile::tempdir().unwrap();
        let link = outside.path().to_str().unwrap();
        let (dir, result) = unpack(&archive(&[
            ("l", EntryType::Symlink, link),
            ("l/x", EntryType::Regular, "x"),
        ]));
        assert!(result.is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        drop(dir);
    }

    #[test]
    fn a_name_of_gigabytes_is_refused_before_it_is_read() {
        let mut bytes = archive(&[("ok", EntryType::Regular, "")]);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNULongName);
        header.set_size(MAX_HEADER_RECORD_BYTES + 1);
        header.set_cksum();
        // In front of the two empty blocks that end an archive.
        bytes.truncate(TAR_BLOCK);
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + 4 * TAR_BLOCK, b'a');
        let (_dir, result) = unpack(&bytes);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("header record"), "{error}");
    }

    #[test]
    fn other_files_are_no_archives_and_odd_compression_is_refused() {
        let file = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file.rewind().unwrap();
            file
        };
        assert_eq!(detect(&file(b"text")).unwrap(), None);
        assert_eq!(detect(&file(&[0; 1024])).unwrap(), None);
        assert_eq!(detect(&file(&[0x1f, 0x8b, 1, 2, 3])).unwrap(), None);
        assert!(
            detect(&file(b"BZh9xxxxxxx"))
                .unwrap_err()
                .to_string()
                .contains("unpack it with RUN")
        );
    }
}
