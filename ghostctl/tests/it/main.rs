//! The real binary against an agent in this process that does as it is told: what every command
//! prints, and the exit code that it ends in.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may; clippy's exception for tests does not see the helpers of this crate"
)]

mod changes;
mod console;
mod contexts;
mod cp;
mod errors;
mod fake;
mod fleet;
mod guest;
mod output;
mod run;
mod shell;
mod telemetry;
mod traces;
