//! What comes from registries and package indexes, one by the first byte: index pages, image configurations, wheels,
//! references, and a whole pull from a registry that serves the fuzzer's manifests.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{Seek, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ionian_image::base::{BaseConfig, BaseImages, BaseReference, BaseRequest, BaseSource, RegistryConfig};
use ionian_image::{BuildLog, LayerStore, MountedRoot, StepError, StepExecution, StepExit, StepRunner, fuzzing};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::bytes_in::BytesIn;
use crate::{logs, scratch};

/// For what must happen, however loaded the machine is.
const PATIENCE: Duration = Duration::from_mins(1);
/// Programs in a wheel are decompressed; the fuzzer's archives are small, and so is what may come out.
const MAX_WHEEL_OUT: u64 = 1 << 30;

pub fn run(data: &[u8]) {
    logs::forbid_errors();
    let mut input = BytesIn(data);
    match input.byte() % 5 {
        0 => page(input.0),
        1 => config(input.0),
        2 => wheel(input.0),
        3 => reference(&String::from_utf8_lossy(input.0)),
        _ => pull(input),
    }
}

fn page(bytes: &[u8]) {
    let base = "https://index.example/simple/uv/".parse().unwrap();
    let Some(files) = fuzzing::index_page(bytes, &base) else {
        return;
    };
    for tag in ["latest", "0.5", "0.5.4", "not-a-tag"] {
        if let Some(name) = fuzzing::chosen_wheel(&files, tag) {
            assert!(files.iter().any(|file| file.filename == name));
        }
    }
}

fn config(bytes: &[u8]) {
    let Some(config) = fuzzing::image_config(bytes) else {
        return;
    };
    let mut names: Vec<_> = config.env.iter().map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), config.env.len(), "a variable has two values");
}

fn wheel(bytes: &[u8]) {
    let dir = scratch::directory();
    let target = dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let mut file = tempfile::tempfile_in(dir.path()).unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    let _refused = fuzzing::extract_wheel(file, &target);
    for entry in std::fs::read_dir(&target).unwrap() {
        let entry = entry.unwrap();
        assert!(["uv", "uvx"].iter().any(|name| entry.file_name() == *name));
        assert!(entry.metadata().unwrap().len() <= MAX_WHEEL_OUT);
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "something lies beside the target"
    );
}

fn reference(text: &str) {
    let Ok(parsed) = BaseReference::parse(text) else { return };
    let shown = parsed.to_string();
    let again = BaseReference::parse(&shown).expect("a name that was understood is understood again");
    assert_eq!(again.to_string(), shown);
}

/// What the registry serves, by path.
type Files = HashMap<String, (&'static str, Bytes)>;

struct Registry {
    address: SocketAddr,
    files: Arc<Mutex<Files>>,
}

const MEDIA_TYPES: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "text/html",
];

/// A pull of manifest, second manifest, configuration and layer as they come. The digests that the seeds have for
/// them (`sha256:` and 64 times the same digit) are made right.
fn pull(mut input: BytesIn<'_>) {
    static STATE: OnceLock<(Runtime, Registry)> = OnceLock::new();
    let (runtime, registry) = STATE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let registry = runtime.block_on(Registry::start());
        (runtime, registry)
    });
    let kind = usize::from(input.byte());
    let [top, second, config, layer] = [(); 4].map(|()| input.long().to_vec());
    let layer_digest = digest(&layer);
    let config = with_digest(config, '1', &layer_digest);
    let config_digest = digest(&config);
    let right = |manifest: Vec<u8>| {
        let manifest = with_digest(manifest, '1', &layer_digest);
        with_size(&with_digest(manifest, '2', &config_digest), config.len(), layer.len())
    };
    let second = right(second);
    let second_digest = digest(&second);
    let top = with_digest(right(top), '3', &second_digest);
    let second_type = MEDIA_TYPES[(kind / MEDIA_TYPES.len()) % MEDIA_TYPES.len()];
    let file = |kind: &'static str, bytes: Vec<u8>| (kind, Bytes::from(bytes));
    let base = "/v2/fuzz/image";
    *registry.files.lock() = HashMap::from([
        ("/v2/".to_owned(), file("application/json", b"{}".to_vec())),
        (
            format!("{base}/manifests/1"),
            file(MEDIA_TYPES[kind % MEDIA_TYPES.len()], top),
        ),
        (format!("{base}/manifests/{second_digest}"), file(second_type, second)),
        (
            format!("{base}/blobs/{config_digest}"),
            file("application/json", config),
        ),
        (
            format!("{base}/blobs/{layer_digest}"),
            file("application/octet-stream", layer),
        ),
    ]);
    let dir = scratch::directory();
    let layers = LayerStore::open(dir.path().join("layers")).unwrap();
    let images = BaseImages::new(BaseConfig {
        sources: vec![BaseSource::Registry],
        registry: RegistryConfig {
            insecure: vec![registry.address.to_string()],
            ..RegistryConfig::default()
        },
        ..BaseConfig::new(dir.path().join("scratch"))
    })
    .unwrap();
    let request = BaseRequest {
        reference: format!("{}/fuzz/image:1", registry.address),
        auth: None,
        force: true,
    };
    let log = BuildLog::discard();
    let resolved = runtime.block_on(async {
        let resolve = images.resolve(request, &layers, &NoRunner, &log);
        tokio::time::timeout(PATIENCE, resolve)
            .await
            .expect("the pull does not end")
    });
    if let Ok(image) = resolved {
        assert!(image.layers.iter().all(|key| layers.contains(key)));
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn with_digest(bytes: Vec<u8>, digit: char, digest: &str) -> Vec<u8> {
    let mark = format!("sha256:{}", String::from(digit).repeat(64));
    match String::from_utf8(bytes) {
        Ok(text) => text.replace(&mark, digest).into_bytes(),
        Err(error) => error.into_bytes(),
    }
}

/// `71000001` and `71000002` stand for the sizes of the configuration and of the layer.
fn with_size(bytes: &[u8], config: usize, layer: usize) -> Vec<u8> {
    match std::str::from_utf8(bytes) {
        Ok(text) => text
            .replace("71000001", &config.to_string())
            .replace("71000002", &layer.to_string())
            .into_bytes(),
        Err(_) => bytes.to_owned(),
    }
}

impl Registry {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let files = Arc::<Mutex<Files>>::default();
        let served = Arc::clone(&files);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let served = Arc::clone(&served);
                let service = service_fn(move |request: Request<Incoming>| {
                    let found = served.lock().get(request.uri().path()).cloned();
                    let answer = match found {
                        Some((kind, bytes)) => Response::builder().header("content-type", kind).body(Full::new(bytes)),
                        None => Response::builder().status(404).body(Full::default()),
                    };
                    async move { Ok::<_, Infallible>(answer.unwrap()) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, files }
    }
}

struct NoRunner;

#[async_trait]
impl StepRunner for NoRunner {
    async fn run(&self, _: StepExecution, _: &BuildLog) -> Result<StepExit, StepError> {
        Ok(StepExit::Exited(1))
    }

    async fn mount(&self, _: &[PathBuf], _: Option<(&Path, &Path)>) -> Result<Box<dyn MountedRoot>, StepError> {
        Err(StepError::Cancelled)
    }
}
