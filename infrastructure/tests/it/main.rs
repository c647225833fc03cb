//! Integration tests of the adapters, in one binary.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and what is skipped is printed; clippy's exception covers #[test] functions but not their helpers"
)]

mod audit;
mod guest_link;
mod hypervisor;
mod identity;
mod images;
mod store;
mod vm_storage;
