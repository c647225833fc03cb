//! Whole-system tests: real agents, the real command line, real libvirt and real QEMU guests. Each
//! ends with the auditor.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and say what they did; clippy's exception covers #[test] functions but not their helpers"
)]

mod agent_life;
mod auditing;
mod bad_input;
mod batwa;
mod collector;
mod crash_points;
mod crash_random;
mod debian;
mod direct;
mod fleet;
mod fleet_evil;
mod fleet_identity;
mod fleet_time;
mod fleet_ways;
mod frozen;
mod honesty;
mod hostile;
mod inside;
mod life;
mod packages;
mod pull;
mod random;
mod remote;
mod replicas;
mod replicas_partition;
mod support;
mod swarm;
mod taken_core;
mod terminal;
