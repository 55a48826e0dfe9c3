//! Tests of the scheduler, in two kinds. Scenarios tell a short story and show what was decided;
//! the simulation runs a world of clients, containers and crashes against the same code.
//!
//! Both keep a record of every write, by the rules of the store, and check the invariants after every
//! turn.

mod ids;
mod invariants;
mod journal;
mod memory;
mod record;
mod scale;
mod scenario;
mod scenarios;
mod simulation;
mod wording;
mod world;
