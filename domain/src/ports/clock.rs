//! The clock, so that tests can turn it.

use crate::{Monotonic, Timestamp};

/// Tells the time.
#[cfg_attr(feature = "mocks", mockall::automock)]
pub trait Clock: Send + Sync {
    /// The wall clock, for stamps.
    fn now(&self) -> Timestamp;
    /// The monotonic clock, for ages and deadlines.
    fn monotonic(&self) -> Monotonic;
}
