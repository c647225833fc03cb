//! Who may do what: roles, principals, and the credentials that we issue.

use std::fmt;
use std::str::FromStr;

use crate::{CredentialId, Error, ErrorCode, Timestamp};

/// What an identity may do. Each role may do all that the ones before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Read everything but secrets and consoles.
    Viewer,
    /// Create, run and delete VMs and images, attach to consoles, enter guests.
    Operator,
    /// Issue and revoke credentials, close all ways into guests, read the audit log.
    Admin,
}

impl Role {
    /// `viewer`, `operator` or `admin`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "viewer" => Ok(Self::Viewer),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("{text:?} is not a role"),
            )
            .because("viewer, operator and admin are the roles")),
        }
    }
}

/// How a principal proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrincipalSource {
    /// Peer credentials of the local Unix socket.
    Socket {
        /// The peer's user id.
        uid: u32,
    },
    /// A client certificate of our CA.
    Certificate {
        /// The credential that the certificate's serial number names.
        credential: CredentialId,
    },
    /// An HTTP key.
    Key {
        /// Which key.
        credential: CredentialId,
    },
    /// Somebody whom Core vouches for, as far as the host's owner lets Core.
    Core {
        /// The tenant of whoever calls; `None` for Core's own administrators.
        tenant: Option<crate::TenantName>,
    },
    /// The agent itself: autostart, crash restart, reconciliation.
    Agent,
}

/// Somebody who makes a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// A name for logs and records.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// How we know.
    pub source: PrincipalSource,
}

impl Principal {
    /// The agent acting by itself.
    pub fn agent() -> Self {
        Self {
            name: "ghost-agent".into(),
            role: Role::Admin,
            source: PrincipalSource::Agent,
        }
    }

    /// Checks that this principal has at least `role`.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`] saying which role is needed.
    pub fn require(&self, role: Role) -> Result<(), Error> {
        if self.role >= role {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::PermissionDenied,
            format!(
                "{} has the role {}, and this needs {role}",
                self.name, self.role
            ),
        )
        .hint(format!(
            "ask the host's owner for a token: ghostctl trust token --role {role}"
        )))
    }
}

/// A secret in memory. Its `Debug` shows nothing, so that it cannot slip into a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself; call it only where it leaves us on purpose.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// A single-use token that turns a certificate request into a certificate. Only its hash is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// Its id, the public half of the token.
    pub id: CredentialId,
    /// SHA-256 of the secret half.
    pub secret_hash: [u8; 32],
    /// The role that the certificate will have.
    pub role: Role,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends, ten minutes later.
    pub expires_at: Timestamp,
}

/// A client identity that we issued; its certificates are renewed under the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its id, in the certificate's subject alternative name.
    pub id: CredentialId,
    /// The name that the holder gave.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// When it was first issued.
    pub created_at: Timestamp,
    /// When the newest certificate ends.
    pub expires_at: Timestamp,
    /// When it was revoked, if it was.
    pub revoked_at: Option<Timestamp>,
}

/// A key for the HTTP API. Only its hash is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id, the public half of the key.
    pub id: CredentialId,
    /// A name for people.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// SHA-256 of the secret half, which is 256 random bits: no slow hash is needed.
    pub secret_hash: [u8; 32],
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends; `None` for a key without end.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked, if it was.
    pub revoked_at: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_include_the_lower_ones() {
        let mut principal = Principal::agent();
        for (has, needs, allowed) in [
            (Role::Viewer, Role::Viewer, true),
            (Role::Viewer, Role::Operator, false),
            (Role::Operator, Role::Admin, false),
            (Role::Admin, Role::Viewer, true),
        ] {
            principal.role = has;
            assert_eq!(
                principal.require(needs).is_ok(),
                allowed,
                "{has} for {needs}"
            );
        }
    }

    #[test]
    fn a_secret_does_not_print() {
        assert!(!format!("{:?}", Secret::new("hunter2")).contains("hunter2"));
    }
}
