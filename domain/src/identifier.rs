//! Typed identifiers: a VM's id can never be passed where an operation's is wanted.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::{Error, ErrorCode};

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random identifier (UUID version 4, RFC 9562).
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// Wraps a known UUID.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID inside.
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($kind, ":{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                Uuid::parse_str(text).map(Self).map_err(|_| {
                    Error::new(
                        ErrorCode::InvalidArgument,
                        format!(concat!("{:?} is not a ", $kind, " id (a UUID is expected)"), text),
                    )
                })
            }
        }
    };
}

identifier!(
    /// Identity of a VM, also the UUID of its libvirt domain.
    VmId, "vm"
);
identifier!(
    /// Identity of an operation.
    OperationId, "operation"
);
identifier!(
    /// Identity of a certificate, key or join token that we issued.
    CredentialId, "credential"
);
identifier!(
    /// Identity of a host in a fleet.
    HostId, "host"
);
identifier!(
    /// Identity of a command that Core queued for a host.
    CommandId, "command"
);

/// The caller's idempotency key: the same key with the same request returns the same operation.
/// 1 to 128 printable ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// Checks and wraps a caller's key.
    ///
    /// # Errors
    /// [`ErrorCode::InvalidArgument`] when it is empty, longer than 128 bytes or not printable ASCII.
    pub fn new(text: impl Into<String>) -> Result<Self, Error> {
        let text = text.into();
        if text.is_empty() || text.len() > 128 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "a request id is 1 to 128 printable ASCII characters without spaces",
            ));
        }
        Ok(Self(text))
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
