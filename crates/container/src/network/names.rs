//! A relay for questions about names, where the host's name servers are on its loopback or on IPv6.
//!
//! Containers have a loopback of their own and no IPv6, so a local stub (systemd-resolved's 127.0.0.53, dnsmasq,
//! unbound) is out of their reach, and a host may have nothing else. They ask the gateway address then, and their
//! messages go to the host's servers as they are; nothing is read or kept. The firewall lets containers whose
//! outside is limited not ask.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::resolver;

const PORT: u16 = 53;
/// The largest datagram that resolvers ask for; larger answers come over TCP.
const MAX_DATAGRAM: usize = 4096;
/// Questions under way at once. Beyond it they are dropped, and resolvers ask again after some seconds.
const MAX_QUESTIONS: usize = 512;
const MAX_CONNECTIONS: usize = 64;
/// For one server; resolvers give up after 5 s themselves.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// A connection is for one question or a few in a row.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// After a socket's error, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// Of a message: its number, flags and counts.
const HEADER_BYTES: usize = 12;

/// Serves until dropped.
#[derive(Debug)]
pub(super) struct NameRelay {
    tasks: [AbortHandle; 2],
}

impl NameRelay {
    pub(super) async fn start(gateway: Ipv4Addr, configured: Vec<IpAddr>) -> io::Result<Self> {
        Self::start_on(
            SocketAddr::from((gateway, PORT)),
            Arc::new(move || resolver::resolv_conf(&configured).relayed),
        )
        .await
    }

    /// The servers are asked for at each question: a laptop's change with its network.
    async fn start_on(
        address: SocketAddr,
        servers: Arc<dyn Fn() -> Vec<SocketAddr> + Send + Sync>,
    ) -> io::Result<Self> {
        let datagrams = Arc::new(UdpSocket::bind(address).await?);
        let connections = TcpListener::bind(datagrams.local_addr()?).await?;
        Ok(Self {
            tasks: [
                tokio::spawn(serve_datagrams(datagrams, Arc::clone(&servers))).abort_handle(),
                tokio::spawn(serve_connections(connections, servers)).abort_handle(),
            ],
        })
    }
}

impl Drop for NameRelay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn serve_datagrams(socket: Arc<UdpSocket>, servers: Arc<dyn Fn() -> Vec<SocketAddr> + Send + Sync>) {
    let permits = Arc::new(Semaphore::new(MAX_QUESTIONS));
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let Ok((length, sender)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            continue;
        };
        if length < HEADER_BYTES {
            continue;
        }
        let (socket, servers, question) = (Arc::clone(&socket), Arc::clone(&servers), buffer[..length].to_vec());
        tokio::spawn(async move {
            let _permit = permit;
            for server in servers() {
                let asked = tokio::time::timeout(ANSWER_TIMEOUT, ask(server, &question)).await;
                if let Ok(Ok(answer)) = asked {
                    let _sent = socket.send_to(&answer, sender).await;
                    return;
                }
            }
        });
    }
}

async fn ask(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A port of its own for each question, drawn by the kernel, from this server alone.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut answer).await?;
        if length >= HEADER_BYTES && answer[..2] == question[..2] {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn serve_connections(listener: TcpListener, servers: Arc<dyn Fn() -> Vec<SocketAddr> + Send + Sync>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((mut inside, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            continue;
        };
        let servers = Arc::clone(&servers);
        tokio::spawn(async move {
            let _permit = permit;
            let carried = async {
                for server in servers() {
                    if let Ok(Ok(mut outside)) = tokio::time::timeout(ANSWER_TIMEOUT, TcpStream::connect(server)).await
                    {
                        let _copied = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
                        return;
                    }
                }
            };
            let _ended = tokio::time::timeout(CONNECTION_TIMEOUT, carried).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn questions_reach_the_next_server_when_one_is_silent() {
        // On IPv6, as the servers of some hosts.
        let server = UdpSocket::bind("[::1]:0").await.unwrap();
        let (silent, address) = ("127.0.0.1:9".parse().unwrap(), server.local_addr().unwrap());
        let tcp = TcpListener::bind(address).await.unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            let (length, sender) = server.recv_from(&mut buffer).await.unwrap();
            // Somebody's answer to something else comes first.
            server.send_to(&[9; 20], sender).await.unwrap();
            buffer[2] = 0x80;
            server.send_to(&buffer[..length], sender).await.unwrap();
        });
        tokio::spawn(async move {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut buffer = [0; 4];
            stream.read_exact(&mut buffer).await.unwrap();
            stream.write_all(&buffer).await.unwrap();
        });
        let relay = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let _relay = NameRelay::start_on(relay, Arc::new(move || vec![silent, address]))
            .await
            .unwrap();

        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(relay).await.unwrap();
        let question = [7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1];
        client.send(&question).await.unwrap();
        let mut answer = [0; 64];
        let length = tokio::time::timeout(LIMIT, client.recv(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((length, answer[2]), (question.len(), 0x80));
        assert_eq!(answer[3..length], question[3..]);

        let mut stream = TcpStream::connect(relay).await.unwrap();
        stream.write_all(b"abcd").await.unwrap();
        let mut echoed = [0; 4];
        tokio::time::timeout(LIMIT, stream.read_exact(&mut echoed))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&echoed, b"abcd");
    }
}
