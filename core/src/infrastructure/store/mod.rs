//! The [`FleetStore`](crate::domain::ports::FleetStore) port: in memory for tests, embedded for one
//! replica, etcd for several.

mod embedded;
mod memory;
mod rows;

#[cfg(test)]
mod contract;
#[cfg(test)]
mod samples;

pub use embedded::EmbeddedStore;
pub use memory::{MemoryStore, SharedMemory};
