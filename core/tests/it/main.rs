//! Core from outside: one binary for all integration tests.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    reason = "a test that cannot go on has failed; clippy's exception covers #[test] functions but not their helpers"
)]

mod agent;
mod batwa;
mod direct;
mod events;
mod front;
mod fuzzed;
mod http;
mod links;
mod listing;
mod matrix;
mod program;
mod route;
mod weight;
mod world;
