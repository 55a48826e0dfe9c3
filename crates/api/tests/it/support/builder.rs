//! A builder that builds nothing. What a definition's first command says decides what happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ionian_control::app::images::BuildLine;
use ionian_control::{BuildFailure, BuildFn, BuildJob};
use ionian_domain::Timestamp;
use ionian_domain::image::{BuiltImage, ImageMetadata};
use ionian_domain::log::LogStream;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

#[derive(Default)]
pub(crate) struct Builder {
    pub builds: AtomicU32,
    pub jobs: Mutex<Vec<BuildJob>>,
    /// Lets builds go on that wait (`RUN wait`).
    pub go_on: Notify,
}

impl Builder {
    pub(crate) fn build_fn(self: &Arc<Self>) -> BuildFn {
        let builder = Arc::clone(self);
        Arc::new(move |job, lines, _cancel| {
            let builder = Arc::clone(&builder);
            Box::pin(async move { builder.build(job, lines).await })
        })
    }

    pub(crate) fn count(&self) -> u32 {
        self.builds.load(Ordering::SeqCst)
    }

    async fn build(&self, job: BuildJob, lines: mpsc::Sender<BuildLine>) -> Result<BuiltImage, BuildFailure> {
        self.builds.fetch_add(1, Ordering::SeqCst);
        self.jobs.lock().push(job.clone());
        let say = |text: &str| {
            let line = BuildLine {
                at: Timestamp::now(),
                stream: LogStream::Stdout,
                text: format!("{text}\n"),
            };
            async { lines.send(line).await.unwrap() }
        };
        let commands = job.spec.dockerfile_commands.join("\n");
        say("=> step 1").await;
        if commands.contains("RUN wait") {
            self.go_on.notified().await;
        }
        assert!(!commands.contains("RUN crash"), "the builder crashes");
        say("=> step 2").await;
        if commands.contains("RUN fail") {
            let message = "the command 'fail' exited with code 1".to_owned();
            return Err(BuildFailure { by_user: true, message });
        }
        let metadata = ImageMetadata {
            python_version_info: Some("Python 3.11.2".to_owned()),
            ..ImageMetadata::default()
        };
        Ok(BuiltImage {
            layers: vec!["layer".to_owned()],
            metadata,
            ..BuiltImage::default()
        })
    }
}
