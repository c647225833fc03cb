//! Adapters of the ports in `ghost_domain::ports`, one module for each part of the outside world.

pub mod audit;
pub mod clock;
pub mod config;
pub mod core_link;
pub mod guest_link;
pub mod host;
pub mod identity;
pub mod images;
pub mod libvirt;
pub mod notify;
pub mod process;
pub mod simulated;
pub mod store;
pub mod telemetry;
pub mod tunnel;
pub mod vm_storage;
