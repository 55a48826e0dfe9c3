//! The ingress from the outside: real sockets, apps made of hyper, and channels in place of control.

#![expect(clippy::unwrap_used, reason = "what a test is built from fails the test")]

mod channel;
mod proxying;
mod routing;
mod support;
mod waiting;
mod websockets;
