//! Waiting for a descriptor on the async runtime.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Takes the descriptor, so that it stays open and the same while it is registered.
pub(crate) fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: `OwnedFd` yields one descriptor for its whole life, owns it exclusively and closes it only when
    // dropped. `AsyncFd` owns the `OwnedFd`, hands out no way to replace it (no caller asks for `get_mut`), and
    // deregisters it before dropping it.
    #[expect(unsafe_code, reason = "tokio cannot know that an owned descriptor stays the same")]
    unsafe {
        AsyncFd::register(descriptor).map_err(Into::into)
    }
}
