//! The hypervisor port: one contract, run against every adapter, and what is special to each.

mod contract;
mod guests;
mod libvirt;
mod loss;
mod networks;
mod proxy;
mod simulated;
mod support;
