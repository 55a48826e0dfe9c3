//! Handlers of what developers' clients (and code in containers) ask for, one file per noun.

pub(crate) mod apps;
pub(crate) mod blobs;
pub(crate) mod calls;
pub(crate) mod environments;
pub(crate) mod functions;
pub(crate) mod images;
pub(crate) mod logs;
pub(crate) mod mounts;
pub(crate) mod secrets;
pub(crate) mod tasks;
pub(crate) mod workspace;
