//! Handlers of what the official runtime asks for from inside containers, one file per noun.

pub(crate) mod announce;
pub(crate) mod data;
pub(crate) mod inputs;
pub(crate) mod lifecycle;
