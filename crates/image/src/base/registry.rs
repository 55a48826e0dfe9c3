//! Base images from OCI registries.
//!
//! Asks the mirrors of a registry in turn, then the registry itself. A registry that cannot be reached
//! (refused, no such name, silence) is remembered for a while, so that not every build waits for it
//! again; a registry that answers "no" is believed. Each pull has a client of its own, because the
//! client caches tokens by repository and credentials of one user must not serve another.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use oci_client::Reference;
use oci_client::client::{Client, ClientConfig, ClientProtocol, LayerDescriptor};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::{OciDescriptor, OciImageManifest};
use oci_client::secrets::RegistryAuth;

use super::oci::{Blobs, FoundImage, MAX_CONFIG_BYTES, select_platform};
use super::reference::BaseReference;
use super::{Answer, BaseError, chain};

/// How long a registry that could not be reached is not asked again. Long enough that the steps of one
/// deploy pay once, short enough that a mended network is noticed.
const UNREACHABLE_FOR: Duration = Duration::from_mins(5);
/// For all requests up to and including the image's configuration.
const MANIFEST_TIMEOUT: Duration = Duration::from_mins(1);
/// A download that brings nothing for this long is broken.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
/// Tries per blob; the pause doubles from [`FIRST_PAUSE`].
const BLOB_ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// For a registry (`docker.io`), the `host[:port]` of mirrors to ask before it. Mirrors are asked
    /// without credentials.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// `host:port` of registries and mirrors that speak plain HTTP.
    pub insecure: Vec<String>,
    /// How long to wait for a connection. Short: where no registry can be reached, the next source is
    /// what people wait for.
    pub connect_timeout: Duration,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            mirrors: BTreeMap::new(),
            insecure: Vec::new(),
            connect_timeout: Duration::from_secs(3),
        }
    }
}

/// Name and password for a registry; they appear in no log.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryCredentials {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryCredentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(super) struct RegistrySource {
    config: RegistryConfig,
    scratch_dir: PathBuf,
    /// Hosts that could not be reached, when, and why.
    unreachable: Mutex<HashMap<String, (Instant, String)>>,
}

/// The blobs of one image in one registry.
pub(super) struct RegistryBlobs {
    client: Client,
    reference: Reference,
    scratch_dir: PathBuf,
}

/// Why one registry did not give an image.
enum Refusal {
    Unreachable(String),
    Absent(String),
    Broken(OciDistributionError),
}

impl RegistrySource {
    pub(super) fn new(config: RegistryConfig, scratch_dir: PathBuf) -> Self {
        Self {
            config,
            scratch_dir,
            unreachable: Mutex::default(),
        }
    }

    /// Finds the manifest for this machine, on a mirror or on the registry itself.
    pub(super) async fn find(
        &self,
        reference: &BaseReference,
        credentials: Option<&RegistryCredentials>,
        force: bool,
    ) -> Result<Answer<FoundImage>, BaseError> {
        let mut unreachable = Vec::new();
        let mut absent = Vec::new();
        let mirrors = self
            .config
            .mirrors
            .get(reference.registry())
            .map_or(&[][..], Vec::as_slice);
        let hosts = mirrors
            .iter()
            .map(|host| (host.as_str(), true))
            .chain([(reference.registry(), false)]);
        for (host, is_mirror) in hosts {
            if let Some(reason) = self.remembered(host).filter(|_| !force) {
                unreachable.push(reason);
                continue;
            }
            let credentials = credentials.filter(|_| !is_mirror);
            match self.ask(host, is_mirror, reference, credentials).await {
                Ok(found) => return Ok(Answer::Found(found)),
                Err(Refusal::Unreachable(why)) => {
                    let reason = format!("registry {host} cannot be reached ({why})");
                    self.remember(host, &reason);
                    unreachable.push(reason);
                }
                Err(Refusal::Absent(why)) => absent.push(format!("registry {host} does not give it ({why})")),
                Err(Refusal::Broken(source)) => {
                    return Err(BaseError::Registry {
                        reference: reference.to_string(),
                        host: host.to_owned(),
                        source,
                    });
                }
            }
        }
        // One registry that says no is an answer, also when a mirror of it is down.
        let all = || {
            unreachable
                .iter()
                .chain(&absent)
                .cloned()
                .collect::<Vec<_>>()
                .join("; ")
        };
        Ok(if absent.is_empty() {
            Answer::Unreachable(all())
        } else {
            Answer::Absent(all())
        })
    }

    async fn ask(
        &self,
        host: &str,
        is_mirror: bool,
        reference: &BaseReference,
        credentials: Option<&RegistryCredentials>,
    ) -> Result<FoundImage, Refusal> {
        let client = Client::try_from(ClientConfig {
            protocol: ClientProtocol::HttpsExcept(self.config.insecure.clone()),
            connect_timeout: Some(self.config.connect_timeout),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("ionian/", env!("CARGO_PKG_VERSION")),
            platform_resolver: Some(Box::new(|entries| {
                select_platform(entries).map(|entry| entry.digest.clone())
            })),
            ..ClientConfig::default()
        })
        .map_err(Refusal::Broken)?;
        let mut oci = reference.oci().clone();
        if is_mirror {
            oci.set_mirror_registry(host.to_owned());
        }
        let auth = match credentials {
            Some(known) => RegistryAuth::Basic(known.username.clone(), known.password.clone()),
            None => RegistryAuth::Anonymous,
        };
        let blobs = RegistryBlobs {
            client,
            reference: oci,
            scratch_dir: self.scratch_dir.clone(),
        };
        let (manifest, config_json) = tokio::time::timeout(MANIFEST_TIMEOUT, blobs.manifest_and_config(&auth))
            .await
            .map_err(|_| Refusal::Unreachable(format!("no answer within {} s", MANIFEST_TIMEOUT.as_secs())))?
            .map_err(refusal)?;
        Ok(FoundImage {
            origin: format!("registry {host}"),
            manifest,
            config_json,
            blobs: Blobs::Registry(blobs),
        })
    }

    fn remembered(&self, host: &str) -> Option<String> {
        let known = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, reason) = known.get(host)?;
        let ago = since.elapsed();
        (ago < UNREACHABLE_FOR).then(|| format!("{reason}, asked {} s ago", ago.as_secs()))
    }

    fn remember(&self, host: &str, reason: &str) {
        let mut known = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        // Builds name arbitrary hosts; what is outdated goes, so that the map stays small.
        known.retain(|_, (since, _)| since.elapsed() < UNREACHABLE_FOR);
        known.insert(host.to_owned(), (Instant::now(), reason.to_owned()));
    }
}

impl RegistryBlobs {
    async fn manifest_and_config(
        &self,
        auth: &RegistryAuth,
    ) -> Result<(OciImageManifest, Vec<u8>), OciDistributionError> {
        // Also stores the credentials in the client, for the blobs.
        let (manifest, _digest) = self.client.pull_image_manifest(&self.reference, auth).await?;
        if !(0..=MAX_CONFIG_BYTES).contains(&manifest.config.size) {
            let text = format!("the configuration has {} bytes", manifest.config.size);
            return Err(OciDistributionError::SpecViolationError(text));
        }
        let mut config = Vec::new();
        let limit = manifest.config.size as u64;
        self.stream(&manifest.config, |chunk| {
            config.extend_from_slice(chunk);
            if config.len() as u64 > limit {
                Err(longer_than_announced())
            } else {
                Ok(())
            }
        })
        .await?;
        Ok((manifest, config))
    }

    /// Downloads a blob into a file without a name. Its digest is verified on the way.
    pub(super) async fn download(&self, descriptor: &OciDescriptor) -> Result<File, BaseError> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            match self.download_once(descriptor).await {
                Ok(file) => return Ok(file),
                Err(OciDistributionError::RequestError(error)) if attempt < BLOB_ATTEMPTS => {
                    tracing::info!(
                        digest = descriptor.digest,
                        attempt,
                        error = chain(&error),
                        "a download broke off"
                    );
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                    attempt += 1;
                }
                Err(source) => {
                    return Err(BaseError::Download {
                        digest: descriptor.digest.clone(),
                        source: Box::new(source),
                    });
                }
            }
        }
    }

    async fn download_once(&self, descriptor: &OciDescriptor) -> Result<File, OciDistributionError> {
        // Anonymous, so that nothing is left of it when the server is killed.
        let mut file = tempfile::tempfile_in(&self.scratch_dir)?;
        let limit = descriptor.size as u64;
        let mut written = 0;
        self.stream(descriptor, |chunk| {
            written += chunk.len() as u64;
            if written > limit {
                return Err(longer_than_announced());
            }
            // Into the page cache; a disk that cannot keep up slows this down, as it should.
            Ok(file.write_all(chunk)?)
        })
        .await?;
        Ok(file)
    }

    async fn stream(
        &self,
        descriptor: &OciDescriptor,
        mut take: impl FnMut(&[u8]) -> Result<(), OciDistributionError>,
    ) -> Result<(), OciDistributionError> {
        // Without the URLs that a manifest may name: those could be any host of this network.
        let blob = LayerDescriptor {
            digest: &descriptor.digest,
            urls: &None,
        };
        let mut blob = self.client.pull_blob_stream(&self.reference, &blob).await?;
        while let Some(chunk) = blob.stream.next().await {
            take(&chunk.map_err(stream_error)?)?;
        }
        Ok(())
    }
}

fn longer_than_announced() -> OciDistributionError {
    OciDistributionError::SpecViolationError("a blob is longer than its manifest says".to_owned())
}

/// The stream hides the HTTP client's errors in IO errors; retrying needs to know them.
fn stream_error(error: std::io::Error) -> OciDistributionError {
    match error.downcast::<reqwest::Error>() {
        Ok(http) => OciDistributionError::RequestError(http),
        Err(error) => OciDistributionError::IoError(error),
    }
}

fn refusal(error: OciDistributionError) -> Refusal {
    match error {
        OciDistributionError::RequestError(error) if error.is_decode() => {
            Refusal::Broken(OciDistributionError::RequestError(error))
        }
        OciDistributionError::RequestError(error) => Refusal::Unreachable(chain(&error)),
        OciDistributionError::ServerError { code, .. } if code >= 500 => {
            Refusal::Unreachable(format!("it answers with status {code}"))
        }
        OciDistributionError::ServerError { code, message, .. } => Refusal::Absent(format!(
            "status {code}: {}",
            message.chars().take(200).collect::<String>()
        )),
        error @ (OciDistributionError::ImageManifestNotFoundError(_)
        | OciDistributionError::RegistryError { .. }
        | OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::AuthenticationFailure(_)) => Refusal::Absent(chain(&error)),
        error => Refusal::Broken(error),
    }
}
