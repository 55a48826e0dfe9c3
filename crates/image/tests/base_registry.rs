//! Base images from a real registry (Debian's `docker-registry`, filled by these tests with `skopeo`), and
//! from OCI layouts and archives on disk.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, which clippy does not see as tests"
)]

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ionian_domain::image::BuiltImage;
use ionian_image::LayerStore;
use ionian_image::base::{
    BaseConfig, BaseError, BaseImages, BaseRequest, BaseSource, RegistryConfig, RegistryCredentials,
};
use sha2::{Digest, Sha256};
use support::{ChrootRunner, RecordedLog};
use tar::EntryType;

/// `ionian`, `open-sesame`, in the only form that the registry reads.
const HTPASSWD: &str = "ionian:$2b$05$kVdM1RF1Nbegdbb020jzou3iIEv3AEnwzbMlOYPs1WPg7ICm/BYYC\n";

fn can_run() -> bool {
    let has = |program: &str| {
        Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok()
    };
    let able = support::is_root() && has("docker-registry") && has("skopeo");
    if !able {
        println!("skipped: needs root, docker-registry and skopeo");
    }
    able
}

/// A registry of its own for each test, on a port that the system chooses.
struct Registry {
    process: Child,
    host: String,
    dir: tempfile::TempDir,
}

impl Registry {
    fn start(is_locked: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The port is free again for a moment before the registry takes it; another try is cheap.
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let host = format!("127.0.0.1:{port}");
            std::fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
            let auth = if is_locked {
                format!(
                    "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
                    dir.path().join("htpasswd").display()
                )
            } else {
                String::new()
            };
            let config = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n{auth}",
                dir.path().join("data").display()
            );
            std::fs::write(dir.path().join("config.yml"), config).unwrap();
            let mut process = Command::new("docker-registry")
                .arg("serve")
                .arg(dir.path().join("config.yml"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let started = Instant::now();
            while started.elapsed() < Duration::from_secs(10) && process.try_wait().unwrap().is_none() {
                if std::net::TcpStream::connect(&host).is_ok() {
                    return Self { process, host, dir };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        panic!("docker-registry did not start");
    }

    fn push(&self, layout: &Path, name: &str) {
        let mut command = Command::new("skopeo");
        command.args([
            "copy",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
            "--dest-creds",
            "ionian:open-sesame",
        ]);
        command
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{}/{name}", self.host));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn header(kind: EntryType, name: &str, size: usize, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size as u64);
    header
}

fn add(tar: &mut tar::Builder<Vec<u8>>, mut header: tar::Header, content: &[u8]) {
    header.set_cksum();
    tar.append(&header, content).unwrap();
}

fn base_layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for dir in ["bin/", "etc/", "data/"] {
        add(&mut tar, header(EntryType::Directory, dir, 0, 0o755), b"");
    }
    add(&mut tar, header(EntryType::Directory, "tmp/", 0, 0o1777), b"");
    add(&mut tar, header(EntryType::Regular, "bin/su", 2, 0o4755), b"su");
    let mut link = header(EntryType::Link, "bin/su2", 0, 0o4755);
    link.set_link_name("bin/su").unwrap();
    add(&mut tar, link, b"");
    add(&mut tar, header(EntryType::Regular, "etc/old", 3, 0o644), b"old");
    add(&mut tar, header(EntryType::Regular, "data/one", 3, 0o644), b"one");
    // More than one chunk of a download.
    let large: Vec<u8> = (0..3_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    add(
        &mut tar,
        header(EntryType::Regular, "data/large", large.len(), 0o644),
        &large,
    );
    tar.into_inner().unwrap()
}

fn upper_layer() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    add(&mut tar, header(EntryType::Regular, "etc/.wh.old", 0, 0o644), b"");
    add(&mut tar, header(EntryType::Regular, "data/.wh..wh..opq", 0, 0o644), b"");
    add(&mut tar, header(EntryType::Regular, "data/two", 3, 0o644), b"two");
    add(&mut tar, header(EntryType::Regular, "tmp/file", 1, 0o644), b"x");
    tar.into_inner().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn put_blob(layout: &Path, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    let dir = layout.join("blobs/sha256");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join(&digest[7..]), bytes).unwrap();
    digest
}

fn host_architecture() -> &'static str {
    if std::env::consts::ARCH == "aarch64" {
        "arm64"
    } else {
        "amd64"
    }
}

/// An image of two layers (gzip and zstd) for this machine, behind an index that has another one for s390x.
fn write_layout(layout: &Path) -> Vec<u8> {
    let base = base_layer();
    let upper = upper_layer();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&base).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(upper.as_slice(), 3).unwrap();
    let config = serde_json::json!({
        "architecture": host_architecture(), "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "LANG=C"], "Cmd": ["sh"], "Entrypoint": null, "WorkingDir": "/data", "User": "1000",
            "Shell": ["/bin/bash", "-c"],
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(&base), digest(&upper)]},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let layer = |bytes: &[u8], kind: &str| {
        let media_type = format!("application/vnd.oci.image.layer.v1.tar+{kind}");
        serde_json::json!({"mediaType": media_type, "digest": put_blob(layout, bytes), "size": bytes.len()})
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": put_blob(layout, &config), "size": config.len()},
        "layers": [layer(&gzip, "gzip"), layer(&zstd, "zstd")],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let entry = |architecture: &str| {
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": put_blob(layout, &manifest),
            "size": manifest.len(), "platform": {"os": "linux", "architecture": architecture},
        })
    };
    // The first entry is for another machine; it must not be taken because it comes first.
    let foreign = foreign_manifest(layout);
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [foreign, entry(host_architecture())],
    });
    let index = serde_json::to_vec(&index).unwrap();
    let root = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": put_blob(layout, &index), "size": index.len()}],
    });
    std::fs::write(layout.join("index.json"), serde_json::to_vec(&root).unwrap()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    index
}

fn foreign_manifest(layout: &Path) -> serde_json::Value {
    let config = br#"{"architecture":"s390x","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": put_blob(layout, config), "size": config.len()},
        "layers": [],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": put_blob(layout, &manifest),
        "size": manifest.len(), "platform": {"os": "linux", "architecture": "s390x"},
    })
}

struct Place {
    dir: tempfile::TempDir,
    layers: LayerStore,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layers = LayerStore::open(dir.path().join("layers")).unwrap();
        Self { dir, layers }
    }

    fn bases(&self, sources: &[BaseSource], registry: RegistryConfig) -> BaseImages {
        let mut config = BaseConfig::new(self.dir.path().join("tmp"));
        config.sources = sources.to_vec();
        config.registry = registry;
        config.layouts_dir = Some(self.dir.path().join("layouts"));
        // Nothing may be fetched from the outside by these tests.
        "http://127.0.0.1:1/simple/".clone_into(&mut config.package_index.url);
        config.debian.mmdebstrap = PathBuf::from("/nonexistent/mmdebstrap");
        BaseImages::new(config).unwrap()
    }

    async fn resolve(&self, bases: &BaseImages, reference: &str) -> (Result<BuiltImage, BaseError>, RecordedLog) {
        let (recorded, log) = RecordedLog::start();
        let request = BaseRequest {
            reference: reference.to_owned(),
            auth: None,
            force: false,
        };
        (
            bases.resolve(request, &self.layers, &ChrootRunner, &log).await,
            recorded,
        )
    }

    fn check(&self, image: &BuiltImage) {
        let [base, upper] = image.layers.as_slice() else {
            panic!("{image:?}")
        };
        let (base, upper) = (self.layers.fs_path(base), self.layers.fs_path(upper));
        let su = std::fs::metadata(base.join("bin/su")).unwrap();
        assert_eq!((su.mode() & 0o7777, su.nlink()), (0o4755, 2));
        assert_eq!(std::fs::metadata(base.join("data/large")).unwrap().len(), 3_000_000);
        let whiteout = std::fs::symlink_metadata(upper.join("etc/old")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
        assert_eq!(
            xattr::get(upper.join("data"), "trusted.overlay.opaque")
                .unwrap()
                .as_deref(),
            Some(&b"y"[..])
        );
        assert_eq!(std::fs::read(upper.join("data/two")).unwrap(), b"two");
        assert_eq!(std::fs::metadata(upper.join("tmp")).unwrap().mode() & 0o7777, 0o1777);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(image.config.env, [pair("PATH", "/bin"), pair("LANG", "C")]);
        assert_eq!(image.config.cmd, ["sh"]);
        assert_eq!(image.config.shell, ["/bin/bash", "-c"]);
        assert_eq!(
            (image.config.workdir.as_deref(), image.config.user.as_deref()),
            (Some("/data"), Some("1000"))
        );
        assert!(image.config.entrypoint.is_empty());
    }
}

fn insecure(hosts: &[&str]) -> RegistryConfig {
    RegistryConfig {
        insecure: hosts.iter().map(|host| (*host).to_owned()).collect(),
        ..RegistryConfig::default()
    }
}

const ALL: [BaseSource; 3] = [BaseSource::Registry, BaseSource::Layouts, BaseSource::Bootstrap];

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_tag_and_by_digest_and_only_once() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    let index = write_layout(&layout);
    let registry = Registry::start(false);
    registry.push(&layout, "team/app:1.0");
    let bases = place.bases(&ALL, insecure(&[&registry.host]));

    let (image, log) = place.resolve(&bases, &format!("{}/team/app:1.0", registry.host)).await;
    let image = image.unwrap();
    place.check(&image);
    log.expect(&format!("from registry {}: 2 layers, 2 to get", registry.host));

    let reference = format!("{}/team/app@{}", registry.host, digest(&index));
    let (again, log) = place.resolve(&bases, &reference).await;
    assert_eq!(again.unwrap(), image);
    log.expect("2 layers, 0 to get");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_pull_the_same_image_at_once_share_the_work() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    let registry = Registry::start(false);
    registry.push(&layout, "app:1");
    let bases = place.bases(&ALL, insecure(&[&registry.host]));
    let reference = format!("{}/app:1", registry.host);
    let pulls = (0..4).map(|_| place.resolve(&bases, &reference));
    let images: Vec<BuiltImage> = futures_util::future::join_all(pulls)
        .await
        .into_iter()
        .map(|(image, _)| image.unwrap())
        .collect();
    assert!(images.iter().all(|image| *image == images[0]));
    place.check(&images[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_open_a_locked_registry_and_their_lack_is_an_answer() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    let registry = Registry::start(true);
    registry.push(&layout, "private:1");
    let bases = place.bases(&ALL, insecure(&[&registry.host]));
    let reference = format!("{}/private:1", registry.host);

    let (refused, _) = place.resolve(&bases, &reference).await;
    let Err(BaseError::NotFound { tried, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(tried.contains("does not give it"), "{tried}");

    let pull = async |password: &str| {
        let (_, log) = RecordedLog::start();
        let auth = Some(RegistryCredentials {
            username: "ionian".to_owned(),
            password: password.to_owned(),
        });
        let request = BaseRequest {
            reference: reference.clone(),
            auth,
            force: false,
        };
        bases.resolve(request, &place.layers, &ChrootRunner, &log).await
    };
    assert!(matches!(pull("wrong").await, Err(BaseError::NotFound { .. })));
    place.check(&pull("open-sesame").await.unwrap());
    // The credentials of one request do not serve the next, though the layers are known now.
    assert!(matches!(
        place.resolve(&bases, &reference).await.0,
        Err(BaseError::NotFound { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_serves_what_its_registry_cannot() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    let mirror = Registry::start(false);
    mirror.push(&layout, "library/python:3.12-slim");
    let mut config = insecure(&["127.0.0.1:1", &mirror.host]);
    config.mirrors = BTreeMap::from([(
        "docker.io".to_owned(),
        vec!["127.0.0.1:1".to_owned(), mirror.host.clone()],
    )]);
    let bases = place.bases(&ALL, config);
    let (image, log) = place.resolve(&bases, "python:3.12-slim").await;
    place.check(&image.unwrap());
    log.expect(&format!("base image python:3.12-slim from registry {}", mirror.host));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_says_no_is_believed() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let registry = Registry::start(false);
    let mut config = insecure(&[&registry.host]);
    config.mirrors = BTreeMap::from([("docker.io".to_owned(), vec![registry.host.clone()])]);
    let bases = place.bases(&ALL, config);
    // Debian could make this one, but a registry answered that it does not exist.
    let (refused, _) = place.resolve(&bases, "python:3.11.99-slim-bookworm").await;
    let Err(BaseError::NotFound { tried, help, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(tried.contains("nothing is made in place of"), "{tried}");
    assert!(
        help.contains("skopeo copy docker://python:3.11.99-slim-bookworm oci:"),
        "{help}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_registry_is_asked_once_and_the_next_source_serves() {
    if !support::is_root() {
        println!("skipped: needs root");
        return;
    }
    let place = Place::new();
    write_layout(&place.dir.path().join("layouts/127.0.0.1:1_app:1"));
    let bases = place.bases(&ALL, insecure(&["127.0.0.1:1"]));
    let (image, log) = place.resolve(&bases, "127.0.0.1:1/app:1").await;
    place.check(&image.unwrap());
    log.expect("registry 127.0.0.1:1 cannot be reached");
    log.expect("from the OCI layout");
    let (_, log) = place.resolve(&bases, "127.0.0.1:1/app:1").await;
    log.expect("asked 0 s ago");

    let (refused, _) = place.resolve(&bases, "127.0.0.1:1/other:1").await;
    let Err(BaseError::NotFound { tried, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(
        tried.contains("cannot be reached") && tried.contains("no OCI layout"),
        "{tried}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_and_archives_are_found_by_name() {
    if !support::is_root() {
        println!("skipped: needs root");
        return;
    }
    let place = Place::new();
    let layouts = place.dir.path().join("layouts");
    let bases = place.bases(&[BaseSource::Layouts], RegistryConfig::default());
    write_layout(&layouts.join("python:3.12-slim"));
    place.check(
        &place
            .resolve(&bases, "docker.io/library/python:3.12-slim")
            .await
            .0
            .unwrap(),
    );
    write_layout(&layouts.join("ghcr.io_owner_name:2"));
    place.check(&place.resolve(&bases, "ghcr.io/owner/name:2").await.0.unwrap());

    // As an archive; a layer of it is read only when it is missing, so the store is a new one.
    let place = Place::new();
    let layouts = place.dir.path().join("layouts");
    std::fs::create_dir_all(&layouts).unwrap();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    let mut archive = tar::Builder::new(std::fs::File::create(layouts.join("app:1.tar")).unwrap());
    archive.append_dir_all(".", &layout).unwrap();
    archive.finish().unwrap();
    let bases = place.bases(&[BaseSource::Layouts], RegistryConfig::default());
    place.check(&place.resolve(&bases, "app:1").await.0.unwrap());
    assert!(matches!(
        place.resolve(&bases, "app:2").await.0,
        Err(BaseError::NotFound { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_skopeo_writes_is_found_by_its_annotation() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    std::fs::create_dir_all(place.dir.path().join("layouts")).unwrap();
    // The command that the error message for a missing image gives.
    let target = format!("oci:{}/python:3.12-slim", place.dir.path().join("layouts").display());
    let status = Command::new("skopeo")
        .args(["copy", "--quiet", &format!("oci:{}", layout.display()), &target])
        .status()
        .unwrap();
    assert!(status.success());
    let bases = place.bases(&[BaseSource::Layouts], RegistryConfig::default());
    place.check(&place.resolve(&bases, "python:3.12-slim").await.0.unwrap());
    assert!(place.resolve(&bases, "python:3.13-slim").await.0.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_does_not_become_a_layer() {
    if !support::is_root() {
        println!("skipped: needs root");
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("layouts/app:1");
    write_layout(&layout);
    let blobs = std::fs::read_dir(layout.join("blobs/sha256")).unwrap();
    let largest = blobs
        .map(|entry| entry.unwrap())
        .max_by_key(|entry| entry.metadata().unwrap().len())
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).unwrap();
    let bases = place.bases(&[BaseSource::Layouts], RegistryConfig::default());
    let (damaged, _) = place.resolve(&bases, "app:1").await;
    let Err(BaseError::Layout { source, .. }) = damaged else {
        panic!("{damaged:?}")
    };
    assert!(source.to_string().contains("is damaged"), "{source}");
    assert_eq!(std::fs::read_dir(place.dir.path().join("layers/l")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_its_registry_damaged_does_not_become_a_layer() {
    if !can_run() {
        return;
    }
    let place = Place::new();
    let layout = place.dir.path().join("image");
    write_layout(&layout);
    let registry = Registry::start(false);
    registry.push(&layout, "app:1");
    let mut waiting = vec![registry.dir.path().join("data")];
    let mut largest: Option<(u64, PathBuf)> = None;
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                waiting.push(entry.path());
            } else if largest.as_ref().is_none_or(|(length, _)| metadata.len() > *length) {
                largest = Some((metadata.len(), entry.path()));
            }
        }
    }
    let (length, path) = largest.unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[length as usize / 2] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let bases = place.bases(&ALL, insecure(&[&registry.host]));
    let (damaged, _) = place.resolve(&bases, &format!("{}/app:1", registry.host)).await;
    assert!(matches!(damaged, Err(BaseError::Download { .. })), "{damaged:?}");
    assert_eq!(std::fs::read_dir(place.dir.path().join("layers/l")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_python_says_how_to_provide_it() {
    let place = Place::new();
    let mut registry = insecure(&["127.0.0.1:1"]);
    registry.mirrors = BTreeMap::from([("docker.io".to_owned(), vec!["127.0.0.1:1".to_owned()])]);
    let bases = place.bases(&[BaseSource::Layouts, BaseSource::Bootstrap], registry);
    let (impossible, _) = place.resolve(&bases, "python:3.12-slim-bookworm").await;
    let text = impossible.unwrap_err().to_string();
    for part in [
        "3.12",
        "bookworm has 3.11",
        "trixie has 3.13",
        "no OCI layout",
        "configure a registry",
        "skopeo copy",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
