//! Control's build jobs, run by the worker's builder.

use std::sync::Arc;

use ionian_control::app::images::BuildLine;
use ionian_control::{BuildFailure, BuildFn, BuildJob};
use ionian_domain::Timestamp;
use ionian_domain::image::BuiltImage;
use ionian_domain::log::LogStream;
use ionian_image::base::RegistryCredentials;
use ionian_image::{BuildRequest, ContextEntry};
use ionian_worker::Builder;
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
    let client_version = job.client_version.clone();
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
    let (result, ()) = tokio::join!(builder.build(request, sender, cancel), forward);
    let image = result.map_err(|error| BuildFailure {
        by_user: error.is_user_fault(),
        message: text_of(&error),
    })?;
    if image.metadata.python_version_info.is_some()
        && let Err(error) = builder.prepare_client(&client_version, &image).await
    {
        // Not the image's fault, and the first start tries again and then fails with this very reason.
        let text = format!(
            "the client {client_version} could not be prepared for this image: {}\n",
            text_of(&error)
        );
        let _closed = lines
            .send(BuildLine {
                at: Timestamp::now(),
                stream: LogStream::Info,
                text,
            })
            .await;
    }
    Ok(image)
}

/// An error with its causes, in one line.
fn text_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
