//! Whole-system tests: real agents, the real command line, real libvirt and real QEMU guests. Each
//! ends with the auditor.

#![expect(
    clippy::unwrap_used,
    reason = "tests fail by panicking; clippy's exception covers #[test] functions but not their helpers"
)]

mod auditing;
