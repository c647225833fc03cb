//! Who may speak to the agent.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{filled, optional_time, time_of};
use crate::agent::v1 as message;

/// Who the caller is to the agent, or to Core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Identity {
    /// A name for people and logs.
    pub name: String,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// How it was proved: `socket`, `certificate`, `key`, `oidc` or `core`.
    pub source: String,
    /// The credential's id; null for a peer of the socket.
    pub id: Option<String>,
    /// Who answered: `agent`, or `core` for a whole fleet; null from older agents.
    #[serde(default)]
    pub server: Option<String>,
    /// The tenant that the caller is bound to at Core; null: to none.
    #[serde(default)]
    pub tenant: Option<String>,
    /// Whether it may enter guests, where the role is enough.
    pub guest_access: bool,
}

impl From<message::Identity> for Identity {
    fn from(identity: message::Identity) -> Self {
        Self {
            name: identity.name,
            role: identity.role,
            source: identity.source,
            id: filled(identity.id),
            server: filled(identity.server),
            tenant: filled(identity.tenant),
            guest_access: identity.guest_access.unwrap_or(true),
        }
    }
}

/// A client certificate that the agent issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Certificate {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// The name that the holder gave.
    pub name: String,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// When it was first issued, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When the newest certificate of this identity ends, RFC 3339.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// When it was revoked, RFC 3339; null while it was not.
    #[schema(format = DateTime)]
    pub revoked_at: Option<String>,
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
}

impl From<message::Certificate> for Certificate {
    fn from(certificate: message::Certificate) -> Self {
        Self {
            id: certificate.id,
            name: certificate.name,
            role: certificate.role,
            created_at: time_of(certificate.created_at.as_ref()),
            expires_at: optional_time(certificate.expires_at.as_ref()),
            revoked_at: optional_time(certificate.revoked_at.as_ref()),
            guest_access: certificate.guest_access.unwrap_or(true),
        }
    }
}

/// A key for the HTTP API, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// A name for people.
    pub name: String,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// When it was made, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When it ends, RFC 3339; null: never.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// When it was revoked, RFC 3339; null while it was not.
    #[schema(format = DateTime)]
    pub revoked_at: Option<String>,
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
}

impl From<message::ApiKey> for ApiKey {
    fn from(key: message::ApiKey) -> Self {
        Self {
            id: key.id,
            name: key.name,
            role: key.role,
            created_at: time_of(key.created_at.as_ref()),
            expires_at: optional_time(key.expires_at.as_ref()),
            revoked_at: optional_time(key.revoked_at.as_ref()),
            guest_access: key.guest_access.unwrap_or(true),
        }
    }
}

/// A new key with its secret, which is shown this once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedKey {
    /// The key.
    pub key: ApiKey,
    /// What goes into `Authorization: Bearer`.
    pub secret: String,
}

impl From<message::CreatedKey> for CreatedKey {
    fn from(created: message::CreatedKey) -> Self {
        Self {
            key: created.key.unwrap_or_default().into(),
            secret: created.secret,
        }
    }
}

/// A single-use token that turns a certificate request into a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// `ghost-join-v1.<id>.<secret>.<fingerprint of the CA>`.
    pub token: String,
    /// When it ends, RFC 3339.
    #[schema(format = DateTime)]
    pub expires_at: Option<String>,
    /// The role that the certificate will have.
    pub role: String,
    /// Whether it will enter guests, where the role is enough.
    pub guest_access: bool,
}

impl From<message::JoinToken> for JoinToken {
    fn from(token: message::JoinToken) -> Self {
        Self {
            token: token.token,
            expires_at: optional_time(token.expires_at.as_ref()),
            role: token.role,
            guest_access: token.guest_access.unwrap_or(true),
        }
    }
}
