//! The ingress from the outside: real sockets, apps made of hyper, and channels in place of control.

mod channel;
mod proxying;
mod routing;
mod support;
mod waiting;
