//! Tests of the whole application over a world of fakes that keep real state, survive a crash of
//! the application, and can be audited.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on must end"
)]

mod crash;
mod credentials;
mod fleet;
mod guest;
mod images;
mod lifecycle;
mod operations;
mod supervision;
mod world;
