//! What both shells fix for each of their calls.

use ghost_domain::Role;

/// Who may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody who reaches the listener, with or without an identity.
    Anyone,
    /// An identity with at least this role.
    Role(Role),
}

/// How a call ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One message each way; it has a deadline.
    Unary,
    /// A stream in at least one direction; it lasts as long as both sides want.
    Stream,
}
