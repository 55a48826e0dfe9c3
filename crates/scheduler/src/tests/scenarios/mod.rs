//! The scenarios, by what they are about.

#![expect(
    clippy::needless_raw_string_hashes,
    reason = "`UPDATE_EXPECT=1` writes what is expected in this form"
)]

mod adoption;
mod attempts;
mod batching;
mod calls;
mod cancel;
mod failures;
mod lifecycle;
mod room;
mod scaling;
mod views;
mod web;
mod workers;
