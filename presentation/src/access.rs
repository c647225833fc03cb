//! What both shells fix for each of their calls.

use std::time::Duration;

use ghost_domain::{Principal, Result, Role};

/// Who may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody who reaches the listener, with or without an identity.
    Anyone,
    /// An identity with at least this role.
    Role(Role),
    /// An operator whose credential lets it into guests.
    Guests,
}

impl Access {
    /// The least role that a caller needs.
    pub const fn least_role(self) -> Role {
        match self {
            Self::Anyone => Role::Viewer,
            Self::Role(role) => role,
            Self::Guests => Role::Operator,
        }
    }

    /// Whether `principal` may make the call.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub fn check(self, principal: &Principal) -> Result<()> {
        match self {
            Self::Anyone => Ok(()),
            Self::Role(role) => principal.require(role),
            Self::Guests => principal.require_guest_access(),
        }
    }
}

/// How a call ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One message each way; it has a deadline, the shell's own.
    Unary,
    /// The same with a deadline of its own, for what takes longer.
    Long(Duration),
    /// A stream in at least one direction; it lasts as long as both sides want.
    Stream,
}

impl Shape {
    /// How long a call may take where the shell's own deadline is `usual`.
    pub fn deadline(self, usual: Duration) -> Option<Duration> {
        match self {
            Self::Unary => Some(usual),
            Self::Long(time) => Some(time),
            Self::Stream => None,
        }
    }

    /// Whether it is a stream.
    pub const fn is_stream(self) -> bool {
        matches!(self, Self::Stream)
    }
}

/// A short request to a guest: its link waits ten seconds for an answer and thirty where programs
/// of the guest have a part in it, after at most twenty for an update to come to its end.
pub(crate) const GUEST: Shape = Shape::Long(Duration::from_secs(60));
/// Freezing and thawing, with all the hooks of the guest's owner: the link gives them five minutes.
pub(crate) const HOOKS: Shape = Shape::Long(Duration::from_secs(360));
/// A new agent in a guest: the transfer over a slow channel, then a minute to say hello.
pub(crate) const UPDATE: Shape = Shape::Long(Duration::from_secs(300));
/// Reading the whole audit log: a gigabyte and a slow disk.
pub(crate) const WHOLE_LOG: Shape = Shape::Long(Duration::from_secs(600));
