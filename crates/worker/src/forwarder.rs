//! The containers' way to a server that is another process: a listener here, whose connections are carried there.
//!
//! It knows nothing of what it carries. While the server is away it keeps trying, so that a container sees a
//! pause and not an error.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

/// Containers hold a few connections each; beyond this new ones wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// How long a connection waits for a server that is away. A restart takes a second; an upgrade, or a machine that
/// has to look for its disks, takes longer.
const PATIENCE: Duration = Duration::from_mins(1);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// One attempt. A host that is there answers at once, also with a refusal.
const ATTEMPT: Duration = Duration::from_secs(5);
/// After the listener failed to accept: it lacks descriptors, and others may free some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

pub struct Forwarder {
    listener: TcpListener,
    /// Where connections go; `None` until it is known.
    target: watch::Receiver<Option<String>>,
    patience: Duration,
}

impl Forwarder {
    pub fn new(listener: TcpListener, target: watch::Receiver<Option<String>>) -> Self {
        Self {
            listener,
            target,
            patience: PATIENCE,
        }
    }

    /// Until cancelled; then all connections end.
    pub async fn run(self, cancel: CancellationToken) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((inside, _)) => {
                    let (target, patience) = (self.target.clone(), self.patience);
                    connections.spawn(async move {
                        carry(inside, target, patience).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a container's connection was not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn carry(mut inside: TcpStream, target: watch::Receiver<Option<String>>, patience: Duration) {
    let Some(mut outside) = reach(target, Instant::now() + patience).await else {
        tracing::warn!("a container's connection was given up: the server cannot be reached");
        return;
    };
    // Small messages back and forth: waiting for more of them helps nobody.
    for stream in [&inside, &outside] {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection keeps its delay");
        }
    }
    // How it ends is a matter between the two ends.
    if let Err(error) = copy_bidirectional(&mut inside, &mut outside).await {
        tracing::debug!(%error, "a container's connection broke");
    }
}

/// The target may change while we try: a server that restarts may listen elsewhere.
async fn reach(mut target: watch::Receiver<Option<String>>, deadline: Instant) -> Option<TcpStream> {
    loop {
        let address = timeout_at(deadline, target.wait_for(Option::is_some))
            .await
            .ok()?
            .ok()?
            .clone()?;
        match timeout(ATTEMPT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err(_)) | Err(_) if Instant::now() + PAUSE < deadline => sleep(PAUSE).await,
            Ok(Err(_)) | Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Sends back what it gets, prefixed by its name.
    async fn echo(name: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut buffer = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    stream.write_all(name.as_bytes()).await.unwrap();
                    stream.write_all(&buffer[..length]).await.unwrap();
                }
            }
        });
        address
    }

    async fn ask(stream: &mut TcpStream, text: &str, length: usize) -> String {
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn a_connection_waits_for_the_server_and_finds_it_elsewhere() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, receiver) = watch::channel(None);
        let cancel = CancellationToken::new();
        let running = tokio::spawn(Forwarder::new(listener, receiver).run(cancel.clone()));
        let mut early = TcpStream::connect(address).await.unwrap();
        early.write_all(b"hello").await.unwrap();
        // Nobody listens there any more.
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
        target.send_replace(Some(gone.local_addr().unwrap().to_string()));
        drop(gone);
        tokio::task::yield_now().await;
        target.send_replace(Some(echo("one:").await));
        let mut answer = [0; 9];
        early.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"one:hello");
        target.send_replace(Some(echo("two:").await));
        let mut late = TcpStream::connect(address).await.unwrap();
        assert_eq!(ask(&mut late, "hi", 6).await, "two:hi");
        assert_eq!(ask(&mut early, "hi", 6).await, "one:hi");
        cancel.cancel();
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_nobody_takes_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_target, receiver) = watch::channel(None);
        let mut forwarder = Forwarder::new(listener, receiver);
        forwarder.patience = Duration::from_millis(50);
        let cancel = CancellationToken::new();
        let running = tokio::spawn(forwarder.run(cancel.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        cancel.cancel();
        running.await.unwrap();
    }
}
