//! The agent as a whole program, and the house rules that its dependencies show.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod documents;
mod fleet;
mod layers;
mod program;
