//! The [`FleetStore`](crate::domain::ports::FleetStore) port: in memory for tests, embedded for one
//! replica, etcd for several.

mod embedded;
mod etcd;
mod memory;
mod rows;

#[cfg(test)]
mod contract;
#[cfg(test)]
mod samples;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdOptions, EtcdStore, EtcdTls};
pub use memory::{MemoryStore, SharedMemory};

/// A host's word with so many VMs.
#[cfg(test)]
pub(crate) fn sample_inventory(vms: u128) -> crate::domain::Inventory {
    samples::inventory(vms)
}
