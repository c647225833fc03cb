//! The hypervisor port: one contract, run against every adapter, and what is special to each.

mod contract;
mod libvirt;
mod networks;
mod simulated;
mod support;
