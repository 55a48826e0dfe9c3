//! `ionian worker`: runs containers for a server that is another process.
//!
//! It owns a bridge, a runtime, layers and builds of its own, in a data directory of its own. Told to stop, it lets
//! its containers go on: another process on the same directory takes them back, as after a crash.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use ionian_container::network::Network;
use ionian_domain::WorkerId;
use ionian_image::LayerStore;
use ionian_worker::{BuildFailure, ContentCache, Forwarder, Link, LinkConfig, LinkEnds, Worker};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::serve::runtimes::Runtimes;
use crate::serve::{self, platform};

const GIB: u64 = 1 << 30;
/// In the data directory.
const WORKER_ID_FILE: &str = "worker-id";
const FORWARDER_PORT_FILE: &str = "containers-port";
/// The port that containers know is tried for two seconds, in which a process that is about to end ends.
const PORT_TRIES: u32 = 20;
const PORT_PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn run(config: Config, server: String, join_token_file: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&config.data_dir)
        .with_context(|| format!("cannot create {}", config.data_dir.display()))?;
    let _lock = serve::lock(&config.data_dir)?;
    if config.database().exists() {
        bail!(
            "{} is a server's data directory; a worker needs one of its own",
            config.data_dir.display()
        );
    }
    let join_token = read_join_token(join_token_file)?;
    let worker_id = worker_id(&config.data_dir.join(WORKER_ID_FILE))?;

    let runtimes = Runtimes::open(&config).await?;
    let network = runtimes.network();
    let listener = listen_for_containers(&config.data_dir, network.map(Network::gateway)).await?;
    if let Some(network) = network {
        network.allow_host_port(listener.local_addr()?.port()).await?;
    }
    let containers_url = format!("http://{}", listener.local_addr()?);

    let layers = LayerStore::open(config.images_dir()).context("cannot open the layer store")?;
    let cache_limit = u64::from(config.content_cache_gib) * GIB;
    let cache = ContentCache::open(config.data_dir.join("content"), cache_limit, &server, &join_token)
        .context("cannot open the cache of content")?;
    let content = platform::Content {
        files: cache.files(),
        fetch: cache.fetcher(),
    };
    let setup = platform::worker(&config, &runtimes, layers.clone(), content).await?;
    let builder = setup.builder.clone();
    let (link, ends) = Link::new(LinkConfig {
        server,
        join_token,
        worker_id,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        capacity: serve::capacity(&config, runtimes.kinds()),
        layers: layers.keys().context("cannot list the layers")?,
        containers_url,
    })?;
    let LinkEnds {
        desired,
        reports,
        logs,
        containers_address,
    } = ends;
    let worker = setup.worker(logs)?;
    let found = worker.found_containers();
    tracing::info!(worker = %worker_id, containers = found.len(), "the worker starts");
    let leave = worker.leave_token();
    let cancel = CancellationToken::new();
    let forwarding = tokio::spawn(Forwarder::new(listener, containers_address).run(cancel.clone()));
    let mut working = tokio::spawn(Worker::run(worker, desired, reports, CancellationToken::new()));
    let build = Arc::new(move |order: ionian_worker::BuildOrder, lines, cancel| {
        let (cache, builder) = (cache.clone(), builder.clone());
        let future = async move {
            let digests = order.request.context.iter().map(|file| file.sha256_hex.clone());
            cache.fetch(digests.collect()).await.map_err(|error| BuildFailure {
                by_user: false,
                message: format!("{:#}", anyhow::Error::new(error)),
            })?;
            builder.build_for_client(order, lines, cancel).await
        };
        Box::pin(future) as futures_util::future::BoxFuture<'static, _>
    });
    let mut linked = tokio::spawn(link.run(found, build, cancel.clone()));

    let result = tokio::select! {
        () = serve::interrupted()? => Ok(()),
        ended = &mut linked => match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(anyhow::Error::new(error)),
            Err(error) => Err(anyhow::Error::new(error).context("the connection to the server crashed")),
        },
        ended = &mut working => Err(match ended {
            Ok(()) => anyhow::anyhow!("the worker ended by itself"),
            Err(error) => anyhow::Error::new(error).context("the worker crashed"),
        }),
    };
    tracing::info!("the worker ends; its containers go on");
    leave.cancel();
    if !working.is_finished() {
        working.await.context("the worker crashed")?;
    }
    cancel.cancel();
    forwarding.await.context("the containers' listener crashed")?;
    runtimes.detach().await?;
    result
}

fn read_join_token(path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {}; `ionian token new --worker` makes a join token",
            path.display()
        )
    })?;
    let mode = fs::metadata(path)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!(
            "{} can be read by others (mode {mode:o}); run: chmod 600 {}",
            path.display(),
            path.display()
        );
    }
    let token = text.trim();
    if token.is_empty() || token.contains(char::is_whitespace) {
        bail!("{} does not hold one join token", path.display());
    }
    Ok(token.to_owned())
}

/// Drawn once.
fn worker_id(path: &Path) -> anyhow::Result<WorkerId> {
    match fs::read_to_string(path) {
        Ok(text) => text
            .trim()
            .parse()
            .with_context(|| format!("{} is damaged", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = WorkerId::generate();
            write_whole(path, &id.to_string())?;
            Ok(id)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Written aside and renamed: a crash leaves a whole file or none.
fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let aside = path.with_extension("new");
    let written = fs::File::create(&aside).and_then(|mut file| {
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()
    });
    written
        .and_then(|()| fs::rename(&aside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// On the port that running containers know, as long as nobody else has taken it.
async fn listen_for_containers(data_dir: &Path, gateway: Option<IpAddr>) -> anyhow::Result<TcpListener> {
    let ip = gateway.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let path = data_dir.join(FORWARDER_PORT_FILE);
    let known = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
    if let Some(port) = known {
        let address = SocketAddr::new(ip, port);
        for _ in 0..PORT_TRIES {
            match TcpListener::bind(address).await {
                Ok(listener) => return Ok(listener),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => tokio::time::sleep(PORT_PAUSE).await,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot listen for containers on {address}"));
                }
            }
        }
        tracing::error!(
            %address,
            "another program listens where containers reach the server; those that run already cannot, and will end"
        );
    }
    let listener = TcpListener::bind((ip, 0))
        .await
        .context("cannot listen for containers")?;
    write_whole(&path, &listener.local_addr()?.port().to_string())?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_keeps_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(WORKER_ID_FILE);
        let id = worker_id(&path).unwrap();
        assert_eq!(worker_id(&path).unwrap(), id);
        fs::write(&path, "nonsense").unwrap();
        assert!(worker_id(&path).is_err());
    }

    #[tokio::test]
    async fn containers_find_the_forwarder_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let first = listen_for_containers(dir.path(), None)
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let second = listen_for_containers(dir.path(), None).await.unwrap();
        assert_eq!(second.local_addr().unwrap(), first);
    }

    #[test]
    fn a_join_token_is_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "wj-1.2\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(read_join_token(&path).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_join_token(&path).unwrap(), "wj-1.2");
    }
}
