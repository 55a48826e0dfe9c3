//! Control's build jobs, run by the embedded worker's builder.

use std::sync::Arc;

use ionian_control::app::images::BuildLine;
use ionian_control::{BuildFailure, BuildFn, BuildJob};
use ionian_domain::image::BuiltImage;
use ionian_image::base::RegistryCredentials;
use ionian_image::{BuildRequest, ContextEntry};
use ionian_worker::{BuildOrder, Builder};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Lines between the builder and control's log of the build.
const LINES: usize = 256;

pub(super) fn build_fn(builder: Builder) -> BuildFn {
    Arc::new(move |job, lines, cancel| Box::pin(build(builder.clone(), job, lines, cancel)))
}

async fn build(
    builder: Builder,
    job: BuildJob,
    lines: mpsc::Sender<BuildLine>,
    cancel: CancellationToken,
) -> Result<BuiltImage, BuildFailure> {
    let request = BuildRequest {
        spec: job.spec,
        bases: job.bases,
        context: job
            .context
            .into_iter()
            .map(|file| ContextEntry {
                path: file.path,
                sha256_hex: file.sha256_hex,
                mode: file.mode,
            })
            .collect(),
        secrets: job.secrets,
        registry_auth: job
            .registry_login
            .map(|(username, password)| RegistryCredentials { username, password }),
        force: job.force,
    };
    let order = BuildOrder {
        request,
        client_version: job.client_version,
    };
    let (sender, mut receiver) = mpsc::channel::<ionian_worker::BuildLine>(LINES);
    let forward = async {
        while let Some(line) = receiver.recv().await {
            // Control keeps its end open until the build is over.
            let _closed = lines
                .send(BuildLine {
                    at: line.at,
                    stream: line.stream,
                    text: line.text,
                })
                .await;
        }
    };
    let (result, ()) = tokio::join!(builder.build_for_client(order, sender, cancel), forward);
    result.map_err(|failure| BuildFailure {
        by_user: failure.by_user,
        message: failure.message,
    })
}
