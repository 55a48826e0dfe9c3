//! How an arriving body can fail.

use std::time::Duration;

/// The sender's side of a failed upload. Whoever turns a connection into a stream of chunks makes these.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the sender was silent for {} seconds", after.as_secs())]
    Stalled { after: Duration },
    #[error("the connection broke")]
    Broken {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
