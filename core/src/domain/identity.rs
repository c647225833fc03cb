//! Tokens, people and keys. Of secrets only hashes are kept.

use std::collections::BTreeSet;

use ghost_domain::{CredentialId, HostId, Role, TenantName, Timestamp};

use super::{Labels, Quota};

/// A hash by which a machine is recognised when it enrols again.
pub type MachineHash = [u8; 32];

/// What a token makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A host.
    Host {
        /// Its tenant.
        tenant: TenantName,
        /// The labels that it begins with.
        labels: Labels,
    },
    /// A person.
    Operator {
        /// The tenant; `None`: of no tenant.
        tenant: Option<TenantName>,
        /// What it will be able to do.
        role: Role,
    },
}

impl TokenKind {
    /// The tenant of whoever joins with it; `None`: a person of no tenant.
    pub const fn tenant(&self) -> Option<&TenantName> {
        match self {
            Self::Host { tenant, .. } => Some(tenant),
            Self::Operator { tenant, .. } => tenant.as_ref(),
        }
    }

    /// The role of a person who joins with it; `None`: it is for a host.
    pub const fn role(&self) -> Option<Role> {
        match self {
            Self::Host { .. } => None,
            Self::Operator { role, .. } => Some(*role),
        }
    }
}

/// A single-use token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// The public half.
    pub id: CredentialId,
    /// SHA-256 of the secret half.
    pub secret_hash: [u8; 32],
    /// What it makes.
    pub kind: TokenKind,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// When it was used. A used one is kept until it would have ended, so that the loser of a race
    /// learns that it was used and not that it never was.
    pub used_at: Option<Timestamp>,
}

/// Where a user comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserSource {
    /// Enrolled with a token; proves itself by certificate.
    Certificate {
        /// When the newest certificate ends.
        expires_at: Timestamp,
    },
    /// Known from an OpenID Connect issuer; the role comes with each of its tokens.
    OpenIdConnect {
        /// The issuer.
        issuer: String,
        /// The subject there.
        subject: String,
    },
}

/// A person, or a program that acts like one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its id, in the certificate's alternative name.
    pub id: CredentialId,
    /// Its name.
    pub name: String,
    /// Its tenant; `None`: of no tenant.
    pub tenant: Option<TenantName>,
    /// What it may do.
    pub role: Role,
    /// Where it comes from.
    pub source: UserSource,
    /// Its own quota, over the tenant's default for users.
    pub quota: Option<Quota>,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// A key for gRPC and HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetKey {
    /// The public half.
    pub id: CredentialId,
    /// SHA-256 of the secret half, which is 256 random bits.
    pub secret_hash: [u8; 32],
    /// A name for people.
    pub name: String,
    /// The tenant that it is bound to; `None`: to none.
    pub tenant: Option<TenantName>,
    /// What it may do.
    pub role: Role,
    /// The only hosts that it may touch; `None`: all of the tenant.
    pub hosts: Option<BTreeSet<HostId>>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends. Keys of a fleet always end.
    pub expires_at: Timestamp,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}
