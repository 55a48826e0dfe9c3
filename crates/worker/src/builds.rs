//! Image builds as their callers see them: a request in, lines out, an image at the end.

use std::sync::Arc;

use ionian_domain::Timestamp;
use ionian_domain::image::BuiltImage;
use ionian_domain::log::LogStream;
use ionian_image::client_bundle::{BundleError, ClientBundles};
use ionian_image::{BuildError, BuildLog, BuildLogChunk, BuildRequest, ImageBuilder, StepRunner};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::lines::LineSplitter;
use crate::logs::PARTIAL_LINE_AFTER;

/// A piece of a build's output: usually one line with its newline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildLine {
    pub at: Timestamp,
    /// `Info` is the builder itself.
    pub stream: LogStream,
    pub text: String,
}

/// A build for a client: the image, and the client that goes under its containers.
#[derive(Debug)]
pub struct BuildOrder {
    pub request: BuildRequest,
    pub client_version: String,
}

/// Why there is no image, for the one who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildFailure {
    /// Whether the definition is at fault (a failing step, an unknown command) or the platform.
    pub by_user: bool,
    pub message: String,
}

/// Builds images on this host. Cheap to clone; builds of different callers run at the same time, and steps
/// that they share run once.
#[derive(Clone)]
pub struct Builder {
    images: ImageBuilder,
    bundles: Arc<ClientBundles>,
    steps: Arc<dyn StepRunner>,
}

impl Builder {
    pub fn new(images: ImageBuilder, bundles: Arc<ClientBundles>, steps: Arc<dyn StepRunner>) -> Self {
        Self { images, bundles, steps }
    }

    /// All lines have been sent by the time this returns. A receiver that is gone stops the log and not the
    /// build; a slow one slows it.
    pub async fn build(
        &self,
        request: BuildRequest,
        lines: mpsc::Sender<BuildLine>,
        cancel: CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        let (log, chunks) = BuildLog::channel();
        let (result, ()) = tokio::join!(self.images.build(request, log, cancel), forward(chunks, lines));
        result
    }

    /// Builds an image and fetches the client for it, which its first container would otherwise wait for.
    pub async fn build_for_client(
        &self,
        order: BuildOrder,
        lines: mpsc::Sender<BuildLine>,
        cancel: CancellationToken,
    ) -> Result<BuiltImage, BuildFailure> {
        let result = self.build(order.request, lines.clone(), cancel).await;
        let image = result.map_err(|error| BuildFailure {
            by_user: error.is_user_fault(),
            message: crate::chain(&error),
        })?;
        if image.metadata.python_version_info.is_some()
            && let Err(error) = self.prepare_client(&order.client_version, &image).await
        {
            // Not the image's fault, and the first start tries again and then fails with this very reason.
            let text = format!(
                "the client {} could not be prepared for this image: {}\n",
                order.client_version,
                crate::chain(&error)
            );
            // A reader that is gone misses a line.
            drop(
                lines
                    .send(BuildLine {
                        at: Timestamp::now(),
                        stream: LogStream::Info,
                        text,
                    })
                    .await,
            );
        }
        Ok(image)
    }

    /// Whether every layer of an image is on this host's disk.
    pub fn is_present(&self, image: &BuiltImage) -> bool {
        image.layers.iter().all(|key| self.images.layers().contains(key))
    }

    /// Fetches the client for an image ahead of its first container, which otherwise waits for it.
    pub async fn prepare_client(&self, client_version: &str, image: &BuiltImage) -> Result<(), BundleError> {
        let (layers, steps, log) = (self.images.layers(), self.steps.as_ref(), BuildLog::discard());
        self.bundles
            .ensure(client_version, image, layers, steps, &log)
            .await
            .map(|_| ())
    }
}

/// Cuts chunks into lines, each stream on its own, and shows the start of a line that takes long.
async fn forward(mut chunks: mpsc::Receiver<BuildLogChunk>, lines: mpsc::Sender<BuildLine>) {
    let streams = [LogStream::Info, LogStream::Stdout, LogStream::Stderr];
    let mut splitters = streams.map(|stream| (stream, LineSplitter::default()));
    loop {
        let waiting = splitters.iter().any(|(_, splitter)| splitter.has_partial());
        let received = tokio::select! {
            received = chunks.recv() => Some(received),
            () = tokio::time::sleep(PARTIAL_LINE_AFTER), if waiting => None,
        };
        let mut ready = Vec::new();
        let is_end = matches!(received, Some(None));
        match received {
            Some(Some(chunk)) => {
                let stream = domain_stream(chunk.stream);
                for (_, splitter) in splitters.iter_mut().filter(|(known, _)| *known == stream) {
                    splitter.push(&chunk.bytes, |text| ready.push((stream, text)));
                }
            }
            Some(None) => {
                ready.extend(
                    splitters
                        .iter_mut()
                        .filter_map(|(stream, lines)| Some((*stream, lines.finish()?))),
                );
            }
            None => {
                ready.extend(
                    splitters
                        .iter_mut()
                        .filter_map(|(stream, lines)| Some((*stream, lines.take_partial()?))),
                );
            }
        }
        for (stream, text) in ready {
            // Without a reader the rest is taken in and dropped, so that the build goes on.
            drop(
                lines
                    .send(BuildLine {
                        at: Timestamp::now(),
                        stream,
                        text,
                    })
                    .await,
            );
        }
        if is_end {
            return;
        }
    }
}

fn domain_stream(stream: ionian_image::LogStream) -> LogStream {
    match stream {
        ionian_image::LogStream::Builder => LogStream::Info,
        ionian_image::LogStream::Stdout => LogStream::Stdout,
        ionian_image::LogStream::Stderr => LogStream::Stderr,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn chunks_become_lines_of_their_stream() {
        let (log, chunks) = BuildLog::channel();
        let (tx, mut rx) = mpsc::channel(64);
        let feed = async {
            let log = log;
            log.line("Step 1/1: RUN pip").await;
            log.chunk(ionian_image::LogStream::Stdout, Bytes::from_static(b"one\ntw"))
                .await;
            log.chunk(ionian_image::LogStream::Stderr, Bytes::from_static(b"warning\n"))
                .await;
            log.chunk(ionian_image::LogStream::Stdout, Bytes::from_static(b"o\n50 %"))
                .await;
            tokio::time::sleep(PARTIAL_LINE_AFTER * 2).await;
            log.chunk(ionian_image::LogStream::Stdout, Bytes::from_static(b" 100 %"))
                .await;
        };
        tokio::join!(feed, forward(chunks, tx));
        let mut got = Vec::new();
        while let Some(line) = rx.recv().await {
            got.push(format!("{} {}", line.stream.wire(), line.text));
        }
        assert_eq!(
            got,
            [
                "3 Step 1/1: RUN pip\n",
                "1 one\n",
                "2 warning\n",
                "1 two\n",
                "1 50 %",
                "1  100 %"
            ]
        );
    }

    #[tokio::test]
    async fn a_reader_that_left_does_not_stop_the_build() {
        let (log, chunks) = BuildLog::channel();
        let (tx, rx) = mpsc::channel(1);
        drop(rx);
        let feed = async {
            let log = log;
            for _ in 0..2000 {
                log.line("x").await;
            }
        };
        tokio::join!(feed, forward(chunks, tx));
    }
}
