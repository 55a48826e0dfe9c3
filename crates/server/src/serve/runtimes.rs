//! The runtimes of this host's worker: the one that the operator chose, and those beside it.

use std::sync::Arc;

use anyhow::{Context, bail};
use ionian_container::network::Network;
use ionian_container::{GvisorRuntime, OpenError, ProcessRuntime, RuncRuntime, Runtime};
use ionian_domain::container::{RuntimeKind, RuntimeKinds};

use crate::config::Config;
use crate::serve::container_config;

/// They share directory, network and names, so any of them stands for all where these are taken down.
pub(crate) struct Runtimes {
    /// For containers.
    pub offered: Vec<Arc<dyn Runtime>>,
    /// For steps of image builds.
    pub builds: Arc<dyn Runtime>,
}

impl Runtimes {
    /// Also finds the containers that an earlier process left.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Self> {
        match config.runtime {
            RuntimeKind::Process => {
                tracing::warn!("the process runtime isolates nothing: run only code that you trust");
                let process: Arc<dyn Runtime> = Arc::new(ProcessRuntime::new());
                Ok(Self {
                    offered: vec![Arc::clone(&process)],
                    builds: process,
                })
            }
            RuntimeKind::Runc => Self::open_runc(config).await,
            RuntimeKind::Gvisor => Self::open_gvisor(config).await,
        }
    }

    /// With gVisor for the functions that ask for it, where it is installed.
    async fn open_runc(config: &Config) -> anyhow::Result<Self> {
        let runc = runc(config).await?;
        let gvisor = match GvisorRuntime::beside(&runc).await {
            Ok(gvisor) => Some(Arc::new(gvisor) as Arc<dyn Runtime>),
            Err(OpenError::ProgramMissing { .. }) => None,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "gVisor cannot be used; functions that ask for it are refused"
                );
                None
            }
        };
        let runc: Arc<dyn Runtime> = Arc::new(runc);
        let builds = match (config.build_runtime, &gvisor) {
            (None | Some(RuntimeKind::Runc | RuntimeKind::Process), _) => Arc::clone(&runc),
            (Some(RuntimeKind::Gvisor), Some(gvisor)) => Arc::clone(gvisor),
            (Some(RuntimeKind::Gvisor), None) => {
                bail!("builds are to run on gvisor, which cannot be used; `ionian doctor` tells what is missing")
            }
        };
        Ok(Self {
            offered: [Some(runc), gvisor].into_iter().flatten().collect(),
            builds,
        })
    }

    /// With runc only where the operator wants it.
    async fn open_gvisor(config: &Config) -> anyhow::Result<Self> {
        const FAILED: &str = "cannot use the gvisor runtime; `ionian doctor` tells what is missing";
        let builds_on_runc = config.build_runtime == Some(RuntimeKind::Runc);
        if !config.allow_weaker_runtime && !builds_on_runc {
            let gvisor: Arc<dyn Runtime> =
                Arc::new(GvisorRuntime::open(container_config(config)).await.context(FAILED)?);
            return Ok(Self {
                offered: vec![Arc::clone(&gvisor)],
                builds: gvisor,
            });
        }
        let runc = runc(config).await?;
        let gvisor: Arc<dyn Runtime> = Arc::new(GvisorRuntime::beside(&runc).await.context(FAILED)?);
        let runc: Arc<dyn Runtime> = Arc::new(runc);
        let mut offered = vec![Arc::clone(&gvisor)];
        if config.allow_weaker_runtime {
            tracing::warn!("functions that ask for runc get it: their code runs on the host's kernel");
            offered.push(Arc::clone(&runc));
        }
        if builds_on_runc {
            tracing::warn!("image builds run on runc: their commands run on the host's kernel, and not in gVisor");
        }
        let builds = if builds_on_runc { runc } else { gvisor };
        Ok(Self { offered, builds })
    }

    pub(crate) fn kinds(&self) -> RuntimeKinds {
        self.offered.iter().map(|runtime| runtime.kind()).collect()
    }

    pub(crate) fn network(&self) -> Option<&Network> {
        self.builds.network()
    }

    /// The last step of a clean shutdown.
    pub(crate) async fn remove_all(&self) -> anyhow::Result<()> {
        self.builds
            .remove_all()
            .await
            .context("cannot remove the containers' network")
    }

    /// The last step where another process goes on with the containers.
    pub(crate) async fn detach(&self) -> anyhow::Result<()> {
        self.builds
            .detach()
            .await
            .context("cannot let go of the containers' network")
    }
}

async fn runc(config: &Config) -> anyhow::Result<RuncRuntime> {
    RuncRuntime::open(container_config(config))
        .await
        .context("cannot use the runc runtime; `ionian doctor` tells what is missing")
}
