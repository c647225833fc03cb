//! The [`FleetStore`](crate::domain::ports::FleetStore) port: in memory for tests, embedded for one
//! replica, etcd for several.

mod memory;

pub use memory::{MemoryStore, SharedMemory};
