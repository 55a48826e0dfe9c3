//! `ionian serve`: the parts, put together, and the order in which they start and end.
//!
//! Start: lock and keys, store and blobs, runtime and network, worker, control (which recovers), then the
//! listeners. End, on SIGTERM or SIGINT: the public listener finishes its requests, containers end, the
//! rest follows. Nothing that was acknowledged depends on an orderly end.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use ionian_api::{Api, JoinTokens, RemoteBuilds, WorkerGateway, WorkerTimes, encode_container_arguments, http_router};
use ionian_blobs::UrlSigner;
use ionian_container::config::ContainerConfig;
use ionian_container::network::Network;
use ionian_control::app::images::PresentFn;
use ionian_control::{Control, ControlConfig, Parts, Started};
use ionian_domain::container::RuntimeKinds;
use ionian_domain::worker::WorkerCapacity;
use ionian_image::{HostTrust, LayerStore};
use ionian_ingress::{Ingress, IngressConfig, Services, platform_service};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::keys::Keys;
use crate::{host, token};

mod build;
pub(crate) mod listeners;
pub(crate) mod platform;
pub(crate) mod runtimes;

use runtimes::Runtimes;

/// How long containers have to end after the last request.
const CONTAINERS_END: Duration = Duration::from_secs(15);
/// An ephemeral app's client sends a heartbeat every 15 s; four missed ones mean that it is gone.
const CLIENT_HEARTBEAT_TIMEOUT: Duration = Duration::from_mins(1);

pub(crate) fn container_config(config: &Config) -> ContainerConfig {
    let mut container = ContainerConfig::new(config.instance_id(), config.data_dir.join("containers"));
    container.address_pool = config.address_pool;
    container.runsc_path.clone_from(&config.runsc);
    container.user_namespaces = config.user_namespaces;
    container
}

pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let store = token::open_store(&config).await?;
    let _lock = lock(&config.data_dir)?;
    let keys = Keys::load(&config.data_dir)?;
    let (content, blobs) = ionian_blobs::open_local(&config.data_dir.join("blobs"))
        .await
        .context("cannot open the blob store")?;
    let signer = UrlSigner::new(keys.urls);
    let listeners = listeners::public(&config.listen).await?;
    let public_port = listeners
        .first()
        .context("no address to listen on")?
        .local_addr()?
        .port();

    let runtimes = if config.embedded_worker {
        Some(Runtimes::open(&config).await?)
    } else {
        None
    };
    let network = runtimes.as_ref().and_then(Runtimes::network);
    // Without containers of our own, workers carry their containers' connections to loopback.
    let container_listener = listeners::for_containers(&store, network.map(Network::gateway)).await?;
    if let Some(network) = network {
        network.allow_host_port(container_listener.local_addr()?.port()).await?;
    }
    let containers_address = container_listener.local_addr()?.to_string();
    let container_server_url = format!("http://{}", container_listener.local_addr()?);

    let cancel = CancellationToken::new();
    let remote_builds = RemoteBuilds::default();
    let (build, layers_present, embedded) = match &runtimes {
        Some(runtimes) => {
            let layers = LayerStore::open(config.images_dir()).context("cannot open the layer store")?;
            let local = platform::Content::local(content.clone());
            let parts = platform::worker(&config, runtimes, layers.clone(), local).await?;
            let build = build::build_fn(parts.builder.clone());
            let present: PresentFn = Arc::new(move |image| image.layers.iter().all(|key| layers.contains(key)));
            (build, present, Some(parts))
        }
        None => (remote_builds.build_fn(), remote_builds.present_fn(), None),
    };
    let (scheme, port) = config
        .public
        .clone()
        .unwrap_or_else(|| ("http".to_owned(), public_port));
    let started = Control::start(Parts {
        config: control_config(
            &config,
            scheme,
            port,
            container_server_url,
            runtimes.as_ref().map(Runtimes::kinds),
        ),
        store: store.clone(),
        content: content.clone(),
        blobs,
        secret_key: keys.secret,
        container_key: keys.containers,
        build,
        layers_present,
        encode_arguments: Arc::new(encode_container_arguments),
        cancel: cancel.clone(),
    })
    .await
    .context("cannot start")?;
    let Started {
        control,
        web,
        desired,
        reports,
        mut essential,
    } = started;
    let workers = WorkerGateway::new(
        Arc::new(control.clone()),
        JoinTokens::new(keys.workers),
        remote_builds,
        content,
        containers_address,
        WorkerTimes::default(),
    );
    let embedded = embedded.map(|parts| parts.embedded(&control)).transpose()?;
    let mut worker = {
        let cancel = cancel.clone();
        tokio::spawn(async move {
            match embedded {
                Some(worker) => worker.run(desired, reports, cancel).await,
                None => cancel.cancelled().await,
            }
        })
    };

    let ingress_config = IngressConfig {
        base_domains: vec![config.base_domain.clone()],
        workspace: config.workspace.clone(),
        ..IngressConfig::default()
    };
    // Proxy tokens are not there yet: endpoints that require one refuse everybody.
    let ingress = Ingress::start(web, ingress_config.clone(), Arc::new(|_, _| false), cancel.clone());
    let public_scheme = if control.config().public_scheme == "https" {
        "https"
    } else {
        "http"
    };
    let public = Services {
        platform: platform_of(&control, &signer, public_scheme, Some(&workers)),
        ingress: ingress.clone(),
    };
    let serving = CancellationToken::new();
    let public_task = tokio::spawn(ionian_ingress::serve(listeners, public, serving.clone()));
    let container_platform = platform_of(&control, &signer, "http", None);
    let container_task = {
        let (ingress_config, cancel) = (ingress_config.clone(), cancel.clone());
        tokio::spawn(async move {
            ionian_ingress::serve_platform_only(vec![container_listener], container_platform, &ingress_config, cancel)
                .await;
        })
    };

    announce(&config, public_port)?;
    tokio::select! {
        () = interrupted()? => {}
        Some(ended) = essential.join_next() => crash("an essential task", ended.err()),
        ended = &mut worker => crash("the worker", ended.err()),
    }
    tracing::info!("shutting down");
    serving.cancel();
    public_task.await.context("the public listener crashed")?;
    if config.embedded_worker {
        control.shut_down(CONTAINERS_END).await;
    }
    cancel.cancel();
    ingress.closed().await;
    container_task.await.context("the containers' listener crashed")?;
    worker.await.context("the worker crashed")?;
    essential.shutdown().await;
    if let Some(runtimes) = &runtimes {
        runtimes.remove_all().await?;
    }
    store.close().await;
    tracing::info!("ended");
    Ok(())
}

/// What this host offers to containers.
pub(crate) fn capacity(config: &Config, runtimes: RuntimeKinds) -> WorkerCapacity {
    let cores = host::cores();
    let three_quarters = host::memory_mib().unwrap_or(4096) / 4 * 3;
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    WorkerCapacity {
        cpu_millis: or(config.cpu_millis, cores * 1_000),
        memory_mib: or(config.memory_mib, three_quarters),
        max_starting: cores.max(2),
        runtimes,
    }
}

fn control_config(
    config: &Config,
    scheme: String,
    port: u16,
    container_server_url: String,
    runtimes: Option<RuntimeKinds>,
) -> ControlConfig {
    ControlConfig {
        workspace: config.workspace.clone(),
        public_scheme: scheme,
        base_domain: config.base_domain.clone(),
        public_port: port,
        image_builder_version: config.builder_version.clone(),
        runtime: config.runtime,
        allow_weaker_runtime: config.allow_weaker_runtime,
        container_server_url,
        web_hook: config.web_hook,
        data_dir: config.data_dir.clone(),
        default_scaledown_window: config.scaledown_window,
        client_heartbeat_timeout: CLIENT_HEARTBEAT_TIMEOUT,
        journal: config.journal.clone(),
        capacity: runtimes.map(|runtimes| capacity(config, runtimes)),
        scheduler: ionian_scheduler::Config::default(),
    }
}

/// Ends the process as a kill would: containers go on, and the next start takes them back and recovers from
/// what is recorded.
fn crash(what: &str, error: Option<JoinError>) -> ! {
    let error = error.map_or_else(|| "it ended by itself".to_owned(), |error| error.to_string());
    tracing::error!(error, "{what} crashed; the server ends. Start it again: it recovers");
    std::process::exit(1)
}

/// gRPC to the service, everything else to the platform's own paths.
fn platform_of(
    control: &Control,
    signer: &UrlSigner,
    scheme: &'static str,
    workers: Option<&WorkerGateway>,
) -> ionian_ingress::PlatformService {
    let mut api = Api::new(control.clone(), signer.clone(), scheme);
    let mut router = http_router(control, signer);
    if let Some(workers) = workers {
        api = api.with_workers(workers.clone());
        router = router.merge(workers.router());
    }
    platform_service(tower::service_fn(
        move |request: http::Request<hyper::body::Incoming>| {
            let (api, router) = (api.clone(), router.clone());
            async move { Ok::<_, std::convert::Infallible>(platform::answer(&api, router, request).await) }
        },
    ))
}

/// One server or worker per data directory.
pub(crate) fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("serve.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        anyhow::anyhow!(
            "another process of the platform runs on {}; stop it, or choose another --data-dir",
            data_dir.display()
        )
    })?;
    Ok(file)
}

/// Tells whoever started us that traffic may come, in one line.
#[expect(clippy::print_stdout, reason = "the contract of `ionian serve`")]
fn announce(config: &Config, port: u16) -> anyhow::Result<()> {
    let ip = config.listen.first().map_or_else(
        || "127.0.0.1".to_owned(),
        |address| {
            if address.ip().is_unspecified() {
                "127.0.0.1".to_owned()
            } else {
                address.ip().to_string()
            }
        },
    );
    let url = format!("http://{ip}:{port}");
    fs::write(config.url_file(), &url).with_context(|| format!("cannot write {}", config.url_file().display()))?;
    println!("ionian ready url={url}");
    Ok(())
}

pub(crate) fn interrupted() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// What the host shares with builds and containers.
fn trust(config: &Config) -> anyhow::Result<HostTrust> {
    let mut trust = match config.ca_bundle.as_str() {
        "auto" => HostTrust::detect(),
        "none" => HostTrust::default(),
        path => {
            let path = Path::new(path);
            if !path.is_file() {
                bail!("the CA bundle {} does not exist", path.display());
            }
            HostTrust {
                ca_bundle: Some(path.to_owned()),
                env: Vec::new(),
            }
        }
    };
    trust.env.clone_from(&config.trust_env);
    Ok(trust)
}
