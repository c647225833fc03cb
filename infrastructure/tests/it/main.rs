//! Integration tests of the adapters, in one binary.

mod hypervisor;
mod identity;
