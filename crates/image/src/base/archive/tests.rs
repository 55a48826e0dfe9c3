//! Layers as tools write them, and archives as attackers do. Ownership and whiteouts need root.

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::entry::MAX_HEADER_RECORD_BYTES;
use super::unpacker::OPAQUE_XATTR;
use super::*;

/// Builds archives, hostile ones included: names are written into headers unchecked.
struct Tar {
    builder: tar::Builder<Vec<u8>>,
}

impl Tar {
    fn new() -> Self {
        Self {
            builder: tar::Builder::new(Vec::new()),
        }
    }

    fn header(kind: EntryType, name: &str, link: &str, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header
    }

    fn add(mut self, mut header: tar::Header, content: &[u8]) -> Self {
        header.set_cksum();
        self.builder.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(
            Self::header(EntryType::Regular, name, "", content.len() as u64),
            content.as_bytes(),
        )
    }

    fn dir(self, name: &str) -> Self {
        self.add(Self::header(EntryType::Directory, name, "", 0), b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.add(Self::header(EntryType::Symlink, name, target, 0), b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.add(Self::header(EntryType::Link, name, target, 0), b"")
    }

    fn device(self, kind: EntryType, name: &str, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, name, "", 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        self.add(header, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

struct Place {
    dir: tempfile::TempDir,
    outside: PathBuf,
    layers: Vec<PathBuf>,
    /// Of targets, those of refused archives included.
    count: u32,
}

impl Place {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: unpacking layers needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        Some(Self {
            outside,
            layers: Vec::new(),
            count: 0,
            dir,
        })
    }

    /// Unpacks one more layer and says where.
    fn unpack(&mut self, tar: Tar) -> Result<PathBuf, UnpackError> {
        self.unpack_bytes(&tar.bytes(), None)
    }

    fn unpack_bytes(&mut self, blob: &[u8], diff_id: Option<&str>) -> Result<PathBuf, UnpackError> {
        self.count += 1;
        let target = self.dir.path().join(format!("layer{}", self.count));
        std::fs::create_dir(&target).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(blob).unwrap();
        let own = format!("sha256:{}", hex::encode(Sha256::digest(blob)));
        unpack_layer(file, diff_id.unwrap_or(&own), &target, &self.layers)?;
        self.layers.push(target.clone());
        Ok(target)
    }

    fn refuse(&mut self, tar: Tar) -> String {
        match self.unpack(tar) {
            Err(UnpackError::Refused { why, .. }) => why.to_owned(),
            Err(error) => panic!("refused for another reason: {error:?}"),
            Ok(_) => panic!("the archive was taken"),
        }
    }
}

fn is_whiteout(path: &Path) -> bool {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(path: &Path) -> bool {
    xattr::get(path, OPAQUE_XATTR).unwrap().as_deref() == Some(b"y")
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn modes_owners_times_and_links_are_kept() {
    let Some(mut place) = Place::new() else { return };
    let mut setuid = Tar::header(EntryType::Regular, "bin/su", "", 4);
    setuid.set_mode(0o4755);
    setuid.set_uid(1234);
    setuid.set_gid(5678);
    let layer = place
        .unpack(
            Tar::new()
                .dir("./")
                .dir("bin/")
                .add(setuid, b"root")
                .hard_link("bin/also-su", "bin/su")
                .symlink("bin/sh", "/usr/bin/dash")
                .add(Tar::header(EntryType::Fifo, "pipe", "", 0), b""),
        )
        .unwrap();
    let su = std::fs::symlink_metadata(layer.join("bin/su")).unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime()),
        (0o4755, 1234, 5678, 1_700_000_000)
    );
    assert_eq!(
        su.ino(),
        std::fs::symlink_metadata(layer.join("bin/also-su")).unwrap().ino()
    );
    assert_eq!(
        std::fs::read_link(layer.join("bin/sh")).unwrap(),
        Path::new("/usr/bin/dash")
    );
    assert_eq!(
        std::fs::symlink_metadata(layer.join("bin")).unwrap().mtime(),
        1_700_000_000
    );
    assert!(
        std::fs::symlink_metadata(layer.join("pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn all_compressions_give_the_same_files() {
    let Some(mut place) = Place::new() else { return };
    let plain = Tar::new().file("file", "content").bytes();
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&plain)));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&plain).unwrap();
    let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
    for blob in [plain.clone(), gzip.finish().unwrap(), zstd] {
        let layer = place.unpack_bytes(&blob, Some(&diff_id)).unwrap();
        assert_eq!(std::fs::read_to_string(layer.join("file")).unwrap(), "content");
    }
}

#[test]
fn content_that_is_not_what_the_image_says_is_refused() {
    let Some(mut place) = Place::new() else { return };
    let other = format!("sha256:{}", "0".repeat(64));
    let result = place.unpack_bytes(&Tar::new().file("file", "x").bytes(), Some(&other));
    assert!(matches!(result, Err(UnpackError::Digest { .. })));
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let Some(mut place) = Place::new() else { return };
    place
        .unpack(
            Tar::new()
                .dir("etc/")
                .file("etc/old", "old")
                .dir("var/")
                .file("var/a", "a"),
        )
        .unwrap();
    let layer = place
        .unpack(
            Tar::new()
                .dir("etc/")
                .file("etc/.wh.old", "")
                .dir("var/")
                .file("var/.wh..wh..opq", "")
                .file("var/b", "b"),
        )
        .unwrap();
    assert!(is_whiteout(&layer.join("etc/old")));
    assert!(!layer.join("etc/.wh.old").exists() && !layer.join("var/.wh..wh..opq").exists());
    assert!(is_opaque(&layer.join("var")) && !is_opaque(&layer.join("etc")));
    assert_eq!(std::fs::read_to_string(layer.join("var/b")).unwrap(), "b");
}

#[test]
fn what_is_deleted_and_made_anew_hides_the_old_in_any_order() {
    let Some(mut place) = Place::new() else { return };
    let base = Tar::new().dir("d/").file("d/old", "old").file("f", "old");
    place.unpack(base).unwrap();
    let first = Tar::new()
        .file(".wh.d", "")
        .file(".wh.f", "")
        .dir("d/")
        .file("d/new", "new")
        .file("f", "new");
    let last = Tar::new()
        .dir("d/")
        .file("d/new", "new")
        .file("f", "new")
        .file(".wh.d", "")
        .file(".wh.f", "");
    let implied = Tar::new().file(".wh.d", "").file("d/new", "new").file("f", "new");
    for tar in [first, last, implied] {
        let layer = place.unpack(tar).unwrap();
        assert!(is_opaque(&layer.join("d")));
        assert_eq!(std::fs::read_to_string(layer.join("f")).unwrap(), "new");
        assert_eq!(std::fs::read_to_string(layer.join("d/new")).unwrap(), "new");
    }
}

#[test]
fn parents_that_are_not_in_the_layer_are_taken_from_below() {
    let Some(mut place) = Place::new() else { return };
    let mut tmp = Tar::header(EntryType::Directory, "tmp/", "", 0);
    tmp.set_mode(0o1777);
    let base = Tar::new()
        .add(tmp, b"")
        .dir("usr/")
        .dir("usr/lib/")
        .symlink("lib", "usr/lib")
        .symlink("abs", "/usr/lib");
    place.unpack(base).unwrap();
    let layer = place
        .unpack(
            Tar::new()
                .file("tmp/x", "x")
                .file("lib/one", "1")
                .file("abs/two", "2")
                .file("new/dir/y", "y"),
        )
        .unwrap();
    assert_eq!(mode(&layer.join("tmp")), 0o1777);
    assert_eq!(mode(&layer.join("new/dir")), 0o755);
    // Not a directory that would hide the link below.
    assert!(std::fs::symlink_metadata(layer.join("lib")).is_err());
    assert!(layer.join("usr/lib/one").exists() && layer.join("usr/lib/two").exists());
}

#[test]
fn a_hard_link_to_a_lower_file_brings_it_up() {
    let Some(mut place) = Place::new() else { return };
    place.unpack(Tar::new().dir("bin/").file("bin/tool", "tool")).unwrap();
    let layer = place.unpack(Tar::new().hard_link("bin/alias", "bin/tool")).unwrap();
    let inode = |name: &str| std::fs::metadata(layer.join(name)).unwrap().ino();
    assert_eq!(inode("bin/alias"), inode("bin/tool"));
    assert_eq!(std::fs::read_to_string(layer.join("bin/alias")).unwrap(), "tool");
    assert!(
        place
            .refuse(Tar::new().hard_link("a", "bin/missing"))
            .contains("does not exist")
    );
}

#[test]
fn later_entries_replace_earlier_ones() {
    let Some(mut place) = Place::new() else { return };
    let tar = Tar::new()
        .file("a", "1")
        .file("a", "2")
        .dir("b/")
        .file("b/x", "x")
        .file("b", "file")
        .symlink("c", "a");
    let layer = place
        .unpack(tar.file("c", "c").file("d", "d").dir("d/").file("d/y", "y"))
        .unwrap();
    let read = |name: &str| std::fs::read_to_string(layer.join(name)).unwrap();
    // `c` was a link to `a`: it is replaced, and what it led to is not written through.
    assert_eq!(
        (read("a"), read("b"), read("c"), read("d/y")),
        ("2".into(), "file".into(), "c".into(), "y".into())
    );
}

#[test]
fn long_names_and_capabilities_come_from_extended_headers() {
    let Some(mut place) = Place::new() else { return };
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
    // cap_net_bind_service+ep, in the form that the kernel stores.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = place
        .unpack(
            Tar::new()
                .pax(&[
                    ("path", long.as_bytes()),
                    ("SCHILY.xattr.security.capability", &capability),
                ])
                .file("short", "content")
                .pax(&[
                    ("SCHILY.xattr.security.selinux", b"system_u"),
                    ("mtime", b"1600000000.5"),
                ])
                .file("labelled", ""),
        )
        .unwrap();
    let path = layer.join(long);
    assert_eq!(
        xattr::get(&path, "security.capability").unwrap().as_deref(),
        Some(&capability[..])
    );
    let labelled = layer.join("labelled");
    assert_eq!(std::fs::metadata(&labelled).unwrap().mtime(), 1_600_000_000);
    assert_ne!(
        xattr::get(&labelled, "security.selinux").unwrap().as_deref(),
        Some(&b"system_u"[..])
    );
}

#[test]
fn names_that_leave_the_image_are_refused() {
    let Some(mut place) = Place::new() else { return };
    assert!(place.refuse(Tar::new().file("../evil", "x")).contains(".."));
    assert!(place.refuse(Tar::new().file("a/../../evil", "x")).contains(".."));
    assert!(
        place
            .refuse(Tar::new().pax(&[("path", b"../evil")]).file("fine", "x"))
            .contains("..")
    );
    assert!(
        place
            .refuse(Tar::new().hard_link("a", "../outside/secret"))
            .contains("..")
    );
    assert!(place.refuse(Tar::new().file(".wh...", "x")).contains("deletes nothing"));
    // Absolute names are names below the root of the image.
    let layer = place.unpack(Tar::new().file("/absolute", "x")).unwrap();
    assert!(layer.join("absolute").exists());
}

#[test]
fn links_do_not_lead_out_of_the_image() {
    let Some(mut place) = Place::new() else { return };
    let outside = place.outside.clone();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let outside_text = outside.to_str().unwrap().to_owned();
    let escape = format!("../../../../../../../../../..{outside_text}");
    for target in [outside_text.as_str(), escape.as_str()] {
        if target.len() > 100 {
            continue;
        }
        // Through a link of the same layer, and through one of the layer below.
        let layer = place
            .unpack(Tar::new().symlink("way", target).file("way/out", "x"))
            .unwrap();
        assert!(layer.join(outside_text.trim_start_matches('/')).join("out").exists());
        place
            .unpack(Tar::new().file("way/out", "x").hard_link("link", "way/out"))
            .unwrap();
        assert!(place.unpack(Tar::new().hard_link("link", "way/secret")).is_err());
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    assert!(
        place
            .refuse(Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", "x"))
            .contains("too many links")
    );
}

#[test]
fn a_whiteout_does_not_delete_through_a_link() {
    let Some(mut place) = Place::new() else { return };
    std::fs::write(place.outside.join("victim"), "alive").unwrap();
    let outside = place.outside.to_str().unwrap().to_owned();
    place
        .unpack(
            Tar::new()
                .symlink("way", &outside)
                .file("way/.wh.victim", "")
                .file("way/.wh..wh..opq", ""),
        )
        .unwrap();
    assert_eq!(std::fs::read_to_string(place.outside.join("victim")).unwrap(), "alive");
    assert!(!is_opaque(&place.outside));
}

#[test]
fn devices_are_refused_except_where_they_do_not_matter() {
    let Some(mut place) = Place::new() else { return };
    assert!(
        place
            .refuse(Tar::new().device(EntryType::Block, "disk", 8, 0))
            .contains("device")
    );
    assert!(
        place
            .refuse(Tar::new().device(EntryType::Char, "etc/mem", 1, 1))
            .contains("device")
    );
    let layer = place
        .unpack(
            Tar::new()
                .device(EntryType::Char, "dev/null", 1, 3)
                .device(EntryType::Char, "gone", 0, 0),
        )
        .unwrap();
    assert!(!layer.join("dev/null").exists());
    assert!(is_whiteout(&layer.join("gone")));
}

#[test]
fn attributes_that_overlayfs_obeys_are_refused() {
    let Some(mut place) = Place::new() else { return };
    for name in [
        "SCHILY.xattr.trusted.overlay.redirect",
        "SCHILY.xattr.user.overlay.opaque",
    ] {
        assert!(
            place
                .refuse(Tar::new().pax(&[(name, b"/etc")]).dir("d/"))
                .contains("overlayfs"),
            "{name}"
        );
    }
}

#[test]
fn header_records_without_end_are_refused() {
    let Some(mut place) = Place::new() else { return };
    let name = vec![b'a'; usize::try_from(MAX_HEADER_RECORD_BYTES).unwrap() + 1];
    let long = Tar::header(EntryType::GNULongName, "././@LongLink", "", name.len() as u64);
    let result = place.unpack(Tar::new().add(long, &name).file("x", ""));
    assert!(matches!(result, Err(UnpackError::TooLarge { .. })));
}

#[test]
fn attributes_of_many_header_records_are_counted_together() {
    let Some(mut place) = Place::new() else { return };
    let value = vec![b'a'; usize::try_from(MAX_HEADER_RECORD_BYTES).unwrap() / 3];
    let record: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &value)];
    let result = place.unpack(Tar::new().pax(record).pax(record).pax(record).pax(record).file("x", ""));
    assert!(matches!(result, Err(UnpackError::TooLarge { .. })));
}

#[test]
fn a_truncated_archive_is_an_error() {
    let Some(mut place) = Place::new() else { return };
    let whole = Tar::new().file("file", &"content".repeat(1000)).bytes();
    assert!(place.unpack_bytes(&whole[..2000], None).is_err());
    assert!(place.unpack_bytes(b"\x1f\x8b\x08 not gzip at all", None).is_err());
    assert!(place.unpack_bytes(&[0xff; 4096], None).is_err());
}

#[test]
fn entries_that_disagree_with_themselves_are_refused() {
    let Some(mut place) = Place::new() else { return };
    assert!(
        place
            .refuse(Tar::new().file("f", "x").file("f/below", "x"))
            .contains("a file stands")
    );
    assert!(place.refuse(Tar::new().hard_link("a", "a")).contains("itself"));
    assert!(
        place
            .refuse(Tar::new().dir("d/").hard_link("a", "d"))
            .contains("directory")
    );
    assert!(
        place
            .refuse(Tar::new().add(Tar::header(EntryType::new(b'V'), "s", "", 0), b""))
            .contains("type")
    );
    assert!(
        place
            .refuse(Tar::new().pax(&[("size", b"99999999999")]).file("big", "x"))
            .contains("8 GiB")
    );
    assert!(
        place
            .refuse(Tar::new().pax(&[("uid", b"4294967295")]).file("x", "x"))
            .contains("owner")
    );
}
