//! What Core does: one use case a file, over the fleet's records in memory and in the store.

pub mod accounts;
pub mod audit;
pub mod callers;
pub mod desk;
pub mod direct;
pub mod enrolment;
pub mod events;
pub mod fleet;
pub mod health;
pub mod hosts;
pub mod links;
pub mod placement;
pub mod quota_check;
pub mod vms;
