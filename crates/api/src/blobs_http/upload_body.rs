//! A request's body as a stream that cannot stall for ever.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{BoxStream, Stream};
use futures_util::{StreamExt, stream};
use http::StatusCode;
use ionian_blobs::BodyError;

use super::refusal::Refusal;

/// After a refusal this much of the rest is read and thrown away, for at most this long: one part at the
/// speed of a local network. A client that has more to say sees its connection closed.
const DRAIN_LIMIT_BYTES: usize = 64 * 1024 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// Ends with an error when the sender is silent for too long, or its connection breaks.
pub(super) struct UploadBody {
    chunks: BoxStream<'static, Result<Bytes, BodyError>>,
}

impl UploadBody {
    pub(super) fn new(body: Body, idle_limit: Duration) -> Self {
        let chunks = stream::unfold(
            Some(body.into_data_stream()),
            move |source: Option<BodyDataStream>| async move {
                let mut source = source?;
                match tokio::time::timeout(idle_limit, source.next()).await {
                    Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(source))),
                    Ok(Some(Err(error))) => Some((Err(BodyError::Broken { source: error.into() }), None)),
                    Ok(None) => None,
                    Err(_elapsed) => Some((Err(BodyError::Stalled { after: idle_limit }), None)),
                }
            },
        );
        // Fused, since a refused body is drained wherever it stood.
        Self {
            chunks: chunks.fuse().boxed(),
        }
    }

    /// Reads a small body as a whole.
    pub(super) async fn read_all(mut self, limit_bytes: usize) -> Result<Bytes, Refusal> {
        let mut all = BytesMut::new();
        while let Some(chunk) = self.chunks.next().await {
            let chunk = chunk.map_err(|error| Refusal::body(&error))?;
            if all.len() + chunk.len() > limit_bytes {
                self.drain().await;
                let sentence = format!("the request is longer than {limit_bytes} bytes");
                return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, sentence));
            }
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }

    /// Reads what is left, within limits, so that the client gets to reading its answer.
    pub(super) async fn drain(mut self) {
        let drained = async {
            let mut drained = 0;
            while let Some(Ok(chunk)) = self.chunks.next().await {
                drained += chunk.len();
                if drained > DRAIN_LIMIT_BYTES {
                    break;
                }
            }
        };
        if tokio::time::timeout(DRAIN_LIMIT, drained).await.is_err() {
            tracing::debug!("a client kept sending after its upload was refused");
        }
    }
}

impl Stream for UploadBody {
    type Item = Result<Bytes, BodyError>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.chunks.poll_next_unpin(context)
    }
}
