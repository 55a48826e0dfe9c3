//! Archives of strangers, unpacked as root: layers of base images, and what `ADD` names.
//!
//! The first byte says which way, the rest is the archive. Checksums of tar headers are made right, or no mutation
//! would come further; the path [`CANARY_MARK`] becomes the path of a directory outside, of the same length. Nothing
//! outside of the target may change, and what comes out must keep to the limits.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ionian_image::fuzzing;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::scratch;

/// What stands in seeds for the directory of the canary.
const CANARY_MARK: &str = "/dev/shm/ifz.0000000000/out";
const BLOCK: usize = 512;
/// More is not decompressed to find out the digest.
const MAX_INSIDE: u64 = 32 << 20;
/// A directory that the archive made unreadable is still removed by root; this many levels are enough to look into.
const MAX_DEPTH: usize = 64;

struct Place {
    base: PathBuf,
    canary: Vec<(PathBuf, u32, u64, Vec<u8>)>,
    lower: Vec<(PathBuf, u32, u64, Vec<u8>)>,
}

pub fn run(data: &[u8]) {
    static PLACE: OnceLock<Mutex<Place>> = OnceLock::new();
    let place = PLACE.get_or_init(|| Mutex::new(Place::new())).lock();
    let Some((flags, archive)) = data.split_first() else {
        return;
    };
    let (as_added, compression) = (flags & 1 != 0, (flags >> 1) & 3);
    let archive = replaced(archive, place.base.join("out").as_os_str().as_encoded_bytes());
    let bytes = match compression {
        0 => with_checksums(archive),
        1 => gzip(&with_checksums(archive)),
        2 => zstd::encode_all(with_checksums(archive).as_slice(), 1).unwrap(),
        // As it is: a damaged stream.
        _ => archive,
    };
    let target = place.base.join("target");
    fs::create_dir(&target).unwrap();
    let mut file = tempfile::tempfile_in(&place.base).unwrap();
    file.write_all(&bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    if as_added {
        let _refused = fuzzing::unpack_added(&file, &target, Path::new("/srv"));
    } else {
        let digest = digest_inside(&bytes);
        let unpacked = fuzzing::unpack_layer(file, &digest, &target, &[place.base.join("lower")]);
        if let Ok((entries, bytes)) = unpacked {
            assert!(entries <= fuzzing::MAX_ENTRIES && bytes <= fuzzing::MAX_UNPACKED_BYTES);
        }
    }
    let size = size_of(&target, 0, &mut HashSet::new());
    // A page for each entry, which may be smaller.
    let limit = fuzzing::MAX_UNPACKED_BYTES + (fuzzing::MAX_ENTRIES + 1) * 4096;
    assert!(size <= limit, "{size} bytes were unpacked, more than {limit}");
    assert_eq!(place.canary, listing(&place.base.join("out")), "a file outside changed");
    assert_eq!(place.lower, listing(&place.base.join("lower")), "a layer below changed");
    fs::remove_dir_all(&target).unwrap();
}

impl Place {
    fn new() -> Self {
        let base = scratch::for_archives();
        let _none = fs::remove_dir_all(&base);
        for dir in ["out/dir", "lower/etc", "lower/srv/app", "lower/tmp"] {
            fs::create_dir_all(base.join(dir)).unwrap();
        }
        fs::write(base.join("out/canary"), "untouched").unwrap();
        fs::write(base.join("lower/etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        fs::write(base.join("lower/srv/app/a.py"), "pass\n").unwrap();
        fs::set_permissions(base.join("lower/tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::symlink("srv/app", base.join("lower/link")).unwrap();
        std::os::unix::fs::symlink(base.join("out"), base.join("lower/out")).unwrap();
        Self {
            canary: listing(&base.join("out")),
            lower: listing(&base.join("lower")),
            base,
        }
    }
}

/// Paths, modes, owners and contents of a small tree.
fn listing(dir: &Path) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let mut content = Vec::new();
        if metadata.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&path)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            names.sort();
            waiting.extend(names);
        } else if metadata.is_file() {
            content = fs::read(&path).unwrap();
        }
        found.push((path, metadata.mode(), u64::from(metadata.uid()), content));
    }
    found
}

/// On disk; a file with several names counts once.
fn size_of(dir: &Path, depth: usize, seen: &mut HashSet<u64>) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let mut size = 0;
    for entry in entries.filter_map(Result::ok) {
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() && depth < MAX_DEPTH {
            size += size_of(&entry.path(), depth + 1, seen);
        } else if seen.insert(metadata.ino()) {
            size += metadata.blocks() * BLOCK as u64;
        }
    }
    size
}

fn replaced(archive: &[u8], canary: &[u8]) -> Vec<u8> {
    let mark = CANARY_MARK.as_bytes();
    let mut archive = archive.to_owned();
    if canary.len() != mark.len() {
        return archive;
    }
    let mut at = 0;
    while at + mark.len() <= archive.len() {
        if &archive[at..at + mark.len()] == mark {
            archive[at..at + mark.len()].copy_from_slice(canary);
            at += mark.len();
        } else {
            at += 1;
        }
    }
    archive
}

/// Walks the headers as a reader does, and makes the checksum of each right.
fn with_checksums(mut archive: Vec<u8>) -> Vec<u8> {
    let mut at = 0;
    while at + BLOCK <= archive.len() {
        let header = &mut archive[at..at + BLOCK];
        if header.iter().all(|byte| *byte == 0) {
            at += BLOCK;
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let size = std::str::from_utf8(&header[124..136]).unwrap_or_default();
        let size = usize::from_str_radix(size.trim_matches(['\0', ' ']), 8).unwrap_or(0);
        at = at
            .saturating_add(BLOCK)
            .saturating_add(size.div_ceil(BLOCK).saturating_mul(BLOCK));
    }
    archive
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn digest_inside(bytes: &[u8]) -> String {
    let mut inside: Box<dyn Read> = match bytes {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(bytes)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => match zstd::stream::read::Decoder::new(bytes) {
            Ok(decoder) => Box::new(decoder),
            Err(_) => Box::new(bytes),
        },
        _ => Box::new(bytes),
    };
    let mut content = Vec::new();
    let _damaged = (&mut inside).take(MAX_INSIDE).read_to_end(&mut content);
    format!("sha256:{}", hex::encode(Sha256::digest(&content)))
}
