//! What Core does: one use case a file, over the fleet's records in memory and in the store.

pub mod fleet;
pub mod links;
