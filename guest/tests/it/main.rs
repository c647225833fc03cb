//! The agent over a socket, as the host sees it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "the helpers of tests fail by panicking, and say what is skipped"
)]

mod exec;
mod files;
mod fuzz;
mod host;
mod program;
mod session;
mod system;
mod vm;
