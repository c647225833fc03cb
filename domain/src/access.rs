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
    /// Whether it may enter guests, where its role is enough: who someone is does not say that.
    pub guest_access: bool,
}

impl Principal {
    /// The agent acting by itself.
    pub fn agent() -> Self {
        Self {
            name: "ghost-agent".into(),
            role: Role::Admin,
            source: PrincipalSource::Agent,
            guest_access: true,
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

    /// Checks that this principal may enter guests: it is an operator, and its credential was not
    /// issued without guest access.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`] saying what is missing.
    pub fn require_guest_access(&self) -> Result<(), Error> {
        self.require(Role::Operator)?;
        if self.guest_access {
            return Ok(());
        }
        if let PrincipalSource::Core { .. } = self.source {
            return Err(Error::new(
                ErrorCode::CorePermissionDenied,
                "the host's owner does not let Ghost Core do this",
            )
            .because("core.permissions is not operate_and_enter: guests may not be entered")
            .hint("the owner decides: core.permissions in /etc/ghost/agent.yaml on the host"));
        }
        Err(Error::new(
            ErrorCode::PermissionDenied,
            format!("{} may not enter guests", self.name),
        )
        .because("its credential was issued without guest access")
        .hint("ask the host's owner for one that has it"))
    }

    /// Checks that this principal may issue a credential: nobody gives what they do not have.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`] saying what is missing.
    pub fn require_issuing(&self, guest_access: bool) -> Result<(), Error> {
        self.require(Role::Admin)?;
        if self.guest_access || !guest_access {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::PermissionDenied,
            format!(
                "{} may not issue a credential that enters guests",
                self.name
            ),
        )
        .because("its own credential was issued without guest access")
        .hint("issue one without: --no-guest-access"))
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
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
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
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
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
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
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
    fn entering_guests_needs_the_role_and_the_permission() {
        let mut principal = Principal::agent();
        for (role, guest_access, enters) in [
            (Role::Viewer, true, false),
            (Role::Operator, true, true),
            (Role::Operator, false, false),
            (Role::Admin, false, false),
            (Role::Admin, true, true),
        ] {
            (principal.role, principal.guest_access) = (role, guest_access);
            let refused = principal
                .require_guest_access()
                .map_err(|error| error.code());
            assert_eq!(refused.is_ok(), enters, "{role} {guest_access}");
            assert!(enters || refused == Err(ErrorCode::PermissionDenied));
            // What one has not, one does not give.
            let admin = role == Role::Admin;
            assert_eq!(
                principal.require_issuing(true).is_ok(),
                admin && guest_access
            );
            assert_eq!(principal.require_issuing(false).is_ok(), admin);
        }
    }

    #[test]
    fn a_secret_does_not_print() {
        assert!(!format!("{:?}", Secret::new("hunter2")).contains("hunter2"));
    }
}
