//! A connection whose first bytes were read to find out what it speaks.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// How an HTTP/2 connection begins (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Enough for most request heads, so that the first request needs no second read.
const FIRST_READ: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// Gives the bytes that were read first, then the rest of the stream.
#[derive(Debug)]
pub(crate) struct Prefixed {
    first: Bytes,
    stream: TcpStream,
}

/// Reads until the protocol is known. `None` for a peer that says nothing, or nothing like HTTP.
pub(crate) async fn sniff(mut stream: TcpStream) -> Option<(Protocol, Prefixed)> {
    let mut first = bytes::BytesMut::with_capacity(FIRST_READ);
    loop {
        match stream.read_buf(&mut first).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
        // A method is a token; TLS, SSH and noise begin otherwise, or soon do. What begins like a
        // method and is none gets hyper's 400.
        if !first[0].is_ascii_alphanumeric() {
            return None;
        }
        let known = first.len().min(PREFACE.len());
        let protocol = if first[..known] != PREFACE[..known] {
            Protocol::Http1
        } else if known == PREFACE.len() {
            Protocol::Http2
        } else {
            continue; // The beginning of the preface: the rest decides.
        };
        return Some((
            protocol,
            Prefixed {
                first: first.freeze(),
                stream,
            },
        ));
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..length]);
        self.first.advance(length);
        if self.first.is_empty() {
            self.first = Bytes::new(); // Lets go of the buffer.
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
